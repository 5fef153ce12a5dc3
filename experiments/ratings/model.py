"""The network: what a user thinks of an item, from the item's embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = ("hidden", "out")  # the layers with LoRA
HEADS = ("own",)  # the layer that may exist once per user
STANDARD_DEVIATION = 0.1  # of the embeddings' random start


class RatingNet(nn.Module):
    """Predicts ratings: mean + b_i + (w + v) · h_i, with h_i = (relu(W (e_i, 1)), 1).

    e_i and b_i are the item's embedding and bias. A constant input stands in the place of each
    linear layer's bias, so that LoRA on ``hidden`` and ``out`` adapts the biases as well. ``own``
    holds v, which is a user's deviation from the shared last layer w: zero and frozen, unless it
    exists once per user. So weight decay on users' heads pulls them towards the shared one.

    Args:
        num_items: number of items.
        mean: of the ratings, which the network adds to.
        embedding: size of e_i.
        hidden: size of W's output.
    """

    mean: Tensor

    def __init__(self, num_items: int, mean: float, embedding: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.embedding = nn.Embedding(num_items, embedding)
        self.bias = nn.Embedding(num_items, 1)
        self.hidden = nn.Linear(embedding + 1, hidden, bias=False)
        self.out = nn.Linear(hidden + 1, 1, bias=False)
        self.own = nn.Linear(hidden + 1, 1, bias=False)
        nn.init.normal_(self.embedding.weight, std=STANDARD_DEVIATION)
        for zero in (self.bias, self.out, self.own):
            nn.init.zeros_(zero.weight)
        self.own.requires_grad_(False)

    def forward(self, items: Tensor) -> Tensor:
        """items int64 [B] → ratings [B], in no way limited to those that can be given."""
        hidden = _with_one(F.relu(self.hidden(_with_one(self.embedding(items)))))
        own = self.out(hidden) + self.own(hidden)
        return self.mean + self.bias(items).squeeze(1) + own.squeeze(1)

    @torch.no_grad()
    def recentre(self) -> None:
        """Adds v to w, and sets it to zero: the same predictions, with v a deviation again."""
        self.out.weight += self.own.weight
        self.own.weight.zero_()


def _with_one(x: Tensor) -> Tensor:
    """[B, n] → [B, n + 1], with a last column of ones."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)
