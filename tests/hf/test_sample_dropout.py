"""Models of transformers with dropout: several processes train as one does, packed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalora.adapters import LoRAConfig
from metalora.hf import SequencePasses, Sequences, enable_packing, position_offset
from metalora.hf.attention import Packing, packed_attention
from metalora.meta import (
    RoundLoader,
    TrainConfig,
    causal_lm_losses,
    lora_ml,
    mean_token_loss,
)
from metalora.nn import sample_dropout
from tests.hf.models import PAD, decoder, roberta, sequences
from tests.meta.test_distribution import Weights
from tests.processes import needs_gloo, run_processes

pytest.importorskip("transformers", reason="needs the package transformers")

P = 0.25
LENGTHS = [5, 9, 3, 7, 2, 11, 4, 6, 8, 3, 5, 10, 2, 6]
TASKS = torch.arange(14) % 3
DECODERS = {
    "MistralForCausalLM": {"attention_dropout": P},
    "GPT2LMHeadModel": {"attn_pdrop": P, "resid_pdrop": P, "embd_pdrop": P},
}


def encoder() -> tuple[nn.Module, Sequences, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    model = roberta(hidden_dropout_prob=P, attention_probs_dropout_prob=P)
    return model, sequences(LENGTHS), torch.arange(14) % 2, {}


def causal(name: str) -> tuple[nn.Module, Sequences, Tensor, dict[str, Any]]:
    found = sequences(LENGTHS)
    fields = {"input_ids": found.fields["input_ids"], "labels": found.fields["input_ids"]}
    calls = {"forward": causal_lm_losses, "loss": mean_token_loss}
    numbers = torch.arange(14)
    return decoder(name, **DECODERS[name]), Sequences(fields, found.starts), numbers, calls


def trained(name: str, packed: bool, parallel: str) -> list[Any]:
    model, given, targets, calls = causal(name) if name in DECODERS else encoder()
    if packed:
        enable_packing(model)
    passes = SequencePasses(
        given,
        packed=packed,
        max_tokens=25,  # a batch of all has several passes, and each process's part has others
        pad_token_id=PAD,
        position_offset=position_offset(model),
    )
    rounds = RoundLoader(torch.arange(14), targets, TASKS, batch_size=3, seed=0, collate=passes)
    lora = LoRAConfig(rank=2, dropout=P, target_modules="all-linear")
    config = TrainConfig(epochs=1, lr=0.02, optimizer="sgd", parallel=parallel)
    weights = Weights()
    lora_ml(model, rounds, config, lora, callbacks=[weights], **calls)
    return weights.seen


NAMES = ["roberta", *DECODERS]


def every_case() -> dict[tuple[str, bool, str], list[Any]]:
    return {
        (name, packed, parallel): trained(name, packed, parallel)
        for name in NAMES
        for packed in (True, False)
        for parallel in ("data", "tasks")
    }


@pytest.mark.slow
@needs_gloo
def test_several_processes_equal_one() -> None:
    one = every_case()
    for processes in (2, 3):
        for rank, own in enumerate(run_processes(every_case, processes, seconds=120)):
            for case, wanted in one.items():
                for step, (ours, theirs) in enumerate(zip(own[case], wanted, strict=True)):
                    where = f"{case}, step {step}, process {rank} of {processes}"
                    pairs = [(ours[0], theirs[0])]
                    for part in (1, 2):
                        pairs += [(value, theirs[part][key]) for key, value in ours[part].items()]
                    for found, right in pairs:
                        assert float((found - right).detach().abs().max()) <= 1e-10, where


@pytest.mark.parametrize("per_sample", [1, 2])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_sample_has_the_same_attention_in_any_packing(blocks: bool, per_sample: int) -> None:
    lengths = [3, 6, 2, 2, 5, 1]
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, n, 4, dtype=torch.float64) for n in lengths]

    def attended(samples: list[int]) -> list[Tensor]:
        chosen = [s * per_sample + i for s in samples for i in range(per_sample)]
        x = torch.cat([parts[i] for i in chosen], 2)
        rows = [lengths[i] for i in chosen]
        packing = Packing.of(rows, x.device, padded=blocks)
        torch.manual_seed(5)
        whole = torch.tensor(rows).view(-1, per_sample).sum(1).tolist()
        with sample_dropout(torch.tensor(samples), whole):
            found = packed_attention(x, x, x, packing, dropout=0.4, causal=True)
        return list(found[0].split(whole))

    every = list(range(len(lengths) // per_sample))
    wanted = attended(every)
    for samples in (every[1:], every[-1:], every[::-2]):
        for sample, found in zip(samples, attended(samples), strict=True):
            torch.testing.assert_close(found, wanted[sample], rtol=0, atol=1e-12)
    alone = packed_attention(
        *[torch.cat(parts, 2)] * 3, Packing.of(lengths, wanted[0].device), causal=True
    )
    assert not torch.allclose(torch.cat(wanted), alone[0])
