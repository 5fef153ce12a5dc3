"""Exports are there whole or not at all, and their cards can be read."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from huggingface_hub import ModelCard

from metalora.adapters import LoRAConfig
from metalora.io import PeftFolderError, export_peft, folder, import_peft
from tests.io.peft_models import adapted_model, load_base, plain_model

pytestmark = pytest.mark.slow

LORA = LoRAConfig(rank=2, target_modules=["query"], heads=["classifier"])


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def fail_at_the_second_adapter(monkeypatch, error):
    real, calls = safetensors.torch.save_file, []

    def save_file(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(*args, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, safetensors.SafetensorError("I/O error")])
def test_nothing_is_left_of_an_export_that_failed(tmp_path, monkeypatch, error):
    fail_at_the_second_adapter(monkeypatch, error)
    with pytest.raises(PeftFolderError, match=r"out could not be written \(.*what was there is un"):
        export_peft(adapted_model(LORA), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_an_export_that_failed_leaves_the_one_before(tmp_path, monkeypatch, error):
    model = adapted_model(LORA)
    export_peft(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    fail_at_the_second_adapter(monkeypatch, error)
    with pytest.raises((PeftFolderError, KeyboardInterrupt)):
        export_peft(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_change_of_folders_that_failed_is_taken_back(tmp_path, monkeypatch, error):
    model = adapted_model(LORA)
    export_peft(model, tmp_path / "out")
    before, real = contents(tmp_path / "out"), Path.replace
    monkeypatch.setattr(folder, "exchange", lambda first, second: False)

    def replace(path, target):
        if path.suffix == ".partial":
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises((PeftFolderError, KeyboardInterrupt)):
        export_peft(model, tmp_path / "out", names=["a", "b"], overwrite=True)
    assert contents(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def killed_at(step, write):
    """Runs ``write`` in a child process that kills itself before a file operation; its exit."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    operations = itertools.count(1)

    def hook(event, arguments):
        if event in OPERATIONS and next(operations) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        write()
        os._exit(0)
    finally:  # an exception must not go on in the child as if it were the test
        os._exit(1)


OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym"}
OLD, NEW = {Path("a/adapter_config.json"): b"old"}, {Path("b/adapter_config.json"): b"new"}


def write(out, files):
    with folder.replacing(out) as partial:
        for path, content in files.items():
            (partial / path).parent.mkdir()
            (partial / path).write_bytes(content)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("exchanged", [True, False])
def test_a_killed_export_leaves_the_old_or_the_new_folder(tmp_path, monkeypatch, exchanged):
    if not exchanged:
        monkeypatch.setattr(folder, "exchange", lambda first, second: False)
    elif not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange folders")
    found = []
    for step in itertools.count(1):
        out = tmp_path / f"{step}" / "[out]"
        write(out, OLD)
        ended = killed_at(step, lambda out=out: write(out, NEW))
        found.append(contents(out) if out.exists() else None)
        folder.restore(out)
        assert contents(out) in (OLD, NEW)
        assert not [*out.parent.glob("*.aside")]
        write(out, NEW)
        assert [p.name for p in out.parent.iterdir()] == ["[out]"]  # nothing of the killed one
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert step > 10 and found[0] == OLD and found[-2] == found[-1] == NEW
    assert (None in found) != exchanged


def can_exchange(path):
    (path / "first").mkdir()
    (path / "second").mkdir()
    return folder.exchange(path / "first", path / "second")


def test_folders_are_exchanged_or_left_alone(tmp_path):
    if not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange folders")
    (tmp_path / "first/one").write_text("1")
    assert folder.exchange(tmp_path / "first", tmp_path / "second")
    assert contents(tmp_path) == {Path("second/one"): b"1"}
    assert not folder.exchange(tmp_path / "second", tmp_path / "third")
    assert contents(tmp_path) == {Path("second/one"): b"1"}


@pytest.mark.parametrize("again", ["export", "import"])
def test_an_export_that_a_killed_one_moved_aside_comes_back(tmp_path, again):
    model, out = adapted_model(LORA), tmp_path / "out"
    tasks = export_peft(model, out)
    before = contents(out)
    out.rename(tmp_path / ".out.123.aside")
    if again == "import":
        import_peft(plain_model(), tasks, base=str(out / "base"))
    else:
        with pytest.raises(PeftFolderError, match="out is not empty"):
            export_peft(model, out)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_is_replaced_only_when_asked(tmp_path):
    model = adapted_model(LORA)
    export_peft(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(PeftFolderError, match="out is not empty; name another folder, or say over"):
        export_peft(model, tmp_path / "out", names=["a", "b"])
    assert contents(tmp_path / "out") == before
    export_peft(model, tmp_path / "out", names=["a", "b"], overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "base"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "out").mkdir()
    export_peft(adapted_model(LORA), tmp_path / "out")
    assert (tmp_path / "out/task_1/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["notes.txt", "base", "runs/today"])
def test_what_is_no_export_is_never_replaced(tmp_path, name):
    stranger = tmp_path / "out" / name / "thesis.tex"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("years of work")
    with pytest.raises(PeftFolderError, match="which is no part of an export"):
        export_peft(adapted_model(LORA), tmp_path / "out", overwrite=True)
    assert stranger.read_text() == "years of work"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(PeftFolderError, match="out must be a folder, or not be there yet"):
        export_peft(adapted_model(LORA), tmp_path / "out", overwrite=True)


def test_the_base_is_not_replaced_by_its_own_adapters(tmp_path):
    export_peft(adapted_model(LORA), tmp_path / "out")
    model = adapted_model(LORA)
    with pytest.raises(ValueError, match=r"base .*out/base lies in folder"):
        export_peft(model, tmp_path / "out", base=tmp_path / "out/base", overwrite=True)
    load_base(tmp_path / "out/base")


def test_cards_have_the_base_and_the_metrics(tmp_path):
    metrics = {"accuracy": [0.5, np.float32(0.25)], "rounds": 30}
    folders = export_peft(adapted_model(LORA), tmp_path / "out", metrics=metrics)
    for task, accuracy in zip(folders, ("0.5", "0.25"), strict=True):
        card = ModelCard.load(task / "README.md")
        assert card.data.base_model == str(tmp_path / "out/base")
        assert card.data.library_name == "peft" and "lora" in card.data.tags
        assert f"| accuracy | {accuracy} |\n| rounds | 30 |" in card.text
    card = ModelCard.load(tmp_path / "out/base/README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert "| rounds | 30 |" in card.text and "accuracy" not in card.text


def test_the_card_of_a_base_names_where_it_comes_from(tmp_path):
    model = adapted_model(LORA)
    model.config._name_or_path = model.name_or_path = "someone/pretrained: base"
    export_peft(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/base/README.md")
    assert card.data.base_model == "someone/pretrained: base"
    assert "## Metrics" not in card.text


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_a_tokenizer_goes_with_the_base(tmp_path):
    export_peft(adapted_model(LORA), tmp_path / "out", tokenizer=Tokenizer())
    found = [p.relative_to(tmp_path) for p in tmp_path.rglob("tokenizer.json")]
    assert [str(p) for p in found] == ["out/base/tokenizer.json"]


def test_without_peft_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="export_peft: needs the package peft; pip install "):
        export_peft(adapted_model(LORA), tmp_path / "out")
    with pytest.raises(ImportError, match="import_peft: needs the package peft; pip install "):
        import_peft(plain_model(), tmp_path)


def test_the_module_itself_imports_neither_peft_nor_transformers():
    code = "import sys, metalora.io; print({'peft', 'transformers'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "set()", run.stderr
