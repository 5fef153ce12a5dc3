"""Models that other packages changed or that call their layers in ways of their own."""

import warnings

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt, adapted_layers, merge_and_unload
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


def fsmt():
    config = transformers.FSMTConfig(
        src_vocab_size=30, tgt_vocab_size=30, d_model=16, langs=["a", "b"],
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    return transformers.FSMTForConditionalGeneration(config)


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
        (fsmt, "FSMTEncoder, which gets sequences first"),
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


def test_a_layer_that_reads_its_weight_is_left_out_aloud():
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, tdnn_dim=(8,), tdnn_kernel=(3,), tdnn_dilation=(1,),
    )  # fmt: skip
    model = transformers.Wav2Vec2ForXVector(config)
    with pytest.warns(UserWarning, match=r"leaves out .*'tdnn.0.kernel' \(TDNNLayer reads its"):
        adapt(model, LoRAConfig(rank=2), 2)
    with pytest.raises(ValueError, match="TDNNLayer reads its weight"):
        adapt(transformers.Wav2Vec2ForXVector(config), LoRAConfig(target_modules=["kernel"]), 2)


def qwen2_vl():
    sections = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": sections,
        },
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 1,
        },
        image_token_id=30, vision_start_token_id=31, vision_end_token_id=32, video_token_id=33,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(text)


def two_images():
    """Two samples with images of 16 and 48 patches, and each of them alone."""
    grids, patches = torch.tensor([[1, 4, 4], [1, 4, 12]]), torch.randn(64, 48)
    rows = [[31, *[30] * count, 32, 5, 6] for count in (4, 12)]  # a token is 2 x 2 patches
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def given(i, first, last):
        return {
            "input_ids": padded[i], "attention_mask": mask[i], "image_grid_thw": grids[i],
            "mm_token_type_ids": (padded[i] == 30).long(), "pixel_values": patches[first:last],
        }  # fmt: skip

    return given(slice(0, 2), 0, 64), [given(slice(0, 1), 0, 16), given(slice(1, 2), 16, 64)]


def test_images_of_unequal_size_need_the_vision_tower_left_out():
    torch.manual_seed(0)
    errors = []
    for excluded in ((), r".*\.visual\..*"):
        model = adapt(qwen2_vl().eval(), LoRAConfig(rank=2, exclude_modules=excluded), 2)
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.lora_B)
        both, alone = two_images()
        with torch.no_grad():
            with warnings.catch_warnings(record=True) as told, tasks(torch.tensor([0, 1])):
                warnings.simplefilter("always")
                mixed = model(**both).logits
            assert ("images of several sizes" in str([one.message for one in told])) != bool(
                excluded
            )
            for task, given in enumerate(alone):
                with tasks(task):
                    wanted = model(**given).logits[given["attention_mask"] == 1]
                found = mixed[task][given["attention_mask"][0] == 1]
                errors.append((found - wanted).abs().max())
    assert max(errors[:2]) > 0.1 and max(errors[2:]) < 1e-4


class CallsAList(nn.Module):
    """As MaskFormer's perceptron does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 2)]
        for number, layer in enumerate(self.layers):
            self.add_module(str(number), layer)

    def forward(self, x):
        return self.layers[1](self.layers[0](self.body(x)))


def test_a_layer_called_from_a_plain_list_is_refused():
    for config in (
        LoRAConfig(target_modules=["0.0"]),
        LoRAConfig(target_modules=(), heads=["0.1"]),
    ):
        with pytest.raises(ValueError, match=r"'layers' of the CallsAList holds it too, in pl"):
            adapt(nn.Sequential(CallsAList()), config, 2)
    with pytest.warns(UserWarning, match=r"leaves out '0.0' \(.*\), '0.1' \("):
        model = adapt(nn.Sequential(CallsAList()), LoRAConfig(), 2)
    assert list(adapted_layers(model)) == ["0.body"]


def test_a_layer_held_out_of_torchs_sight_is_refused():
    class Nested(CallsAList):
        def __init__(self):
            super().__init__()
            self.layers = {"a": [[self.layers[0]]]}
            object.__setattr__(self, "own", self.get_submodule("1"))
            self.body.register_buffer("nothing", None)

    with pytest.warns(UserWarning, match=r"'0.0' \('layers' of .*, '0.1' \('own' of"):
        model = adapt(nn.Sequential(Nested()), LoRAConfig(), 2)
    assert list(adapted_layers(model)) == ["0.body"]


def bart():
    config = transformers.BartConfig(
        d_model=16, vocab_size=30, max_position_embeddings=32, init_std=0.2,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def masked():
    config = transformers.BertConfig(**BERT_LIKE, initializer_range=0.2)
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize(
    ("make", "name"), [(bart, "lm_head"), (switch, "lm_head"), (masked, "decoder")]
)
def test_a_merged_output_layer_leaves_other_ties(make, name, tmp_path):
    """What is saved then lacks nothing, and the merged layer is not tied again."""
    torch.manual_seed(0)
    model = make().eval()
    adapt(model, LoRAConfig(rank=2, target_modules=[name]), 2)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    given = inputs(model)
    given.pop("labels", None)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad():
        with tasks(1):
            wanted = model(**given).logits
        merged = merge_and_unload(model, 1)
        torch.testing.assert_close(merged(**given).logits, wanted, rtol=1e-5, atol=1e-5)
        merged.save_pretrained(tmp_path)
        again, found = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not found["missing_keys"]
        torch.testing.assert_close(again.eval()(**given).logits, wanted, rtol=1e-5, atol=1e-5)
