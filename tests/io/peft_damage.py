"""Adapter folders as accidents and enemies leave them."""

import json

import torch
from safetensors.torch import load_file, save_file

VALUES = (
    None, True, False, 0, -1, 1, 3, 2.5, 10**30, 10**400, float("nan"), float("inf"), -0.0, "", "x",
    "query", "(", "(a|b", "\ud800", "é\n\0", "x" * 10_000, [], [1], ["query"], [None], [[["x"]]],
    {}, {"x": "y"}, {"query": 2}, {"query": 0}, {"query": "3"}, {"(": 1}, {"": 3}, {"[a-": 1},
    {"query": float("nan")}, {"\\": 1}, {"(?P<n>q)uery": 3}, {"x": {"y": [None]}},
)  # fmt: skip
NAMES = (
    "", ".", "..", "weight", "x.weight", ".lora_A.weight", "lora_A.weight", "classifier.weight",
    "roberta.encoder.layer.0.attention.self.query.weight", "roberta.weight", "classifier.dense.x",
    "roberta.encoder.layer.9.attention.self.query.lora_A.weight", "q\n.lora_B.weight", "é.lora_A",
)  # fmt: skip
DTYPES = (
    torch.int8, torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16,
    torch.complex64, torch.float8_e5m2,
)  # fmt: skip


def damage(folder, random):
    """Does one to three kinds of damage to the adapter in ``folder``, drawn from ``random``."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice((_settings, _settings, _tensors, _tensors, _bytes))(folder, random)


def _settings(folder, random):
    path = folder / "adapter_config.json"
    try:
        values = json.loads(path.read_text())
    except ValueError:
        return
    if not isinstance(values, dict):
        return
    name = random.choice([*values, "use_magic", ""])
    if random.random() < 0.1:
        values.pop(name, None)
    else:
        values[name] = random.choice(VALUES)
    path.write_text(json.dumps(values))


def _tensors(folder, random):
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except Exception:
        return
    name = random.choice([*tensors])
    tensor = tensors[name]
    kind = random.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"base_model.model.{random.choice(NAMES)}"] = tensor.clone()
    elif kind == 2:
        tensors[random.choice(NAMES) or "x"] = tensors.pop(name)
    elif kind == 3:
        tensors[name] = tensor.to(random.choice(DTYPES))
    elif kind == 4:
        tensors[name] = random.choice((tensor[:0], tensor[:1], tensor[None], tensor.flatten()[0]))
    else:
        tensors[name] = torch.full_like(tensor, random.choice((float("nan"), 3e38)))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)


def _bytes(folder, random):
    path = folder / random.choice(("adapter_config.json", "adapter_model.safetensors"))
    content = bytearray(path.read_bytes())
    place = random.randrange(min(len(content), 2000) or 1)
    kind = random.randrange(4)
    if kind == 0:
        del content[place:]
    elif kind == 1 and content:
        content[place] ^= 1 << random.randrange(8)
    elif kind == 2:
        content[place:place] = random.randbytes(random.randrange(1, 9))
    else:
        content[place:place] = b"[" * 5000
    path.write_bytes(content)
