"""What PEFT loads computes what the tasks computed."""

import json
import math
import re

import pytest
import torch
from torch import nn

from metalora.adapters import (
    LoRAConfig,
    adapt,
    adapted_layers,
    base_state_dict,
    load_task_state_dict,
    task_parameters,
    task_state_dict,
    unload,
)
from metalora.io import export_peft, import_peft
from metalora.meta import RoundLoader, TrainConfig, lora_ml
from metalora.nn import tasks
from tests.io.peft_models import (
    TOKENS,
    adapted_model,
    assert_close,
    load_base,
    logits,
    peft,
    plain_model,
)

pytestmark = pytest.mark.slow

QV = ["query", "value"]
LORA = LoRAConfig(rank=3, alpha=5, dropout=0.1, target_modules=QV, heads=["classifier"])
CONFIGS = {
    "head": [LORA],
    "no head": [LoRAConfig(rank=2, target_modules=QV)],
    "alpha none": [LoRAConfig(rank=3, target_modules="all-linear", heads=["classifier"])],
    "symmetric": [LoRAConfig(rank=2, alpha=3, target_modules=QV, symmetric=True)],
    "rslora": [
        peft.LoraConfig(
            r=3, use_rslora=True, target_modules=QV, modules_to_save=["classifier"]
        )
    ],
    "two kinds": [
        LoRAConfig(rank=2, alpha=3, target_modules=QV),
        LoRAConfig(rank=4, alpha=2.5, target_modules=["0.attention.self.key"]),
        LoRAConfig(rank=2, target_modules=["1.output.dense"], symmetric=False),
    ],
    "heads alone": [LoRAConfig(target_modules=(), heads=["classifier"])],
    "adapted classifier": [LoRAConfig(rank=2, target_modules=r".*(query|classifier.*)")],
    "adapted classifier alone": [LoRAConfig(rank=2, target_modules=r".*classifier.*")],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_the_same_before_and_after_merging(tmp_path, kind, configs):
    model = adapted_model(*configs, kind=kind)
    folders = export_peft(model, tmp_path / "out")
    assert folders == [tmp_path / "out/task_0", tmp_path / "out/task_1"]
    back = import_peft(load_base(tmp_path / "out/base", kind), folders)
    for task, folder in enumerate(folders):
        wanted = logits(model, task)
        theirs = peft.PeftModel.from_pretrained(load_base(tmp_path / "out/base", kind), folder)
        assert_close(logits(theirs), wanted)
        assert_close(logits(theirs.merge_and_unload()), wanted)
        assert_close(logits(back, task), wanted)
    assert (logits(model, 0) - logits(model, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_the_adapter_alone_finds_its_base(tmp_path, configs):
    model = adapted_model(*configs)
    folder = export_peft(model, tmp_path / "out")[1]
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
    assert_close(logits(auto), logits(model, 1))


def test_without_a_task_type_peft_takes_the_class_from_the_adapter(tmp_path):
    model = adapted_model(LoRAConfig(rank=2, target_modules="all-linear"))
    folder = export_peft(model, tmp_path / "out", task_type=None)[1]
    auto = peft.AutoPeftModel.from_pretrained(folder).eval()
    assert_close(logits(auto), logits(model, 1))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["modules_to_save"] is None
    assert "classifier.dense" in config["target_modules"]


def test_the_base_is_the_plain_model_with_the_mean_head(tmp_path):
    model = adapted_model(LORA)
    export_peft(model, tmp_path / "out")
    wanted = unload(model).state_dict()
    got = load_base(tmp_path / "out/base").state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_what_is_half_a_head_is_saved_whole_where_peft_does_so(tmp_path):
    model = adapted_model(LoRAConfig(rank=2, target_modules=QV, heads=["out_proj"]))
    saved = {
        task_type: peft.LoraConfig.from_pretrained(
            export_peft(model, tmp_path / f"{task_type}", task_type=task_type)[0]
        ).modules_to_save
        for task_type in ("SEQ_CLS", None)
    }
    assert saved == {"SEQ_CLS": ["classifier", "score"], None: ["classifier.out_proj"]}
    for name in saved:
        base = load_base(tmp_path / f"{name}/base")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / f"{name}/task_1")
        assert_close(logits(theirs), logits(model, 1))


def test_the_config_says_what_the_layers_are(tmp_path):
    model = adapted_model(*CONFIGS["two kinds"])
    first = export_peft(model, tmp_path / "out")[0]
    text = (first / "adapter_config.json").read_text()
    values = json.loads(text)
    assert values["r"] == 2 and values["lora_alpha"] == 3 and values["inference_mode"] is True
    assert values["rank_pattern"] == {r"^roberta\.encoder\.layer\.0\.attention\.self\.key": 4}
    assert sorted(values["alpha_pattern"].values()) == [2, 2.5]
    assert values["base_model_name_or_path"] == str(tmp_path / "out/base")
    assert values["target_modules"] == sorted(adapted_layers(model))
    again = export_peft(model, tmp_path / "again", base=tmp_path / "out/base")[0]
    assert (again / "adapter_config.json").read_text() == text


def test_stabilised_adapters_keep_their_scale(tmp_path):
    model = adapted_model(*CONFIGS["rslora"])
    values = peft.LoraConfig.from_pretrained(export_peft(model, tmp_path / "out")[0])
    assert values.lora_alpha / values.r == pytest.approx(8 / math.sqrt(3))


def test_only_safetensors_and_text_are_written(tmp_path):
    export_peft(adapted_model(LORA), tmp_path / "out")
    files = {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json", ".md"}


def test_the_model_and_the_random_numbers_stay_as_they_are(tmp_path):
    model = adapted_model(LORA)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    frozen = parameters["roberta.embeddings.word_embeddings.weight"].requires_grad_(False)
    config, random = model.config.to_dict(), torch.get_rng_state()
    export_peft(model, tmp_path / "out")
    state = [task_state_dict(model, task) for task in (0, 1)]
    export_peft(unload(model), tmp_path / "again", adapters=state, lora_config=LORA)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.to_dict() == config
    for name, parameter in model.named_parameters():
        if not name.startswith("classifier"):
            assert parameter is parameters[name]
            assert parameter.requires_grad == (parameter is not frozen)
            assert torch.equal(parameter, before[name])


def test_the_adapters_of_a_result(tmp_path):
    model, ids = plain_model(), torch.tensor([0, 0, 1, 1])
    rounds = RoundLoader({"input_ids": TOKENS[:4]}, torch.tensor([0, 1, 2, 0]), ids, batch_size=2)
    result = lora_ml(model, rounds, TrainConfig(epochs=2, lr=0.05), LORA)
    model.eval()
    folders = export_peft(
        model, tmp_path / "out", adapters=result.adapters, lora_config=LORA, names=["b", "a"]
    )
    assert [folder.name for folder in folders] == ["b", "a"]
    assert_close(logits(load_base(tmp_path / "out/base")), logits(model))
    adapt(model, LORA, 2)
    for task, folder in enumerate(folders):
        load_task_state_dict(model, task, result.adapters[task])
        theirs = peft.PeftModel.from_pretrained(load_base(tmp_path / "out/base"), folder)
        assert_close(logits(theirs), logits(model, task))


def test_one_task_of_a_result_leaves_the_base_as_the_model_is(tmp_path):
    model = plain_model()
    state = task_state_dict(adapted_model(LORA), 1)
    export_peft(model, tmp_path / "out", adapters=[state], lora_config=LORA)
    assert torch.equal(logits(load_base(tmp_path / "out/base")), logits(model))


def test_an_adapter_for_a_base_that_is_there_already(tmp_path, monkeypatch):
    plain_model().save_pretrained(tmp_path / "retrained")
    model = adapted_model(LORA, num_tasks=1)
    monkeypatch.chdir(tmp_path)
    (folder,) = export_peft(model, "out", base="retrained")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["task_0"]
    monkeypatch.chdir("/")
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
    assert_close(logits(auto), logits(model, 0))
    (named,) = export_peft(model, tmp_path / "named", base="someone/retrained")
    assert peft.PeftConfig.from_pretrained(named).base_model_name_or_path == "someone/retrained"


def test_a_moved_export_is_loaded_with_its_base_at_hand(tmp_path):
    model = adapted_model(LORA)
    export_peft(model, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    base = load_base(tmp_path / "moved/base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "moved/task_1")
    assert_close(logits(theirs), logits(model, 1))


def test_half_precision_is_kept_bit_for_bit(tmp_path):
    model = adapted_model(LORA).bfloat16()
    folders = export_peft(model, tmp_path / "out")
    base = load_base(tmp_path / "out/base")
    assert base.dtype == torch.bfloat16
    back = import_peft(base, folders)
    for task in (0, 1):
        wanted, got = task_state_dict(model, task), task_state_dict(back, task)
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_weights_that_are_tied_stay_tied(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=40, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=48,
        )
    ).eval()  # fmt: skip
    assert model.lm_head.weight is model.get_input_embeddings().weight
    adapt(model, LoRAConfig(rank=2), 2)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    folder = export_peft(model, tmp_path / "out")[1]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert_close(logits(theirs), logits(model, 1))
    merged = theirs.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert_close(logits(merged), logits(model, 1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))


def test_any_module_goes_with_a_base_that_is_saved_elsewhere(tmp_path):
    """Here "0" is also the end of "1.0", which has no adapter."""
    model = adapt(mlp(), LoRAConfig(rank=2, target_modules=r"0", heads=["2"]), 2)
    nn.init.normal_(adapted_layers(model)["0"].lora_B)
    folders = export_peft(model, tmp_path / "out", base="someone/mlp")
    x = torch.randn(4, 5)
    with tasks(torch.full((4,), 1)):
        wanted = model(x)
    assert_close(peft.PeftModel.from_pretrained(mlp(), folders[1])(x), wanted)
    with tasks(torch.full((4,), 1)):
        assert_close(import_peft(mlp(), folders)(x), wanted)


class Blocks(nn.Module):
    """Names that PEFT mistakes: it looks at the ends of names, and takes "." for any letter."""

    def __init__(self):
        super().__init__()
        self.h = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.h_0, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.ba = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return self.ba(self.a(self.other(self.h_0(self.h(x)))))


def test_names_that_peft_would_mistake_are_refused(tmp_path):
    config = LoRAConfig(rank=1, target_modules=["other", "h_0"], heads=["h.0"])
    model = adapt(Blocks(), config, 2)
    with pytest.raises(ValueError, match="export_peft: peft would leave out 'h_0'"):
        export_peft(model, tmp_path / "out", base="someone/mlp")
    assert list(tmp_path.iterdir()) == []


def test_what_peft_saves_by_mistake_is_merged(tmp_path):
    """It takes "ba" for the head "a"."""
    torch.manual_seed(0)
    model = adapt(Blocks(), LoRAConfig(rank=1, target_modules=["other", "ba.0"], heads=["a"]), 2)
    for parameter in task_parameters(model):
        nn.init.normal_(parameter)
    folders = export_peft(model, tmp_path / "out", base="someone/mlp")
    base, x = Blocks(), torch.randn(3, 4)
    base.load_state_dict(base_state_dict(model))
    with tasks(1):
        wanted = model(x)
    assert_close(peft.PeftModel.from_pretrained(base, folders[1])(x), wanted)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first


def test_what_peft_cannot_express_is_refused(tmp_path):
    shared = adapt(Twice(), LoRAConfig(rank=1), 2)
    with pytest.raises(ValueError, match="'first' and 'second' are one and the same module"):
        export_peft(shared, tmp_path / "out", base="someone/twice")
    mixed = adapted_model(
        LoRAConfig(target_modules=["query"], dropout=0.1), LoRAConfig(target_modules=["value"])
    )
    with pytest.raises(ValueError, match=r"must have the same dropout.*got \[0\.0, 0\.1\]"):
        export_peft(mixed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": [{}]}, "adapters and lora_config come together"),
        (
            {"adapters": [{}], "lora_config": LORA},
            "the model has adapters already; leave adapters out",
        ),
        ({"names": ["a"]}, "names must be 2 different names, one per task, got ['a']"),
        ({"names": ["a", "a"]}, "names must be 2 different names"),
        ({"names": "ab"}, "names must be 2 different names, one per task, got 'ab'"),
        ({"names": ["a", "base"]}, "and not 'base'; got 'base'"),
        ({"names": ["a", "../b"]}, "names must be folder names of letters"),
        ({"base": "no/such/folder"}, "base must be a folder or a hub name"),
        ({"base": "x/y", "tokenizer": object()}, "tokenizer is saved with the base"),
        ({"task_type": "SEQ_CLASS"}, "did you mean 'SEQ_CLS'"),
        ({"metrics": {"loss": [0.1]}}, "'loss' must be a number, or one per task (2), got [0.1]"),
        ({"metrics": {"loss": "low"}}, "'loss' must be a number, or one per task (2), got 'low'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        export_peft(adapted_model(LORA), tmp_path / "out", **options)
    assert str(caught.value).startswith("export_peft: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_are_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        export_peft({}, out)
    with pytest.raises(ValueError, match=r"the model has no adapters.*adapters=result\.adapters"):
        export_peft(plain_model(), out)
    with pytest.raises(ValueError, match="adapters must hold at least one task"):
        export_peft(plain_model(), out, adapters=[], lora_config=LORA)
    with pytest.raises(ValueError, match="is missing from state"):
        export_peft(plain_model(), out, adapters=[{}], lora_config=LORA)
    with pytest.raises(ValueError, match=r"Sequential has no save_pretrained.*base=<folder>"):
        export_peft(adapt(mlp(), LoRAConfig(rank=1), 2), out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("heads", [(), ("classifier",)])
def test_a_layer_whose_name_ends_like_a_head_is_saved_whole(tmp_path, heads):
    """DistilBERT's pre_classifier, which PEFT takes for a classifier."""
    model = adapted_model(LoRAConfig(rank=2, heads=heads), kind="distilbert")
    for task, folder in enumerate(export_peft(model, tmp_path / "out")):
        base = load_base(tmp_path / "out/base", "distilbert")
        assert_close(logits(peft.PeftModel.from_pretrained(base, folder)), logits(model, task))


def test_wrappers_leave_no_trace(tmp_path):
    model = adapted_model(LORA)
    wrapped = torch.compile(model, backend="eager")
    folder = export_peft(wrapped, tmp_path / "out")[1]
    theirs = peft.PeftModel.from_pretrained(load_base(tmp_path / "out/base"), folder)
    assert_close(logits(theirs), logits(model, 1))
    parallel = nn.DataParallel(model)
    in_each_other = nn.DataParallel(wrapped), torch.compile(parallel, backend="eager")
    for wrapper in (wrapped, parallel, *in_each_other):
        assert base_state_dict(wrapper).keys() == base_state_dict(model).keys()
        state = task_state_dict(wrapper, 1)
        assert state.keys() == task_state_dict(model, 1).keys()
        load_task_state_dict(wrapper, 0, state)
