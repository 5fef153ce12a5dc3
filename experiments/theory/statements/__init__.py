"""Every statement of the paper's theory, by number, and wrong ones that must be refuted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.theory.checks import Outcome
from experiments.theory.settings import TheorySettings
from experiments.theory.statements.finetuning import finetuning_error
from experiments.theory.statements.landscape import saddles, spurious_minimum, wrong_saddles
from experiments.theory.statements.recovery import (
    base_gap,
    descent,
    exact_recovery,
    hyperbola,
    wrong_recovery,
)
from experiments.theory.statements.standard import (
    asymmetric,
    gap_rank,
    many_tasks,
    standard_loss,
    standard_retraining,
    wrong_standard_loss,
)


@dataclass(frozen=True)
class Statement:
    """What is claimed, where in the paper, and the function that checks it."""

    claim: str
    source: str
    check: Callable[[TheorySettings], Outcome]


STATEMENTS = {
    "1": Statement("Â_SR = A* + mean R_t, uniquely", "eq. 12", standard_retraining),
    "2": Statement("loss at Â_SR is ½(1 − 1/T) k d (d + 1)", "thm 3.1", standard_loss),
    "3": Statement("Â_SR is k (T + 1) ranks off the test task", "prop. 1", gap_rank),
    "4": Statement("T → ∞: Â_SR → A* + k I, loss stays", "prop. 2", many_tasks),
    "5": Statement("L = 0 leaves rank(A − A*) ≤ 2k", "thm 3.2", base_gap),
    "6": Statement("T ≥ 3: L = 0 recovers A* and U_tU_tᵀ", "thm 3.3", exact_recovery),
    "7": Statement("T = 2: no spurious local minima", "thm 3.4", saddles),
    "8": Statement("fine-tuning error ~ σ² r d / n", "lemma 1", finetuning_error),
    "9": Statement("the same for asymmetric adapters", "app. C", asymmetric),
    "10": Statement("T = 2: minima form a hyperbola", "app. F.1", hyperbola),
    "11": Statement("T = 3: spurious minima exist", "app. F.2", spurious_minimum),
    "12": Statement("gradient descent reaches L = 0", "sec. 3.2.2", descent),
}
CONTROLS = {
    "wrong-2": Statement("loss at Â_SR is ½(1 − 1/T) k d²", "wrong", wrong_standard_loss),
    "wrong-6": Statement("T = 2: L = 0 recovers A* and U_tU_tᵀ", "wrong", wrong_recovery),
    "wrong-7": Statement("T = 3: no spurious local minima", "wrong", wrong_saddles),
}
ALL = {**STATEMENTS, **CONTROLS}
