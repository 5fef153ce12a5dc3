"""The operators in plain PyTorch: the specification that the native kernels are tested against.

Every function here runs on any device and in any floating dtype and is differentiable by autograd
as often as wanted. Nothing is checked: `metalora.ops` holds the checked public functions.
"""

from metalora.reference.dropout import dropout_mask
from metalora.reference.lora_linear import lora_linear, lora_linear_backward
from metalora.reference.merge_lora import (
    merge_lora,
    merge_lora_backward,
    merge_lora_symmetric,
    merge_lora_symmetric_backward,
)
from metalora.reference.packed_attention import packed_attention
from metalora.reference.task_matvec import task_matvec, task_matvec_backward

__all__ = [
    "dropout_mask",
    "lora_linear",
    "lora_linear_backward",
    "merge_lora",
    "merge_lora_backward",
    "merge_lora_symmetric",
    "merge_lora_symmetric_backward",
    "packed_attention",
    "task_matvec",
    "task_matvec_backward",
]
