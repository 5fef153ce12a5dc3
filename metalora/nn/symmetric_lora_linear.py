"""A square linear layer with one symmetric low-rank adapter per task."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from metalora import ops
from metalora._checks import check_choice, check_count, check_positive
from metalora.nn.layer import TaskLayer, as_linear, new_parameter, share_parameters
from metalora.nn.lora_linear import note_rank
from metalora.nn.task_batch import TaskBatch


class SymmetricLoRALinear(TaskLayer):
    """y = x (W + s·U_t U_tᵀ)ᵀ + b, with s = alpha / rank and the sample's task t (paper, eq. 14).

    ``weight`` [d, d] and ``bias`` [d] are shared; ``lora_U`` is [T, d, rank]. U = 0 would be a
    stationary point, so U starts normal with variance 0.1 / d: the paper's standard deviation of
    0.1 at its d = 10, and U_t U_tᵀ of about the same norm at every width.

    Args:
        features: size d of inputs and outputs.
        num_tasks: number of tasks T.
        rank: rank k of the adapters; above d it is legal, but warned about.
        alpha: scale of the adapters, s = alpha / rank; None means rank, so s = 1.
        bias: whether there is a bias.
        route: how it is computed, see `metalora.ops.lora_linear`.
        keep_merged: whether the weight route keeps every task's merged weight for backward; faster
            where memory is plenty.
        device: where the parameters live.
        dtype: what they are.
        name: what error messages call the layer.

    Raises:
        ValueError: if a number is outside its range, or the layer is not square.
    """

    task_parameters = ("lora_U",)
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        num_tasks: int,
        rank: int,
        *,
        alpha: float | None = None,
        bias: bool = True,
        route: str = "auto",
        keep_merged: bool = False,
        device: Any = None,
        dtype: Any = None,
        name: str = "",
    ) -> None:
        super().__init__(num_tasks, name)
        check_count(type(self).__name__, "features", features)
        check_count(type(self).__name__, "rank", rank)
        linear = nn.Linear(features, features, bias=bias, device=device, dtype=dtype)
        self._build(linear, rank, alpha, route, keep_merged)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_tasks: int,
        rank: int,
        *,
        alpha: float | None = None,
        route: str = "auto",
        keep_merged: bool = False,
        name: str = "",
    ) -> SymmetricLoRALinear:
        """Adapters on ``linear``, whose own Parameter objects become ``weight`` and ``bias``."""
        layer = cls.__new__(cls)
        TaskLayer.__init__(layer, num_tasks, name)
        layer._build(linear, rank, alpha, route, keep_merged)
        return layer.train(linear.training)

    def _build(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None,
        route: str,
        keep_merged: bool,
    ) -> None:
        function = type(self).__name__
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features != self.out_features:
            raise ValueError(
                f"{self._where()}: a symmetric adapter needs a square layer, got "
                f"[out={self.out_features}, in={self.in_features}]"
            )
        self.rank = check_count(function, "rank", rank)
        self.alpha = float(rank) if alpha is None else check_positive(function, "alpha", alpha)
        self.scaling = self.alpha / self.rank
        self.route = check_choice(function, "route", route, ops.ROUTES)
        self.keep_merged = bool(keep_merged)
        note_rank(self._where(), rank, self.in_features, self.out_features)
        share_parameters(self, linear)
        self.lora_U = new_parameter(self.weight, self.num_tasks, self.in_features, rank)
        self.reset_task_parameters()

    def reset_task_parameters(self) -> None:
        """Draws every U_t afresh from N(0, 0.1 / d)."""
        nn.init.normal_(self.lora_U, std=math.sqrt(0.1 / self.in_features))

    def forward(self, x: Tensor, tasks: TaskBatch | None = None) -> Tensor:
        """x [B, ..., d] → [B, ..., d]; see `MultiTaskLoRALinear.forward`."""
        batch = self.batch_of(x, tasks)
        rows, task_ptr = self.sort_rows(x, batch)
        y = ops.lora_linear(
            rows,
            self.weight,
            self.bias,
            self.lora_U.transpose(1, 2),
            self.lora_U,
            task_ptr,
            scaling=self.scaling,
            route=self.route,
            keep_merged=self.keep_merged,
        )
        return self.restore_rows(y, x, batch)

    def to_linear(self, task: int | None = None) -> nn.Linear:
        """Task t's layer, W + s·U_t U_tᵀ merged into a new weight; None gives W's own Parameter."""
        if task is None:
            return as_linear(self.weight, self.bias, self.training)
        u = self.lora_U.detach()[self.check_task(task)]
        merged = ops.merge_lora(self.weight.detach(), u.T[None], u[None], self.scaling)[0]
        weight = nn.Parameter(merged.to(self.weight.dtype), self.weight.requires_grad)
        return as_linear(weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"
