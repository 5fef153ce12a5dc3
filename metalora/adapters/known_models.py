"""Models whose layers cannot be adapted as they stand: PEFT's, and some of transformers.

Their classes are told by name, so that neither package is imported.
"""

from __future__ import annotations

from torch import nn

# Weights that are read where the layer is not called: in every pass (dt_proj of Mamba), while a
# model trains (Gemma 3n), or by kernels that it takes on a GPU while it trains (out_proj of all).
_READ = {
    "MambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "FalconMambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "LongcatFlashTopkRouter": ("classifier",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "Gemma3nTextAltUp": ("correction_coefs",),
}
# Modules whose layers get rows in which the samples cannot be told.
_SEQUENCE_FIRST = (
    "XLNetFeedForward",
    "LongformerSelfAttention",
    "LEDEncoderSelfAttention",
    "FSMTEncoder",
    "FSMTDecoder",
    "Mask2FormerMaskedAttentionDecoder",
)
_EXPERTS = ("SwitchTransformersExperts", "NllbMoeExperts")


def check_without_peft(model: nn.Module) -> None:
    """Raises ValueError if ``model`` is PEFT's, or has layers of PEFT's inside."""
    for name, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package == "peft":
            where = f"has {name!r}, a" if name else "is a"
            raise ValueError(
                f"adapt: the model {where} {type(module).__name__} of PEFT, whose own matrices "
                "would get adapters; unload or merge the PEFT model first "
                "(model.merge_and_unload(), then model.requires_grad_(True))"
            )


def reader_of_weight(modules: dict[str, nn.Module], name: str) -> str:
    """The class of the module that reads this layer's weight and does not call it, or ""."""
    parent, _, last = name.rpartition(".")
    kind = type(modules.get(parent)).__name__
    return kind if last in _READ.get(kind, ()) else ""


def check_sample_order(model: nn.Module, names: list[str]) -> None:
    """Raises ValueError if a layer to adapt does not get its samples first, or only some rows."""
    found = {name: outer for name in names if (outer := _mixing(model, name)) is not None}
    if not found:
        return
    name, (place, kind) = next(iter(found.items()))
    if kind in _EXPERTS:
        why, excluded = "gets rows of any samples", rf"r'.*\.{place.rpartition('.')[2]}\..*'"
    else:
        alike = [n.rpartition(".")[2] for n, (_, other) in found.items() if other == kind]
        why, excluded = "gets sequences first, [L, B, ...]", repr(list(dict.fromkeys(alike)))
    raise ValueError(
        f"adapt: {name!r} is in a {kind}, which {why}, so that it cannot tell the samples of "
        f"several tasks apart; exclude such layers, as in exclude_modules={excluded}"
    )


def _mixing(model: nn.Module, name: str) -> tuple[str, str] | None:
    """The module around this layer that keeps it from telling samples apart: name and class."""
    parts = name.split(".")
    for depth in range(len(parts)):
        place = ".".join(parts[:depth])
        kind = type(model.get_submodule(place)).__name__
        if kind in _SEQUENCE_FIRST or kind in _EXPERTS:
            return place, kind
    return None
