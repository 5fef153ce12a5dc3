"""The linear model in which LoRA-ML can be analysed (paper, section 3 and D.1).

Data of task t: y = M_t x + ε with M_t = A* + U_t* U_t*ᵀ. Every function takes any leading batch
dimensions, so that many trainings run in one call, in parallel.
"""

from metalora.linear.data import LinearProblem, sample_data, sample_problem, sample_statistics
from metalora.linear.statistics import (
    SufficientStatistics,
    prediction_error,
    sufficient_statistics,
)
from metalora.linear.training import (
    FinetuneResult,
    RetrainResult,
    finetune_lora,
    lora_ml,
    standard,
)

__all__ = [
    "FinetuneResult",
    "LinearProblem",
    "RetrainResult",
    "SufficientStatistics",
    "finetune_lora",
    "lora_ml",
    "prediction_error",
    "sample_data",
    "sample_problem",
    "sample_statistics",
    "standard",
    "sufficient_statistics",
]
