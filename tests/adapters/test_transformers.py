"""torch's own transformer layers, parts of which read a layer's weight without calling it."""

import warnings

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt, adapted_layers, unload
from metalora.nn import tasks


def encoder(norm_first=False, batch_first=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def adapted_encoder(**options):
    model = encoder(**options)
    adapt(model, LoRAConfig(rank=2, target_modules=["linear1", "linear2"]), 2)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_inference_equals_training_without_dropout(norm_first, padded):
    model = adapted_encoder(norm_first=norm_first)
    x, mask = torch.randn(3, 4, 8), None
    if padded:
        mask = torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]])
    with tasks(torch.tensor([1, 0, 1])):
        trained = model.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            inferred = model.eval()(x, src_key_padding_mask=mask)
    kept = torch.ones(3, 4, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(inferred[kept], trained[kept])


def test_the_fused_path_would_be_wrong():
    """What `adapt` guards against: torch's attribute put back, the adapters are ignored."""
    model, x = adapted_encoder(), torch.randn(3, 4, 8)
    with tasks(torch.tensor([1, 0, 1])), torch.no_grad():
        right = model.eval()(x)
        for layer in model.layers:
            layer.activation_relu_or_gelu = 1
        wrong = model(x)
    assert not torch.allclose(right, wrong)


def test_remove_gives_the_fused_path_back():
    model, plain = adapted_encoder(), encoder()
    assert not model.use_nested_tensor
    unload(model)
    assert model.use_nested_tensor is plain.use_nested_tensor is True
    assert model.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu == 1
    assert vars(model.layers[0]).keys() == vars(plain.layers[0]).keys()


def test_attention_output_is_never_adapted():
    with pytest.raises(ValueError, match=r"out_proj' cannot get an adapter: nn\.MultiheadAttent"):
        adapt(encoder(), LoRAConfig(rank=1, target_modules=["out_proj"]), 2)
    model = encoder()
    with pytest.warns(UserWarning, match=r"leaves out 'layers\.0\.self_attn\.out_proj'"):
        adapt(model, LoRAConfig(rank=1), 2)
    assert set(adapted_layers(model)) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}


def test_batch_second_is_refused_for_several_tasks():
    config = LoRAConfig(rank=1, target_modules=["linear1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = encoder(batch_first=False)
    with pytest.raises(ValueError, match=r"'layers\.0' is a TransformerEncoderLayer with batch_fi"):
        adapt(model, config, 2)
    assert adapt(model, config, 1)(torch.randn(4, 3, 8)).shape == (4, 3, 8)
