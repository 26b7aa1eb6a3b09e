"""Round a matrix inside a product so that what the product loses is small, not what the matrix loses."""

from collections.abc import Callable

import torch
from torch import Tensor

# Relative to the mean diagonal: keeps corrections finite along directions that the product does not see.
_DAMPING = 1e-4
_PANEL = 64


def round_with_feedback(matrix: Tensor, gram: Tensor, rounded: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Round a matrix M row by row so that tr((M̂ − M)ᵀ G (M̂ − M)) stays small.

    Each row is rounded after the errors of the rows rounded before it were compensated in it (Babai's nearest
    plane; what GPTQ does to a weight). With A M the product that matters and G = AᵀA, rounding errors
    that A would amplify cancel each other; for A with orthonormal columns this is plain rounding.

    Args:
        matrix: M, (k, n) float64.
        gram: G, (k, k) float64, positive semidefinite.
        rounded: Rounds row i, given as (i, row), to what can be stored.
    """
    k = len(matrix)
    upper = torch.linalg.cholesky(_damped(gram)).mT
    weights = upper / upper.diagonal()[:, None]
    result, error = torch.empty_like(matrix), torch.zeros_like(matrix)
    for end in range(k, 0, -_PANEL):
        start = max(0, end - _PANEL)
        # Panels, so that most of the work is one matrix product.
        panel = matrix[start:end] - weights[start:end, end:] @ error[end:]
        for row in range(end - 1, start - 1, -1):
            later = slice(row + 1, end)
            aim = torch.addmv(panel[row - start], error[later].mT, weights[row, later], alpha=-1)
            result[row] = rounded(row, aim)
            torch.sub(result[row], matrix[row], out=error[row])
    return result


def refit(matrix: Tensor, left: Tensor, product: Tensor) -> Tensor:
    """Return the C nearest to `left` that brings C `matrix` closest to `product`: least squares, damped.

    Args:
        matrix: M after rounding, (k, n).
        left: C before, (m, k).
        product: What C M should be, (m, n).
    """
    gram = _damped(matrix @ matrix.mT)
    return left + torch.linalg.solve(gram, (product - left @ matrix) @ matrix.mT, left=False)


def _damped(gram: Tensor) -> Tensor:
    """Return a Gram matrix made safely positive definite; the identity where it is zero."""
    level = gram.diagonal().mean()
    damping = torch.where(level > 0, _DAMPING * level, torch.ones_like(level))
    return gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
