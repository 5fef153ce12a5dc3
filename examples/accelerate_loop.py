"""LoRA-ML in a loop with accelerate: three tasks, a small RoBERTa, made-up tokens."""

from typing import Any

import accelerate
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader

import metalora
from metalora.hf import TaskCollator, TaskRounds, accept_task_ids

TASKS = 3


def samples(count: int) -> list[dict[str, Any]]:
    """Sequences of tokens 2..8; each task asks for one of its own: is it among them?"""
    tokens, ids = torch.randint(2, 9, (count, 6)), torch.arange(count) % TASKS
    labels = (tokens == ids[:, None] + 3).any(1).long()
    every = zip(tokens, labels, ids, strict=True)
    return [{"input_ids": x, "labels": y, "task_id": t} for x, y, t in every]


def main() -> list[float]:
    """Retrains, and returns the mean loss of each epoch."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=8)
    model = transformers.RobertaForSequenceClassification(config)
    metalora.adapt(model, metalora.LoRAConfig(rank=4, heads=["classifier"]), TASKS)
    objective = accept_task_ids(model)
    train = samples(900)
    rounds = TaskRounds(train, [f["task_id"] for f in train], batch_size=16)
    loader = DataLoader(rounds, collate_fn=TaskCollator(transformers.default_data_collator))
    optimizer = metalora.TaskOptimizer(model, torch.optim.AdamW, lr=3e-3)

    accelerator = accelerate.Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    history = []
    for epoch in range(8):
        rounds.set_epoch(epoch)
        losses = []
        for batch in loader:
            logits = model(**batch).logits
            per_sample = F.cross_entropy(logits, batch["labels"], reduction="none")
            loss = objective.mean(per_sample)  # the mean over tasks (paper, eq. 5)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        history.append(float(torch.stack(losses).mean()))
    metalora.unload(accelerator.unwrap_model(model))  # plain again, with the retrained weights
    accelerator.end_training()  # leaves the other processes, if there are any
    return history


if __name__ == "__main__":
    print(main())
