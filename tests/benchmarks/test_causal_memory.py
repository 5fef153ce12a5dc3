"""The formulae of memory against what small models take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import metalora
from benchmarks.causal_memory import (
    SHAPES,
    Shape,
    measured,
    new_llama,
    on_paper,
    paper_table,
    what_is_kept,
)

SHAPE = Shape(32, 80, 2, 4, 16, 50)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted(tied: bool) -> None:
    shape = replace(SHAPE, tied=tied)
    model = new_llama(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    metalora.adapt(model, metalora.LoRAConfig(rank=3), 5)
    adapters = sum(p.numel() for p in metalora.task_parameters(model))
    assert adapters == 5 * shape.adapters(3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_what_a_layer_keeps_of_a_token(autocast: bool, checkpointing: bool) -> None:
    """Measured as the difference that one more layer makes."""
    found = {}
    for layers in (2, 3):
        model = new_llama(replace(SHAPE, layers=layers))
        metalora.adapt(model, metalora.LoRAConfig(rank=2, route="weight"), 2)
        if checkpointing:
            model.train().gradient_checkpointing_enable()  # type: ignore[operator]
        ids = torch.randint(50, (4, 128))
        context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with what_is_kept(model) as kept, metalora.tasks(torch.tensor([0, 0, 1, 1])), context:
            hidden = model.model(input_ids=ids, use_cache=False)[0]  # type: ignore[operator]
        found[layers] = sum(kept.values())
        del hidden
    wanted = 4 * SHAPE.hidden if checkpointing else SHAPE.kept_by_layer(autocast)
    assert (found[3] - found[2]) / ids.numel() == wanted


def test_the_state_is_that_of_all_parameters() -> None:
    found = measured(SHAPE, 3, 2, 6, 16, checkpointing=False)
    assert found["state"] == found["state on paper"]
    assert found["kept"] > 0 and found["peak"] > found["kept"] // 2


def test_large_models_on_paper() -> None:
    """Parameters of the published models: 1.24, 6.74 and 70.6 billion."""
    counts = [round(shape.parameters / 1e9, 2) for shape in SHAPES.values()]
    assert counts == [1.24, 6.74, 70.55]
    found = on_paper(SHAPES["7B"], 8, 16, 8192)
    assert found["weights, gradients, AdamW"] == 16 * SHAPES["7B"].parameters
    assert found["activations, checkpointed"] < found["activations"] / 5
    assert found["a GPU of 8"] < found["a GPU of 1"] / 3
    header, rows = paper_table({"7B": found})
    assert header[1] == "parameters, billions" and rows[0][:2] == ["7B", "6.74"]
