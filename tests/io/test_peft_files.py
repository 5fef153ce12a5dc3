"""Exports are there whole or not at all, and their cards can be read."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from huggingface_hub import ModelCard

from metalora.adapters import LoRAConfig
from metalora.io.peft import PeftFolderError, export_peft, import_peft
from tests.io.peft_models import adapted_model, load_base, plain_model

LORA = LoRAConfig(rank=2, target_modules=["query"], heads=["classifier"])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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

    def replace(path, target):
        if path.suffix == ".partial":
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises((PeftFolderError, KeyboardInterrupt)):
        export_peft(model, tmp_path / "out", names=["a", "b"], overwrite=True)
    assert contents(tmp_path / "out") == before
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
    for folder, accuracy in zip(folders, ("0.5", "0.25"), strict=True):
        card = ModelCard.load(folder / "README.md")
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
    code = "import sys, metalora.io.peft; print({'peft', 'transformers'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "set()", run.stderr
