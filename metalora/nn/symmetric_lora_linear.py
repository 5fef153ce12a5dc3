"""A square linear layer with one symmetric low-rank adapter per task."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from metalora import ops
from metalora._checks import check_count
from metalora.nn.lora_layer import LoRALayer


class SymmetricLoRALinear(LoRALayer):
    """y = x (W + s·U_t U_tᵀ)ᵀ + b, with s = alpha / rank and the sample's task t (paper, eq. 14).

    ``weight`` [d, d] and ``bias`` [d] are shared; ``lora_U`` is [T, d, rank]. U = 0 would be a
    stationary point, so U starts normal with variance 0.1 / d: the paper's standard deviation of
    0.1 at its d = 10, and U_t U_tᵀ of about the same norm at every width.

    Args:
        features: size d of inputs and outputs.
        num_tasks: number of tasks T.
        rank: rank k of the adapters; above d it is legal, but warned about.
        alpha, bias, route, keep_merged, device, dtype, name: see `MultiTaskLoRALinear`.

    Raises:
        ValueError: if a number is outside its range, or the layer is not square.
    """

    task_parameters = ("lora_U",)
    lora_U: nn.Parameter

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
        self._build(linear, rank, alpha, 0.0, route, keep_merged)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        if self.in_features != self.out_features:
            raise ValueError(
                f"{self._where()}: a symmetric adapter needs a square layer, got "
                f"[out={self.out_features}, in={self.in_features}]"
            )
        if self.dropout:
            raise ValueError(f"{self._where()}: symmetric adapters have no dropout; set dropout=0")
        return {"lora_U": (self.in_features, self.rank)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A = Uᵀ and B = U."""
        return self.lora_U.transpose(1, 2), self.lora_U

    def _run(self, rows: Tensor, task_ptr: Tensor, hands_on: bool) -> tuple[Tensor, Tensor]:
        y = ops.lora_linear_symmetric(
            rows,
            self.dense(),
            self.bias,
            self.lora_U,
            task_ptr,
            scaling=self.scaling,
            route=self.route,
            keep_merged=self.keep_merged,
        )
        return y, rows

    def reset_task_parameters(self) -> None:
        """Draws every U_t afresh from N(0, 0.1 / d)."""
        nn.init.normal_(self.lora_U, std=math.sqrt(0.1 / self.in_features))
