"""Measures the memory of a LoRA-ML step of a Llama, and says what larger ones need on paper.

python -m benchmarks.causal_memory [--write DIR]

Small models with random weights take a step, with and without gradient checkpointing, for several
numbers of tasks. What autograd keeps for backward and the optimiser's state are compared with the
formulae, of which the table on paper is made: models of 1, 7 and 70 billion parameters with weights
in float32, products in bfloat16 (autocast), and AdamW.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import metalora
from benchmarks.lib.cli import BenchmarkSettings, program, repeat
from benchmarks.lib.measure import peak_bytes
from benchmarks.lib.tables import machine, markdown, page, write_json
from experiments.lib.cli import check_values, main_guard, option, parse
from metalora.meta import causal_lm_losses
from metalora.meta.causal import CHUNK_LOGITS

FLOAT32, BFLOAT16 = 4, 2  # bytes
STATE = 2 * FLOAT32  # of AdamW, for each parameter
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        key_features: features of all keys of a token, fewer than ``hidden`` where heads share them.
        tied: whether the output layer is the embeddings.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_features: int
    vocabulary: int
    tied: bool = False

    @property
    def of_layer(self) -> int:
        """Parameters of a layer: four projections of attention, three of the MLP, two norms."""
        h, k, f = self.hidden, self.key_features, self.intermediate
        return 2 * h * h + 2 * h * k + 3 * h * f + 2 * h

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * self.of_layer + embeddings + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of one task's adapters, on all linear layers but the output layer."""
        h, k, f = self.hidden, self.key_features, self.intermediate
        return self.layers * rank * (2 * (h + h) + 2 * (h + k) + 3 * (h + f))

    def kept_by_layer(self, autocast: bool) -> int:
        """Bytes that a layer keeps of a token for backward, on the weight route.

        The inputs of both norms and what they are multiplied by, [h] each; the norms' outputs
        (which the projections share) and attention's output, queries, keys and values; in the MLP
        the outputs of gate and up, their activation and its product. Besides the norms' scales and
        attention's logarithms of sums, in float32.
        """
        h, k, f = self.hidden, self.key_features, self.intermediate
        scales = FLOAT32 * (2 + self.heads)
        if not autocast:
            return FLOAT32 * (8 * h + 2 * k + 4 * f) + scales
        return FLOAT32 * 4 * h + BFLOAT16 * (7 * h + 2 * k + 4 * f) + scales

    def kept(self, tokens: int, *, autocast: bool, checkpointing: bool) -> int:
        """Bytes that all layers keep; checkpointed their inputs, and the rest of one layer."""
        of_layer = self.kept_by_layer(autocast)
        if not checkpointing:
            return tokens * self.layers * of_layer
        return tokens * (self.layers * FLOAT32 * self.hidden + of_layer)


SHAPES = {
    "1B": Shape(2048, 8192, 16, 32, 512, 128_256, tied=True),
    "7B": Shape(4096, 11_008, 32, 32, 4096, 32_000),
    "70B": Shape(8192, 28_672, 80, 64, 1024, 128_256),
}


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of this benchmark."""

    tasks: int = option(8, help="on paper: number of tasks")
    rank: int = option(16, help="on paper: rank of the adapters")
    tokens: int = option(8192, help="on paper: tokens of a pass, on each GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values("causal_memory", self)


def on_paper(shape: Shape, tasks: int, rank: int, tokens: int) -> dict[str, Any]:
    """Bytes that a step needs, by part; and of one GPU, for some numbers of GPUs with FSDP2.

    Weights, gradients and AdamW's state are sharded over the GPUs, those of the adapters too. Each
    GPU has its own tokens, checkpointed, and the weights of two layers in bfloat16: of the one that
    computes, and of the next, which is gathered meanwhile.
    """
    adapters = tasks * shape.adapters(rank)
    each = FLOAT32 + FLOAT32 + STATE
    parts = {
        "parameters": shape.parameters,
        "adapters": adapters,
        "weights, gradients, AdamW": each * shape.parameters,
        "the same of adapters": each * adapters,
        "activations": shape.kept(tokens, autocast=True, checkpointing=False),
        "activations, checkpointed": shape.kept(tokens, autocast=True, checkpointing=True),
        "logits": 3 * FLOAT32 * CHUNK_LOGITS,
    }
    sharded = parts["weights, gradients, AdamW"] + parts["the same of adapters"]
    for gpus in GPUS:
        own = parts["activations, checkpointed"] + parts["logits"]
        own += 2 * BFLOAT16 * shape.of_layer
        parts[f"a GPU of {gpus}"] = sharded // gpus + own
    return parts


def new_llama(shape: Shape) -> nn.Module:
    """A model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_features * shape.heads // shape.hidden,
        tie_word_embeddings=shape.tied,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


@contextmanager
def what_is_kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within, notes the bytes of every storage but the parameters' that autograd keeps."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def measured(
    shape: Shape, tasks: int, rank: int, sequences: int, length: int, checkpointing: bool
) -> dict[str, Any]:
    """One step of LoRA-ML under autocast: what it takes, and what the formulae say."""
    model: Any = new_llama(shape)
    metalora.adapt(model, metalora.LoRAConfig(rank=rank), tasks)
    optimizer = metalora.TaskOptimizer(model, torch.optim.AdamW, lr=1e-3)
    model.train()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its name in later versions
            model.gradient_checkpointing_enable()
    ids = torch.randint(shape.vocabulary, (sequences, length))
    task_ids = torch.arange(sequences) * tasks // sequences

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), metalora.tasks(task_ids):
            return causal_lm_losses(model, {"input_ids": ids, "labels": ids}).mean

    def step() -> None:
        metalora.task_mean(forward(), task_ids).backward()

    forward()  # tries the model's parts once
    with what_is_kept(model) as kept:
        losses = forward()
    del losses
    found = {
        "tasks": tasks,
        "checkpointing": checkpointing,
        "parameters": shape.parameters,
        "adapters": tasks * shape.adapters(rank),
        "kept": sum(kept.values()),
        "peak": peak_bytes(step, "cpu"),
    }
    optimizer.step()
    states = optimizer.state.values()
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    found["state"] = sum(v.nbytes for v in tensors if v.dim() > 0)
    tokens = sequences * length
    found["kept on paper"] = shape.kept(tokens, autocast=True, checkpointing=False)
    if checkpointing:
        found["kept on paper"] = tokens * shape.layers * FLOAT32 * shape.hidden
    found["state on paper"] = STATE * (found["parameters"] + found["adapters"])
    return found


# Hidden features, layers, tasks; four heads, an MLP of three times the features.
MEASURED = ((128, 4, 2), (256, 4, 2), (256, 8, 2), (256, 8, 8), (256, 8, 32))
SMOKE = ((32, 2, 2),)
LENGTH, RANK = 128, 8


def small(hidden: int, layers: int) -> Shape:
    return Shape(hidden, 3 * hidden, layers, 4, hidden // 2, 1024)


def paper_table(paper: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table on paper, in GB."""
    names = list(next(iter(paper.values())))
    rows = [
        [name, *(_billions(of[n]) if n in names[:2] else _gigabytes(of[n]) for n in names)]
        for name, of in paper.items()
    ]
    billions = [f"{name}, billions" for name in names[:2]]
    return ["model", *billions, *(f"{name}, GB" for name in names[2:])], rows


def measured_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of measurements, in MiB."""
    header = ["features, layers", "tasks", "checkpointing", "kept for backward", "on paper"]
    header += ["peak of a step", "AdamW's state", "on paper"]
    return header, [
        [
            row["model"],
            str(row["tasks"]),
            "yes" if row["checkpointing"] else "no",
            *(f"{row[n] / 2**20:.1f}" for n in ("kept", "kept on paper", "peak")),
            *(f"{row[n] / 2**20:.1f}" for n in ("state", "state on paper")),
        ]
        for row in rows
    ]


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Measures the small models, and prints both tables."""
    settings = parse(Settings, argv, prog=program("causal_memory"), description=__doc__ or "")
    if settings.device != "cpu":
        raise ValueError("argument --device: what is measured is measured on the CPU alone")
    rows = []
    for hidden, layers, tasks in SMOKE if settings.smoke else MEASURED:
        shape = small(hidden, layers)
        for checkpointing in (False, True):
            found = measured(shape, tasks, RANK, max(8, tasks), LENGTH, checkpointing)
            rows.append({"model": f"{hidden}, {layers}", **found})
    given = settings.tasks, settings.rank, settings.tokens
    paper = {name: on_paper(shape, *given) for name, shape in SHAPES.items()}
    record = {
        "title": "Memory of a LoRA-ML step of a Llama",
        "command": repeat("causal_memory", argv),
        "machine": machine(),
        "rows": {"measured": rows, "paper": paper},
        "tasks": settings.tasks,
        "rank": settings.rank,
        "tokens": settings.tokens,
    }
    text = page(
        record,
        f"On paper: {settings.tasks} tasks, rank {settings.rank}, {settings.tokens} tokens.",
        markdown(*paper_table(paper)),
        f"Measured, in MiB: {LENGTH} tokens a sequence, 8 sequences or one for each task, rank "
        f"{RANK}. The peak is beside weights and state; gradients are a part of it.",
        markdown(*measured_table(rows)),
    )
    print(text)
    if settings.write is not None:
        name = settings.name or "causal_memory_cpu"
        write_json(settings.write / f"{name}.json", record)
        (settings.write / f"{name}.md").write_text(text, encoding="utf-8")


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"


if __name__ == "__main__":
    main()
