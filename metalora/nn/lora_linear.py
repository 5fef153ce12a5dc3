"""A linear layer with one low-rank adapter per task."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from metalora import ops
from metalora._checks import check_choice, check_count, check_nonnegative, check_positive
from metalora._warn import warn_user
from metalora.nn.layer import TaskLayer, as_linear, new_parameter, share_parameters
from metalora.nn.task_batch import TaskBatch


class MultiTaskLoRALinear(TaskLayer):
    """y = x (W + s·B_t A_t)ᵀ + b, with s = alpha / rank and the sample's own task t (paper, eq. 6).

    ``weight`` [out, in] and ``bias`` [out] are shared by the tasks and trained with them;
    ``lora_A`` [T, rank, in] starts Kaiming-uniform per task and ``lora_B`` [T, out, rank] zero, so
    that every task starts from W.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        num_tasks: number of tasks T.
        rank: rank of the adapters; above min(in, out) it is legal, but warned about.
        alpha: scale of the adapters, s = alpha / rank; None means rank, so s = 1.
        dropout: probability to drop an input of the adapters in training, 0 <= p < 1.
        bias: whether there is a bias.
        route: how it is computed, see `metalora.ops.lora_linear`.
        keep_merged: whether the weight route keeps every task's merged weight for backward; faster
            where memory is plenty.
        device: where the parameters live.
        dtype: what they are.
        name: what error messages call the layer.

    Raises:
        ValueError: if a number is outside its range.
    """

    task_parameters = ("lora_A", "lora_B")
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        route: str = "auto",
        keep_merged: bool = False,
        device: Any = None,
        dtype: Any = None,
        name: str = "",
    ) -> None:
        super().__init__(num_tasks, name)
        check_count(type(self).__name__, "in_features", in_features)
        check_count(type(self).__name__, "out_features", out_features)
        check_count(type(self).__name__, "rank", rank)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._build(linear, rank, alpha, dropout, route, keep_merged)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_tasks: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        route: str = "auto",
        keep_merged: bool = False,
        name: str = "",
    ) -> MultiTaskLoRALinear:
        """Adapters on ``linear``, whose own Parameter objects become ``weight`` and ``bias``."""
        layer = cls.__new__(cls)
        TaskLayer.__init__(layer, num_tasks, name)
        layer._build(linear, rank, alpha, dropout, route, keep_merged)
        return layer.train(linear.training)

    def _build(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None,
        dropout: float,
        route: str,
        keep_merged: bool,
    ) -> None:
        function = type(self).__name__
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = check_count(function, "rank", rank)
        self.alpha = float(rank) if alpha is None else check_positive(function, "alpha", alpha)
        self.scaling = self.alpha / self.rank
        self.dropout = check_nonnegative(function, "dropout", dropout)
        if self.dropout >= 1:
            raise ValueError(f"{function}: dropout must be >= 0 and < 1, got {dropout}")
        self.route = check_choice(function, "route", route, ops.ROUTES)
        self.keep_merged = bool(keep_merged)
        note_rank(self._where(), rank, self.in_features, self.out_features)
        share_parameters(self, linear)
        self.lora_A = new_parameter(self.weight, self.num_tasks, rank, self.in_features)
        self.lora_B = new_parameter(self.weight, self.num_tasks, self.out_features, rank)
        self.reset_task_parameters()

    def reset_task_parameters(self) -> None:
        """Draws every A_t afresh, Kaiming-uniform, and sets every B_t to zero, as PEFT does."""
        for lora_a in self.lora_A.unbind():
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, tasks: TaskBatch | None = None) -> Tensor:
        """x [B, ..., in] → [B, ..., out].

        Args:
            x: inputs, the samples along the first dimension. It may also be [B·n, ..., in] with
                the n parts of a sample one after the other, as when a model flattens its sequences,
                or packed, see ``lengths`` of `metalora.tasks`.
            tasks: the samples' tasks; None takes those of the `metalora.tasks` context around.

        Raises:
            ValueError: if shapes do not fit or no tasks are known.
        """
        batch = self.batch_of(x, tasks)
        rows, task_ptr = self.sort_rows(x, batch)
        y = ops.lora_linear(
            rows,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            task_ptr,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            route=self.route,
            keep_merged=self.keep_merged,
        )
        return self.restore_rows(y, x, batch)

    def to_linear(self, task: int | None = None) -> nn.Linear:
        """Task t's layer, W + s·B_t A_t merged into a new weight; None gives W's own Parameter."""
        if task is None:
            return as_linear(self.weight, self.bias, self.training)
        one = slice(self.check_task(task), task + 1)
        a, b = self.lora_A.detach()[one], self.lora_B.detach()[one]
        merged = ops.merge_lora(self.weight.detach(), a, b, self.scaling)[0]
        weight = nn.Parameter(merged.to(self.weight.dtype), self.weight.requires_grad)
        return as_linear(weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, p={self.dropout:g}"


def note_rank(where: str, rank: int, in_features: int, out_features: int) -> None:
    """Warns if ``rank`` is more than the matrix can have."""
    full = min(in_features, out_features)
    if rank > full:
        warn_user(
            f"{where}: rank {rank} is above min(in={in_features}, out={out_features}) = {full}; "
            "legal, but a smaller rank would do the same"
        )
