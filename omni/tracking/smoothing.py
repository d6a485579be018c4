"""A robust cubic B-spline per track: removes jitter, bridges gaps, defined at any real time.

Letters: N tracks, T frames, C control points, M times. All tracks share the knots, so each needs
one banded Cholesky factorisation of width 4, done for all tracks at once.
"""

from dataclasses import dataclass

import numpy as np
import torch

from omni.maths import bspline_weights, num_control_points

__all__ = ["Curves", "fit_curves"]

SPACING = 1.0
"""Frames per control point. Measured: 1.5 loses fast turns, 3 camera shake."""

ROUGHNESS = 0.2
"""Weight of the second differences of control points, squared where they are small."""

TURN = 0.3
"""Pixels beyond which a second difference counts linearly: real turns are sharp and rare, jitter is
small and everywhere."""

HUBER = 1.5
"""Residuals beyond this many standard deviations count linearly."""

ITERATIONS = 5


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
        return _along(self.control, basis.T).astype(np.float32)

    def each_at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, 2)`, every track at its own one of `(N,)` times."""
        basis = _basis(times, self.spacing, self.control.shape[1])
        return np.einsum("nc,ncd->nd", basis, self.control).astype(np.float32)


def fit_curves(xy: np.ndarray, weight: np.ndarray) -> Curves:
    """Robust in data and roughness: `min sum_t w_t rho(|B_t c - x_t|) + r sum_i rho(|D2_i c|)`.

    Huber's rho, in units of `1 / sqrt(weight)` and of `TURN`, by iteratively reweighted least
    squares.

    Args:
        xy: (N, T, 2) measured positions.
        weight: (N, T) inverse variances, positive.

    Source: P-splines, Eilers and Marx 1996; Huber 1964; linear far out, the penalty of l1 trend
    filtering, Kim et al. 2009.
    """
    count = num_control_points(xy.shape[1], SPACING)
    basis = _basis(np.arange(xy.shape[1]), SPACING, count)
    second = np.diff(np.eye(count), 2, axis=0)
    data, penalty = _products(basis), ROUGHNESS * _products(second)
    robust, straight = np.ones_like(weight), np.ones((len(xy), len(second)))
    for _ in range(ITERATIONS):
        w = (weight * robust).astype(np.float64)
        bands = _banded(w, data) + _banded(straight, penalty)
        control = _solve(bands, _along(w[..., None] * xy, basis))
        residual = np.linalg.norm(_along(control, basis.T) - xy, axis=-1)
        robust = np.minimum(1, HUBER / np.maximum(residual * np.sqrt(weight), 1e-9))
        turn = np.linalg.norm(np.diff(control, 2, axis=1), axis=-1)
        straight = np.minimum(1, TURN / np.maximum(turn, 1e-9))
    return Curves(control)


def _along(values: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`(N, M, 2)`: a matrix `(T, M)` applied to `(N, T, 2)` along T, as one matrix product."""
    rows = values.transpose(0, 2, 1).reshape(-1, values.shape[1])
    return (rows @ matrix).reshape(len(values), 2, -1).transpose(0, 2, 1)


def _basis(times: np.ndarray, spacing: float, count: int) -> np.ndarray:
    """Dense `(M, C)` matrix of the spline basis."""
    moments = torch.as_tensor(np.asarray(times, np.float64))
    index, weight = bspline_weights(moments, spacing, count)
    basis = np.zeros((len(moments), count))
    np.put_along_axis(basis, index.numpy(), weight.numpy(), axis=1)
    return basis


def _products(rows: np.ndarray) -> np.ndarray:
    """`(M, C, 4)`: main and three upper diagonals of `r r^T` of each row r of `(M, C)`."""
    bands = np.zeros((*rows.shape, 4))
    for d in range(4):
        bands[:, : rows.shape[1] - d, d] = rows[:, : rows.shape[1] - d] * rows[:, d:]
    return bands


def _banded(weight: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Bands `(N, C, 4)` of the sums of products weighted by `(N, M)`."""
    return np.tensordot(weight, products, axes=1)


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
