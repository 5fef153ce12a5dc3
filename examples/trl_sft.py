"""LoRA-ML with TRL's SFTTrainer: tasks are ways to answer, of each of which there are dialogues.

Prompts have no part in the loss. Needs the package trl.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from trl import SFTConfig, SFTTrainer

import metalora
from metalora.hf import TaskCollator, accept_task_ids
from metalora.meta import Batch

TASKS = 3
WORDS = ["<pad>", "<end>", *(str(number) for number in range(10))]


def samples(count: int) -> list[dict[str, Any]]:
    """A prompt of two numbers; task t answers with each of them plus t + 1, modulo 10."""
    given, ids = torch.randint(10, (count, 2)), torch.arange(count) % TASKS
    answers = (given + ids[:, None] + 1) % 10
    tokens = F.pad(torch.cat([given, answers], 1) + 2, (0, 1), value=1)
    labels = tokens.clone()
    labels[:, :2] = -100
    columns = {"input_ids": tokens, "labels": labels, "task_id": ids}
    columns["attention_mask"] = torch.ones_like(tokens)  # SFTTrainer asks for it
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Each sample's mean [B] over the tokens of its answer."""
    labels = batch.targets[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return losses.sum(1) / labels.ne(-100).sum(1).clamp(min=1)


def main() -> dict[str, float]:
    """Retrains; returns the share of right answers of each task."""
    torch.manual_seed(0)
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<end>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    metalora.adapt(model, metalora.LoRAConfig(rank=4), TASKS)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=48,
            num_train_epochs=20,
            remove_unused_columns=False,  # keeps task_id
            dataset_kwargs={"skip_prepare_dataset": True},  # it has tokens already
            save_strategy="no",
            bf16=False,  # its default, which only some machines have
            report_to="none",
        ),
        processing_class=tokenizer,
        data_collator=TaskCollator(transformers.default_data_collator),
        train_dataset=Dataset.from_list(samples(900)).with_format("torch"),
        compute_loss_func=accept_task_ids(model, answer_loss).loss,
        optimizers=(metalora.TaskOptimizer(model, torch.optim.AdamW, lr=5e-3), None),
    )
    trainer.train()
    model.eval()
    asked = TaskCollator(transformers.default_data_collator)(samples(300))
    labels, ids = asked.pop("labels"), asked["task_ids"]
    with torch.no_grad():
        found = model(**asked).logits[:, 1:3].argmax(-1)
    right = (found == labels[:, 2:4]).all(1).float()
    return {f"task{task}": float(right[ids == task].mean()) for task in range(TASKS)}


if __name__ == "__main__":
    print(main())
