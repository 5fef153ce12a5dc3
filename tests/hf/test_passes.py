"""Token sequences, and how samples come in passes."""

from itertools import pairwise

import pytest
import torch

from metalora.hf import SequencePasses, Sequences
from metalora.meta import Batch, RoundLoader
from metalora.nn import MultiTaskLoRALinear, tasks
from tests.hf.models import PAD, sequences

LENGTHS = [5, 2, 9, 1, 2, 12, 1, 7, 4, 4, 3, 8]  # two of each sample
SAMPLES = 6


def passes_of(packed, max_tokens=10_000, **options):
    arguments = {"pad_token_id": PAD, "position_offset": PAD + 1, **options}
    return SequencePasses(sequences(LENGTHS, 2), packed=packed, max_tokens=max_tokens, **arguments)


def batch_of(ids, **options):
    numbers = torch.arange(len(ids))
    return Batch(numbers, numbers * 10, torch.tensor(ids), **options)


def tokens_of(part, passes):
    """The token lists of every sequence in a pass, by what the model would be given."""
    ids = part.inputs["input_ids"]
    if passes.packed:
        ends = part.inputs["packing"].ends.tolist()
        return [ids[0, a:b].tolist() for a, b in pairwise(ends)]
    return [row[mask.bool()].tolist() for row, mask in zip(ids, part.inputs["attention_mask"])]  # noqa: B905


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [10_000, 40, 25, 1])
def test_every_sample_comes_once_with_what_belongs_to_it(packed, max_tokens):
    passes = passes_of(packed, max_tokens)
    source = sequences(LENGTHS, 2)
    wanted = [part.tolist() for part in source.fields["input_ids"].split(LENGTHS)]
    ids = [2, 0, 2, 0, 3, 0]  # in no order, task 1 absent
    weights = torch.rand(SAMPLES)
    seen = []
    for part in passes(batch_of(ids, weights=weights)):
        samples = (part.targets // 10).tolist()
        seen += samples
        assert part.task_ids.tolist() == sorted(ids[s] for s in samples)
        assert part.task_ids.tolist() == [ids[s] for s in samples]
        assert torch.bincount(part.task_ids).tolist() == list(part.counts)
        assert torch.equal(part.weights, weights[samples])
        assert part.collate is None
        assert tokens_of(part, passes) == [wanted[2 * s + c] for s in samples for c in (0, 1)]
        if packed:
            sizes = [LENGTHS[2 * s] + LENGTHS[2 * s + 1] for s in samples]
            assert part.lengths == tuple(sizes)
            lengths = [n for s in samples for n in LENGTHS[2 * s : 2 * s + 2]]
            wanted_positions = [2 + i for n in lengths for i in range(n)]
            assert part.inputs["position_ids"][0].tolist() == wanted_positions
        assert part.inputs["input_ids"].numel() <= max_tokens or len(samples) == 1
    assert sorted(seen) == list(range(SAMPLES))
    assert passes.tokens == sum(LENGTHS)
    assert (passes.padding == 0) == packed


@pytest.mark.parametrize(
    ("max_tokens", "sizes"),
    [(58, [58]), (40, [31, 27]), (30, [17, 22, 19]), (1, [7, 10, 14, 8, 8, 11])],
)
def test_packed_passes_are_few_and_about_equal(max_tokens, sizes):
    passes = passes_of(True, max_tokens)
    assert [sum(part.lengths) for part in passes(batch_of([0] * SAMPLES))] == sizes


def test_similar_lengths_are_padded_together():
    passes = passes_of(False, 40)
    widths = [part.inputs["input_ids"].shape[1] for part in passes(batch_of([0] * SAMPLES))]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 12 and widths[-1] < 12
    several = passes.padding
    whole = passes_of(False)
    list(whole(batch_of([0] * SAMPLES)))
    assert several < whole.padding == 12 * 12 - sum(LENGTHS)


def test_other_fields_come_along():
    source = sequences(LENGTHS)
    types = torch.arange(sum(LENGTHS))
    source = Sequences({**source.fields, "token_type_ids": types}, source.starts, 2)
    for packed in (True, False):
        passes = SequencePasses(
            source, packed=packed, max_tokens=1000, pad_token_id=PAD, position_offset=0
        )
        (part,) = passes(batch_of([0] * SAMPLES))
        got = part.inputs["token_type_ids"]
        real = part.inputs.get("attention_mask", torch.ones_like(got)).bool()
        assert sorted(got[real].tolist()) == types.tolist()
        assert not got[~real].any()


def test_a_loader_of_numbers_gives_all_samples():
    ids = torch.tensor([0, 0, 1, 1, 1, -1])
    numbers = torch.arange(SAMPLES)
    passes = passes_of(True, 25)
    loader = RoundLoader(numbers, numbers * 10, ids, batch_size=2, collate=passes)
    seen = [t for batch in loader for part in batch.passes() for t in part.targets.tolist()]
    assert sorted(seen) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "numbers of its samples, int64"),
        ({"x": torch.zeros(2)}, TypeError, "got dict"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "must be on the CPU"),
    ],
)
def test_other_inputs_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        list(passes_of(True)(Batch(inputs, torch.zeros(2), torch.zeros(2).long())))


def test_taking_samples_keeps_their_sequences():
    source = sequences(LENGTHS, 2)
    assert len(source) == SAMPLES
    some = source.take(torch.tensor([4, 1]))
    assert some.lengths.tolist() == [[4, 4], [9, 1]]
    parts = source.fields["input_ids"].split(LENGTHS)
    want = torch.cat([parts[8], parts[9], parts[2], parts[3]])
    assert torch.equal(some.fields["input_ids"], want)
    assert len(source.take(torch.tensor([], dtype=torch.int64))) == 0


IDS = torch.arange(6)


@pytest.mark.parametrize(
    ("fields", "starts", "per_sample", "error", "message"),
    [
        ({"ids": IDS}, [0, 6], 1, ValueError, r"must have 'input_ids', got \['ids'\]"),
        ({"input_ids": IDS.float()}, [0, 6], 1, TypeError, "must be int32 or int64 with one"),
        ({"input_ids": [1, 2]}, [0, 2], 1, TypeError, "must be a tensor, got list"),
        ({"input_ids": IDS}, [0, 5], 1, ValueError, "as many tokens as starts says, 5, got 6"),
        ({"input_ids": IDS}, [0, 3, 3, 6], 1, ValueError, "ascend strictly"),
        ({"input_ids": IDS}, [1, 6], 1, ValueError, "start at 0"),
        ({"input_ids": IDS}, [0, 2, 4, 6], 2, ValueError, "2 sequences per sample, got 3"),
        ({"input_ids": IDS}, [0, 6], 0, ValueError, "per_sample must be an int >= 1"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(fields, starts, per_sample, error, message):
    with pytest.raises(error, match=message):
        Sequences(fields, torch.tensor(starts), per_sample)


@pytest.mark.filterwarnings("error:sample order")
@pytest.mark.parametrize("packed", [True, False])
def test_layers_know_that_the_sequences_of_a_sample_come_together(packed):
    (part,) = passes_of(packed)(batch_of([2, 0, 2, 0, 3, 0]))
    layer = MultiTaskLoRALinear(4, 3, num_tasks=4, rank=1)
    with tasks(part.task_ids, counts=part.counts, lengths=part.lengths):
        layer(torch.randn(2 * SAMPLES, 1, 4))  # as of first tokens
    with tasks(part.task_ids.clone()), pytest.raises(UserWarning, match="sample order"):
        layer(torch.randn(2 * SAMPLES, 1, 4))
