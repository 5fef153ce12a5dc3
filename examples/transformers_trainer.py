"""LoRA-ML with a stock transformers.Trainer: three tasks, a small RoBERTa, made-up tokens."""

import tempfile
from typing import Any

import torch
import transformers

import metalora
from metalora.hf import RoundsCallback, TaskCollator, TaskRounds, accept_task_ids

TASKS = 3


def samples(count: int) -> list[dict[str, Any]]:
    """Sequences of tokens 2..8; each task asks for one of its own: is it among them?"""
    tokens, ids = torch.randint(2, 9, (count, 6)), torch.arange(count) % TASKS
    labels = (tokens == ids[:, None] + 3).any(1).long()
    every = zip(tokens, labels, ids, strict=True)
    return [{"input_ids": x, "labels": y, "task_id": t} for x, y, t in every]


def accuracy(prediction: Any) -> dict[str, float]:
    labels, ids = prediction.label_ids
    right = prediction.predictions.argmax(-1) == labels
    return {f"task{task}": float(right[ids == task].mean()) for task in range(TASKS)}


def main() -> dict[str, float]:
    """Retrains, and returns what the trainer measures afterwards."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=8)
    model = transformers.RobertaForSequenceClassification(config)
    metalora.adapt(model, metalora.LoRAConfig(rank=4, heads=["classifier"]), TASKS)
    optimizer = metalora.TaskOptimizer(model, torch.optim.AdamW, lr=5e-3, weight_decay=0.0)
    train = samples(900)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=1,  # an item of TaskRounds is a whole batch
            num_train_epochs=8,
            remove_unused_columns=False,  # keeps task_id
            label_names=["labels", "task_ids"],  # what compute_metrics is given
            save_strategy="no",
        ),
        data_collator=TaskCollator(transformers.default_data_collator),
        train_dataset=TaskRounds(train, [f["task_id"] for f in train], batch_size=16),
        eval_dataset=samples(300),
        compute_loss_func=accept_task_ids(model).loss,  # the mean over tasks (paper, eq. 5)
        compute_metrics=accuracy,
        callbacks=[RoundsCallback()],  # an epoch's own rounds
        optimizers=(optimizer, None),  # instead of the trainer's, which would move absent tasks too
    )
    trainer.train()
    measured = trainer.evaluate()
    metalora.unload(model)  # plain again, with the retrained weights
    return measured


if __name__ == "__main__":
    print(main())
