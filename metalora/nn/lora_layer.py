"""The base of linear layers with a low-rank adapter per task."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from metalora import ops
from metalora._checks import FLOATS, check_choice, check_count, check_positive, check_probability
from metalora._warn import warn_user
from metalora.nn.layer import TaskLayer, new_parameter
from metalora.nn.plain import as_conv1d, as_linear, features_of, is_conv1d
from metalora.nn.sample_dropout import drops_by_sample
from metalora.nn.shared_input import hand_on, may_share, rows_handed_on
from metalora.nn.task_batch import TaskBatch
from metalora.ops._native import autocasting
from metalora.ops.lora_linear import dtypes_differ, lora_linear_handing_on


class LoRALayer(TaskLayer):
    """y = x (W + s·B_t A_t)ᵀ + b, with s = alpha / rank and the sample's own task t.

    Subclasses say what A_t and B_t are made of.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    fan_in_fan_out: bool = False
    """Whether ``weight`` is Wᵀ [in, out], as in the Conv1D of transformers."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        num_tasks: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        route: str = "auto",
        keep_merged: bool = False,
        name: str = "",
    ) -> Self:
        """Adapters on ``linear``, whose own Parameter objects become ``weight`` and ``bias``.

        Args:
            linear: an nn.Linear, or a Conv1D of transformers.
            num_tasks, rank, alpha, dropout, route, keep_merged, name: see `MultiTaskLoRALinear`.
        """
        layer = cls.__new__(cls)
        TaskLayer.__init__(layer, num_tasks, name)
        layer._build(linear, rank, alpha, dropout, route, keep_merged)
        return layer.train(linear.training)

    def _build(
        self,
        linear: nn.Module,
        rank: int,
        alpha: float | None,
        dropout: float,
        route: str,
        keep_merged: bool,
    ) -> None:
        function = type(self).__name__
        self.in_features, self.out_features = features_of(linear)
        self.fan_in_fan_out = is_conv1d(linear)
        self.rank = check_count(function, "rank", rank)
        self.alpha = float(rank) if alpha is None else check_positive(function, "alpha", alpha)
        self.scaling = self.alpha / self.rank
        self.dropout = check_probability(function, "dropout", dropout)
        self.route = check_choice(function, "route", route, ops.ROUTES)
        self.keep_merged = bool(keep_merged)
        shapes = self._shapes()
        self._note_rank()
        for name, parameter in linear._parameters.items():  # the very parameters of ``linear``
            self.register_parameter(name, parameter)
        for name, shape in shapes.items():
            self.register_parameter(name, new_parameter(self.weight, self.num_tasks, *shape))
        self.reset_task_parameters()

    def _note_rank(self) -> None:
        full = min(self.in_features, self.out_features)
        if self.rank > full:
            warn_user(
                f"{self._where()}: rank {self.rank} is above min(in={self.in_features}, "
                f"out={self.out_features}) = {full}; legal, but a smaller rank would do the same"
            )

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of each per-task parameter, without the dimension of the tasks."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W [out, in], shared by the tasks."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [T, rank, in] and B [T, out, rank] of all tasks."""
        raise NotImplementedError

    def forward(self, x: Tensor, tasks: TaskBatch | None = None) -> Tensor:
        """x [B, ..., in] → [B, ..., out].

        Args:
            x: inputs, the samples along the first dimension. It may also be [B·n, ..., in] with
                the n parts of a sample one after the other, as when a model flattens its sequences,
                or packed, see ``lengths`` of `metalora.tasks`.
            tasks: the samples' tasks; None takes those of the `metalora.tasks` context around.

        Raises:
            TypeError: if x has another dtype than the weight, without autocast.
            ValueError: if shapes do not fit or no tasks are known.
        """
        batch = self.batch_of(x, tasks)
        if x.dtype != self.weight.dtype and x.dtype in FLOATS and not autocasting(x.device.type):
            raise TypeError(dtypes_differ(self._where(), x, self.weight))
        if self.training and self.dropout > 0 and drops_by_sample():
            return self._forward_by_sample(x, batch)
        rows, task_ptr = self.sort_rows(x, batch)
        shares = tasks is None and may_share(x, batch)
        if shares:
            rows = rows_handed_on(self, x, rows)
        y, rows = self._run(rows, task_ptr, shares)
        if shares:
            hand_on(self, x, rows)
        return self.restore_rows(y, x, batch)

    def _run(self, rows: Tensor, task_ptr: Tensor, hands_on: bool) -> tuple[Tensor, Tensor]:
        """Rows [M, in] in task order → [M, out], and rows for a layer that reads them too."""
        lora_A, lora_B = self.factors()
        weight = self.dense()
        if (lora_B.shape[1], lora_A.shape[2]) != weight.shape:
            raise ValueError(
                f"{self._where()}: the weight is {list(weight.shape)}, but the adapters were "
                f"made for {[lora_B.shape[1], lora_A.shape[2]]}; change sizes, as by "
                "resize_token_embeddings, before metalora.adapt"
            )
        layer = rows, weight, self.bias, lora_A, lora_B, task_ptr
        settings: dict[str, Any] = {
            "scaling": self.scaling,
            "dropout_p": self.dropout if self.training else 0.0,
            "route": self.route,
            "keep_merged": self.keep_merged,
        }
        if hands_on:
            return lora_linear_handing_on(*layer, **settings)
        return ops.lora_linear(*layer, **settings), rows

    def _forward_by_sample(self, x: Tensor, batch: TaskBatch | None) -> Tensor:
        """The same with masks that depend on the sample, which the operator does not have."""
        rows, task_ptr = self.sort_rows(F.dropout(x, self.dropout), batch)
        bounds = pairwise(task_ptr.tolist())
        factors = zip(*self.factors(), strict=True)
        updates = [rows[a:b] @ A.T @ B.T for (a, b), (A, B) in zip(bounds, factors, strict=True)]
        update = self.restore_rows(torch.cat(updates), x, batch)
        return F.linear(x, self.dense(), self.bias) + self.scaling * update

    def to_linear(self, task: int | None = None) -> nn.Module:
        """Task t's layer, W + s·B_t A_t merged into a new weight; None gives W's own Parameter.

        It is an nn.Linear, or a Conv1D of transformers if it was made of one.
        """
        as_plain = as_conv1d if self.fan_in_fan_out else as_linear
        if task is None:
            return as_plain(self.weight, self.bias, self.training)
        one = slice(self.check_task(task), task + 1)
        lora_A, lora_B = (factor.detach()[one] for factor in self.factors())
        merged = ops.merge_lora(self.dense().detach(), lora_A, lora_B, self.scaling)[0]
        merged = (merged.T if self.fan_in_fan_out else merged).to(self.weight.dtype)
        weight = nn.Parameter(merged.contiguous(), self.weight.requires_grad)
        return as_plain(weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"
