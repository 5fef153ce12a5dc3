"""A linear layer with one low-rank adapter per task."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from metalora._checks import check_count
from metalora.nn.lora_layer import LoRALayer


class MultiTaskLoRALinear(LoRALayer):
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
    lora_A: nn.Parameter
    lora_B: nn.Parameter

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

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"lora_A": (self.rank, self.in_features), "lora_B": (self.out_features, self.rank)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """``lora_A`` and ``lora_B``."""
        return self.lora_A, self.lora_B

    def reset_task_parameters(self) -> None:
        """Draws every A_t afresh, Kaiming-uniform, and sets every B_t to zero, as PEFT does."""
        for lora_a in self.lora_A.unbind():
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.dropout:g}"
