"""The common start of the language experiment, and the switches of its ablations."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.language.data import data_folder, fingerprints, load, load_pooled
from experiments.language.dialogues import Dialogue, Turn
from experiments.language.encoders import checksums
from experiments.language.run import LANGUAGE, load_corpus
from experiments.language.settings import LanguageSettings, StartSettings
from experiments.language.start import (
    LANGUAGE_START,
    MODEL,
    SAVE,
    SEEN,
    Start,
    results_table,
    table,
)
from experiments.language.summary import BEFORE, BEST, METRICS, tables
from experiments.language.trials import Trials, fewer_candidates
from experiments.lib.errors import DataError, RunError
from experiments.lib.manifest import MANIFEST
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.training import load_weights
from experiments.lib.units import UNITS
from tests.experiments.retraining import language, language_settings


def start_settings(**given: Any) -> StartSettings:
    small: dict[str, Any] = {"candidates": 3, "train_candidates": 2, "turns": 1, "device": "cpu"}
    return StartSettings(**{**small, "packed": False, "dialogues": 30, **given}, smoke=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    LANGUAGE_START.run(start_settings(out=folder, history=1))
    return folder


def rows(folder: RunFolder, metric: str, **labels: str) -> list[float]:
    chosen = [r for r in folder.rows() if r["metric"] == metric]
    return [float(r["value"]) for r in chosen if labels.items() <= r.items()]


def test_every_method_of_every_trial_begins_with_the_start(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = language_settings(start=start, seeds=2, retrain=("none", "standard"), lr=1e-9)
    settings = dataclasses.replace(settings, finetune=("last-layer",), out=tmp_path / "run")
    work = LANGUAGE.prepare(settings)
    assert f"note: --history is None, but 1 in the common start {start}" in work.notes
    plans = [line for line in work.notes if line.startswith("plan: ")]
    assert len(plans) == 2 and plans[0].startswith("plan: 2 retrainings of 1 epochs, each of ")
    assert plans[1].startswith("plan: 4 fine-tunings of 1 epochs")

    trials = language(start=start)
    model = Start.read(start, trials.settings).model
    trials = Trials(trials.settings, trials.corpus, torch.device("cpu"), start=model)
    first, second = (trials.new_model(seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    trained = trials.new_model(0)
    load_weights(trained, start / "weights" / "standard-0.safetensors")
    assert all(torch.equal(v, first[name]) for name, v in trained.state_dict().items())

    folder = LANGUAGE.run(settings)
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert manifest["data"]["model"] == checksums(model=str(model))["model"]
    before = [rows(folder, BEFORE, method=m, trial=t) for m in ("none", "standard") for t in "01"]
    assert before[0] and all(each == before[0] for each in before)  # lr 1e-9 changes nothing


def test_a_start_says_its_accuracy_and_goes_on_where_it_stopped(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"epoch": 0, "loss": 0.5, "validation": 0.25}, {"phase": "retrained"}]
    text = table([*records, {"epoch": 1, "loss": 0.4, "validation": 0.2}], 8, 5.0)
    assert "1    0.5000           25.00 (kept)" in text and "20.00\n" in text
    assert "(chance)                   5.00" in text and "of 8 held-out turns" in text

    run = RunFiles(start, json.loads((start / MANIFEST).read_text()))
    run.manifest["notes"] = {"turns": {"retraining": [1200], "validation": [8]}}
    made = results_table(run)
    (cells,) = made.rows
    assert (cells[0], cells[1], cells[-1]) == ("tiny", "1,200", "33.3")
    assert cells[2] == cells[3] and "on 8 held-out turns" in made.caption

    again = tmp_path / "run"
    shutil.copytree(start, again)
    lines = (again / UNITS).read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["unit"] == SAVE
    (again / UNITS).write_text("".join(lines[:-1]))
    shutil.rmtree(again / MODEL)
    LANGUAGE_START.run(start_settings(out=again, history=1, resume=True))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / MODEL / name).read_bytes() == (start / MODEL / name).read_bytes()


def test_the_held_out_personas_are_not_trained_on(tmp_path: Path) -> None:
    turns = [["how do you do ?", f"i am number {i} ."] for i in range(6)]
    records = [{"cluster": 1, "turns": [turn], "persona": [f"i am {i % 3} ."]} for i, turn in
               enumerate(turns)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    corpus = load_pooled(tmp_path, file="mine.jsonl", held_out=1, per_turn=2)
    (task,) = corpus.retraining
    assert (len(task.train), len(task.held_out), corpus.other_sides) == (4, 1, 1)
    assert fingerprints(task.train).isdisjoint(fingerprints(task.held_out))
    assert corpus.testing == ()
    with pytest.raises(DataError, match="has 6 dialogues, 6 of them to hold out"):
        load_pooled(tmp_path / "mine.jsonl", held_out=6, per_turn=2)
    with pytest.raises(DataError, match=r"no dialogues in .*: none of train_subset.jsonl, "):
        load_pooled(tmp_path, per_turn=2)
    with pytest.raises(DataError, match="is one file; leave out --file"):
        load_pooled(tmp_path / "mine.jsonl", file="mine.jsonl", per_turn=2)


def test_a_dialogue_is_known_from_either_side_and_a_persona_in_either_spelling() -> None:
    def dialogue(*turns: tuple[str, str], persona: tuple[str, ...] = ()) -> Dialogue:
        return Dialogue("here", persona, tuple(Turn(u, (r,), 0) for u, r in turns))

    own = dialogue(("hi", "hello"), ("fine ?", "yes"))
    partners = dialogue(("__SILENCE__", "hi"), ("hello", "fine ?"))
    assert fingerprints([own]) == fingerprints([partners])
    greetings = [dialogue(("hi", response)) for response in ("hello", "hey")]
    assert fingerprints(greetings[:1]).isdisjoint(fingerprints(greetings[1:]))
    one = dialogue(("a", "b"), persona=("i'm old.", "i've a dog"))
    other = dialogue(("c", "d"), persona=("i have a dog .", "i am old"))
    assert len(fingerprints([one]) & fingerprints([other])) == 1


def test_starts_that_cannot_be_used(start: Path, tmp_path: Path) -> None:
    settings = language_settings().resolved("cpu")

    def refused(folder: Path, message: str, **given: Any) -> None:
        with pytest.raises(RunError, match=message):
            Start.read(folder, dataclasses.replace(settings, **given))

    refused(tmp_path / "none", "holds no common start; make one with python -m experiments.lang")
    refused(start, "was trained with --model tiny, this run has minilm", model="minilm")
    refused(start, "with --tokenizer None, this run has other", tokenizer="other")
    broken = tmp_path / "run"
    shutil.copytree(start, broken)
    (broken / SEEN).unlink()
    refused(broken, "is damaged .*; make a new one")
    manifest = json.loads((start / MANIFEST).read_text())
    (broken / MANIFEST).write_text(json.dumps({**manifest, "status": "interrupted"}))
    refused(broken, "is interrupted; finish it with .* --resume --out")
    (broken / MANIFEST).write_text(json.dumps({**manifest, "experiment": "language"}))
    refused(broken, "holds no common start")

    tasks = load_corpus(settings)
    found = Start.read(start, settings)
    found.check_unseen(tasks)
    known = dataclasses.replace(found, seen=fingerprints(tasks.testing[0].held_out[:1]))
    with pytest.raises(RunError, match="was trained on the dialogues or personas of 1 of the "):
        known.check_unseen(tasks)


def test_few_candidates_and_turns() -> None:
    """Few candidates are for training only; few turns are the first ones, with the same lists."""
    turn = Turn("hi", ("a", "b", "c", "d"), 2)
    assert fewer_candidates(turn, 2) == Turn("hi", ("c", "a"), 0)
    assert fewer_candidates(turn, 3) == Turn("hi", ("a", "b", "c"), 2)
    assert fewer_candidates(turn, 4) == turn
    trials = language(candidates=4, train_candidates=2)
    assert (trials.retraining.per_turn, trials.test.per_turn) == (2, 2)
    assert (trials.validation.per_turn, trials.test_held_out.per_turn) == (4, 4)
    whole = language(turns=2)
    first_turns = language(turns=1).test
    tokens = [whole.test.starts[i : i + 4].diff() for i in (0, 6)]  # dialogues have two turns here
    assert torch.equal(torch.cat(tokens), first_turns.starts[:7].diff())
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"--train-candidates: must be at least 2, .*{wrong}"):
            language_settings(candidates=4, train_candidates=wrong)
        with pytest.raises(ValueError, match=f"--train-candidates: must be at least 2, .*{wrong}"):
            start_settings(candidates=4, train_candidates=wrong)


def test_lora_ml_with_one_head_for_all_tasks_trains_it() -> None:
    """And no adapter lies on it: in the plain model only the shared weights are left."""
    own, shared = language(), language(lora_heads="shared")
    assert own.retraining_lora(8) == own.lora(8) == shared.lora(8)
    assert "lora-ml" in own.with_head and list(shared.with_head) == ["last-layer-ml"]
    config = shared.retraining_lora(8)
    assert config.heads == () and list(config.exclude_modules) == list(shared.heads)
    model, result = shared.retrain("lora-ml", 0, rank=8)
    assert not any(name.startswith("classifier") for name in result.adapters[0])
    before, after = shared.new_model(0).state_dict(), model.state_dict()
    assert not torch.equal(before["classifier.dense.weight"], after["classifier.dense.weight"])


def test_test_tasks_that_do_not_depend_on_the_number_of_retraining_tasks() -> None:
    def clusters(**given: Any) -> tuple[list[int], list[int]]:
        with data_folder(None, smoke=True) as folder:
            corpus = load(folder, per_turn=3, test_tasks=2, **given)
        return [t.cluster for t in corpus.retraining], [t.cluster for t in corpus.testing]

    assert clusters(tasks=2) == ([1, 2], [3, 4])
    assert clusters(tasks=2, first_test_task=4) == ([1, 2], [5, 6])
    assert clusters(tasks=4, first_test_task=4) == ([1, 2, 3, 4], [5, 6])
    with pytest.raises(DataError, match=r"--first-test-task must be at least 4, .* got 3"):
        clusters(tasks=4, first_test_task=3)


def test_bad_settings_of_a_start_are_one_clear_line() -> None:
    for kind in (LanguageSettings, StartSettings):
        with pytest.raises(ValueError, match="--history must be an int >= 1, got 0"):
            kind(history=0)
    with pytest.raises(ValueError, match="argument --data: give the folder"):
        LANGUAGE_START.prepare(StartSettings(device="cpu"))
    given = StartSettings().resolved("cpu")
    assert (given.model, given.epochs, given.held_out_dialogues) == ("minilm", 3, 100)
    assert given.language().validation_dialogues == 100


def test_held_out_accuracy_may_be_measured_after_the_last_epoch_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"retrain": ("none",), "finetune": ("last-layer",)}
    given |= {"finetune_epochs": 2, "finetune_lr": 1e-2}
    values = {}
    for every in (1, 2):
        out = tmp_path / str(every)
        folder = LANGUAGE.run(language_settings(**given, evaluate_every=every, out=out))
        values[every] = {m: rows(folder, m) for m in METRICS}
        measured = ["validation" in r for r in folder.records() if r["phase"] == "finetune"]
        assert measured == [every == 1, True]
    assert values[2] == {**values[1], BEST: []} and values[1][BEST]
    assert "epoch 1 of 2, loss 0." in capsys.readouterr().err
    assert "-" in tables(folder.rows(), 5.0)
