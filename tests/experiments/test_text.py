from __future__ import annotations

import dataclasses
import gzip
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from experiments.lib.errors import DataError, RunError
from experiments.lib.processes import FollowedFolder
from experiments.lib.runs import read_rows
from experiments.lib.training import load_weights, save_weights
from experiments.text import manpages
from experiments.text import run as text_run
from experiments.text.data import Document, documents, load
from experiments.text.decoders import Decoders, head_names
from experiments.text.run import TEXT, main, read
from experiments.text.settings import TextSettings
from experiments.text.summary import results_tables, table
from experiments.text.tokens import Bytes, Subwords, few, tokenize
from experiments.text.trials import Trials
from metalora.meta.causal import IGNORED
from tests.meta.test_causal import llama

CPU = torch.device("cpu")
NAMES = ("a", "b", "c", "d")
TASKS: dict[str, Any] = {
    "tasks": ("a", "b"),
    "validation_tasks": ("c",),
    "test_tasks": ("d",),
}
LOAD: dict[str, Any] = {**TASKS, "train": 500, "few": 100, "held_out": 200, "seed": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}.txt").write_text(f"{name}é {number} " * 60, encoding="utf-8")
    return root


def settings(**given: Any) -> TextSettings:
    return TextSettings(**{"smoke": True, "device": "cpu", "seeds": 1, **given}).resolved("cpu")


def trials(**given: Any) -> Trials:
    found = settings(**given)
    return Trials(found, read(found), CPU)


# Text


def test_held_out_text_is_of_other_documents(data: Path) -> None:
    corpus = load(data, **LOAD)
    assert [task.name for task in corpus.every] == list(NAMES)
    for task in corpus.every:
        assert not {d.where for d in task.train} & {d.where for d in task.held_out}
        assert sum(len(d.text) for d in task.held_out) in (199, 200)  # é is cut out whole
        for document in (*task.train, *task.held_out):
            document.text.decode()
    sizes = [sum(len(d.text) for d in task.train) for task in corpus.every]
    assert sizes[0] in (499, 500) and sizes[2] in (199, 200)
    assert corpus.sha256 == load(data, **LOAD).sha256
    assert corpus.sha256 != load(data, **{**LOAD, "seed": 1}).sha256


def test_a_single_document_is_cut_in_two(data: Path) -> None:
    for number in (1, 2, 3):
        (data / "a" / f"{number}.txt").unlink()
    text = (data / "a" / "0.txt").read_bytes()
    task = load(data, **LOAD).retraining[0]
    (first,), (rest,) = task.held_out, task.train
    assert text.startswith(first.text + rest.text)


def test_prompts_and_responses(data: Path) -> None:
    lines = [{"prompt": "p" * 9, "response": "r" * 40}, {"text": "t" * 30}, {"response": ""}]
    path = data / "a" / "x.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found, empty = documents(data / "a")
    assert empty == 1 and len(found) == 6
    assert found[4] == Document(f"{path}, line 1", b"r" * 40, b"p" * 9)
    assert found[5] == Document(f"{path}, line 3", b"t" * 30)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl, line 1: no JSON; wanted an object with prompt and response"),
        ('"text"', "line 1: wanted text for 'prompt' and 'response', or for 'text', got str"),
        ('{"prompt": "a"}', "or for 'text', got ['prompt']"),
        ('{"prompt": 3, "response": "a"}', "got ['prompt', 'response']"),
    ],
)
def test_damaged_lines(line: str, message: str, data: Path) -> None:
    (data / "a" / "x.jsonl").write_text(line)
    with pytest.raises(DataError) as told:
        load(data, **LOAD)
    assert message in str(told.value)


def test_bad_folders(data: Path) -> None:
    def message(**given: Any) -> str:
        with pytest.raises(RunError) as told:
            load(given.pop("root", data), **{**LOAD, **given})
        assert "\n" not in str(told.value)
        return str(told.value)

    assert "is no folder; give one with a folder of text per task" in message(root=data / "none")
    assert "has no folder 'x'; there are a, b, c, d" in message(tasks=("a", "x"))
    assert "'a' is named by two of --tasks, --validation-tasks" in message(test_tasks=("a",))
    assert "--tasks: there must be two retraining tasks at least, got 1" in message(tasks=("a",))
    assert "b: too little text: 1.4 kB in 4 documents" in (
        told := message(held_out=10_000, tasks=("b", "a"))
    )
    assert "wanted 10 kB to measure with" in told
    assert "c: too little text" in message(few=9000)
    assert "a: too little text" in message(held_out=1300)  # nothing is left to learn from
    (data / "e").mkdir()
    assert "e: no text; wanted *.txt or *.jsonl" in message(tasks=("a", "e"))
    (data / "e" / "1.txt").write_bytes(b" \n")
    assert "e: all of its 1 files are empty" in message(tasks=("a", "e"))


def test_all_other_folders_are_retraining_tasks(data: Path) -> None:
    corpus = load(data, **{**LOAD, "tasks": ()})
    assert [task.name for task in corpus.retraining] == ["a", "b"]


# Tokens


def test_every_token_of_a_text_is_predicted_once() -> None:
    texts = ["Grüße, 世界! " * 9, "x", "yz"]
    part = tokenize([[Document("", t.encode()) for t in texts]], Bytes(), 20)
    seen = [
        (ids, labels)
        for ids, labels in zip(
            part.sequences.fields["input_ids"].split(part.sequences.lengths.flatten().tolist()),
            part.sequences.fields["labels"].split(part.sequences.lengths.flatten().tolist()),
            strict=True,
        )
    ]
    assert max(len(ids) for ids, _ in seen) == 20
    assert all(labels[0] == IGNORED and torch.equal(ids[1:], labels[1:]) for ids, labels in seen)
    predicted = torch.cat([labels[1:] for _, labels in seen]).tolist()
    wanted = [token for text in texts for token in (*text.encode(), Bytes.end)]
    assert predicted == wanted
    assert int(part.tokens.sum()) == len(wanted)
    assert int(part.bytes.sum()) == sum(len(text.encode()) for text in texts)
    assert part.cut == 0


def test_responses_are_predicted_and_prompts_are_not() -> None:
    short, long = Document("", b"abc", b"xy"), Document("", b"abc", b"vwxyz")
    endless = Document("", b"abcdefghij", b"xy")
    part = tokenize([[short], [long, endless]], Bytes(), 7)
    ids, labels = (
        part.sequences.fields[name].split(part.sequences.lengths.flatten().tolist())
        for name in ("input_ids", "labels")
    )
    end = Bytes.end
    assert ids[0].tolist() == [end, *b"xy", *b"abc", end]
    assert labels[0].tolist() == [IGNORED] * 3 + [*b"abc", end]
    assert ids[1].tolist() == [end, *b"yz", *b"abc", end]  # the prompt loses its beginning
    assert ids[2].tolist() == [end, *b"abcdef"]  # and then the response its end
    assert part.cut == 2
    assert part.ids.tolist() == [0, 1, 1]
    assert part.tokens.tolist() == [4, 4, 6] and part.bytes.tolist() == [3, 3, 6]


def subwords(**special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["Grüße an die Welt"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_the_bytes_of_subwords_add_up() -> None:
    tokenizer = Subwords(subwords(eos_token="<end>"), "here")
    text = "Grüße an die Welt, 世界 und Grüße"
    tokens, sizes = tokenizer.encode(text.encode(), "")
    assert sum(sizes) == len(text.encode()) and len(tokens) == len(sizes) < len(text.encode())
    assert tokenizer.encode(b"", "") == ([], [])
    assert tokenizer.pad == tokenizer.end


def test_a_tokenizer_without_an_end_token() -> None:
    with pytest.raises(DataError, match="here: its tokenizer has no end token; set eos_token"):
        Subwords(subwords(unk_token="?"), "here")


def test_text_that_is_not_utf_8() -> None:
    tokenizer = Subwords(subwords(eos_token="<end>"), "here")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 2; convert it, or take"):
        tokenizer.encode(b"ab\xff", "a.txt")
    part = tokenize([[Document("a.txt", b"ab\xff")]], Bytes(), 20)
    assert int(part.tokens.sum()) == 4


def test_few_draws_whole_sequences_of_each_task() -> None:
    tasks = [[Document("", bytes([65 + task]) * 300)] for task in range(2)]
    part = tokenize(tasks, Bytes(), 11)
    found = few(part, 45, torch.Generator().manual_seed(0))
    of_task = torch.zeros(2, dtype=torch.int64).index_add(0, found.ids, found.bytes)
    assert ((of_task >= 45) & (of_task < 55)).all()
    again = few(part, 45, torch.Generator().manual_seed(1))
    assert len(found) == len(found.sequences) and found.ids.tolist() == sorted(found.ids.tolist())
    assert not torch.equal(
        found.sequences.fields["input_ids"], part.sequences.fields["input_ids"]
    ) and len(again)


# Models


def test_a_model_in_a_folder_is_trained(data: Path, tmp_path: Path) -> None:
    model = llama(vocab_size=300).float()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    subwords(eos_token="<end>").save_pretrained(folder)
    made = Decoders(settings(data=data, model=str(folder)))
    assert made.longest == 32 and made.tokenizer.size <= 300
    assert torch.equal(made.new(1).lm_head.weight, model.lm_head.weight)
    tried = trials(data=data, model=str(folder), length=100, **TASKS)
    assert "note: --length 100: the model takes at most 32, so all are used" in tried.notes()
    assert int(tried.retraining.sequences.lengths.max()) == 32
    before = tried._bits(tried.new_model(0), tried.validation).mean
    trained, _ = tried.retrain("standard", 0)
    assert tried._bits(trained, tried.validation).mean < before


def test_a_run_goes_on_with_the_model_that_it_began_with(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = llama(vocab_size=300).float()
    model.save_pretrained(folder)
    own: dict[str, Any] = {"model": str(folder), "tokenizer": "bytes", "finetune": ()}
    given = settings(data=data, retrain=("none",), **{**TASKS, **own})
    given = dataclasses.replace(given, out=tmp_path / "run")
    run = TEXT.run(given)
    assert set(run.manifest["data"]) == {"text", "model"}
    again = dataclasses.replace(given, resume=True)
    (folder / "trainer_state.json").write_text("{}")  # no part of the model
    TEXT.run(again)
    model.lm_head.weight.data.neg_()
    model.save_pretrained(folder)
    with pytest.raises(RunError, match="the data 'model' are not those the run began with"):
        TEXT.run(again)


def test_models_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama(tie_word_embeddings=True, vocab_size=400).float().save_pretrained(folder)
    given = {"data": data, **TASKS, "model": str(folder), "rank": 2}
    with pytest.raises(RunError, match=r"has no tokenizer|no usable tokenizer"):
        trials(**given)
    given["tokenizer"] = "bytes"
    with pytest.raises(RunError, match="last-layer-ml: the model's output layer shares its weight"):
        trials(**given)
    tried = trials(**given, retrain=("lora-ml",), finetune=("lora",))
    assert head_names(tried.new_model(0)) == []
    small = tmp_path / "small"
    llama(vocab_size=99).save_pretrained(small)
    with pytest.raises(DataError, match="the tokenizer has 258 tokens but the model only 99"):
        trials(**{**given, "model": str(small)})
    with pytest.raises(RunError, match="--hidden must be a multiple of 64, got 129"):
        trials(data=data, **TASKS, hidden=129)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="has no usable causal language model"):
        trials(**given)


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    model, other = (llama(tie_word_embeddings=tied) for tied in (True, False))
    save_weights(model, tmp_path / "a.safetensors")
    again = llama(tie_word_embeddings=True)
    torch.nn.init.zeros_(again.lm_head.weight)
    load_weights(again, tmp_path / "a.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(RunError, match="is missing or damaged"):
        load_weights(other, tmp_path / "a.safetensors")


# Trials


def test_bits_are_of_all_held_out_bytes(data: Path) -> None:
    tried = trials(data=data, **TASKS)
    model = tried.new_model(0)
    found = tried._bits(model, tried.validation)
    for task in range(2):
        nats = count = 0
        for document in tried.corpus.retraining[task].held_out:
            tokens = torch.tensor([Bytes.end, *document.text, Bytes.end])
            for first in range(0, len(tokens) - 1, tried.settings.length - 1):
                window = tokens[first : first + tried.settings.length][None]
                with torch.no_grad():
                    logits = model(window[:, :-1]).logits[0].double()
                losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
                nats += float(losses)
            count += len(document.text)
        assert found.per_task[task] == pytest.approx(nats / math.log(2) / count, rel=1e-4)


@pytest.mark.parametrize("over", ["tokens", "samples"])
def test_a_task_s_mean_is_over_tokens_or_sequences(over: str, data: Path) -> None:
    tried = trials(data=data, mean_over=over, **TASKS)
    batch = next(iter(tried.loader(tried.retraining, 4, seed=0)))
    if over == "samples":
        assert batch.sizes is None
    else:
        assert torch.equal(batch.sizes, tried.retraining.tokens[batch.inputs])


def test_adaptations_take_as_many_steps_whatever_the_text(data: Path) -> None:
    tried = trials(data=data, finetune_steps=12, **TASKS)
    for size in (1, 4, 9):
        tried._steps_of = tried.unseen["test"].train.take(torch.arange(size))
        epochs = tried.config("lora", 0).epochs
        assert 8 <= epochs * len(tried.loader(tried._steps_of, 4)) <= 12
    assert tried.config("reptile", 0).optimizer == "sgd"


def test_empty_files_and_long_prompts_are_said_once(data: Path) -> None:
    (data / "a" / "none.txt").write_text("")
    lines = [json.dumps({"prompt": "p" * 99, "response": "r" * 9})] * 40
    (data / "d" / "x.jsonl").write_text("\n".join(lines))
    notes = trials(data=data, **TASKS).notes()
    assert "note: a: 1 empty files or lines are left out" in notes
    assert sum("lose the beginning of the prompt" in note for note in notes) == 1


def test_a_model_that_cannot_be_packed_is_padded(data: Path, tmp_path: Path) -> None:
    """BLOOM, which has no limit of positions either."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=258, hidden_size=32, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    given = {"data": data, **TASKS, "model": str(tmp_path / "bloom"), "tokenizer": "bytes"}
    given |= {"retrain": ("standard",), "finetune": ("lora",), "rank": 1}
    reason = "BloomForCausalLM has an attention of its own, not transformers'"
    tried = trials(**given)
    assert not tried.packed and tried.facts()["packed"] is False
    assert tried.notes() == [f"note: sequences are padded: {reason}"]
    trained, _ = tried.retrain("standard", 0)
    assert tried._bits(trained, tried.validation).mean < 8
    assert trials(**given, packed=False).notes() == []
    with pytest.raises(RunError, match=f"--packed: {reason}; leave it out"):
        trials(**given, packed=True)


@pytest.mark.slow
def test_a_run_is_told_apart_by_its_rows(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = dataclasses.replace(
        settings(data=data, retrain=("none", "lora-ml", "standard"), seeds=2, **TASKS), out=out
    )
    folder = TEXT.run(given)
    rows = read_rows(out / "results.csv")
    assert {row["task"] for row in rows if row["metric"] == "bits"} == {"d"}
    assert "retraining tasks" in table(rows)
    samples = json.loads((out / "samples.json").read_text())
    assert {one["method"] for one in samples} == {"none", "lora-ml", "standard"}
    assert all(one["trial"] == 0 and one["prompt"] for one in samples)
    found = results_tables(rows, samples)
    assert len(found[""].rows) == 2 and len(found["languages"].rows) == 2
    assert {row[0] for row in found["retraining"].rows} == {"LoRA-ML", "standard"}
    assert float(found["retraining"].rows[0][1].split()[0]) > 0  # bits, not minus bits
    assert len(found["samples"].rows) == 3  # of the one test task
    assert folder.manifest["notes"]["tokens"]["retraining"] > 0
    before = (out / "results.csv").read_bytes()
    TEXT.run(dataclasses.replace(given, resume=True))
    assert (out / "results.csv").read_bytes() == before


def test_written_text_fits_into_a_table() -> None:
    one = {"task": "a", "method": "standard", "prompt": "x_y", "text": "|\n<b>&\x00`"}
    row = {"method": "standard", "finetune": "lora", "amount": "4.0", "task": "a", "trial": "0"}
    rows = [{**row, "metric": metric, "value": "2.5"} for metric in ("bits", "bits_before")]
    found = results_tables(rows, [{**one, "task": "b"}, one])  # the first task's alone is shown
    assert found["samples"].rows == [
        ["a", "standard", "x&#95;y", "&#124; &#60;b&#62;&#38; &#96;"],
    ]
    assert found[""].rows == [["LoRA", "4", "2.500", "1"]]


def test_rates_of_retraining_are_tuned_without_the_test_tasks(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = settings(data=data, retrain=("standard",), finetune=("lora",), tune=True, **TASKS)
    folder = TEXT.run(dataclasses.replace(given, out=out))
    assert {row["metric"] for row in folder.rows()} == {
        *("validation_best", "validation_last", "validation_bits", "learning_rate"),
    }
    assert "test_tasks" not in folder.manifest["notes"]
    assert "lora" in table(folder.rows())


def test_only_the_first_process_shows_a_bar_and_reads_what_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def bar(plan: Any, **options: Any) -> Any:
        hidden.append(options["disable"])
        return plan

    hidden: list[bool | None] = []
    work = TEXT.prepare(settings(retrain=("none",), finetune=("none",)))
    monkeypatch.setattr(text_run, "tqdm", bar)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "metrics.jsonl").write_text('{"phase": ')  # the first is about to write more
    work.trials(FollowedFolder(tmp_path, {}, set()))
    assert hidden == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "argument --data: give the folder that has a folder of text per task"),
        (("--data", "nowhere", "--finetune", "none"), "--data: nowhere is no folder"),
        (("--data", "."), "--validation-tasks and --test-tasks: name the unseen tasks"),
        (("--length", "1"), "argument --length: must be at least 2, got 1"),
        (("--dropout", "1"), "argument --dropout: must be below 1, got 1.0"),
        (("--warmup", "2"), "argument --warmup: must be a part, at most 1, got 2.0"),
        (("--compile",), "argument --compile: the text experiment has no use for it; leave it out"),
        (("--smoke", "--model", "nowhere"), "--model nowhere: neither a folder nor downloaded"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Manual pages

PAGE = r"""'\" t
.\" A comment
.TH LS 1 "2022" "GNU"
.SH NAVN
ls \- vis \fBindholdet\fP af mapper
.SH "OVER SIGT"
.B ls
[\fI\,TILVALG\/\fP]... \(co
.PP
.TS
left out
.TE
.TP
.BR \-a ", " \-\-all
skjul ikke \(lqpunktum\(rq\&.
"""
TEXT_OF_PAGE = """NAVN
ls - vis indholdet af mapper
OVER SIGT
ls [TILVALG]... ©
-a, --all skjul ikke “punktum”.
"""


def test_the_text_of_a_page() -> None:
    assert manpages.plain_text(PAGE) == TEXT_OF_PAGE


def test_pages_of_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manpages, "SHORTEST", 20)
    for place in ("da/man1", "man1"):
        (tmp_path / "tree" / place).mkdir(parents=True)
    (tmp_path / "tree/da/man1/ls.1.gz").write_bytes(gzip.compress(PAGE.encode()))
    (tmp_path / "tree/man1/short.1").write_text(".so man1/ls.1\n")
    (tmp_path / "tree/man1/ls.1").write_text(PAGE)
    found = manpages.make(tmp_path / "tree", tmp_path / "out")
    size = len(TEXT_OF_PAGE.encode())
    assert found == {"da": (1, size), "en": (1, size)}
    assert (tmp_path / "out/da/ls.1.txt").read_text(encoding="utf-8") == TEXT_OF_PAGE


def test_folders_without_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no manual pages; wanted packages"):
        manpages.make(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no such folder; give one of manpages-"):
        manpages.make(tmp_path / "none", tmp_path / "out")
    (tmp_path / "x.deb").write_text("no package")

    def missing(*args: Any, **options: Any) -> None:
        raise FileNotFoundError

    def refused(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 2, "", "not an archive\n")

    for run, message in ((missing, "dpkg-deb is not installed"), (refused, "not an archive; down")):
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(DataError, match=message):
            manpages.make(tmp_path, tmp_path / "out")
