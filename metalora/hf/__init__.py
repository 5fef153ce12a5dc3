"""Models of transformers: tokenised texts as samples, packed or padded."""

from metalora.hf.attention import Packing
from metalora.hf.packing import disable_packing, enable_packing, packing_problem, position_offset
from metalora.hf.passes import SequencePasses
from metalora.hf.sequences import Sequences

__all__ = [
    "Packing",
    "SequencePasses",
    "Sequences",
    "disable_packing",
    "enable_packing",
    "packing_problem",
    "position_offset",
]
