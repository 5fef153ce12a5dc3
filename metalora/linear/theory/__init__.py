"""The paper's theory of the linear model as functions: closed forms, derivatives, certificates.

`docs/theory.md` leads from every equation and theorem to its function, and
``python -m experiments.theory`` checks each of them numerically.
"""

from metalora.linear.theory.critical import (
    CriticalPoints,
    Curvature,
    LocalMinimum,
    find_critical_points,
    local_minimum,
    lowest_curvature,
    rise_on_net,
)
from metalora.linear.theory.finetuning import best_adapted_weight, expected_finetune_error
from metalora.linear.theory.objective import (
    best_weight,
    gradient,
    hessian,
    loss,
    population_statistics,
    reduced_gradient,
    reduced_hessian,
    reduced_loss,
)
from metalora.linear.theory.recovery import base_gap_rank, solution_dimension, two_task_minima
from metalora.linear.theory.standard import (
    best_finetune_loss,
    expected_standard_loss,
    many_task_loss_bound,
    numerical_rank,
    standard_gap_rank,
    standard_minimum,
)

__all__ = [
    "CriticalPoints",
    "Curvature",
    "LocalMinimum",
    "base_gap_rank",
    "best_adapted_weight",
    "best_finetune_loss",
    "best_weight",
    "expected_finetune_error",
    "expected_standard_loss",
    "find_critical_points",
    "gradient",
    "hessian",
    "local_minimum",
    "loss",
    "lowest_curvature",
    "many_task_loss_bound",
    "numerical_rank",
    "population_statistics",
    "reduced_gradient",
    "reduced_hessian",
    "reduced_loss",
    "rise_on_net",
    "solution_dimension",
    "standard_gap_rank",
    "standard_minimum",
    "two_task_minima",
]
