"""Re-centring: the shared head fitted to the shared weights, which stay as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora.adapters import LoRAConfig, adapt
from metalora.meta import RoundLoader, TrainConfig, last_layer_ml, lora_ml, refit_heads

T = 3
HEADS = ["head"]
WITH_HEADS = LoRAConfig(rank=2, heads=HEADS)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tasks that share one direction, each with an offset of its own."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    ids = torch.arange(120) % T
    offset = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)[ids]
    return inputs, (inputs[:, 0] + offset > 0).long(), ids


def rounds(order: str = "rounds") -> RoundLoader:
    return RoundLoader(*data(), batch_size=20, seed=1, order=order)


def retrained(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network().double()
    config = TrainConfig(epochs=5, lr=0.02)
    if method == "lora-ml":
        lora_ml(model, rounds(), config, WITH_HEADS)
    else:
        last_layer_ml(model, rounds(), config, HEADS)
    return model


def pooled_loss(model: nn.Module) -> float:
    inputs, labels, _ = data()
    with torch.no_grad():
        return F.cross_entropy(model(inputs), labels).item()


@pytest.mark.parametrize("method", ["lora-ml", "last-layer-ml"])
def test_the_pooled_loss_falls_and_the_shared_weights_stay_bitwise(method: str) -> None:
    model = retrained(method)
    mean = pooled_loss(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.body[0].bias.requires_grad_(False)
    result = refit_heads(model, rounds("pooled"), TrainConfig(epochs=20, lr=0.05), HEADS)
    assert pooled_loss(model) < mean - 1e-3
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (not name.startswith("head")), name
        assert parameter.requires_grad == (name != "body.0.bias")


def test_it_is_logistic_regression_on_the_features() -> None:
    """Its limit is the minimum over the head, as Newton's method finds it."""
    model = retrained("last-layer-ml")
    inputs, labels, _ = data()
    features = F.pad(model.body(inputs).detach(), (0, 1), value=1.0)  # the bias is a weight
    head = torch.zeros(2, features.shape[1], dtype=torch.float64, requires_grad=True)
    newton = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        newton.zero_grad()
        loss = F.cross_entropy(features @ head.T, labels)
        loss.backward()
        return loss

    newton.step(closure)  # type: ignore[arg-type]
    lowest = closure().item()
    whole = RoundLoader(*data(), batch_size=120, order="pooled")
    config = TrainConfig(epochs=300, lr=0.1, schedule="cosine")
    refit_heads(model, whole, config, HEADS)
    assert lowest <= pooled_loss(model) < lowest + 5e-3


def test_models_without_a_shared_head_are_refused() -> None:
    config = TrainConfig(epochs=1, lr=0.1)
    with pytest.raises(
        ValueError, match="refit_heads: heads must name the layers to fit, got none"
    ):
        refit_heads(Network().double(), rounds(), config, [])
    with pytest.raises(ValueError, match=r"^refit_heads: heads: .*; did you mean 'head'"):
        refit_heads(Network().double(), rounds(), config, ["heed"])
    for adapter in (WITH_HEADS, LoRAConfig(target_modules=(), heads=HEADS)):
        model = Network().double()
        adapt(model, adapter, T)
        with pytest.raises(ValueError, match="refit_heads: the model has adapters or heads of"):
            refit_heads(model, rounds(), config, HEADS)


def test_flags_come_back_after_a_failure() -> None:
    model = retrained("lora-ml")
    with pytest.raises(ZeroDivisionError):
        refit_heads(
            model, rounds(), TrainConfig(epochs=1, lr=0.1), HEADS, validation=lambda m: 1 / 0
        )
    assert all(p.requires_grad for p in model.parameters())
