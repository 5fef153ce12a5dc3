"""LoRA-ML of a small Llama with a stock transformers.Trainer, on made-up text.

Task t continues a number by adding t + 1, modulo 10. A merged model of a task is saved and loaded
by AutoModelForCausalLM, and continues numbers.
"""

import copy
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import metalora
from metalora.hf import RoundsCallback, TaskCollator, TaskRounds, accept_task_ids
from metalora.meta import Batch

TASKS, LENGTH = 3, 8


def samples(count: int) -> list[dict[str, Any]]:
    """Digits as tokens; of each sequence all but the first are to be predicted."""
    first, ids = torch.randint(10, (count, 1)), torch.arange(count) % TASKS
    tokens = (first + (ids[:, None] + 1) * torch.arange(LENGTH)) % 10
    return [{"input_ids": x, "labels": x, "task_id": t} for x, t in zip(tokens, ids, strict=True)]


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Each sample's mean [B] over its tokens; labels of -100 count for nothing."""
    labels = batch.targets[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / labels.ne(-100).sum(1).clamp(min=1)


def right(model: Any, task: int) -> float:
    """How much of what a plain model generates is as the task wants it."""
    wanted = torch.stack([s["input_ids"] for s in samples(60) if int(s["task_id"]) == task])
    found = model.generate(wanted[:, :2], max_new_tokens=LENGTH - 2, do_sample=False)
    return float((found == wanted)[:, 2:].float().mean())


def main() -> dict[str, float]:
    """Retrains; returns the share of right tokens of each task's merged model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        pad_token_id=10,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    metalora.adapt(model, metalora.LoRAConfig(rank=4), TASKS)
    accepted = accept_task_ids(model, next_token_loss)
    train = samples(900)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=1,  # an item of TaskRounds is a whole batch
            num_train_epochs=8,
            remove_unused_columns=False,  # keeps task_id
            save_strategy="no",
        ),
        data_collator=TaskCollator(transformers.default_data_collator),
        train_dataset=TaskRounds(train, [s["task_id"] for s in train], batch_size=16),
        compute_loss_func=accepted.loss,  # the mean over tasks (paper, eq. 5)
        callbacks=[RoundsCallback()],  # an epoch's own rounds
        optimizers=(metalora.TaskOptimizer(model, torch.optim.AdamW, lr=5e-3), None),
    )
    trainer.train()
    accepted.remove()
    shares = {}
    for task in range(TASKS):
        folder = tempfile.mkdtemp()
        metalora.merge_and_unload(copy.deepcopy(model), task).save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        shares[f"task{task}"] = right(loaded, task)
    return shares


if __name__ == "__main__":
    print(main())
