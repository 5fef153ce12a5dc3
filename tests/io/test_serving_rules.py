"""Exported adapters against the rules of those who serve them: vLLM, and llama.cpp's conversion.

Both read adapter_config.json and adapter_model.safetensors; the rules are those of vLLM's LoRA
loader (vllm/lora: peft_helper.py, lora_model.py and utils.py) and of convert_lora_to_gguf.py. Where
vLLM is installed, its loader itself reads them, on a CPU; with LLAMA_CPP naming a checkout of
llama.cpp, and its package gguf, the conversion itself is run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import metalora
from metalora.io import export_peft
from tests.io.test_peft_causal import adapted

pytest.importorskip("peft", reason="PEFT folders need the package peft")
transformers = pytest.importorskip("transformers", reason="PEFT folders need transformers")

FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# The layers of a Llama that vLLM has adapters for.
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


@dataclass
class Adapter:
    """An exported adapter and the base that it belongs to."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    tied: bool

    def layers(self) -> dict[str, dict[str, torch.Tensor]]:
        """The factors "A" and "B" of each layer, by its name in the base."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            if parts := FACTOR.fullmatch(name):
                found.setdefault(parts[1], {})[parts[2]] = tensor
        return found


def exported(case: str, folder: Path) -> Adapter:
    model = adapted(case)
    adapter = export_peft(model, folder)[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    return Adapter(
        adapter,
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
        base.state_dict(),
        base.config.tie_word_embeddings,
    )


def fits(adapter: Adapter) -> bool:
    """A is [r, in] and B [out, r] of a weight [out, in] that the base has under the name."""
    for layer, factors in adapter.layers().items():
        weight = adapter.base.get(f"{layer}.weight")
        if weight is None or factors.keys() != {"A", "B"}:
            return False
        rank = factors["A"].shape[0]
        if (factors["A"].shape, factors["B"].shape) != (
            (rank, weight.shape[1]),
            (len(weight), rank),
        ):
            return False
    return True


VLLM: dict[str, Callable[[Adapter], bool]] = {
    "r, lora_alpha and target_modules are given": lambda a: (
        type(a.config["r"]) is int
        and type(a.config["lora_alpha"]) in (int, float)
        and all(type(name) is str for name in a.config["target_modules"])
    ),
    "r is at most max_lora_rank, at most 512": lambda a: a.config["r"] <= 512,
    "all layers have the rank r (0.33 takes others)": lambda a: all(
        len(factors["A"]) == a.config["r"] for factors in a.layers().values()
    ),
    "all layers have the scale lora_alpha / r (0.33 takes others)": lambda a: (
        not (a.config["alpha_pattern"] or a.config["rank_pattern"] or a.config["use_rslora"])
    ),
    "bias is none": lambda a: a.config["bias"] == "none" and not a.config["lora_bias"],
    "modules_to_save is None": lambda a: not a.config["modules_to_save"],
    "use_dora is false": lambda a: not a.config["use_dora"],
    "tensors are lora_A and lora_B": lambda a: all(map(FACTOR.fullmatch, a.tensors)),
    "layers are linear layers that vLLM has": lambda a: (
        {name.rpartition(".")[2] for name in a.layers()} <= LAYERS
    ),
    "factors fit the base": fits,
}
LLAMA_CPP: dict[str, Callable[[Adapter], bool]] = {
    "lora_alpha is one number": lambda a: (
        type(a.config["lora_alpha"]) in (int, float) and not a.config["alpha_pattern"]
    ),
    "the scale is lora_alpha / r": lambda a: not a.config["use_rslora"],
    "tensors are lora_A and lora_B": VLLM["tensors are lora_A and lora_B"],
    "factors fit the base": fits,
    "no adapter on a tied output layer": lambda a: not (a.tied and "lm_head" in a.layers()),
    "no Conv1D, which is transposed": lambda a: not a.config["fan_in_fan_out"],
}
RULES = {"vLLM": VLLM, "llama.cpp": LLAMA_CPP}


def broken(adapter: Adapter) -> set[str]:
    return {
        f"{who}: {n}" for who, rules in RULES.items() for n, r in rules.items() if not r(adapter)
    }


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_adapters_of_linear_layers_keep_all_rules(case: str, tmp_path: Path) -> None:
    adapter = exported(case, tmp_path / "out")
    assert broken(adapter) == set()
    assert adapter.config["peft_type"] == "LORA" and adapter.config["task_type"] == "CAUSAL_LM"
    assert adapter.config["base_model_name_or_path"] == str(tmp_path / "out/base")
    assert set(adapter.layers()) == set(adapter.config["target_modules"])


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (
            "llama, heads",
            {
                "vLLM: modules_to_save is None",
                "vLLM: tensors are lora_A and lora_B",
                "llama.cpp: tensors are lora_A and lora_B",
            },
        ),
        (
            "llama, tied",
            {"llama.cpp: no adapter on a tied output layer"},
        ),
        (
            "gpt2",
            {
                "vLLM: layers are linear layers that vLLM has",
                "vLLM: factors fit the base",
                "llama.cpp: factors fit the base",
                "llama.cpp: no Conv1D, which is transposed",
            },
        ),
    ],
)
def test_others_break_the_rules_that_the_documentation_names(
    case: str, wanted: set[str], tmp_path: Path
) -> None:
    assert broken(exported(case, tmp_path / "out")) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_vllm_loads_them(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its layers' updates, the base has the weights that `merge_and_unload` gives."""
    vllm = pytest.importorskip("vllm.lora.lora_model", reason="needs the package vllm")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    monkeypatch.setattr(vllm, "PIN_MEMORY", False)  # there may be no GPU to pin it for
    model = adapted(case)
    folders = export_peft(model, tmp_path)
    wanted = metalora.merge_and_unload(model, task=1).state_dict()
    helper = PEFTHelper.from_local_dir(str(folders[1]), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8, max_loras=1))
    settings = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32}
    loaded = vllm.LoRAModel.from_local_checkpoint(str(folders[1]), LAYERS, helper, **settings)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for name, layer in loaded.loras.items():
        found[f"{name}.weight"] += layer.scaling * layer.lora_b @ layer.lora_a
    assert len(loaded.loras) == len(helper.target_modules)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_llama_cpp_converts_them(case: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    script = Path(os.environ.get("LLAMA_CPP", ""), "convert_lora_to_gguf.py")
    if not script.exists():
        pytest.skip("needs LLAMA_CPP, a checkout of llama.cpp")
    adapter, file = exported(case, tmp_path / "out"), tmp_path / "adapter.gguf"
    options = ["--base", str(tmp_path / "out/base"), "--outfile", str(file)]
    subprocess.run([sys.executable, str(script), *options, str(adapter.folder)], check=True)
    found = gguf.GGUFReader(file)
    assert found.fields["adapter.lora.alpha"].contents() == adapter.config["lora_alpha"]
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in found.tensors}
    assert len(tensors) == len(adapter.tensors)
    for number in range(2):
        for theirs, ours in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
            factors = adapter.layers()[f"model.layers.{number}.{ours}"]
            for factor, tensor in factors.items():
                name = f"blk.{number}.{theirs}.weight.lora_{factor.lower()}"
                assert torch.equal(tensors[name], tensor)
