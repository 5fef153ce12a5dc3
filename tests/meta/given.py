"""A loader of given batches."""

from dataclasses import dataclass, field

from metalora.meta import Batch


@dataclass
class GivenRounds:
    """Gives the same batches in every epoch, in their order."""

    batches: list[Batch]
    num_tasks: int
    pooled: bool = False
    rounds_per_task: list[int] = field(init=False)

    def __post_init__(self):
        present = [set(batch.task_ids.tolist()) for batch in self.batches]
        self.rounds_per_task = [sum(t in p for p in present) for t in range(self.num_tasks)]

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)
