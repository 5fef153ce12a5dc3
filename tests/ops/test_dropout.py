from __future__ import annotations

import pytest
import torch

from metalora import ops, reference

# The three vectors that Random123, the authors' own library, publishes for Philox4x32-10 have
# counters of 128 bits; the first is (counter 0, key 0), which is a dropout mask's first block.
FIRST_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("mask", [ops.dropout_mask, None], ids=["ops", "reference"])
@pytest.mark.parametrize("lane", range(4))
def test_known_answer(mask, lane: int) -> None:
    word = FIRST_WORDS[lane]
    for threshold, kept in ((word, True), (word + 1, False)):
        p = threshold / 2**32
        if mask is None:
            got = reference.dropout_mask(torch.tensor(0), p, 1, 4)
        else:
            got = mask(0, p, 1, 4)
        assert got[0, lane].item() is kept


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (37, 53), (2, 1024), (0, 4), (7, 0)])
def test_native_and_reference_masks_are_equal(seed: int, shape: tuple[int, int]) -> None:
    native = ops.dropout_mask(seed, 0.3, *shape)
    assert native.dtype == torch.bool
    assert torch.equal(native, reference.dropout_mask(torch.tensor(seed), 0.3, *shape))


def test_statistics() -> None:
    kept = ops.dropout_mask(5, 0.25, 1000, 1000).double()
    assert abs(kept.mean().item() - 0.75) < 5 * (0.25 * 0.75 / 1e6) ** 0.5
    neighbours = ((kept[:, 1:] - 0.75) * (kept[:, :-1] - 0.75)).mean().item()
    assert abs(neighbours) < 5 * 0.25 * 0.75 / 1e3


def test_seeds_differ() -> None:
    assert not torch.equal(ops.dropout_mask(1, 0.5, 20, 20), ops.dropout_mask(2, 0.5, 20, 20))


def test_opcheck(native: None) -> None:
    raw = torch.ops.metalora.dropout_mask.default
    torch.library.opcheck(raw, (torch.tensor(3), 0.5, 4, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1000, 1003)])
def test_cuda_mask_is_the_same(shape: tuple[int, int]) -> None:
    seed = torch.tensor(2**40 + 12345, device="cuda")
    wanted = reference.dropout_mask(seed.cpu(), 0.3, *shape)
    assert torch.equal(ops.dropout_mask(seed, 0.3, *shape).cpu(), wanted)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((1, 1.0, 2, 2), ValueError, r"p must be in \[0, 1\)"),
        ((1, 0.5, -1, 2), ValueError, "rows must be an int >= 0, got -1"),
        ((1, 0.5, 2.0, 2), TypeError, "rows must be an int >= 0"),
        ((2**63, 0.5, 2, 2), ValueError, "seed must be in"),
        ((torch.tensor([1]), 0.5, 2, 2), TypeError, "seed must be an int or an int64 scalar"),
    ],
)
def test_messages(arguments, kind, text: str) -> None:
    with pytest.raises(kind, match=text):
        ops.dropout_mask(*arguments)
