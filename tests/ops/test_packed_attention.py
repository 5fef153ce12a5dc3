"""Attention within sequences, against torch's own with a mask, and against its specification."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metalora import ops, reference
from metalora._library import build_info
from tests.ops.problems import relative_error
from tests.pairs import every_pair

F64 = torch.float64
LENGTHS = {
    "ragged": [5, 1, 33, 9, 0, 2, 70, 1, 17],
    "one": [40],
    "equal": [16] * 4,
    "short": [1, 1, 2],
    "long": [130, 65],
    "none": [],
    "only empty": [0, 0],
}


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def problem(
    lengths: list[int], heads: int, d: int, dtype: torch.dtype = F64, key_heads: int | None = None
) -> list[Tensor]:
    """Query, key, value and a gradient of the output."""
    torch.manual_seed(sum(lengths) + d)
    shape = (4, sum(lengths), heads, d)
    query, key, value, grad = (2 * torch.randn(shape)).to(dtype).unbind()
    return [query, key[:, :key_heads], value[:, :key_heads], grad]


def plain_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention over all tokens in plain PyTorch, which hides those of other sequences."""
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    age = torch.arange(len(of))[:, None] - torch.arange(len(of))
    mask = (of[:, None] == of) & (age >= 0) & (age < (len(of) + 1 if window is None else window))
    group = query.shape[1] // key.shape[1]
    q, k, v = (part.transpose(0, 1) for part in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = 0.1 * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return (weights @ v).transpose(0, 1)


def masked(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """torch's attention over all tokens, which hides those of other sequences."""
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    mask = of[:, None] == of
    return F.scaled_dot_product_attention(*parts, mask, scale=scale)[0].transpose(0, 1)


def with_gradients(function, *tensors: Tensor) -> list[Tensor]:
    *inputs, grad = tensors
    inputs = [part.detach().requires_grad_() for part in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


@every_pair(
    lengths=LENGTHS,
    size=[(1, 1), (3, 5), (2, 8), (4, 32), (2, 50), (1, 64)],
    dtype=[F64, torch.float32, torch.bfloat16, torch.float16],
    scale=[None, 0.3],
)
def test_agrees_with_masked_attention(lengths, size, dtype, scale):
    lengths = LENGTHS[lengths]
    given = problem(lengths, *size, dtype)
    copies = [part.clone() for part in given]
    ends, factor = ends_of(lengths), size[1] ** -0.5 if scale is None else scale
    got = with_gradients(lambda *qkv: ops.packed_attention(*qkv, ends, scale=scale), *given)
    plain = with_gradients(lambda *qkv: masked(*qkv, lengths, factor), *given)
    exact = with_gradients(
        lambda *qkv: masked(*qkv, lengths, factor), *(part.double() for part in given)
    )
    for ours, usual, right in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        limit = 1e-12
        if dtype != F64:
            limit = max(2 * relative_error(usual, right), 2 * torch.finfo(dtype).eps)
        assert relative_error(ours, right) <= limit
    assert all(torch.equal(*pair) for pair in zip(given, copies, strict=True))


@every_pair(
    lengths=LENGTHS,
    heads=[(4, 4), (4, 2), (3, 1)],
    d=[1, 5, 32, 50],
    dtype=[F64, torch.float32, torch.bfloat16, torch.float16],
    window=[None, 1, 7, 40],
    softcap=[None, 0.5, 30.0],
)
def test_causal_attention_agrees_with_plain_pytorch(lengths, heads, d, dtype, window, softcap):
    lengths, (many, few) = LENGTHS[lengths], heads
    given = problem(lengths, many, d, dtype, few)
    ends, options = ends_of(lengths), {"causal": True, "window": window, "softcap": softcap}
    got = with_gradients(
        lambda *qkv: ops.packed_attention(*qkv, ends, scale=0.1, **options), *given
    )
    plain = with_gradients(lambda *qkv: plain_causal(*qkv, lengths, window, softcap), *given)
    exact = with_gradients(
        lambda *qkv: plain_causal(*qkv, lengths, window, softcap),
        *(part.double() for part in given),
    )
    for ours, usual, right in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        limit = 1e-12
        if dtype != F64:
            limit = max(2 * relative_error(usual, right), 2 * torch.finfo(dtype).eps)
        assert relative_error(ours, right) <= limit


@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("window", [None, 3])
def test_causal_dropout_is_that_of_the_specification_and_gradcheck(window, softcap):
    lengths, seed = LENGTHS["ragged"], torch.tensor(11)
    options = {"causal": True, "window": window, "softcap": softcap}
    given, ends = problem(lengths, 4, 12, F64, 2), ends_of(lengths)
    got = with_gradients(
        lambda *qkv: ops.packed_attention(*qkv, ends, scale=0.4, dropout_p=0.3, seed=11, **options),
        *given,
    )
    seen = 10**9 if window is None else window
    want = with_gradients(
        lambda *qkv: reference.packed_attention(*qkv, ends, 0.4, 0.3, seed, seen, softcap or 0.0),
        *given,
    )
    for ours, right in zip(got, want, strict=True):
        assert relative_error(ours, right) <= 1e-12
    few = [part.detach().requires_grad_() for part in problem([3, 1, 5], 2, 3, F64, 1)[:3]]

    def function(*qkv: Tensor) -> Tensor:
        return ops.packed_attention(*qkv, ends_of([3, 1, 5]), dropout_p=0.2, seed=5, **options)

    assert torch.autograd.gradcheck(function, few)
    assert torch.autograd.gradgradcheck(function, few)


@every_pair(lengths=["ragged", "short", "long"], dtype=[F64, torch.float32], p=[0.1, 0.6])
def test_dropout_is_that_of_the_specification(lengths, dtype, p):
    lengths = LENGTHS[lengths]
    given, ends, seed = problem(lengths, 3, 12, dtype), ends_of(lengths), torch.tensor(2**40 + 7)
    got = with_gradients(
        lambda *qkv: ops.packed_attention(*qkv, ends, scale=0.4, dropout_p=p, seed=seed), *given
    )
    want = with_gradients(
        lambda *qkv: reference.packed_attention(*qkv, ends, 0.4, p, seed),
        *(part.double() for part in given),
    )
    for ours, right in zip(got, want, strict=True):
        assert relative_error(ours, right) <= (1e-12 if dtype == F64 else 3e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_with_a_seed_each_a_sequence_has_the_mask_that_it_has_alone(causal):
    lengths = LENGTHS["ragged"]
    given, options = problem(lengths, 4, 12, F64, 2), {"causal": causal, "dropout_p": 0.4}
    seeds = torch.randint(2**63 - 1, (2 * len(lengths),))[::2]  # not contiguous
    got = with_gradients(
        lambda *qkv: ops.packed_attention(*qkv, ends_of(lengths), seed=seeds, **options), *given
    )
    want = with_gradients(
        lambda *qkv: reference.packed_attention(
            *qkv, ends_of(lengths), 12**-0.5, 0.4, seeds, 10**9 if causal else 0
        ),
        *given,
    )
    parts = zip(*(tensor.split(lengths) for tensor in given), strict=True)
    alone = [
        with_gradients(
            lambda *qkv, n=n, seed=seed: ops.packed_attention(
                *qkv, ends_of([n]), seed=seed, **options
            ),
            *part,
        )
        for part, n, seed in zip(parts, lengths, seeds, strict=True)
    ]
    for i, (ours, right) in enumerate(zip(got, want, strict=True)):
        assert relative_error(ours, right) <= 1e-12
        assert torch.equal(ours, torch.cat([found[i] for found in alone]))


def test_dropout_drops_each_weight_with_its_probability():
    lengths, p = [96] * 8, 0.3
    ones = torch.ones(sum(lengths), 2, 96)
    weights = ops.packed_attention(  # values are unit vectors, so that outputs are the weights
        0 * ones, ones, torch.eye(96).repeat(8, 1)[:, None].expand_as(ones).contiguous(),
        ends_of(lengths), dropout_p=p, seed=1,
    )  # fmt: skip
    kept = weights != 0
    assert torch.allclose(weights[kept], torch.tensor(1 / 96 / (1 - p)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * deviation
    for dim in (0, 2):  # every token and every place is dropped as often
        shares = kept.float().mean([i for i in range(3) if i != dim])
        assert float((shares - (1 - p)).abs().max()) < 0.2


def test_draws_its_seed_from_torch_and_repeats_bit_for_bit():
    lengths = LENGTHS["ragged"]
    given, ends = problem(lengths, 2, 8, torch.float32), ends_of(lengths)

    def run():
        return with_gradients(lambda *qkv: ops.packed_attention(*qkv, ends, dropout_p=0.5), *given)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    lengths = [3, 1, 4]
    given = [part.requires_grad_() for part in problem(lengths, 2, 3)[:3]]

    def function(*qkv: Tensor) -> Tensor:
        return ops.packed_attention(*qkv, ends_of(lengths), dropout_p=dropout_p, seed=5)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)
    for i in range(3):
        alone = [part.detach().requires_grad_(i == j) for j, part in enumerate(given)]
        assert torch.autograd.gradcheck(function, alone)
        assert torch.autograd.gradgradcheck(function, alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_sequence(bad, dtype):
    lengths = [6, 20, 3]
    for part in range(3):
        given = problem(lengths, 2, 8, dtype)
        clean = with_gradients(lambda *qkv: ops.packed_attention(*qkv, ends_of(lengths)), *given)
        given[part][7, 1, 2] = bad
        got = with_gradients(lambda *qkv: ops.packed_attention(*qkv, ends_of(lengths)), *given)
        for before, after in zip(clean, got, strict=True):
            assert torch.equal(before[:, 0], after[:, 0])
            others = [i for i in range(29) if not 6 <= i < 26]
            assert torch.equal(before[others], after[others])
        want = reference.packed_attention(*given[:3], ends_of(lengths), 8**-0.5)
        assert torch.equal(got[0].isfinite(), want.isfinite())
        assert not all(part.isfinite().all() for part in got)


def test_large_scores_and_strided_inputs():
    lengths = [9, 30]
    wide = 300 * torch.randn(39, 3, 2, 8)  # as one layer gives for query, key and value
    parts = wide.unbind(1)
    got = ops.packed_attention(*parts, ends_of(lengths), scale=1.0)
    want = masked(*(part.double() for part in parts), lengths, 1.0)
    assert relative_error(got, want) < 1e-6


def test_casts_under_autocast_and_keeps_no_scores():
    given = [part.requires_grad_() for part in problem([300], 2, 16, torch.float32)[:3]]
    given[0] = given[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.packed_attention(*given, ends_of([300]))
    assert output.dtype == torch.bfloat16
    assert max(saved.numel() for saved in output.grad_fn.saved_tensors if saved is not None) <= 9600


@pytest.mark.usefixtures("native")
def test_compiles_whole():
    torch._dynamo.reset()
    given, ends = problem([4, 9], 2, 8, torch.float32), ends_of([4, 9])
    compiled = torch.compile(ops.packed_attention, backend="aot_eager", fullgraph=True)
    got = with_gradients(lambda *qkv: compiled(*qkv, ends), *given)
    want = with_gradients(lambda *qkv: ops.packed_attention(*qkv, ends), *given)
    torch.testing.assert_close(got, want)
    torch.library.opcheck(
        torch.ops.metalora.packed_attention.default, (*given[:3], ends, 0.3, 0.0, None, 0, 0.0)
    )


def test_function_transforms_take_plain_pytorch():
    query, key, value, _ = problem([4, 2], 2, 3)
    ends = ends_of([4, 2])
    many = torch.stack([query, 2 * query])
    got = torch.func.vmap(lambda q: ops.packed_attention(q, key, value, ends))(many)
    torch.testing.assert_close(got[1], ops.packed_attention(2 * query, key, value, ends))


CODE = """
import sys, torch
from tests.ops.test_packed_attention import results
torch.save(results(), sys.argv[1])
"""


def results() -> list[Tensor]:
    found = []
    for dtype in (F64, torch.float32, torch.bfloat16):
        for size in ((2, 5), (1, 64), (2, 48)):
            given, ends = problem(LENGTHS["ragged"], *size, dtype), ends_of(LENGTHS["ragged"])
            found += with_gradients(
                lambda *qkv, ends=ends: ops.packed_attention(*qkv, ends, dropout_p=0.2, seed=9),
                *given,
            )
            found += with_gradients(
                lambda *qkv, ends=ends: ops.packed_attention(
                    *qkv, ends, causal=True, window=20, softcap=3.0
                ),
                *problem(LENGTHS["ragged"], *size, dtype, 1),
            )
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_results(isa, tmp_path):
    if isa == build_info()["instructions"]:
        pytest.skip("this process has it")
    file = tmp_path / "found.pt"
    subprocess.run(
        [sys.executable, "-c", CODE, str(file)],
        env={**os.environ, "METALORA_CPU_ISA": isa},
        cwd=Path(__file__).resolve().parents[2],
        check=True,
        timeout=120,
    )
    for other, here in zip(torch.load(file), results(), strict=True):
        limit = {F64: 1e-12, torch.float32: 1e-5}.get(here.dtype, 2e-2)
        assert relative_error(other, here.double()) <= limit


X = torch.zeros(4, 2, 3)
ENDS = ends_of([1, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], X, X, ENDS), ValueError, "query must be [N, heads, d]"),
        (
            (X, X[:, :0], X[:, :0], ENDS),
            ValueError,
            "query must have a multiple of the heads of key",
        ),
        ((X, X[1:], X, ENDS), ValueError, "key must be [N=4, key_heads, d=3], got [3, 2, 3]"),
        ((X, X, X.double(), ENDS), TypeError, "value must"),
        ((X, X, X, ENDS.long()), TypeError, "ends must be an int32 tensor [S+1] on the CPU, got"),
        ((X, X, X, [0, 4]), TypeError, "got list"),
        ((X, X, X, ends_of([1, 2])), ValueError, "ends must ascend from 0 to N=4, got [0, 1, 3]"),
        ((X, X, X, ENDS.flip(0)), ValueError, "ends must ascend from 0 to N=4"),
        ((X, X, X, ENDS[:0]), ValueError, "ends must ascend from 0 to N=4"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        ops.packed_attention(*arguments)
    assert str(caught.value).startswith("packed_attention: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "window needs causal=True, got window=3 without"),
        ({"window": 0, "causal": True}, "window must be an int >= 1, got 0"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0, got 0.0"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=f"^packed_attention: {re.escape(message)}"):
        ops.packed_attention(X, X, X, ENDS, **options)


def test_dropout_must_be_a_probability():
    with pytest.raises(ValueError, match=r"packed_attention: dropout_p must be in \[0, 1\)"):
        ops.packed_attention(X, X, X, ENDS, dropout_p=1.0)


@pytest.mark.parametrize("seed", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_seeds_must_be_one_or_one_for_each_sequence(seed):
    message = (
        "packed_attention: seed must be an int or an int64 scalar tensor or one of [S=2], got "
        f"{seed.dtype} of shape {list(seed.shape)}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ops.packed_attention(X, X, X, ENDS, dropout_p=0.5, seed=seed)
