"""Statements 7 and 11: no spurious local minima with two tasks, but with three."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from experiments.lib.errors import RunError
from experiments.theory.checks import Checks, Outcome
from experiments.theory.settings import TheorySettings
from experiments.theory.statements.recovery import inner_rate
from metalora.linear import RetrainResult, lora_ml
from metalora.linear.theory import (
    CriticalPoints,
    best_weight,
    find_critical_points,
    gradient,
    hessian,
    local_minimum,
    loss,
    lowest_curvature,
    population_statistics,
    reduced_loss,
    rise_on_net,
)

_CRITICAL = 1e-9  # relative gradient norm
_POSITIVE = 1e-7  # relative loss above which a critical point is no global minimum
_CURVED = 1e-9  # relative curvature below which it counts as negative
_STEPS = 20000  # of gradient descent
_SHOWN = torch.unique(torch.logspace(0, 4.5, 150).long().clamp_max(_STEPS))
_LEAST, _BARRIER = 1e-4, 1e-8  # relative loss of a minimum worth showing, and rise around it
SEARCHED, SEARCHES = 3000, 20  # truths per seed, seeds


def saddles(
    settings: TheorySettings,
    statement: str = "7",
    tasks: int = 2,
    shapes: tuple[tuple[int, int], ...] = ((1, 2), (1, 4), (2, 4), (2, 6), (3, 6)),
    spreads: tuple[float | None, ...] = (None, 0.3),
) -> Outcome:
    """Statement 7 (theorem 3.4): with T = 2, only global minima have no negative curvature."""
    generator = settings.generator(statement)
    checks = Checks()
    for rank, dim in shapes:
        for spread in spreads:
            name = "random truths" if spread is None else "nearly equal truths"
            draws = 3000 if tasks > 2 else settings.draws(1000 if rank == 1 else 250)
            factors, starts = _truths(tasks, dim, rank, draws, spread, generator)
            truths = factors @ factors.mT
            found = find_critical_points(truths, starts, max_steps=60)
            chosen = _not_global(truths, found)
            checks.at = f"T={tasks} k={rank} d={dim} {name}"
            _check_falls(checks, truths[chosen], found.factors[chosen])
    checks.at = ""
    _check_derivatives(checks, tasks, generator)
    return Outcome(checks)


def wrong_saddles(settings: TheorySettings) -> Outcome:
    """Control: theorem 3.4 with T = 3. Appendix F.2 says why not."""
    return saddles(settings, "wrong-7", 3, ((1, 3),), (0.3,))


def spurious_minimum(settings: TheorySettings) -> Outcome:
    """Statement 11 (appendix F.2): with T = 3 spurious local minima exist, for adversarial truths.

    The truths are searched: with nearly equal adapters about one critical point of 300 is one.
    """
    searched, factors, found = find_spurious_minimum(settings.seed)
    truths = factors @ factors.mT
    certificate = local_minimum(truths, found)
    generator = settings.generator("11")
    least, epsilon = rise_on_net(truths, found, certificate.radius)
    copies = truths.expand(20, *truths.shape)
    begin = found + certificate.radius * _directions(copies.shape[:1] + found.shape, generator)
    kept = _descend(truths, begin, settings)
    kept_factors = kept.factors
    assert kept_factors is not None

    size = float(truths.square().sum())
    free = _descend(truths, _starts(factors, 20, generator), settings)
    random_factors, starts = _truths(3, 6, 1, settings.draws(4000), None, generator)
    random_truths = random_factors @ random_factors.mT
    everywhere = find_critical_points(random_truths, starts, max_steps=60)
    chosen = _not_global(random_truths, everywhere)
    stable = lowest_curvature(random_truths[chosen], everywhere.factors[chosen]).value >= 0
    after = loss(copies, kept.weight, kept_factors)
    checks = Checks()
    what = f"relative loss at the minimum (seed {searched})"
    checks.at_least(what, certificate.loss / size, _LEAST)
    checks.at_most("relative gradient norm there", certificate.gradient_norm / size**0.75, 1e-13)
    checks.at_least("smallest eigenvalue of the Hessian there", certificate.curvature, 1e-4)
    what = "relative rise to a sphere around it that is proved"
    checks.at_least(what, certificate.rise / size, _BARRIER)
    what = f"rise on the ε-net of that sphere (ε = {epsilon:.2f} r) over that proved"
    checks.at_least(what, least / certificate.rise, 1)
    apart = (kept_factors - found).flatten(1).norm(dim=-1) / certificate.radius
    what = "largest distance after descent from that sphere, in radii"
    checks.at_most(what, apart.max(), 1e-3)
    what = "largest change of the relative loss after descent"
    checks.at_most(what, (after - certificate.loss).abs().max() / size, 1e-12)
    what = "share of local minima among critical points with L > 0, random truths, T=3 k=1 d=6"
    checks.share_at_most(what, stable, settings.within(0.02))
    data = {
        "seed": searched,
        "true_factors": factors.tolist(),
        "factors": found.tolist(),
        "weight_minus_base": best_weight(truths, found).tolist(),
        "certificate": asdict(certificate),
        "relative_to": size,
        "path": _path(truths, factors, found),
        "steps": _SHOWN.tolist(),
        "descents": {
            "from around it": (3 * kept.losses[:, _SHOWN - 1]).tolist(),
            "from random starts": (3 * free.losses[:, _SHOWN - 1]).tolist(),
        },
    }
    return Outcome(checks, data)


def find_spurious_minimum(seed: int) -> tuple[int, Tensor, Tensor]:
    """Searches seed by seed for a local minimum with T = 3, k = 1, d = 3 and a positive loss.

    Args:
        seed: the first of ``SEARCHES`` seeds.

    Returns:
        (the seed that found it, the truths' factors U_t* [3, 3, 1], the minimum's U_t [3, 3, 1]);
        of the minima that a seed finds, with a barrier proved, the one with the highest loss.

    Raises:
        RunError: none was found.
    """
    for tried in range(seed, seed + SEARCHES):
        generator = torch.Generator().manual_seed(tried)
        factors, starts = _truths(3, 3, 1, SEARCHED, 0.3, generator)
        truths = factors @ factors.mT
        found = find_critical_points(truths, starts, max_steps=60)
        least, best = _LEAST, None
        curved = lowest_curvature(truths, found.factors).value > 0
        for index in (_not_global(truths, found) & curved).nonzero().flatten().tolist():
            certificate = local_minimum(truths[index], found.factors[index])
            size = float(truths[index].square().sum())
            if certificate.rise > _BARRIER * size and certificate.loss > least * size:
                least, best = certificate.loss / size, index
        if best is not None:
            polished = find_critical_points(truths[best], found.factors[best], tolerance=1e-15)
            return tried, factors[best], polished.factors
    raise RunError(
        f"statement 11: no spurious minimum found with the seeds {seed} to {seed + SEARCHES - 1}; "
        "choose another --seed"
    )


def _check_falls(checks: Checks, truths: Tensor, factors: Tensor) -> None:
    """Checks that every point has negative curvature somewhere, and that the loss falls there."""
    size = truths.square().sum((-3, -2, -1)).sqrt()
    down = lowest_curvature(truths, factors)
    weight = best_weight(truths, factors)
    before = loss(truths, weight, factors)
    # With curvature −c, at the distance h = √c/2 in the better of both directions, the quadratic
    # term is −c h²/2, the cubic one not positive, and the quartic one at most h⁴/2.
    step = (down.value.abs().sqrt() / 2)[:, None, None]
    after = [
        loss(truths, weight + s * down.weight, factors + s.unsqueeze(-1) * down.factors)
        for s in (step, -step)
    ]
    fall = before - after[0].minimum(after[1])
    enough = fall >= 3 / 32 * down.value.square() - 1e-13 * size**2
    what = "critical points with L > 0 and negative curvature"
    checks.all_of(what, down.value < -_CURVED * size, 10)
    what = "loss falls by 3c²/32 or more along the direction returned"
    checks.all_of(what, (down.value < 0) & enough, 10)


def _check_derivatives(checks: Checks, tasks: int, generator: torch.Generator) -> None:
    """Checks the formulas for the gradient and Hessian of eq. 14 against autograd."""
    dim, rank = 4, 2
    truths = torch.randn(tasks, dim, dim, generator=generator, dtype=torch.float64)
    point = torch.randn(dim * (dim + tasks * rank), generator=generator, dtype=torch.float64)

    def split(p: Tensor) -> tuple[Tensor, Tensor]:
        return p[: dim * dim].view(dim, dim), p[dim * dim :].view(tasks, dim, rank)

    def objective(p: Tensor) -> Tensor:
        a, u = split(p)
        return (truths - a - u @ u.mT).square().sum() / 2

    by_hand = torch.cat([part.flatten() for part in gradient(truths, *split(point))])
    slopes = torch.autograd.functional.jacobian(objective, point)
    curves = torch.autograd.functional.hessian(objective, point)
    off = (by_hand - slopes).abs().max()
    checks.at_most("gradient of eq. 14 against autograd", off, 1e-12)
    off = (hessian(truths, *split(point)) - curves).abs().max()
    checks.at_most("Hessian of eq. 14 against autograd", off, 1e-12)


def _descend(truths: Tensor, starts: Tensor, settings: TheorySettings) -> RetrainResult:
    """Descends eq. 14 with the truths [T, d, d] from starts [runs, T, d, k] and the best A."""
    copies = truths.expand(len(starts), *truths.shape).contiguous()
    return lora_ml(
        population_statistics(copies),
        starts.shape[-1],
        outer_steps=_STEPS,
        inner_steps=1,
        outer_lr=settings.outer_lr,
        inner_lr=inner_rate(settings, float(torch.linalg.matrix_norm(truths, ord=2).amax())),
        initial_weight=best_weight(copies, starts),
        initial_factors=starts,
    )


def _path(truths: Tensor, true: Tensor, found: Tensor) -> dict[str, list[float]]:
    """Returns f on the line from the minimum found to the truth with the nearest column signs."""
    signs = (true * found).sum((-2, -1), keepdim=True).sign()
    share = torch.linspace(-0.1, 1.1, 241, dtype=torch.float64)
    line = found + share[:, None, None, None] * (signs * true - found)
    values = reduced_loss(truths.expand(len(line), *truths.shape), line)
    return {"share": share.tolist(), "loss": values.tolist()}


def _directions(shape: torch.Size, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn / drawn.flatten(1).norm(dim=-1)[:, None, None, None]


def _starts(factors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws random starts of the truths' own size, [count, T, d, k]."""
    size = factors.norm(dim=(-2, -1), keepdim=True) / factors[0].numel() ** 0.5
    shape = (count, *factors.shape)
    return size * torch.randn(shape, generator=generator, dtype=torch.float64)


def _truths(
    tasks: int,
    dim: int,
    rank: int,
    draws: int,
    spread: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draws U_t*, independent or ``spread`` apart from a common one, and starts of their size."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = normal(draws, tasks, dim, rank)
    if spread is not None:
        factors = normal(draws, 1, dim, rank) + spread * factors
    size = factors.norm(dim=(-2, -1), keepdim=True) / (dim * rank) ** 0.5
    return factors, size * normal(draws, tasks, dim, rank)


def _not_global(truths: Tensor, found: CriticalPoints) -> Tensor:
    """Returns which points are critical and have a positive loss, relative to the truths' size."""
    size = truths.square().sum((-3, -2, -1))
    critical = found.gradient_norms <= _CRITICAL * size**0.75
    return critical & (found.losses > _POSITIVE * size)
