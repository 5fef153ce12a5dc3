"""Dropout whose masks depend on the sample, and not on the batch that it is in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora.nn import MultiTaskLoRALinear, drops_by_sample, sample_dropout, tasks
from metalora.nn.sample_dropout import _attend_by_sample

PLACES = torch.arange(6)
X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))


def attention(x: torch.Tensor) -> torch.Tensor:
    heads = x.view(len(x), 5, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4, is_causal=True)


def encoder() -> nn.Module:
    torch.manual_seed(3)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)


def lora() -> nn.Module:
    torch.manual_seed(3)
    layer = MultiTaskLoRALinear(8, 8, 3, 2, dropout=0.4)
    nn.init.normal_(layer.lora_B)
    return layer


CALLS = {
    "nn.Dropout": nn.Dropout(0.4),
    "functional": lambda x: F.dropout(x, 0.4, inplace=False),
    "in place": lambda x: F.dropout(x.clone(), 0.4, inplace=True),
    "attention": attention,
    "encoder layer": encoder(),
    "flattened samples": lambda x: F.dropout(x.flatten(0, 1), 0.4).unflatten(0, (len(x), 5)),
    "LoRA": lora(),
}


def called(name: str, rows: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    with sample_dropout(PLACES[rows]), tasks(rows % 3):
        return CALLS[name](X[rows])


@pytest.mark.parametrize("name", CALLS)
def test_a_sample_has_the_same_mask_in_any_batch(name: str) -> None:
    whole = called(name, PLACES)
    for rows in (PLACES[1::2], PLACES[3:4], PLACES.flip(0)):
        torch.testing.assert_close(called(name, rows), whole[rows], rtol=0, atol=1e-6)
    with tasks(PLACES % 3):
        torch.manual_seed(7)
        assert not torch.equal(CALLS[name](X), whole)


def test_packed_samples_have_the_masks_of_their_own_rows() -> None:
    lengths = [3, 1, 4]
    x = torch.ones(1, 8, 5)
    torch.manual_seed(7)
    with sample_dropout(PLACES[:3], lengths):
        whole = F.dropout(x, 0.5)
    torch.manual_seed(7)
    with sample_dropout(PLACES[2:3], lengths[2:]):
        assert torch.equal(F.dropout(x[:, 4:], 0.5), whole[:, 4:])


def test_a_sample_has_the_same_mask_however_far_it_is_padded() -> None:
    short, long = torch.ones(6, 2, 3, 4), torch.ones(6, 2, 7, 9)
    with sample_dropout(PLACES):
        torch.manual_seed(7)
        wanted = F.dropout(long, 0.5)[..., :3, :4]
        torch.manual_seed(7)
        assert torch.equal(F.dropout(short, 0.5), wanted)
        torch.manual_seed(7)
        assert torch.equal(F.dropout(short.flatten(0, 1), 0.5).view_as(short), wanted)
        torch.manual_seed(7)
        padded = F.dropout(torch.ones(6, 4, 5), 0.5)
    lengths = [3, 1, 2, 4, 1, 3]
    torch.manual_seed(7)
    with sample_dropout(PLACES, lengths):
        packed = F.dropout(torch.ones(1, 14, 5), 0.5)[0].split(lengths)
    for i, rows in enumerate(packed):
        assert torch.equal(rows, padded[i, : len(rows)])


def test_masks_have_no_pattern() -> None:
    with sample_dropout(torch.arange(300)):
        kept = [F.dropout(torch.ones(300, 4, 256), 0.25) > 0 for _ in range(2)]
    one, two = kept
    neighbours = [(one, two), *((one, one.roll(1, dim)) for dim in range(3))]
    for found, other in neighbours:  # two masks that know nothing of each other
        assert abs(float((found & other).float().mean()) - 0.75**2) < 0.005
    for dim in range(3):
        shares = one.float().mean([i for i in range(3) if i != dim])
        assert float((shares - 0.75).abs().max()) < 0.06


def test_it_keeps_the_mean_and_differs_between_samples_and_calls() -> None:
    x = torch.ones(40, 500)
    with sample_dropout(torch.arange(40)):
        assert drops_by_sample()
        first, second = F.dropout(x, 0.25), F.dropout(x, 0.25)
        assert torch.equal(F.dropout(x, 0.25, training=False), x)
        assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))
        assert F.dropout(torch.ones(3, 7), 0.5).shape == (3, 7)  # of no sample
    assert not drops_by_sample()
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(float(first.mean()) - 1) < 0.02
    assert len({tuple(row.tolist()) for row in first}) == 40
    assert not torch.equal(first, second)


def test_attention_in_plain_steps_is_that_of_torch() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)
    blind = mask.clone()
    blind[2] = False
    for options in (
        {"is_causal": True},
        {"attn_mask": blind},
        {"attn_mask": mask},
        {"attn_mask": torch.randn(5, 5), "scale": 0.3},
    ):
        wanted = F.scaled_dot_product_attention(q, k, k, enable_gqa=True, **options)
        found = _attend_by_sample(q, k, k, dropout_p=1e-30, enable_gqa=True, **options)
        torch.testing.assert_close(found, wanted)
