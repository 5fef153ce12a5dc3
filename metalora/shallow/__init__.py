"""The shallow network in which LoRA-ML is compared with standard retraining (paper, D.2).

Data of task t: y = cᵀ σ((A + U_t* U_t*ᵀ) x) + ε, σ the elementwise sigmoid. Every function takes
any leading batch dimensions, so that many trainings run in one call, in parallel.
"""

from metalora.shallow.data import ShallowProblem, sample_data, sample_problem
from metalora.shallow.network import (
    Adapters,
    Network,
    initial_adapters,
    initial_network,
)
from metalora.shallow.training import (
    AdamW,
    FinetuneResult,
    RetrainResult,
    finetune_lora,
    lora_ml,
    standard,
)

__all__ = [
    "AdamW",
    "Adapters",
    "FinetuneResult",
    "Network",
    "RetrainResult",
    "ShallowProblem",
    "finetune_lora",
    "initial_adapters",
    "initial_network",
    "lora_ml",
    "sample_data",
    "sample_problem",
    "standard",
]
