"""Pivoted storage: k rows of a rank-k matrix, and the other rows as combinations of them.

A rank-k matrix has k (m + n − k) degrees of freedom, k² fewer than the entries of two factors (PIFA, arXiv
2501.19090). With U the left factor and Q an orthonormal basis that spans its columns, the
coefficients of the other rows are C = Q_other Q_pivots⁻¹ whatever the right factor is: the pivots are chosen
on Q alone. C does not depend on the basis either, so pivots that make it small are well conditioned in every
gauge.
"""

from collections.abc import Callable
from typing import ClassVar

import scipy.linalg
import torch
from torch import Tensor

from aasvd.lowrank import CompressedLinear, Layout, is_vector, product
from aasvd.rounding import refit, round_with_feedback

# Largest coefficient. Swapping a pivot for a row with a larger one multiplies |det Q_pivots| by it, so swaps
# come to an end for any bound above 1; column pivoting alone leaves few to do.
BOUND = 1.1


def choose_pivots(u: Tensor, *, bound: float = BOUND) -> tuple[Tensor, Tensor, Tensor]:
    """Choose rows of which all others are combinations with coefficients of at most `bound`.

    Column-pivoted QR of the transpose, then swaps as in Gu and Eisenstat's strong rank-revealing QR (SIAM
    J. Sci. Comput. 17, 1996), whose criterion is |C_ij| alone where the rank is k exactly.

    Args:
        u: (m, k), k ≤ m; of any rank, since only a basis that spans its columns matters.
        bound: Largest coefficient, more than 1.

    Returns:
        Pivot rows (k,), other rows (m − k,), both ascending, and the coefficients C (m − k, k) float64 with
        u[others] = C u[pivots].
    """
    m, k = u.shape
    # Householder QR gives k orthonormal columns even where u has a lower rank.
    basis = torch.linalg.qr(u.to(torch.float64)).Q
    ranking = scipy.linalg.qr(basis.mT.cpu().numpy(), mode="r", pivoting=True)[1]
    chosen = torch.zeros(m, dtype=torch.bool, device=u.device)
    chosen[torch.from_numpy(ranking[:k]).to(u.device, torch.int64)] = True
    while True:
        pivots, others = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        coefficients = torch.linalg.solve(basis[pivots], basis[others], left=False)
        exchanged = _swap(pivots, others, coefficients.clone(), bound)
        if not exchanged:
            return pivots, others, coefficients
        for leaving, entering in exchanged:
            chosen[leaving], chosen[entering] = False, True


def _swap(pivots: Tensor, others: Tensor, coefficients: Tensor, bound: float) -> list[tuple[int, int]]:
    """Swap the pair with the largest coefficient until it is at most `bound`; return (leaving, entering)."""
    inside, outside = pivots.tolist(), others.tolist()
    exchanged: list[tuple[int, int]] = []
    if not outside:
        return exchanged
    while True:
        row, column = divmod(int(coefficients.abs().argmax()), len(inside))
        pivot = float(coefficients[row, column])
        if abs(pivot) <= bound:
            return exchanged
        exchanged.append((inside[column], outside[row]))
        inside[column], outside[row] = outside[row], inside[column]
        # The same rows in terms of the new pivots: a rank-one update (Sherman and Morrison).
        left, right = coefficients[:, column].clone(), coefficients[row].clone()
        coefficients.addr_(left, right, alpha=-1 / pivot)
        coefficients[:, column] = left / pivot
        coefficients[row] = -right / pivot
        coefficients[row, column] = 1 / pivot


def convert(
    u: Tensor, v: Tensor, fit: Callable[[Tensor, Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert factors u (m, k), v (k, n) to rows, coefficients and their order.

    Args:
        u: Left factor.
        v: Right factor.
        fit: Rounds a matrix M, given the Gram matrix G of what it is multiplied with, as (M, G); None keeps
            all digits. The rows are rounded against what the coefficients make of their errors; then the
            coefficients, fitted anew to the rounded rows.

    Returns:
        Rows (k, n) and coefficients (m − k, k), float64; order (m,) int32: the place of each row of u v among
        the pivots' rows followed by the others.
    """
    pivots, others, coefficients = choose_pivots(u)
    left, right = u.to(torch.float64), v.to(torch.float64)
    rows = left[pivots] @ right
    if fit is not None:
        identity = torch.eye(len(rows), dtype=torch.float64, device=u.device)
        rows = fit(rows, identity + coefficients.mT @ coefficients)
        coefficients = refit(rows, coefficients, left[others] @ right)
        coefficients = fit(coefficients.mT, rows @ rows.mT).mT
    order = torch.empty(len(u), dtype=torch.int32, device=u.device)
    order[torch.cat((pivots, others))] = torch.arange(len(u), dtype=torch.int32, device=u.device)
    return rows, coefficients, order


def left_factor(coefficients: Tensor, order: Tensor) -> Tensor:
    """Return u (out, rank) of coefficients (out − rank, rank): the identity in the pivots' rows."""
    rank = coefficients.shape[1]
    identity = torch.eye(rank, device=coefficients.device, dtype=coefficients.dtype)
    return torch.cat((identity, coefficients)).index_select(0, order)


def outputs(latents: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map latents (..., rank), the outputs of the pivots' rows, to those of all rows (..., out), plus bias.

    Args:
        latents: x rowsᵀ.
        coefficients: Those of the other rows (out − rank, rank).
        order: Place of each row of the weight among pivots and others (out,).
        bias: (out,) or None.
    """
    if is_vector(latents, coefficients):
        pivots = latents.view(-1)
        vector = torch.cat((pivots, torch.mv(coefficients, pivots))).index_select(0, order)
        return (vector if bias is None else vector + bias).view(*latents.shape[:-1], -1)
    # Ordering rank rows of the weight once costs less than ordering the outputs of that many tokens,
    # which are strided; a compiler makes one kernel of the latter, and keeps one graph for any length.
    if not torch.compiler.is_compiling() and latents.shape[:-1].numel() > latents.shape[-1]:
        return product(latents, left_factor(coefficients, order), bias)
    y = torch.cat((latents, product(latents, coefficients)), -1)
    if torch.compiler.is_compiling() or y.numel() == y.shape[-1]:
        y = y.index_select(-1, order)
    else:  # on CPUs several times as fast for many tokens of 16 bits, and as fast for others
        y = y.gather(-1, order.long().expand(y.shape))
    return y if bias is None else y + bias.to(y.dtype)


class PivotedLinear(CompressedLinear):
    """Linear layer of rank k that stores k rows of its weight and the others' coefficients.

    y = [x rowsᵀ, (x rowsᵀ) coefficientsᵀ] in the order of the weight's rows, plus bias, with rows (k, in) and
    coefficients (out − k, k). `order` (out,) names, for each row of the weight, its place among pivots
    and others.
    """

    OVERHEAD: ClassVar[tuple[str, ...]] = ("order",)
    DOWN: ClassVar[str | None] = "rows"

    rows: Tensor
    coefficients: Tensor
    order: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int, rank: int) -> Layout:
        """Return the shapes of the pivots' rows, the others' coefficients and the order of both."""
        return {
            "rows": ((rank, in_features), None),
            "coefficients": ((out_features - rank, rank), None),
            "order": ((out_features,), torch.int32),
        }

    @staticmethod
    def pack(u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Convert factors u (out, rank), v (rank, in) exactly; round only where `dtype` is short.

        In float32 and float64 the stored rows are rows of u v.
        """

        def rounded(_row: int, values: Tensor) -> Tensor:
            return values.to(dtype).to(torch.float64)

        def fit(matrix: Tensor, gram: Tensor) -> Tensor:
            return round_with_feedback(matrix, gram, rounded)

        short = torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
        rows, coefficients, order = convert(u, v, fit if short else None)
        return {"rows": rows.to(dtype), "coefficients": coefficients.to(dtype).contiguous(), "order": order}

    @staticmethod
    def problem(name: str, value: Tensor) -> str | None:
        """Say so if `order` is not an order of all rows."""
        places = torch.arange(len(value), dtype=value.dtype, device=value.device)
        complete = name != "order" or torch.equal(value.sort().values, places)
        return None if complete else f"is not an order of the numbers 0 to {len(value) - 1}"

    def coefficients_in(self, _dtype: torch.dtype) -> Tensor:
        """Return the coefficients as a pass in a float type needs them."""
        return self.coefficients

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return u (out, rank), the identity in the pivots' rows, and v (rank, in) with weight u v."""
        return left_factor(self.coefficients_in(dtype), self.order), self.rows

    def down(self, x: Tensor) -> Tensor:
        """Map x (..., in) to its latents (..., rank): the outputs of the pivots' rows."""
        return product(x, self.rows) if self.shared is None else self.shared.latents(self, x)

    def up(self, latents: Tensor) -> Tensor:
        """Map latents (..., rank) to (..., out)."""
        return outputs(latents, self.coefficients_in(latents.dtype), self.order, self.bias)
