"""Folders that PEFT wrote become tasks; those that do not fit change nothing."""

import copy
import json
import math
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metalora.adapters import LoRAConfig, adapted_layers, unload
from metalora.io import PeftFolderError, export_peft, import_peft, patterns
from metalora.nn import MultiTaskEmbedding
from tests.io.peft_damage import damage
from tests.io.peft_models import (
    adapted_model,
    assert_close,
    load_base,
    logits,
    peft,
    plain_model,
    transformers,
)

pytestmark = pytest.mark.slow

THEIRS = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def written_by_peft(folder, seed=0, kind="roberta", **fields):
    """An adapter folder of PEFT's own making, and what its model computes."""
    model = peft.get_peft_model(plain_model(kind), peft.LoraConfig(**{**THEIRS, **fields})).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*\.0\..*\.dense", "init_lora_weights": "gaussian"},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {r"0\.attention\.self\.value": 7}},
        {"rank_pattern": {"query": 2}, "use_rslora": True},
        {"layers_to_transform": [1], "lora_dropout": 0.1},
        {"task_type": None, "modules_to_save": ["classifier"]},
    ],
)
def test_what_peft_wrote_computes_the_same(tmp_path, kind, fields):
    folders = [tmp_path / "a", tmp_path / "b"]
    wanted = [written_by_peft(f, seed, kind, **fields) for seed, f in enumerate(folders)]
    model = import_peft(plain_model(kind), folders)
    for task in (0, 1):
        assert_close(logits(model, task), wanted[task])
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    dropouts = {getattr(m, "dropout", 0.0) for m in adapted_layers(model).values()}
    assert max(dropouts) == fields.get("lora_dropout", 0.0)


def test_the_head_of_a_task_type_need_not_be_named(tmp_path):
    """PEFT before 0.11 saved it without writing so."""
    wanted = written_by_peft(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": None}))
    assert_close(logits(import_peft(plain_model(), tmp_path / "a")), wanted)


def test_a_single_folder_is_one_task(tmp_path):
    wanted = written_by_peft(tmp_path / "a")
    assert_close(logits(import_peft(plain_model(), str(tmp_path / "a"))), wanted)


def test_import_and_export_are_inverse_to_each_other(tmp_path):
    written_by_peft(tmp_path / "a")
    model = import_peft(plain_model(), tmp_path / "a")
    (again,) = export_peft(model, tmp_path / "out")
    before = load_file(tmp_path / "a/adapter_model.safetensors")
    after = load_file(again / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def unchanged(model):
    """A check, for later, that the model is still as it is now."""
    modules, state = list(model.modules()), {n: p.clone() for n, p in model.state_dict().items()}

    def check():
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        assert all(torch.equal(state[n], p) for n, p in model.state_dict().items())

    return check


def refused(model, folders, message, error=PeftFolderError, **options):
    check = unchanged(model)
    with pytest.raises(error, match=message) as caught:
        import_peft(model, folders, **options)
    assert str(caught.value).startswith("import_peft: ")
    assert "\n" not in str(caught.value)
    check()


@pytest.fixture
def exported(tmp_path):
    config = LoRAConfig(rank=2, target_modules=["query"], heads=["classifier"])
    export_peft(adapted_model(config), tmp_path / "out")
    return tmp_path / "out"


def test_another_base_by_its_name(exported, tmp_path):
    """Shapes all fit, but the weights are others."""
    other = plain_model()
    other.save_pretrained(tmp_path / "other")
    named = re.escape(f"is for another base: for '{exported}/base', but the model is '{tmp_path}/")
    refused(load_base(tmp_path / "other"), exported / "task_0", named)
    refused(other, exported / "task_0", "for another base.*but the model is 'a/b'", base="a/b")


def test_a_base_that_has_moved_is_said_to_be_the_same(exported, tmp_path, monkeypatch):
    exported.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    model = load_base("moved/base")
    refused(model, "moved/task_0", "if that is the same, say base='.*out/base'")
    import_peft(model, "moved/task_0", base=str(exported / "base"))
    assert adapted_layers(model)


def test_the_base_may_be_named_by_a_relative_path(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert adapted_layers(import_peft(load_base("out/base"), ["out/task_0", "out/task_1"]))


def test_another_base_by_its_layers(exported):
    task = exported / "task_0"
    refused(plain_model("bert"), task, "for another base: it has an adapter for 'roberta.*no lin")
    refused(plain_model(num_hidden_layers=1), task, r"layer\.1\..*which is no linear layer of the")
    refused(
        plain_model(hidden_size=32),
        task,
        r"task_0 does not fit the model: .*query\.lora_A' must be \[2, 32\], got \[2, 16\]",
    )
    refused(
        plain_model(num_labels=2),
        task,
        r"does not fit the model: .*'classifier\.out_proj\.weight' must be \[2, 16\], got \[3",
    )


def test_adapters_on_embeddings_are_refused(tmp_path):
    written_by_peft(tmp_path / "a", target_modules=["query", "word_embeddings"])
    refused(plain_model(), tmp_path / "a", "adapters on embeddings are not supported; have PEFT")


def test_heads_must_be_linear(tmp_path):
    written_by_peft(tmp_path / "a", modules_to_save=["LayerNorm"])
    refused(plain_model(), tmp_path / "a", "is a LayerNorm; a head is made of nn.Linear")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2}, r"b does not go with .*a: r of 'roberta.*query' is 2 instead of 3"),
        ({"lora_alpha": 6}, r"the scaling of 'roberta.*query' is 2\.0 instead of 1\.66"),
        ({"use_rslora": True}, r"the scaling of"),
        ({"lora_dropout": 0.1}, r"b does not go with .*a: lora_dropout is 0\.1 instead of 0\.0"),
        ({"target_modules": ["query"]}, "target_modules are .* instead of"),
        ({"task_type": None}, r"modules_to_save hold \[\] instead of \['classifier\.dense', 'cl"),
    ],
)
def test_folders_must_agree(tmp_path, fields, message):
    written_by_peft(tmp_path / "a")
    written_by_peft(tmp_path / "b", **fields)
    refused(plain_model(), [tmp_path / "a", tmp_path / "b"], message)


def test_shapes_must_agree(tmp_path, exported):
    written_by_peft(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b/adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.out_proj.bias"] = torch.zeros(7)
    save_file(tensors, path)
    refused(
        plain_model(),
        [tmp_path / "a", tmp_path / "b"],
        r"b does not go with .*the shape of 'classifier\.out_proj\.bias' is \[7\] instead of \[3",
    )


NAN = math.nan


def nested(depth):
    """A list in a list in a list ..."""
    return json.loads("[" * depth + "]" * depth)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "peft.LoraConfig field use_dora=True is not supported by metalora"),
        ({"bias": "all"}, "field bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "field init_lora_weights='pissa' is not supported"),
        ({"fan_in_fan_out": True}, "field fan_in_fan_out=True is for the Conv1D of"),
        ({"trainable_token_indices": [1]}, r"field trainable_token_indices=\[1\] is not supported"),
        ({"peft_type": "IA3"}, "must have peft_type 'LORA', got 'IA3'"),
        ({"use_magic": True}, "has the field 'use_magic', which peft .* does not know; upgrade"),
        ({"r": 4}, "has an adapter of rank 3 for '.*query', but its adapter_config.json says 4"),
        ({"r": 0}, r"adapter_config\.json: r must be an int >= 1, got 0"),
        ({"r": -3}, r"adapter_config\.json: r must be an int >= 1, got -3"),
        ({"r": 10**30}, "has an adapter of rank 3 for '.*query', but its .* says 1000000000000000"),
        ({"r": "3"}, r"adapter_config\.json: r must be an integer, got '3'"),
        ({"r": 3.0}, r"adapter_config\.json: r must be an integer, got 3\.0"),
        ({"r": True}, r"adapter_config\.json: r must be an integer, got True"),
        ({"r": NAN}, r"adapter_config\.json: r must be an integer, got nan"),
        ({"r": nested(900)}, r"adapter_config\.json: r must be an integer, got \[\[\[.{,20}$"),
        ({"lora_alpha": None}, r"adapter_config\.json: lora_alpha must be a number, got None"),
        ({"lora_alpha": -1}, r"config\.json: lora_alpha must be a finite number > 0, got -1"),
        ({"lora_alpha": NAN}, r"config\.json: lora_alpha must be a finite number > 0, got nan"),
        ({"lora_alpha": -math.inf}, "lora_alpha must be a finite number > 0, got -inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number > 0, got 1000000"),
        ({"lora_dropout": 1}, r"config\.json: lora_dropout must be in \[0, 1\), got 1"),
        ({"use_rslora": 1}, r"config\.json: use_rslora must be true or false, got 1"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be a string or null, g"),
        ({"target_modules": [1]}, "target_modules must be a string, a list of strings or null, go"),
        ({"rank_pattern": ["query"]}, r"rank_pattern must be an object or null, got \['query'\]"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be an int >= 1, got 0"),
        ({"alpha_pattern": {"query": "5"}}, r"alpha_pattern\['query'\] must be a number, got '5'"),
        ({"alpha_pattern": {"query": NAN}}, r"alpha_pattern\['query'\] must be a finite number"),
        ({"rank_pattern": {"(": 2}}, r"json: rank_pattern: '\(' is no valid regular expression \("),
        ({"rank_pattern": {"(" * 9999: 2}}, r"json: rank_pattern: '\(\(.{,200}' is nested too d"),
        ({"rank_pattern": {"a{9999999999}": 2}}, "is no valid regular expression .*too large"),
    ],
)
def test_settings_that_do_not_work_are_refused(tmp_path, fields, message):
    written_by_peft(tmp_path / "a")
    edit(tmp_path / "a", **fields)
    refused(plain_model(), tmp_path / "a", message)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_for_ever_is_stopped(tmp_path, monkeypatch, field):
    """The name's 43 letters can be cut in 2^42 ways, all of which must be tried."""
    monkeypatch.setattr(patterns, "CPU_SECONDS", 1)
    written_by_peft(tmp_path / "a")
    edit(tmp_path / "a", **{field: {"value": 3, "(.+)+X": 2, "query": 3}})
    message = rf"adapter_config\.json: {field}: '\(\.\+\)\+X' takes too long to match"
    refused(plain_model(), tmp_path / "a", message)


def test_a_pattern_that_needs_too_much_memory_is_stopped(monkeypatch):
    """Each repetition of a group keeps a record of what it may take back."""
    pytest.importorskip("resource", reason="this system cannot limit memory")
    monkeypatch.setattr(patterns, "BYTES", 2**27)
    with pytest.raises(patterns.PatternError, match="needs too much memory"):
        patterns.first_matches(("(?:(a)|b)*c",), ("ab" * 1_000_000,))


PATTERNS = {
    r".*\.layer\.[01]\..*query": 1,
    "value": 1,
    r"(encoder|decoder)\.layer\.1\.(attention\.self\.)?key": 1,
    r"^roberta\.encoder\.layer\.0\.attention\.self\.key": 1,
    "a)|(roberta.*0.*dense": 1,
    r"(?:\w+\.)+dense": 1,
}


def test_patterns_mean_what_they_mean_to_peft():
    names = tuple(n for n, m in plain_model().named_modules() if isinstance(m, nn.Linear))
    from peft.utils.other import get_pattern_key

    keys = tuple(PATTERNS)
    found = patterns.first_matches(keys, names)
    assert [n if place is None else keys[place] for n, place in zip(names, found, strict=True)] == [
        get_pattern_key(keys, name) for name in names
    ]
    assert {*range(len(keys))} <= {*found}


def test_settings_that_are_no_file_or_nested_too_deeply(tmp_path):
    written_by_peft(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    refused(plain_model(), tmp_path / "a", "config.json cannot be read: it is nested too deeply")
    os.truncate(path, 2**24 + 1)
    refused(plain_model(), tmp_path / "a", "config.json cannot be read: it has 16777217 bytes, mo")
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer
    refused(plain_model(), tmp_path / "a", "config.json cannot be read: there is no such file")


def test_settings_of_any_type_give_a_clear_line(tmp_path):
    """Every field of a damaged file, with wrong types."""
    written_by_peft(tmp_path / "a")
    path, model = tmp_path / "a/adapter_config.json", plain_model()
    values, messages = json.loads(path.read_text()), []
    for name in values:
        for wrong in (None, "x", 2.5, ["x"], {"x": "y"}):
            path.write_text(json.dumps({**values, name: wrong}))
            try:
                unload(import_peft(model, tmp_path / "a"))
            except PeftFolderError as error:
                messages.append(str(error))
    assert len(messages) > len(values)
    assert not any("\n" in message for message in messages)


def import_damaged(count, seed, folder, place):
    """Damages copies of ``folder`` and imports them; the messages of those that were refused."""
    messages, model = [], plain_model()
    check = unchanged(model)
    for number in range(count):
        shutil.copytree(folder, place, dirs_exist_ok=True)
        damage(place, random.Random(f"{seed} {number}"))
        try:
            import_peft(model, place)
        except PeftFolderError as error:
            messages.append(str(error))
            check()
        else:
            model = plain_model()
            check = unchanged(model)
    assert all(m.startswith("import_peft: ") and len(m) < 2000 for m in messages)
    assert all(len(m.splitlines()) == 1 for m in messages)
    return messages


def test_damaged_folders_are_refused_in_one_line_and_change_nothing(tmp_path):
    written_by_peft(tmp_path / "a")
    assert len(import_damaged(100, 0, tmp_path / "a", tmp_path / "b")) > 50


def test_pickles_are_never_read(tmp_path):
    written_by_peft(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    refused(plain_model(), tmp_path / "a", "is missing; adapter_model.bin is never read, save it a")


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def foreign_tensor(path):
    save_file({**load_file(path), "stranger": torch.zeros(2)}, path)


def one_dimension(path):
    tensors = load_file(path)
    save_file({n: t.flatten() if "lora_A" in n else t for n, t in tensors.items()}, path)


def without_b(path):
    save_file({n: t for n, t in load_file(path).items() if "lora_B" not in n}, path)


def nothing(path):
    save_file({}, path)


def named(name):
    return lambda path: save_file({**load_file(path), name: torch.zeros(2)}, path)


def of_type(dtype):
    return lambda path: save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path)


def rank_zero(path):
    tensors = load_file(path).items()
    cut = {n: t[:0] if "lora_A" in n else t[:, :0] if "lora_B" in n else t for n, t in tensors}
    save_file({n: t.contiguous() for n, t in cut.items()}, path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", cut, "adapter_model.safetensors is damaged: "),
        ("adapter_model.safetensors", foreign_tensor, r"has 'stranger' of shape \[2\], which is n"),
        ("adapter_model.safetensors", one_dimension, r"lora_A.weight' of shape \[48\], which is n"),
        ("adapter_model.safetensors", without_b, r"query.lora_B' is missing from state"),
        ("adapter_model.safetensors", nothing, "holds no tensors"),
        ("adapter_model.safetensors", named("base_model.model.weight"), r"safetensors has 'base_"),
        ("adapter_model.safetensors", named("base_model.model."), r"has 'base_model.model.' of sh"),
        (
            "adapter_model.safetensors",
            named("base_model.model.x.y"),
            "it has 'x.y', which is no parameter of the model",
        ),
        ("adapter_model.safetensors", of_type(torch.int8), r"safetensors has '.*' of torch.int8; "),
        ("adapter_model.safetensors", of_type(torch.complex64), r"' of torch.complex64; the tenso"),
        ("adapter_model.safetensors", rank_zero, "has an adapter of rank 0 for .* says 3"),
        ("adapter_config.json", cut, "adapter_config.json cannot be read: "),
        ("adapter_config.json", lambda p: p.write_text("3"), "must have peft_type 'LORA', got 3"),
        ("adapter_config.json", lambda p: p.unlink(), "adapter_config.json cannot be read: "),
        ("adapter_config.json", lambda p: p.write_bytes(b"\xff"), "config.json cannot be read: "),
    ],
)
def test_damaged_folders_are_refused(tmp_path, name, damage, message):
    written_by_peft(tmp_path / "a")
    damage(tmp_path / "a" / name)
    refused(plain_model(), tmp_path / "a", message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_adapters_of_short_types_are_read(tmp_path, dtype):
    written_by_peft(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    of_type(dtype)(path)
    model = import_peft(plain_model(), tmp_path / "a")
    name = "roberta.encoder.layer.0.attention.self.query.lora_A"
    stored = load_file(path)[f"base_model.model.{name}.weight"]
    assert stored.dtype == dtype
    assert torch.equal(model.state_dict()[name][0], stored.float())


def test_bad_arguments_are_refused(tmp_path):
    for folders in (5, [5], {"a": 1}, None):
        refused(plain_model(), folders, "folders must be a folder or a list of folders", TypeError)
    refused(plain_model(), tmp_path / "no", "no is no folder; an adapter of a hub must be downlo")
    refused(plain_model(), [], "folders must hold at least one folder, got none", ValueError)
    model = adapted_model(LoRAConfig(rank=1, target_modules=["query"]))
    refused(model, tmp_path, "the model has adapters already; metalora.unload", ValueError)
    with pytest.raises(TypeError, match=r"import_peft: model must be an nn\.Module, got str"):
        import_peft("roberta-base", tmp_path)


def test_the_imported_base_is_the_same_objects(exported):
    model = load_base(exported / "base")
    weight = model.roberta.encoder.layer[0].attention.self.query.weight
    import_peft(model, exported / "task_0")
    assert isinstance(weight, nn.Parameter)
    assert unload(model).roberta.encoder.layer[0].attention.self.query.weight is weight


def decoder(seed=0, tied=False):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def written_with_embeddings(folder, base, *targets):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[*targets])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder, save_embedding_layers=True)
    return logits(model)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_the_base_that_peft_writes_too_are_passed_over(tmp_path, tied):
    """An adapted vocabulary layer, and embeddings that were resized."""
    for name, base, targets in (
        ("adapted", decoder(), ["q_proj", "lm_head"]),
        ("resized", decoder(tied=tied), ["q_proj"]),
    ):
        wanted = written_with_embeddings(tmp_path / name, copy.deepcopy(base), *targets)
        assert any(
            "embed" in k or "base_layer" in k
            for k in load_file(tmp_path / name / "adapter_model.safetensors")
        )
        model = import_peft(base, [tmp_path / name])
        assert not [n for n, m in model.named_modules() if isinstance(m, MultiTaskEmbedding)]
        torch.testing.assert_close(logits(model, 0), wanted, rtol=1e-5, atol=1e-5)
    other = decoder(seed=1, tied=tied)
    refused(other, [tmp_path / "resized"], "has other weights of the base for 'lm_head.weight', ")
