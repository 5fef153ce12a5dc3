"""One embedding per task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalora.nn.head import mean_over_tasks
from metalora.nn.layer import TaskLayer
from metalora.nn.task_batch import TaskBatch


class MultiTaskEmbedding(TaskLayer):
    """Rows of W_t with the sample's own task t, for tasks with embeddings of their own.

    ``weight`` is [T, num_embeddings, d].
    """

    task_parameters = ("weight",)
    weight: nn.Parameter
    num_embeddings: int
    padding_idx: int | None

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, num_tasks: int, *, name: str = ""
    ) -> MultiTaskEmbedding:
        """T copies of ``embedding``."""
        layer = cls(num_tasks, name)
        layer.in_features, layer.out_features = 1, embedding.embedding_dim
        layer.num_embeddings, layer.padding_idx = embedding.num_embeddings, embedding.padding_idx
        layer.weight = nn.Parameter(embedding.weight.detach().repeat(num_tasks, 1, 1))
        layer.note_frozen(embedding)
        return layer.train(embedding.training)

    def reset_task_parameters(self) -> None:
        """Draws every task's embeddings afresh, as nn.Embedding does."""
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[:, self.padding_idx] = 0

    def forward(self, ids: Tensor, tasks: TaskBatch | None = None) -> Tensor:
        """Places in the embedding, integers [B, ...] → [B, ..., d].

        Args:
            ids: the samples along the first dimension; [B·n, ...] or packed as for other layers.
            tasks: see `MultiTaskLoRALinear.forward`.

        Raises:
            IndexError: if an id is outside 0..num_embeddings-1 (on a GPU: a device assertion).
            ValueError: if shapes do not fit or no tasks are known.
        """
        x = ids[..., None]
        batch = self.batch_of(x, tasks)
        rows = ids
        if batch is not None and batch.size:
            if not torch.compiler.is_compiling():
                batch.check_range(self.num_tasks)
            if batch.packs(x):
                own = batch.packed_ids(ids.device).view(ids.shape)
            else:
                own = batch.ids_on(ids.device)
                own = own.repeat_interleave(ids.shape[0] // batch.size)
                own = own.view(-1, *[1] * (ids.dim() - 1))
            # An id outside goes behind the last row of all, where torch itself looks for such ones
            # and no host waits for a GPU; added up, it would be a row of another task.
            inside = (ids >= 0) & (ids < self.num_embeddings)
            behind = self.num_tasks * self.num_embeddings
            rows = torch.where(inside, ids + own * self.num_embeddings, behind)
        try:
            found = F.embedding(rows, self.weight.flatten(0, 1))
        except IndexError:
            raise IndexError(self._outside(ids)) from None
        if self.padding_idx is None:
            return found
        return torch.where(ids.eq(self.padding_idx)[..., None], found.detach(), found)

    def _outside(self, ids: Tensor) -> str:
        wrong = ids[(ids < 0) | (ids >= self.num_embeddings)]
        return (
            f"{self._where()}: ids must be in 0..{self.num_embeddings - 1}, the places of the "
            f"embedding, got {int(wrong[0])}; resize the embedding before adapt, or mend the ids"
        )

    def to_linear(self, task: int | None = None) -> nn.Embedding:
        """Task t's embedding, or (None) the mean of all, as a new parameter."""
        own = self.weight.detach()
        weight = mean_over_tasks(own) if task is None else own[self.check_task(task)].clone()
        sizes = self.num_embeddings, self.out_features
        embedding = nn.Embedding(*sizes, self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(weight, self.is_trained("weight"))
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.out_features}, {self._number()}"
