"""A robust cubic B-spline per track: removes jitter, bridges gaps, answers at any real time.

Letters: N tracks, T frames, C control points. All tracks share the knots, so each needs one
banded Cholesky factorisation of width 4, done for all tracks at once.
"""

from dataclasses import dataclass

import numpy as np
import torch

from omni.splines import bspline_weights, num_control_points

__all__ = ["Curves", "fit_curves"]

SPACING = 1.0
"""Frames per control point. Measured: 1.5 loses fast turns, 3 camera shake."""

ROUGHNESS = 0.03
"""Weight of the squared second difference of control points."""

HUBER = 1.5
"""Residuals beyond this many standard deviations count linearly."""

ROUNDS = 5


@dataclass
class Curves:
    """Cubic B-splines of N tracks.

    control: (N, C, 2) control points. spacing: frames per control point.
    """

    control: np.ndarray
    spacing: float = SPACING

    def at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, M, 2)` at `(M,)` real times in frames."""
        basis = _basis(times, self.spacing, self.control.shape[1])
        return np.einsum("mc,ncd->nmd", basis, self.control).astype(np.float32)

    def each_at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, 2)`, every track at its own one of `(N,)` times."""
        basis = _basis(times, self.spacing, self.control.shape[1])
        return np.einsum("nc,ncd->nd", basis, self.control).astype(np.float32)


def fit_curves(xy: np.ndarray, weight: np.ndarray) -> Curves:
    """Weighted robust least squares: `min sum_t w_t rho(|B_t c - x_t|) + roughness |D2 c|^2`.

    Iteratively reweighted with Huber's rho in units of `1 / sqrt(weight)`.

    Args:
        xy: (N, T, 2) measured positions.
        weight: (N, T) inverse variances, positive.

    Source: P-splines, Eilers and Marx 1996; Huber 1964.
    """
    count = num_control_points(xy.shape[1], SPACING)
    basis = _basis(np.arange(xy.shape[1]), SPACING, count)
    second = np.diff(np.eye(count), 2, axis=0)
    penalty = ROUGHNESS * _bands((second.T @ second)[None])
    products = np.stack(
        [np.einsum("tc,tc->tc", basis, _shifted(basis, d)) for d in range(4)], axis=-1
    )
    robust = np.ones_like(weight)
    for _ in range(ROUNDS):
        w = (weight * robust).astype(np.float64)
        bands = np.einsum("nt,tcd->ncd", w, products) + penalty
        control = _solve(bands, np.einsum("tc,nt,ntd->ncd", basis, w, xy, optimize=True))
        residual = np.linalg.norm(np.einsum("tc,ncd->ntd", basis, control) - xy, axis=-1)
        scaled = residual * np.sqrt(weight)
        robust = np.minimum(1, HUBER / np.maximum(scaled, 1e-9))
    return Curves(control)


def _basis(times: np.ndarray, spacing: float, count: int) -> np.ndarray:
    """Dense `(M, C)` matrix of the spline basis."""
    moments = torch.as_tensor(np.asarray(times, np.float64))
    index, weight = bspline_weights(moments, spacing, count)
    basis = np.zeros((len(moments), count))
    np.put_along_axis(basis, index.numpy(), weight.numpy(), axis=1)
    return basis


def _shifted(basis: np.ndarray, by: int) -> np.ndarray:
    moved = np.zeros_like(basis)
    moved[:, : basis.shape[1] - by] = basis[:, by:]
    return moved


def _bands(matrix: np.ndarray) -> np.ndarray:
    """Main and three upper diagonals `(..., C, 4)` of symmetric matrices `(..., C, C)`."""
    size = matrix.shape[-1]
    bands = np.zeros((*matrix.shape[:-1], 4))
    for d in range(4):
        bands[..., : size - d, d] = np.diagonal(matrix, d, -2, -1)
    return bands


def _solve(bands: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve N banded positive definite systems at once (LDL^T).

    Args:
        bands: (N, C, 4), entry d of row i is A[i, i + d].
        right: (N, C, D).
    """
    count = bands.shape[1]
    factor = bands.copy()
    solution = right.copy()
    for i in range(count):
        pivot = factor[:, i, 0]
        for d in range(1, min(4, count - i)):
            ratio = factor[:, i, d] / pivot
            factor[:, i + d, : 4 - d] -= ratio[:, None] * factor[:, i, d:]
            solution[:, i + d] -= ratio[:, None] * solution[:, i]
    for i in reversed(range(count)):
        for d in range(1, min(4, count - i)):
            solution[:, i] -= factor[:, i, d, None] * solution[:, i + d]
        solution[:, i] /= factor[:, i, 0, None]
    return solution
