"""Models that other packages changed or that call their layers in ways of their own."""

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt, adapted_layers
from metalora.nn import tasks

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
BERT_LIKE = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}
DISENTANGLED = {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
IMAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2]}


def deberta():
    return transformers.DebertaForSequenceClassification(transformers.DebertaConfig(**DISENTANGLED))


def deberta_v2():
    config = transformers.DebertaV2Config(**DISENTANGLED)
    return transformers.DebertaV2ForSequenceClassification(config)


def deberta_v3():
    config = transformers.DebertaV2Config(
        **DISENTANGLED,
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def swin_v2():
    config = transformers.Swinv2Config(**IMAGES, window_size=4)
    return transformers.Swinv2ForImageClassification(config)


def xlnet():
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=30)
    return transformers.XLNetForSequenceClassification(config)


def longformer():
    config = transformers.LongformerConfig(**BERT_LIKE, attention_window=4)
    return transformers.LongformerForSequenceClassification(config)


def switch():
    config = transformers.SwitchTransformersConfig(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=30, num_experts=2
    )
    config.decoder_start_token_id = 0
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb():
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    both = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sides.items()}
    config = transformers.NllbMoeConfig(
        **both, d_model=16, vocab_size=30, num_experts=2, encoder_sparse_step=2
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def mamba():
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=30, state_size=4
    )
    return transformers.MambaForCausalLM(config)


def inputs(model):
    if isinstance(model, transformers.Swinv2ForImageClassification):
        return {"pixel_values": torch.randn(4, 3, 16, 16)}
    tokens = {"input_ids": torch.randint(3, 30, (4, 8))}
    if model.config.is_encoder_decoder:
        tokens["labels"] = tokens["input_ids"]
    return tokens


def call(model):
    return model(**inputs(model))


EXCLUDED = [  # the lists of docs/how-to/hugging-face.md
    (deberta, ["pos_proj", "pos_q_proj"]),
    (deberta_v2, ["pos_key_proj", "pos_query_proj"]),
    (deberta_v3, ["query_proj", "key_proj"]),
    (swin_v2, ["continuous_position_bias_mlp.0", "continuous_position_bias_mlp.2"]),
    (longformer, ["query", "key", "value", "query_global", "key_global", "value_global"]),
    (xlnet, ["layer_1", "layer_2"]),
    (switch, r".*\.experts\..*"),
    (nllb, r".*\.experts\..*"),
]


@pytest.mark.filterwarnings("ignore:sample order")  # of the windows of Swin
@pytest.mark.parametrize(("make", "excluded"), EXCLUDED)
def test_each_task_computes_as_it_does_alone_with_what_the_page_excludes(make, excluded):
    torch.manual_seed(0)
    model = make().double().eval()
    with pytest.raises(ValueError, match="exclude"), tasks(torch.tensor([1, 0, 1, 1])):
        call(adapt(make(), LoRAConfig(rank=2), 2))
    adapt(model, LoRAConfig(rank=2, exclude_modules=excluded), 2)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B)
    given = inputs(model)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].double()
    with torch.no_grad():
        with tasks(torch.tensor([1, 0, 1, 1])):
            mixed = model(**given).logits
        for task, of_task in ((0, [1]), (1, [0, 2, 3])):
            with tasks(task):
                alone = model(**{name: x[of_task] for name, x in given.items()}).logits
            torch.testing.assert_close(mixed[of_task], alone, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            xlnet,
            r"XLNetFeedForward, which gets sequences first.*=\['layer_1', 'layer_2'\]",
        ),
        (longformer, "LongformerSelfAttention, which gets sequences first"),
        (
            switch,
            r"SwitchTransformersExperts, which gets rows .* exclude_modules=r'\.\*\\\.experts",
        ),
    ],
)
def test_layers_that_cannot_tell_samples_apart_are_refused_for_several_tasks(make, message):
    with pytest.raises(ValueError, match=message):
        adapt(make(), LoRAConfig(rank=2), 2)
    adapt(make(), LoRAConfig(rank=2), 1)


def test_weights_that_are_read_by_others_are_left_out_aloud():
    with pytest.warns(
        UserWarning, match=r"leaves out 'backbone\.layers\.0\.mixer\.x_proj' \(Mamba"
    ):
        adapted = adapt(mamba(), LoRAConfig(rank=2), 2)
    assert [name.rpartition(".")[2] for name in adapted_layers(adapted)] == ["in_proj"]
    with pytest.raises(
        ValueError, match="dt_proj' cannot get an adapter: MambaMixer reads its wei"
    ):
        adapt(mamba(), LoRAConfig(rank=2, target_modules=["dt_proj"]), 2)


def test_models_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    for model, where in ((wrapped, "is a PeftModel"), (wrapped.base_model.model, "has '0', a Lin")):
        with pytest.raises(ValueError, match=rf"adapt: the model {where}.*merge_and_unload\(\)"):
            adapt(model, LoRAConfig(rank=1), 2)
    adapt(wrapped.merge_and_unload(), LoRAConfig(rank=1), 2)
