"""The shallow network's training with autograd and torch.optim.AdamW, and both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from metalora.shallow import AdamW, Adapters, Network
from tests.backends import backend  # noqa: F401


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a second thread takes longer than the arithmetic here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _train(
    x: Tensor,  # [T, N, d]
    y: Tensor,  # [T, N]
    network: Network,
    adapters: Adapters | None,  # lora_A [T, k, d]
    epochs: int,
    optimizer: AdamW,
    *,
    frozen: bool = False,
) -> tuple[Network, Adapters | None, Tensor]:
    """One training, a task and a layer at a time, as a user of PyTorch would write it."""
    weight = network.weight.clone().requires_grad_(not frozen)
    output = network.output.clone().requires_grad_(not frozen)
    pairs = []
    if adapters is not None:
        for a, b in zip(adapters.lora_A, adapters.lora_B, strict=True):
            pairs.append((a.clone().requires_grad_(), b.clone().requires_grad_()))
    parameters = [weight, output, *(p for pair in pairs for p in pair)]
    adamw = torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    losses = []
    for _ in range(epochs):
        loss = torch.zeros((), dtype=x.dtype)
        for t in range(len(x)):
            hidden = x[t] @ weight.T
            if pairs:
                hidden = hidden + x[t] @ pairs[t][0].T @ pairs[t][1].T
            loss = loss + torch.nn.functional.mse_loss(hidden.sigmoid() @ output, y[t]) / len(x)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.detach())
    trained = Network(weight.detach(), output.detach())
    tuned = None
    if pairs:
        tuned = Adapters(
            torch.stack([a.detach() for a, _ in pairs]), torch.stack([b.detach() for _, b in pairs])
        )
    return trained, tuned, torch.stack(losses)


@pytest.fixture(scope="session")
def oracle() -> Callable[..., tuple[Network, Adapters | None, Tensor]]:
    """Training with autograd and torch.optim.AdamW."""
    return _train
