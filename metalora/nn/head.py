"""One last layer per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalora._checks import check_count
from metalora._transforms import faking
from metalora.nn.layer import TaskLayer, new_parameter, rows_per_sample
from metalora.nn.plain import as_linear
from metalora.nn.task_batch import TaskBatch

# Outputs of all heads for the rows of all tasks, rows · T · out, up to which one product of all is
# about as fast as anything else.
_FEW = 2**17
# Outputs of one head for the rows of all tasks, rows · out. On a CPU core, forward and backward
# with 5 to 640 tasks, all heads together were faster up to 2600, each by itself from 8200.
_PER_HEAD = 2**13
_TOGETHER_ON_GPU = 2**27  # of all heads, 512 MiB in float32: a GPU computes them at once
_VOCABULARY = 8192  # outputs of a head; above, compiled code computes one head at a time


class MultiTaskHead(TaskLayer):
    """y = x W_tᵀ + b_t with the sample's own task t: Last-Layer-ML's per-task parameters.

    ``weight`` is [T, out, in] and ``bias`` [T, out], each task initialised as nn.Linear does.
    Every row is multiplied by all T heads, and its own result is kept: one product, without sorting
    or waiting for a device, but a row that is not finite makes the gradients of all heads NaN.
    Where that would be many outputs, each row is multiplied by its own head alone: in one batched
    product if all tasks have equally many rows and the host knows it, else task by task.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        num_tasks: number of tasks T.
        bias: whether there is a bias.
        device: where the parameters live.
        dtype: what they are.
        name: what error messages call the layer.
    """

    task_parameters = ("weight", "bias")
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tasks: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        name: str = "",
    ) -> None:
        super().__init__(num_tasks, name)
        self.in_features = check_count("MultiTaskHead", "in_features", in_features)
        self.out_features = check_count("MultiTaskHead", "out_features", out_features)
        like = torch.empty(0, device=device, dtype=dtype)
        self.weight = new_parameter(like, num_tasks, out_features, in_features)
        self.bias = new_parameter(like, num_tasks, out_features) if bias else None
        self.reset_task_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_tasks: int, *, name: str = "") -> MultiTaskHead:
        """T copies of ``linear``."""
        head = cls.__new__(cls)
        TaskLayer.__init__(head, num_tasks, name)
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight = nn.Parameter(linear.weight.detach().repeat(num_tasks, 1, 1))
        bias = linear.bias
        head.bias = None if bias is None else nn.Parameter(bias.detach().repeat(num_tasks, 1))
        head.note_frozen(linear)
        return head.train(linear.training)

    def reset_task_parameters(self) -> None:
        """Draws every task's head afresh, as nn.Linear does."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.own_task_parameters().values():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, tasks: TaskBatch | None = None) -> Tensor:
        """x [B, ..., in] → [B, ..., out]; see `MultiTaskLoRALinear.forward`."""
        batch = self.batch_of(x, tasks)
        if batch is None or self.num_tasks == 1:
            if batch is not None and not torch.compiler.is_compiling():
                batch.check_range(1)
            return F.linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        compiling = torch.compiler.is_compiling()
        if not compiling:
            batch.check_range(self.num_tasks)
        per_head = x.shape[:-1].numel() * self.out_features
        few = per_head * self.num_tasks <= _FEW
        if batch.size and not few and not compiling and not faking():
            if self._has_equal_counts(x, batch):
                return self._in_one_product(x, batch)
            on_cpu = x.device.type == "cpu"
            if per_head > (_PER_HEAD if on_cpu else _TOGETHER_ON_GPU // self.num_tasks):
                return self._task_by_task(x, batch)
        bias = None if self.bias is None else self.bias.flatten()
        if batch.size == 0:
            every = F.linear(x, self.weight.flatten(0, 1), bias)  # [B, ..., T * out]
            return every[..., : self.out_features]
        if batch.packs(x):
            ids, rows = batch.packed_ids(x.device), 1
        else:
            ids, rows = batch.ids_on(x.device), rows_per_sample(x, batch)
        if compiling and self.out_features > _VOCABULARY:
            own = self._head_by_head(x.reshape(ids.shape[0], rows, self.in_features), ids)
            return own.reshape(*x.shape[:-1], self.out_features)
        every = F.linear(x, self.weight.flatten(0, 1), bias)
        every = every.reshape(ids.shape[0], rows, self.num_tasks, self.out_features)
        ids = ids.view(-1, 1, 1, 1)
        own = every.gather(2, ids.expand(-1, every.shape[1], 1, self.out_features))
        return own.reshape(*x.shape[:-1], self.out_features)

    def _has_equal_counts(self, x: Tensor, batch: TaskBatch) -> bool:
        """Whether the host knows, without waiting, that all tasks have equally many rows of x."""
        if x.shape[:-1].numel() % self.num_tasks or not batch.counts_known(self.num_tasks):
            return False
        per_sample = None if batch.packs(x) else rows_per_sample(x, batch)
        least, most = batch.task_ptr(self.num_tasks, per_sample).diff().aminmax()
        return int(least) == int(most)

    def _in_one_product(self, x: Tensor, batch: TaskBatch) -> Tensor:
        rows = self.sort_rows(x, batch)[0].reshape(self.num_tasks, -1, self.in_features)
        weight = self.weight.mT  # [T, in, out]
        if self.bias is None:
            own = torch.bmm(rows, weight)
        else:
            own = torch.baddbmm(self.bias[:, None], rows, weight)
        return self.restore_rows(own.flatten(0, 1), x, batch)

    def _task_by_task(self, x: Tensor, batch: TaskBatch) -> Tensor:
        rows, task_ptr = self.sort_rows(x, batch)
        parts = zip(rows.split(task_ptr.diff().tolist()), *self._heads(), strict=True)
        return self.restore_rows(torch.cat([F.linear(*part) for part in parts]), x, batch)

    def _head_by_head(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [n, rows, in] and ids [n] → [n, rows, out]; all outputs of one head at a time."""
        own: Tensor | None = None
        for task, (weight, bias) in enumerate(zip(*self._heads(), strict=True)):
            outputs = F.linear(x, weight, bias)
            own = outputs if own is None else torch.where(ids.view(-1, 1, 1) == task, outputs, own)
        assert own is not None
        return own

    def _heads(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The weight and the bias of each task."""
        biases = [None] * self.num_tasks if self.bias is None else self.bias.unbind()
        return self.weight.unbind(), biases

    def to_linear(self, task: int | None = None) -> nn.Linear:
        """Task t's head, or (None) the mean of all heads, as new parameters."""
        own = {name: p.detach() for name, p in self.own_task_parameters().items()}
        if task is None:
            parts = {name: mean_over_tasks(p) for name, p in own.items()}
        else:
            parts = {name: p[self.check_task(task)].clone() for name, p in own.items()}
        weight = nn.Parameter(parts["weight"], self.is_trained("weight"))
        bias = nn.Parameter(parts["bias"], self.is_trained("bias")) if "bias" in parts else None
        return as_linear(weight, bias, self.training)


def mean_over_tasks(stacked: Tensor) -> Tensor:
    """[T, ...] → the mean [...] over tasks; of equal values these very values, without rounding."""
    return stacked[0] + (stacked - stacked[0]).mean(0)
