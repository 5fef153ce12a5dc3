from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from experiments.language import summary
from experiments.language.encoders import head_names, tiny_roberta, word_tokenizer
from experiments.language.run import LANGUAGE, load_corpus
from experiments.language.settings import LanguageSettings
from experiments.language.summary import COLUMNS, LAST, METRICS
from experiments.language.trials import choice_accuracy, choice_loss
from experiments.lib.training import row
from metalora.adapters import LoRAConfig, adapt, adapted_layers
from metalora.meta import Batch, evaluate, learning_rate
from tests.experiments.retraining import language, language_settings


@pytest.fixture(autouse=True)
def _no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALORA_CACHE", str(tmp_path / "cache"))


def test_what_is_left_out_or_cut_is_said(
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
    monkeypatch.setattr("experiments.language.figures.draw", lambda *_: [])
    LANGUAGE.run(language_settings(**given, validation_dialogues=1, out=tmp_path / "run"))
    without_part, *printed = capsys.readouterr().err.splitlines()
    assert without_part.startswith("note: --batch-size has no effect in this run")
    path = tmp_path / "valid_self_original_no_cands.txt"
    assert printed[:2] == [
        f"note: {path}: 4 dialogues are left out, whose personas match no cluster, first {path}:25",
        "note: retraining: 6 of 6 turns are too long for the model and lose their oldest tokens",
    ]


@pytest.mark.slow
def test_several_ranks_in_one_run(tmp_path: Path) -> None:
    given = {"retrain": ("none", "lora-ml", "last-layer-ml"), "rank": (1, 4)}
    folder = LANGUAGE.run(language_settings(**given, out=tmp_path / "run"))
    lines = summary.summary(folder.rows())
    assert [(line["method"], line["finetune"], line["rank"]) for line in lines] == [
        ("none", "lora", "1"),
        ("none", "lora", "4"),
        ("none", "last-layer", ""),
        ("lora-ml", "lora", "1"),
        ("lora-ml", "lora", "4"),
        ("last-layer-ml", "last-layer", ""),
    ]
    text = summary.tables(folder.rows(), 5.0).splitlines()
    assert [line.split()[2] for line in text[1:7]] == ["1", "4", "-", "1", "4", "-"]
    first, none, lora_ml = text[-3:]
    assert first.split()[-2:] == ["1", "4"]
    assert none.startswith("none ") and lora_ml.startswith("lora-ml ")
    assert none.count("(") == lora_ml.count("(") == 2 and "n/a" not in none  # errors over tasks
    assert summary.table_of_ranks(lines[2:4]) == []
    assert (folder.folder / "accuracy.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["lora", "last-layer"])
def test_fine_tuning_leaves_the_encoder_and_starts_where_it_is_told(kind: str) -> None:
    heads = {}
    for start in ("retrained", "fresh"):
        prepared = language(finetune_head=start, finetune_lr=1e-9)
        model = prepared.new_model(0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        measured = prepared.finetune(model, {"finetune": kind, "rank": 8, "trial": 0})
        assert [m["metric"] for m in measured] == [m for m in METRICS for _ in range(2)]
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

    prepared = language(epochs=epochs, finetune_epochs=epochs)
    cases = [
        (prepared.config(method, 0), 5e-5, sum(batches), 0.1 * 30, 6.67 * 30)
        for method in ("standard", "lora-ml", "last-layer-ml")
    ]
    cases.append((prepared.config("reptile", 0), 1e-4, 10, 0.1 * 10, 6.67 * 10))
    cases += [(prepared.config("lora", 0), 1e-4, b, 0.1 * b, 4 * b) for b in batches]
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
        prepared = language(shared_head=kind, finetune_lr=1e-3, finetune_epochs=4, dropout=0.0)
        model, _ = prepared.retrain("last-layer-ml", 0)
        turns = prepared.retraining

        def metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
            return choice_loss(logits, batch).double()

        loader = prepared.loader(turns, len(turns), shuffle=False)
        losses[kind] = evaluate(model, loader, metric).mean
        encoders[kind] = {k: v for k, v in model.state_dict().items() if "classifier" not in k}
    assert losses["refit"] < losses["mean"]
    assert all(torch.equal(v, encoders["refit"][k]) for k, v in encoders["mean"].items())


def candidates_of(data_seed: int, **given: Any) -> list[list[tuple[str, ...]]]:
    corpus = load_corpus(language_settings(data_seed=data_seed, **given).resolved("cpu"))
    tasks = (*corpus.retraining, *corpus.testing)
    return [[t.candidates for d in task.train for t in d.turns] for task in tasks]


def test_candidates_are_drawn_by_the_data_seed_alone() -> None:
    assert candidates_of(0) == candidates_of(0, first_seed=3) != candidates_of(1)
    cache = Path(os.environ["METALORA_CACHE"])
    tokens = [language(data_seed=seed).test.fields["input_ids"] for seed in (0, 1, 0)]
    assert torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])
    assert len(list(cache.glob("turns-*"))) == 2 * 4  # four parts, each once per data seed


def test_settings_without_a_part_in_the_run_or_beyond_the_data_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.language.figures.draw", lambda *_: [])
    given: dict[str, Any] = {"retrain": ("none",), "finetune": ("last-layer",), "rank": (4,)}
    given |= {"reptile_lr": 1e-3, "adapter_steps": 2, "dialogues": 99, "turns": 50, "history": 99}
    LANGUAGE.run(language_settings(**given, max_length=9999, out=tmp_path / "run"))
    printed = capsys.readouterr().err
    for line in (
        "note: --rank has no effect in this run: it is for lora-ml, lora only\n",
        "note: --batch-size has no effect in this run: it is for lora-ml, last-layer-ml, ",
        "note: --reptile-lr has no effect in this run: it is for reptile only\n",
        "note: --adapter-steps has no effect in this run: it is for lora-ml, last-layer-ml only\n",
        "note: --dialogues 99: the tasks have at most ",
        "note: --turns 50: the dialogues have at most ",
        "note: --history 99: before a response there are at most ",
        "note: --max-length 9999: the model takes at most ",
    ):
        assert line in printed
    assert printed.count("note: ") == 8


def test_packed_and_padded_measure_the_same() -> None:
    labels = {"finetune": "lora", "rank": 8, "trial": 0}
    measured = [
        trials.finetune(trials.new_model(0), labels)[:2]  # before, of both tasks
        for trials in (language(packed=packed) for packed in (True, False))
    ]
    assert measured[0] == measured[1] and measured[0][0]["metric"] == summary.BEFORE


def test_loss_and_accuracy_of_a_choice() -> None:
    torch.manual_seed(0)
    logits, answers = torch.randn(2 * 3, 2, dtype=torch.float64), torch.tensor([2, 0])
    batch = Batch(None, answers, torch.zeros(2, dtype=torch.int64))
    truth = torch.tensor([[0, 0, 1], [1, 0, 0]])
    of_each = F.cross_entropy(logits, truth.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(choice_loss(logits, batch), of_each.mean(1))
    logits[:, 1] = torch.tensor([0.0, 1.0, 2.0, 1.0, 5.0, 0.0])
    assert choice_accuracy(logits, batch).tolist() == [1.0, 0.0]


def test_the_heads_of_bert_and_of_roberta() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = word_tokenizer(["one two three four five six"])
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **small)
    for model, heads in (
        (BertForSequenceClassification(config), ["bert.pooler.dense", "classifier"]),
        (tiny_roberta(tokenizer), ["classifier.dense", "classifier.out_proj"]),
    ):
        assert head_names(model) == heads
        adapt(model, LoRAConfig(rank=2, heads=head_names(model)), 2)
        lora = set(adapted_layers(model)) - set(heads)
        assert len(lora) == 2 * 6 and all(".encoder.layer." in name for name in lora)


def test_defaults_are_the_papers_and_what_is_given_wins() -> None:
    paper = LanguageSettings().resolved("cuda")
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
    assert paper.max_tokens > (LanguageSettings().resolved("cpu").max_tokens or 0)
    given = LanguageSettings(smoke=True, seeds=3, epochs=7, finetune=("lora",)).resolved("cpu")
    assert (given.model, given.seeds, given.epochs, given.precision) == ("tiny", 3, 7, "fp32")
    assert given.finetunes("last-layer-ml") == ("lora",)
    assert paper.finetunes("last-layer-ml") == ("last-layer",)


def test_summary_and_table() -> None:
    def rows(method: str, trials: list[list[float]]) -> list[dict[str, str]]:
        return [
            row(COLUMNS, {"method": method, "finetune": "lora", "rank": "8", "task": str(t)})
            | {"trial": str(n), "metric": m, "value": str(value)}
            for n, values in enumerate(trials)
            for t, value in enumerate(values)
            for m in METRICS
        ]

    found = [*rows("lora-ml", [[0.7, 0.9], [0.9, 1.0]]), *rows("none", [[0.5]])]
    two, one = summary.summary(found)
    assert two[LAST] == pytest.approx((80 + 95) / 2)
    assert two[f"{LAST}_se"] == pytest.approx(7.5)  # |95 - 80| / 2
    assert two["trials"] == 2 and math.isnan(one[f"{LAST}_se"])
    text = summary.tables(found, 5.0)
    assert "87.50 (7.50)" in text and "50.00 (n/a)" in text and " 5.00\n" in text
    first, *_ = summary.by_task(rows("lora-ml", [[0.7, 0.9], [0.9, 1.0]]))
    assert first["task"] == "0" and first[LAST] == pytest.approx(80)


def test_the_table_of_the_retraining_tasks_is_for_one_rank() -> None:
    def retrained(method: str, rank: str, value: str) -> dict[str, str]:
        found = row(COLUMNS, {"method": method, "finetune": "", "rank": rank, "task": ""})
        return found | {"trial": "0", "metric": summary.RETRAINING, "value": value}

    def tuned(rank: str) -> dict[str, str]:
        found = row(COLUMNS, {"method": "standard", "finetune": "lora", "rank": rank, "task": "0"})
        return found | {"trial": "0", "metric": LAST, "value": "0.5"}

    rows = [retrained("standard", "", "0.5"), retrained("lora-ml", "8", "0.6"), tuned("8")]
    table = summary.results_tables(rows)["retraining"]
    assert [r[:3] for r in table.rows] == [
        ["standard", "50.0", ""],
        ["LoRA-ML", "60.0", "+10.0"],
    ]
    assert "retraining" in summary.results_tables(rows[:1])
    assert "retraining" not in summary.results_tables([*rows, tuned("4")])
    assert "retraining" not in summary.results_tables(rows[2:])


def test_the_last_layer_after_lora_ml_is_compared_though_standard_has_no_rank() -> None:
    rows = []
    for method, rank, value in (("standard", "", "0.5"), ("lora-ml", "8", "0.6")):
        given = {"method": method, "finetune": "last-layer", "rank": rank, "task": "0"}
        rows.append(row(COLUMNS, given) | {"trial": "0", "metric": LAST, "value": value})
    table = summary.results_tables(rows)[""]
    assert table.rows[1] == ["last layer", "LoRA-ML", "60.0", "+10.0", "1 of 1", "1"]
