"""How precise torch's float32 matrix products are within a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from metalora._checks import check_choice
from metalora._matmul import MKLDNN, exact_by_onednn

# Their names in torch.set_float32_matmul_precision; ours are those of the newer fp32_precision.
_LEGACY = {"ieee": "highest", "tf32": "high", "bf16": "medium"}
MATMUL_PRECISIONS = ("default", *_LEGACY)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within, torch computes products of float32 matrices as ``precision`` says; then as before.

    The setting is torch's own and holds for the whole process, other threads included. It says
    nothing about other dtypes, such as those that autocast takes.

    Args:
        precision: "default" leaves torch's setting alone. "ieee" computes in float32: on a CPU
            through oneDNN where that is faster (see ``METALORA_MATMUL``) and was found to compute
            in float32. The others round the factors first on devices that gain from it, and sum in
            float32: "tf32" to 10 bits after the point, and "bf16" to 7 bits on CPUs and as "tf32"
            on GPUs. They are "high" and "medium" of ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: for another ``precision``.
    """
    check_choice("matmul_precision", "precision", precision, MATMUL_PRECISIONS)
    if precision == "default":
        yield
        return
    through_onednn = precision == "ieee" and exact_by_onednn()
    with _restored():
        torch.set_float32_matmul_precision(_LEGACY[precision])
        if through_onednn:  # torch calls it for float32 under this setting alone
            MKLDNN.matmul.fp32_precision = "bf16"
        yield


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Restores torch's settings of float32 products, of both its interfaces."""
    cuda = torch.backends.cuda
    before = MKLDNN.matmul.fp32_precision, cuda.matmul.fp32_precision
    inherited = MKLDNN.fp32_precision, torch.backends.cudnn.fp32_precision
    legacy = None
    with contextlib.suppress(RuntimeError):  # unreadable where the two interfaces disagree
        legacy = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        own = ["none" if b == i else b for b, i in zip(before, inherited, strict=True)]
        MKLDNN.matmul.fp32_precision, cuda.matmul.fp32_precision = own
