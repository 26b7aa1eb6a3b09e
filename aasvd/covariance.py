"""Accumulate Gram and cross-Gram matrices over batches of tokens, in float64.

A float32 sum has no safe eigenvalue cutoff once an outlier direction is present;
a float64 sum of bfloat16 or float32 products is exact to 1e-15.
"""

import torch
from torch import Tensor

# Columns of one tile: large enough for nearly full speed, small enough to skip nearly half of a product.
_TILE = 256


class Gram:
    """The uncentred covariance sum over tokens of x xᵀ, shape (features, features).

    Only the tiles on and above the diagonal are computed: little more than half the work of a product.
    """

    def __init__(self, features: int, *, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        """Start from zero.

        Args:
            features: Width of the tokens.
            device: Where they are.
            dtype: What is summed in; float32 only where nothing is inverted.
        """
        self._upper = torch.zeros(features, features, dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Add the tokens of a batch, shape (..., features)."""
        rows = x.reshape(-1, x.shape[-1]).to(self._upper.dtype)
        features = rows.shape[1]
        for start in range(0, features, _TILE):
            stop = min(start + _TILE, features)
            self._upper[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def matrix(self) -> Tensor:
        """Return the full symmetric matrix, float64."""
        return symmetric(self._upper.double())


class CrossGram:
    """The sum over tokens of x x'ᵀ for original inputs x and shifted inputs x', (features, features)."""

    def __init__(self, features: int, *, device: torch.device) -> None:
        """Start from zero."""
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, original: Tensor, shifted: Tensor) -> None:
        """Add the tokens of a batch; both are (..., features), the same tokens in the same order."""
        features = original.shape[-1]
        x = original.reshape(-1, features).to(torch.float64)
        self._sum.addmm_(x.T, shifted.reshape(-1, features).to(torch.float64))

    def matrix(self) -> Tensor:
        """Return the matrix, float64."""
        return self._sum


def symmetric(upper: Tensor) -> Tensor:
    """Mirror the upper triangle of a square matrix to its lower one."""
    full = torch.triu(upper)
    full = full + full.T
    full.diagonal().mul_(0.5)  # exact: it was doubled
    return full


def pack(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric (n, n) matrix as a vector of n (n + 1) / 2 numbers.

    Packed float64 takes the room of full float32 and loses nothing.
    """
    return matrix.masked_select(_above(len(matrix), matrix.device))


def unpack(packed: Tensor) -> Tensor:
    """Return the symmetric (n, n) matrix of a packed upper triangle."""
    features = int(((8 * packed.numel() + 1) ** 0.5 - 1) / 2)
    matrix = torch.zeros(features, features, dtype=packed.dtype, device=packed.device)
    return symmetric(matrix.masked_scatter_(_above(features, packed.device), packed))


def _above(features: int, device: torch.device) -> Tensor:
    return torch.ones(features, features, dtype=torch.bool, device=device).triu_()
