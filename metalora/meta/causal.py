"""The loss of causal language models, computed without the logits of all tokens at once."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from metalora._checks import SHORT, check_count, first_line
from metalora.meta.data import Batch
from metalora.meta.evaluation import Evaluation, evaluation_mode, mean_of
from metalora.nn import TaskBatch, TaskLayer, current_tasks, tasks

IGNORED = -100
"""The label of tokens that have no part in the loss, such as those of prompts and padding."""

CHUNK_LOGITS = 2**25
"""How many logits exist at a time, 128 MiB in float32, where ``chunk_tokens`` is not given."""


class SampleLosses(NamedTuple):
    """The losses of a batch's samples.

    Attributes:
        mean: [B], each sample's mean over its labelled tokens, in nats; 0 where it has none.
        tokens: int64 [B], how many labelled tokens each sample has.
    """

    mean: Tensor
    tokens: Tensor


def causal_lm_losses(
    model: nn.Module, inputs: Mapping[str, Any], *, chunk_tokens: int | None = None
) -> SampleLosses:
    """Cross-entropy of the next token, as means over samples; ``forward`` of a training.

    The model's decoder runs on all tokens, its output layer on some at a time, see `token_losses`.
    Labels stand where their tokens stand, as transformers has them: label i is compared with what
    is predicted from the tokens before it, so the first of a sequence is never used. Losses that
    a model adds to this one, such as those of routers, are left out.

    The decoder and the output layer are called by themselves, so what acts in the ``forward`` of a
    wrapper does not act here. In a loop of one's own with DistributedDataParallel, wrap a module
    whose ``forward`` calls this function on the model.

    Example:
        ``lora_ml(model, rounds, config, lora, forward=causal_lm_losses, loss=mean_token_loss)``

    Args:
        model: a causal language model of transformers, or one around it; plain or adapted.
        inputs: what its decoder takes, "input_ids" [S, L] and more, and "labels", int64 [S, L],
            with -100 for tokens that are not to be predicted; packed [1, N] with "packing".
        chunk_tokens: see `token_losses`.

    Raises:
        ValueError: if there are no labels, or the logits of ``model`` are not its output layer
            applied to what its decoder returns (a cap on them as in Gemma is known), which is tried
            once for each model; or if it is compiled, or wrapped in DistributedDataParallel, whose
            own ``forward`` would not be called.
    """
    if "labels" not in inputs:
        raise ValueError(f"causal_lm_losses: inputs must have 'labels', got {sorted(inputs)}")
    decoder, head, softcap = _parts(model)
    labels = inputs["labels"]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = decoder(**given, use_cache=False)[0]
    packing = given.get("packing")
    if packing is not None:
        labels = labels.index_fill(1, packing.ends[:-1].long(), IGNORED)
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = token_losses(hidden, following, head, chunk_tokens=chunk_tokens, softcap=softcap)
    sums, counts = (
        _of_samples(part, packing) for part in (losses, (following != IGNORED).to(torch.int64))
    )
    return SampleLosses(sums / counts.clamp(min=1), counts)


def mean_token_loss(outputs: SampleLosses, batch: Batch) -> Tensor:
    """The means [B] of `causal_lm_losses`: the ``loss`` of a training, and nats a token.

    With ``sizes`` of the loader, the numbers of labelled tokens, a task's loss is the mean over its
    tokens; without, it is the mean over its samples.

    Raises:
        TypeError: if the outputs are not what `causal_lm_losses` returns.
    """
    if not isinstance(outputs, SampleLosses):
        raise TypeError(
            "mean_token_loss: pass forward=metalora.meta.causal_lm_losses with it, got outputs of "
            f"type {type(outputs).__name__}"
        )
    return outputs.mean


def bits_per_byte(outputs: SampleLosses, batch: Batch) -> Tensor:
    """A metric [B] for `evaluate`: bits of each sample for each of its ``batch.sizes`` bytes.

    With the loader's ``sizes`` the bytes of text that each sample's labelled tokens stand for, a
    task's mean is its bits over its bytes, which compares models whatever their tokens are.

    Raises:
        ValueError: if the batch has no sizes.
    """
    if batch.sizes is None:
        raise ValueError("bits_per_byte: the loader must have sizes, the bytes of each sample")
    nats = outputs.mean.double() * outputs.tokens
    return nats / (math.log(2) * batch.sizes.to(nats).clamp(min=1))


def perplexity(evaluation: Evaluation) -> Evaluation:
    """The perplexity of each task and its mean over tasks, of `evaluate` with `mean_token_loss`.

    It is over a task's tokens if these are the loader's ``sizes``.
    """
    per_task = tuple(torch.tensor(evaluation.per_task, dtype=torch.float64).exp().tolist())
    present = [value for value in per_task if not math.isnan(value)]
    return Evaluation(per_task, mean_of(present))


def token_losses(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of each token; the logits of some tokens exist at a time.

    Backward computes the logits of each chunk again, so that [tokens, vocabulary] never stands
    whole. Logits of half precision are reduced in float32, and the gradients of the head's
    parameters are added up in float32 over the chunks.

    Args:
        hidden: [S, L, H], what ``head`` takes.
        labels: int64 [S, L], the token that each is to predict; -100 leaves it out.
        head: the output layer: any module [rows, H] → [rows, vocabulary] that treats each row by
            itself, with or without bias, its weight tied or not. An adapted one, such as
            `metalora.nn.MultiTaskLoRALinear`, takes the tasks of the `metalora.tasks` context.
        chunk_tokens: tokens whose logits exist at a time; None: as many as have 2²⁵ logits, or 512
            where ``head`` does not say how many a token has.
        softcap: c; logits z become c · tanh(z / c), as in Gemma.

    Returns:
        [S, L], in float32 or better; 0 where the label is -100.

    Raises:
        ValueError: if shapes do not fit, or a label on the CPU is outside the vocabulary.
    """
    if chunk_tokens is None:
        vocabulary = getattr(head, "out_features", CHUNK_LOGITS // 512)
        chunk_tokens = max(1, CHUNK_LOGITS // vocabulary)
    check_count("token_losses", "chunk_tokens", chunk_tokens)
    if labels.dtype != torch.int64 or hidden.shape[:-1] != labels.shape or hidden.dim() < 2:
        raise ValueError(
            "token_losses: hidden must be [S, L, H] and labels int64 [S, L], got "
            f"{list(hidden.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    ids = _tasks_of_rows(hidden) if any(isinstance(m, TaskLayer) for m in head.modules()) else None
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    places = _labelled(wanted)
    if places is not None:
        rows, wanted = rows[places], wanted[places]
        ids = None if ids is None else ids[places]
    parameters = dict(head.named_parameters())
    chunks = _Chunks(head, list(parameters), ids, chunk_tokens, softcap, rows.device.type)
    losses: Tensor = _ChunkedLosses.apply(chunks, rows, wanted, *parameters.values())
    if places is not None:
        losses = losses.new_zeros(labels.numel()).index_copy(0, places, losses)
    return losses.view(labels.shape)


class _Chunks:
    """How the loss of some rows is computed, now and again in backward."""

    def __init__(
        self,
        head: nn.Module,
        names: Sequence[str],
        ids: Tensor | None,
        size: int,
        softcap: float | None,
        device: str,
    ) -> None:
        self.head, self.names, self.ids, self.size, self.softcap = head, names, ids, size, softcap
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def __call__(
        self, rows: Tensor, labels: Tensor, parameters: Sequence[Tensor], place: slice
    ) -> Tensor:
        """The losses of the rows [n, H] at ``place`` among all."""
        named = dict(zip(self.names, parameters, strict=True))
        with ExitStack() as around:
            # Without its cache, which would add up a weight's gradients in half precision.
            around.enter_context(torch.autocast(*self._autocast, cache_enabled=False))
            if self.ids is not None:
                around.enter_context(tasks(TaskBatch(self.ids[place])))
            # Hooks on the parameters, such as those of SeenTasks, see the sum over chunks alone.
            logits = torch.func.functional_call(self.head, named, (rows,))
        logits = logits.float() if logits.dtype in SHORT else logits
        if labels.device.type == "cpu":
            outside = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
            if len(wrong := labels[outside]):
                raise ValueError(
                    f"token_losses: labels must be -100 or in 0..{logits.shape[-1] - 1}, the "
                    f"head's vocabulary, got {int(wrong[0])}"
                )
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")

    def places(self, total: int) -> Iterator[slice]:
        """The fewest chunks of about equal size; one of an empty batch."""
        count = max(1, -(-total // self.size))
        for i in range(count):
            yield slice(total * i // count, total * (i + 1) // count)


class _ChunkedLosses(torch.autograd.Function):
    """The losses [N] of rows [N, H]; saves the rows and the parameters, and no logits."""

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks, rows: Tensor, labels: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.chunks = chunks
        ctx.random = torch.get_rng_state(), *get_device_states(rows)
        ctx.save_for_backward(rows, labels, *parameters)
        found = [chunks(rows[p], labels[p], parameters, p) for p in chunks.places(len(rows))]
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, labels, *parameters = ctx.saved_tensors
        needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        leaves = [
            part.detach().requires_grad_(n) for part, n in zip(parameters, needed[1:], strict=True)
        ]
        sums = [
            torch.zeros_like(p, dtype=torch.float32 if p.dtype in SHORT else p.dtype) if n else None
            for p, n in zip(parameters, needed[1:], strict=True)
        ]
        of_rows = torch.zeros_like(rows) if needed[0] else None
        of_cpu, devices, states = ctx.random
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.set_rng_state(of_cpu)  # what adapters drop, they drop again
            set_device_states(devices, states)
            for place in ctx.chunks.places(len(rows)):
                chunk = rows[place].detach().requires_grad_(needed[0])
                losses = ctx.chunks(chunk, labels[place], leaves, place)
                wanted = [part for part in (chunk, *leaves) if part.requires_grad]
                found = iter(torch.autograd.grad(losses, wanted, grad[place], allow_unused=True))
                del losses
                if of_rows is not None:
                    of_rows[place] = next(found)
                for total in sums:
                    if total is not None and (gradient := next(found)) is not None:
                        total.add_(gradient)
        gradients = [
            None if total is None else total.to(p.dtype)
            for total, p in zip(sums, parameters, strict=True)
        ]
        return None, of_rows, None, *gradients


_tried: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module, float | None]:
    """The decoder, the output layer and the cap on the logits of a model, tried once."""
    inner: Any = None
    for module in model.modules():  # the wrappers come first
        _check_called(module)
        if hasattr(type(module), "get_output_embeddings"):
            inner = module
            break
    head = None if inner is None else inner.get_output_embeddings()
    if head is None or inner.base_model is inner or inner.config.is_encoder_decoder:
        raise ValueError(
            "causal_lm_losses: model must be a causal language model of transformers with an "
            f"output layer, got {type(inner or model).__name__}"
        )
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    if inner not in _tried:
        _try(inner, head, softcap)
        _tried.add(inner)
    return inner.base_model, head, softcap


def _check_called(module: nn.Module) -> None:
    """Refuses a module whose own call, which is left out here, does what is needed."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "causal_lm_losses: DistributedDataParallel must not be around the model, as its "
            "forward, which is not called, prepares the exchange of gradients; put it around a "
            "module whose forward calls causal_lm_losses"
        )
    dynamo = sys.modules.get("torch._dynamo")  # imported by torch.compile alone
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    if wrapped or module._compiled_call_impl is not None:
        raise ValueError(
            "causal_lm_losses: the model is compiled, but its decoder is called alone; compile "
            "that one instead, as in model.base_model.compile()"
        )


def _try(inner: Any, head: nn.Module, softcap: float | None) -> None:
    """Compares the model's own logits of three tokens with those of its parts."""
    kind = type(inner).__name__
    ids = torch.arange(3, device=next(head.parameters()).device)[None]
    try:
        with evaluation_mode(inner), tasks(torch.zeros(1, dtype=torch.int64)):
            wanted = inner(input_ids=ids, use_cache=False).logits
            found = head(inner.base_model(input_ids=ids, use_cache=False)[0])
    except Exception as error:  # many kinds, of models that take more than tokens
        raise ValueError(
            f"causal_lm_losses: {kind} is no causal language model of tokens alone: "
            f"{first_line(error)}"
        ) from None
    found = found if softcap is None else softcap * torch.tanh(found / softcap)
    limit = (5e-2 if wanted.dtype in SHORT else 1e-3) * wanted.abs().max()
    if wanted.shape != found.shape or not bool(((wanted - found).abs() <= limit).all()):
        raise ValueError(
            f"causal_lm_losses: the logits of {kind} are not its output layer "
            "applied to what its decoder returns; use the model's own logits with "
            "torch.nn.functional.cross_entropy instead"
        )


def _labelled(labels: Tensor) -> Tensor | None:
    """int64: which of the rows have a label; None on a GPU, where the host would wait for it."""
    return (labels != IGNORED).nonzero()[:, 0] if labels.device.type == "cpu" else None


def _tasks_of_rows(hidden: Tensor) -> Tensor | None:
    """int64 [S · L] on the CPU: the task of each row of hidden [S, L, H]; None outside of tasks."""
    batch = current_tasks()
    if batch is None:
        return None
    if batch.packs(hidden):
        return batch.packed_ids(torch.device("cpu"))
    ids = batch.task_ids.cpu()
    return ids.repeat_interleave(hidden.shape[:-1].numel() // max(1, len(ids)))


def _of_samples(values: Tensor, packing: Any) -> Tensor:
    """The sums [B] over each sample's tokens of values [S, L], or packed [1, N]."""
    batch = current_tasks()
    if packing is not None:
        tokens = torch.arange(values.shape[1], device=values.device, dtype=torch.int32)
        sequence = torch.bucketize(tokens, packing.ends, right=True) - 1
        sums = values.new_zeros(len(packing.ends) - 1).index_add(0, sequence, values[0])
    else:
        sums = values.sum(1)
    return sums if batch is None or batch.size == 0 else sums.view(batch.size, -1).sum(1)
