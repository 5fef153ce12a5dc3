"""Operators on tensors, checked and differentiable; the only place that touches torch.ops.metalora.

Each one runs on native kernels where they are loaded and on `metalora.reference` elsewhere, with
the same results to rounding.
"""

from metalora.ops.dropout import dropout_mask
from metalora.ops.lora_linear import lora_linear, lora_linear_symmetric
from metalora.ops.merge_lora import merge_lora, merge_lora_symmetric
from metalora.ops.packed_attention import packed_attention
from metalora.ops.route import ROUTES, RouteChoice, choose_route, lora_linear_route
from metalora.ops.task_matvec import task_matvec

__all__ = [
    "ROUTES",
    "RouteChoice",
    "choose_route",
    "dropout_mask",
    "lora_linear",
    "lora_linear_route",
    "lora_linear_symmetric",
    "merge_lora",
    "merge_lora_symmetric",
    "packed_attention",
    "task_matvec",
]
