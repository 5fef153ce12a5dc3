"""Critical points of LoRA-ML's population loss: found, and told apart with certificates.

Paper, theorem 3.4 (two tasks: every critical point that is no global minimum has a direction of
negative curvature) and appendix F.2 (three tasks: local minima that are not global exist).

Everything works on the reduced loss f(U) = min_A L(A, U) of eq. 14. U_t and U_t Q give the same
adapter for every rotation Q, so that k(k−1)/2 directions per task are always flat.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import check_count, check_positive
from metalora.linear.theory.objective import (
    reduced_gradient,
    reduced_hessian,
    reduced_loss,
)

_LARGEST_NET = 12  # 3¹² points


@dataclass(frozen=True)
class CriticalPoints:
    """Where `find_critical_points` ended.

    Attributes:
        factors: U_t, [..., T, d, k].
        losses: f(U), [...].
        gradient_norms: ‖∇f(U)‖, [...]; a point is critical only as far as this is small.
    """

    factors: Tensor
    losses: Tensor
    gradient_norms: Tensor


@dataclass(frozen=True)
class Curvature:
    """The direction in which eq. 14 curves down most, A following U to stay the best.

    Attributes:
        value: smallest eigenvalue of the reduced Hessian, [...].
        weight: the direction's part in A, [..., d, d].
        factors: its part in U, [..., T, d, k], of norm 1.
    """

    value: Tensor
    weight: Tensor
    factors: Tensor


@dataclass(frozen=True)
class LocalMinimum:
    """What proves that U is a local minimum, unique up to rotations of the U_t.

    Attributes:
        loss: f(U).
        gradient_norm: ‖∇f(U)‖.
        curvature: smallest eigenvalue of the Hessian across the flat directions of the rotations.
        radius: of a sphere around U, across the flat directions.
        rise: on that sphere f is at least f(U) + rise; positive exactly if U is proved to be within
            ``radius`` of a local minimum that no path leaves without climbing so far.
    """

    loss: float
    gradient_norm: float
    curvature: float
    radius: float
    rise: float


def find_critical_points(
    truths: Tensor, starts: Tensor, *, max_steps: int = 200, tolerance: float = 1e-12
) -> CriticalPoints:
    """Solves ∇f(U) = 0 by Levenberg and Marquardt's method: any saddle is as good as a minimum.

    Args:
        truths: M_t, [..., T, d, d].
        starts: of the U_t, [..., T, d, k], with the same leading dimensions.
        max_steps: steps at most.
        tolerance: stop when every gradient norm is below it.

    Returns:
        Where each start led; those that did not converge show in their gradient norm.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or numbers.
    """
    name = "find_critical_points"
    check_count(name, "max_steps", max_steps, minimum=0)
    check_positive(name, "tolerance", tolerance)
    reduced_loss(truths, starts)  # checks them
    if starts.shape[:-3] != truths.shape[:-3]:
        raise ValueError(
            f"{name}: starts must have the leading dimensions {list(truths.shape[:-3])} of truths, "
            f"got {list(starts.shape[:-3])}"
        )
    factors = starts.reshape(-1, *starts.shape[-3:]).clone()
    active_truths = truths.reshape(-1, *truths.shape[-3:])
    active = torch.arange(len(factors), device=truths.device)
    damping = torch.full((len(factors),), 1e-2, dtype=truths.dtype, device=truths.device)
    for _ in range(max_steps):
        current = factors[active]
        gradient = reduced_gradient(active_truths, current).flatten(-3)
        norm = gradient.norm(dim=-1)
        left = norm > tolerance
        active, active_truths, damping = active[left], active_truths[left], damping[left]
        if not len(active):
            break
        moved = current[left] - _damped_step(active_truths, current[left], gradient[left], damping)
        better = reduced_gradient(active_truths, moved).flatten(-3).norm(dim=-1) < norm[left]
        factors[active[better]] = moved[better]
        damping = torch.where(better, damping / 5, damping * 3).clamp(1e-14, 1e8)
    factors = factors.reshape(starts.shape)
    norms = reduced_gradient(truths, factors).flatten(-3).norm(dim=-1)
    return CriticalPoints(factors, reduced_loss(truths, factors), norms)


def lowest_curvature(truths: Tensor, factors: Tensor) -> Curvature:
    """The certificate of theorem 3.4: a negative value proves that U is no local minimum.

    Args:
        truths: M_t, [..., T, d, d].
        factors: U_t, [..., T, d, k], a critical point.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or values.
    """
    values, vectors = torch.linalg.eigh(reduced_hessian(truths, factors))
    direction = vectors[..., 0].reshape(factors.shape)
    product = direction @ factors.mT
    return Curvature(values[..., 0], -(product + product.mT).mean(-3), direction)


def local_minimum(truths: Tensor, factors: Tensor) -> LocalMinimum:
    """The certificate of a local minimum (paper, appendix F.2).

    With g the gradient norm, λ the curvature and u the largest ‖U_t‖, every V of norm r across the
    flat directions has f(U + V) − f(U) >= −g r + λ r²/2 − 2 u r³: the cubic term is
    Σ_t ⟨W_t − mean W, V_t V_tᵀ⟩ with ‖W‖ <= 2 u r, and the quartic one is not negative. The radius
    is where the bound is largest for g = 0.

    Args:
        truths: M_t, [T, d, d].
        factors: U_t, [T, d, k].

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or values.
    """
    gradient = float(reduced_gradient(truths, factors).norm())
    normal = _across_rotations(factors)
    across = normal.mT @ reduced_hessian(truths, factors) @ normal
    curvature = float(torch.linalg.eigvalsh(across)[0])
    largest = float(torch.linalg.matrix_norm(factors, ord=2).amax())
    radius = max(curvature, 0.0) / (6 * largest) if largest else 0.0
    rise = -gradient * radius + curvature * radius**2 / 2 - 2 * largest * radius**3
    return LocalMinimum(float(reduced_loss(truths, factors)), gradient, curvature, radius, rise)


def rise_on_net(truths: Tensor, factors: Tensor, radius: float) -> tuple[float, float]:
    """The least rise of f over an ε-net of the sphere around U, across the flat directions.

    The net is every vector with entries −1, 0 and 1, scaled to the radius.

    Args:
        truths: M_t, [T, d, d].
        factors: U_t, [T, d, k].
        radius: of the sphere.

    Returns:
        (least f − f(U), ε as a multiple of the radius).

    Raises:
        ValueError, TypeError: wrong shapes or values, or more directions than a net can cover.
    """
    check_positive("rise_on_net", "radius", radius)
    before = reduced_loss(truths, factors)
    normal = _across_rotations(factors)
    size = normal.shape[-1]
    if size > _LARGEST_NET:
        raise ValueError(
            f"rise_on_net: factors must have at most {_LARGEST_NET} directions across rotations, "
            f"got {size}"
        )
    net = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=size)), dtype=truths.dtype)
    net = net[net.any(-1)].to(truths.device)
    moves = net / net.norm(dim=-1, keepdim=True) @ normal.mT
    around = factors + radius * moves.reshape(-1, *factors.shape)
    rises = reduced_loss(truths.expand(len(around), *truths.shape), around) - before
    # Worst covered is the direction with entries √j − √(j−1): all its nearest points are as far.
    cosine = 1 / math.sqrt(sum((math.sqrt(j) - math.sqrt(j - 1)) ** 2 for j in range(1, size + 1)))
    return float(rises.min()), 2 * math.sin(math.acos(cosine) / 2)


def _damped_step(truths: Tensor, factors: Tensor, gradient: Tensor, damping: Tensor) -> Tensor:
    """(H² + μ I)⁻¹ H ∇f with μ relative to the mean eigenvalue of H², [B, T, d, k]."""
    hessian = reduced_hessian(truths, factors)
    square = hessian @ hessian
    diagonal = square.diagonal(dim1=-2, dim2=-1)  # a view
    diagonal += (damping * diagonal.mean(-1).clamp_min(1e-300)).unsqueeze(-1)
    return torch.linalg.solve(square, hessian @ gradient.unsqueeze(-1)).reshape(factors.shape)


def _across_rotations(factors: Tensor) -> Tensor:
    """Orthonormal basis of the directions across U_t ↦ U_t Ω with Ωᵀ = −Ω, [T d k, n]."""
    tasks, dim, rank = factors.shape
    flat = []
    for task, (a, b) in itertools.product(range(tasks), itertools.combinations(range(rank), 2)):
        turned = torch.zeros_like(factors)
        turned[task, :, a], turned[task, :, b] = factors[task, :, b], -factors[task, :, a]
        flat.append(turned.flatten())
    if not flat:
        return torch.eye(tasks * dim * rank, dtype=factors.dtype, device=factors.device)
    left, _, _ = torch.linalg.svd(torch.stack(flat, 1))
    return left[:, len(flat) :]
