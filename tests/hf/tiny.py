"""A RoBERTa of two small layers and token sequences of three tasks."""

import torch
import transformers

from metalora.adapters import LoRAConfig, adapt, task_parameters, task_state_dict

T, CLASSES = 3, 2
LORA = LoRAConfig(
    rank=2, target_modules=["query", "value", "dense"], exclude_modules=["classifier.dense"],
    heads=["classifier"],
)  # fmt: skip


def plain_model(**options):
    """In float64 and without dropout, so that two trainings can be compared."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=CLASSES,
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options},
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).double()


def adapted_model():
    model = adapt(plain_model(), LORA, T)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def features(count=22, seed=1):
    """Ragged sequences; the tasks are unsorted and of unequal size."""
    source = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(3, 9, (), generator=source))
        made.append(
            {
                "input_ids": torch.randint(3, 50, (length,), generator=source).tolist(),
                "labels": int(torch.randint(CLASSES, (), generator=source)),
                "task_id": (2 * number) % 5 % T,
            }
        )
    return made


def pad(samples):
    """What transformers.DataCollatorWithPadding does, which would want a tokenizer."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = [s["input_ids"] + [1] * (longest - len(s["input_ids"])) for s in samples]
    ids = torch.tensor(ids)
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}


def state_of_task(model, optimizer, task):
    """Copies of all that a task has: adapters, heads, and the optimiser's state of them."""
    found = list(task_state_dict(model, task).values())
    for parameter in task_parameters(model):
        for key, value in optimizer.state[parameter].items():
            if key != "tasks_with_state":
                found.append((value[task] if value.dim() else value).clone())
    return found
