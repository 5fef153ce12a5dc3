"""Rounds of the language experiment: every version computes the same, and is told apart from
those that do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import language
from benchmarks.lib import operators, step_versions
from benchmarks.lib.cases import PRECISIONS, Options
from benchmarks.lib.dialogues import AT, CANDIDATES, UTTERANCE, Turns, drawn
from benchmarks.lib.encoders import new_model
from benchmarks.lib.gate import GateError
from benchmarks.lib.measure import Budget
from benchmarks.lib.step_versions import (
    AT_ONCE,
    AUTHORS,
    PACKED,
    PEFT,
    SORTED,
    TO_THE_BATCH,
    TOLERANCE,
    Gate,
    Setting,
    language_lora,
    language_setting,
    shortest_turns,
    versions,
)
from metalora.adapters import LoRAConfig, adapt
from metalora.hf import Sequences
from metalora.meta import Batch, RoundLoader

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
pytest.importorskip("peft")

# Two tasks with three turns of four candidates.
LENGTHS = torch.tensor([[3, 5], [4, 4], [8, 2], [6, 6], [2, 2], [3, 4]]).repeat(1, 2)


@pytest.fixture
def turns() -> Turns:
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.flatten().cumsum(0)])
    tokens = torch.randint(5, 100, (int(starts[-1]),))
    task_ids = torch.tensor([0, 0, 0, 1, 1, 1])
    answers = torch.tensor([0, 3, 1, 2, 2, 1])
    return Turns(Sequences({"input_ids": tokens}, starts, 4), answers, task_ids, "made up")


@pytest.fixture
def setting(turns: Turns) -> Setting:
    rounds = RoundLoader(
        torch.arange(6), turns.answers, turns.task_ids, batch_size=2, shuffle=False, max_rounds=1
    )
    return language_setting(new_model("tiny"), turns, rounds, 48, "cpu", language_lora())


def test_all_versions_pass_the_gate_and_have_all_columns(setting: Setting) -> None:
    found = language.benchmark(setting, "made up", "its name", "bf16")
    options = Options(tuple(found.versions["all"]))
    fp32 = PRECISIONS["fp32"]
    record = operators.measure_case(found, found.cases[0], fp32, options, Budget())
    records = record["rows"]
    assert list(records) == [*language.FULL, *language.SHORT] and len(records) == 10
    assert record["work"]["amounts"] == {"round": 64}
    for name, record in records.items():
        short = name.endswith("bf16")
        assert record["precision"] == ("bf16" if short else "fp32")
        assert 0 < record["error"] < (TOLERANCE["bf16"] if short else 1e-5)
        assert short == (record["error"] > 1e-4)
        total = record["total"]
        assert total["low"] <= total["median"] <= total["high"]
        assert record["peak_bytes"] > 2**16
        assert record["relative"] == total["median"] / records[AUTHORS]["total"]["median"]
    # Of the round's 64 tokens: the longest are 8 and 6 in the tasks, 5 and 6 in the round.
    places = {
        AUTHORS: 8 * 8 + 8 * 6,
        PEFT: 8 * 8 + 8 * 6,
        f"{AUTHORS}, bf16": 8 * 8 + 8 * 6,
        TO_THE_BATCH: 8 * 5 + 8 * 6,
        AT_ONCE: 16 * 6,
        SORTED: 8 * 6 + 8 * 4,
        PACKED: 64,
    }
    for name, count in places.items():
        assert records[name]["padding"] == pytest.approx(1 - 64 / count)


def test_all_versions_of_a_causal_model_pass_the_gate() -> None:
    settings = language.Settings(model="llama-tiny", tasks=2, turns=2, rounds=1, max_tokens=100)
    setting, source = language.make_setting(settings)
    found = language.benchmark(setting, source, "its name", "bf16")
    assert found.title.startswith("Rounds of LoRA-ML, a causal model, lengths drawn")
    check, makers = Gate(setting), versions(setting)
    for name in found.versions["all"]:
        error = check(name, makers[name]())
        assert 0 < error < (TOLERANCE["bf16"] if name.endswith("bf16") else 1e-5)
    few = setting.few
    assert int(setting.rounds.num_tasks) == 2 and few.counts == (1, 1)
    with pytest.raises(ValueError, match="argument --data: is for encoders"):
        language.Settings(model="llama-tiny", data=Path(), tokenizer="some")


def the_next_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a packed sequence predicts the first of the next one."""
    right = step_versions.next_token_loss

    def wrong(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        if "packing" not in batch.inputs:
            return right(logits, batch)
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1], batch.inputs["input_ids"][0, 1:], reduction="none"
        )
        parts = losses.split([*batch.lengths[:-1], batch.lengths[-1] - 1])
        return torch.stack([part.mean() for part in parts])

    monkeypatch.setattr(language, "next_token_loss", wrong)


def test_a_wrong_loss_of_packed_sequences_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    the_next_sequence(monkeypatch)
    settings = language.Settings(model="llama-tiny", tasks=2, turns=2, rounds=1)
    setting, _ = language.make_setting(settings)
    check, makers = Gate(setting), versions(setting)
    assert check(SORTED, makers[SORTED]()) < 1e-5
    with pytest.raises(GateError, match="has a relative error"):
        check(PACKED, makers[PACKED]())


def other_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        step_versions, "adapt", lambda model, config, tasks: adapt(model, changed(config), tasks)
    )


def changed(config: LoRAConfig) -> LoRAConfig:
    return replace(config, alpha=17)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_versions.padded

    def wrong(*arguments: object) -> dict[str, torch.Tensor]:
        inputs = right(*arguments)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}

    monkeypatch.setattr(step_versions, "padded", wrong)


def one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_versions.peft
    monkeypatch.setattr(
        step_versions, "peft", lambda *a: replace(right(*a), select=lambda task: None)
    )


def frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_versions.peft

    def wrong(*arguments):
        what = right(*arguments)
        for name, parameters in what.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_("lora" in name or "classifier" in name)
        return what

    monkeypatch.setattr(step_versions, "peft", wrong)


def head_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_versions.peft

    def wrong(*arguments):
        what = right(*arguments)
        kept = {n: p for n, p in what.parameters.items() if "classifier" not in n}
        return replace(what, parameters=kept)

    monkeypatch.setattr(step_versions, "peft", wrong)


@pytest.mark.parametrize(
    ("name", "plant", "message"),
    [
        (PACKED, other_alpha, "has a relative error"),
        (AT_ONCE, no_mask, "has a relative error"),
        (PEFT, one_adapter, "has a relative error"),
        (PEFT, frozen_weights, r"weight has a relative error of 1\.0e\+00"),
        (PEFT, head_left_out, "not the same parameters: classifier"),
    ],
)
def test_a_wrong_version_does_not_pass_the_gate(
    name: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    message: str,
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = Gate(setting)
    check.plainest(plain=False, precision="fp64")
    plant(monkeypatch)
    with pytest.raises(GateError, match=message):
        check(name, versions(setting)[name]())


def test_the_gate_compares_the_shortest_turn_of_each_task(turns: Turns) -> None:
    few = shortest_turns(turns)
    assert few.inputs.tolist() == [0, 4] and few.counts == (1, 1)
    assert few.targets.tolist() == turns.answers[few.inputs].tolist()


def test_drawn_lengths_are_like_those_of_the_dialogues() -> None:
    turns = drawn(10, 30522)
    again, other = drawn(10, 30522), drawn(10, 30522, seed=1)
    lengths = turns.sequences.lengths
    assert torch.equal(lengths, again.sequences.lengths)
    assert lengths.shape[1] == CANDIDATES and lengths.shape != other.sequences.lengths.shape
    # Measured on the 20 largest tasks of ConvAI2's validation split: 109 tokens on average, 252 at
    # most in a task.
    assert 100 < lengths.double().mean() < 120
    assert 215 < sum(turns.longest) / 10 < 290
    candidates = lengths - lengths.amin(1, keepdim=True)
    assert candidates.max() <= UTTERANCE[-1] - UTTERANCE[0] and len(AT) == len(UTTERANCE)
    assert turns.answers.min() >= 0 and turns.answers.max() == CANDIDATES - 1
    assert torch.bincount(turns.task_ids).min() >= 20 * 7


def test_the_command_writes_its_table(
    turns: Turns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "drawn", lambda tasks, vocabulary: turns)
    with pytest.raises(SystemExit) as ended:
        language.main(["--smoke", "--write", str(tmp_path), "--name", "rounds"])
    assert not ended.value.code
    record = json.loads((tmp_path / "rounds.json").read_text())
    assert len(record["rows"][0]["rows"]) == 7 and record["machine"]["torch"]
    assert record["command"] == (
        "python -m benchmarks.language --smoke --write benchmarks/results --name rounds"
    )
    page = (tmp_path / "rounds.md").read_text()
    assert "| padding | peak memory, MiB | rate |" in page and "tokens/s |" in page
    assert "| tiny, 2 tasks of 1 turns | fp32 | + packed |" in page


def test_real_dialogues_are_read(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALORA_CACHE", str(tmp_path))
    files = [shared_data / "convai2", shared_data / "roberta_tokenizer"]
    settings = language.Settings(
        model="tiny", tasks=2, turns=1, rounds=1, data=files[0], tokenizer=str(files[1])
    )
    setting, source = language.make_setting(settings)
    assert setting.rounds.num_tasks == 2 and source == "dialogues of convai2"
    assert 40 < setting.work[1] / (2 * CANDIDATES) < 250
    assert setting.model.config.vocab_size == 50265
