"""Closed-form low-rank factors of one linear layer for every layer objective: pure linear algebra in float64.

One problem covers them. With original inputs X and shifted inputs X',
one token per column, blend b and ridge λ,

    minimise over rank(W') ≤ k   ‖((1 − b) W X' + b W X) − W' X'‖² + λ ‖W − W'‖²

whose solution, with C = X'X'ᵀ + λI, T = W ((1 − b) X'X'ᵀ + b XX'ᵀ + λI) and R = T C⁺, is

    W' = U_k U_kᵀ R,   U_k = the k leading eigenvectors of R C Rᵀ.

    objective        X' in the formula      b
    input_agnostic   identity covariance    0      plain SVD
    input_aware      original inputs        0      DRONE, SVD-LLM (W)
    shift_aware      shifted inputs         0
    anchored         shifted inputs         1      AA-SVD (arXiv 2604.02119), its objective 4
    blended          shifted inputs         (0,1)  SAES-SVD's CEALC with b = α / (1 + α)

At b = 0, R = W exactly: nothing is inverted and a singular covariance is harmless.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Directions weaker than this, relative to the strongest, are scaled as if they were this strong.
_SMALLEST_SIGMA = 1e-6


class Target(NamedTuple):
    """What the layers of one group are fitted to; all layers of a group read the same tensor.

    Attributes:
        gram: C, (n, n) float64, the ridge included.
        transfer: C_target C⁺, (n, n), so that R = W transfer; None where R = W.
        root: S with S Sᵀ = C, (n, n); None where it was not needed.
        dropped: Directions of C below the cutoff, which no calibration token excites.
        cutoff: The eigenvalue below which directions were dropped, relative to the largest.
        ridge: λ, in the units of C.
        token_count: Number of tokens that C sums over.
    """

    gram: Tensor
    transfer: Tensor | None
    root: Tensor | None
    dropped: int
    cutoff: float
    ridge: float
    token_count: int


class Factors(NamedTuple):
    """A low-rank solution W' = u v.

    Attributes:
        u: (m, k) float64.
        v: (k, n) float64; σ is shared evenly, with σ_i the root mean square of direction i's output.
        spectrum: All eigenvalues of R C Rᵀ in descending order: what each further rank would explain.
        kept: Share of the explainable energy tr(R C Rᵀ) that the first k directions hold.
    """

    u: Tensor
    v: Tensor
    spectrum: Tensor
    kept: float


def prepare(
    gram: Tensor,
    *,
    cross_gram: Tensor | None,
    blend: float,
    ridge: float,
    need_root: bool,
    token_count: int = 1,
) -> Target:
    """Prepare what all layers of a group share.

    Args:
        gram: X'X'ᵀ summed over tokens, (n, n) float64.
        cross_gram: XX'ᵀ over the same tokens, (n, n); needed only where blend > 0.
        blend: b, from 0 (fit W X') to 1 (fit W X).
        ridge: λ relative to the mean diagonal of the Gram; pulls towards W what the tokens do not
            determine, and is in both sides, so it never pulls towards 0.
        need_root: Whether some layer of the group has more outputs than inputs.
        token_count: Number of tokens summed over; fixes the scale that u and v share.

    Raises:
        ValueError: If the Gram is not finite, or a blend is asked for without a cross-Gram.
    """
    if not torch.isfinite(gram).all() or (cross_gram is not None and not torch.isfinite(cross_gram).all()):
        raise ValueError("the covariance is not finite: an activation overflowed or is NaN")
    if blend > 0 and cross_gram is None:
        raise ValueError(f"blend {blend} fits original outputs and needs the cross-Gram")
    features = len(gram)
    shift = ridge * gram.diagonal().mean().item()
    # Without a ridge it is the Gram itself: a copy of 11008 channels takes a gigabyte.
    regularized = _shifted(gram.clone(), shift) if shift else gram
    if blend == 0 and not need_root:
        return Target(regularized, None, None, 0, 0.0, shift, token_count)
    values, vectors = torch.linalg.eigh(regularized)
    # n eps is the accuracy of eigh itself; a larger cutoff costs real directions beside an outlier
    # (1e-6 cost 6.7 % of the objective with a direction 300 times as strong as the others).
    cutoff = features * torch.finfo(values.dtype).eps
    alive = values > cutoff * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    values, vectors = values[alive], vectors[:, alive]
    root = vectors * values.sqrt()
    if blend == 0:
        return Target(regularized, None, root, features - len(values), cutoff, shift, token_count)
    assert cross_gram is not None
    wanted = _shifted((1 - blend) * gram + blend * cross_gram, shift)
    transfer = (wanted @ vectors / values) @ vectors.T
    return Target(regularized, transfer, root, features - len(values), cutoff, shift, token_count)


def _shifted(matrix: Tensor, shift: float) -> Tensor:
    """Add a number to the diagonal, in place."""
    matrix.diagonal().add_(shift)
    return matrix


def factorize(weight: Tensor, target: Target, *, rank: int) -> Factors:
    """Solve one layer: W' = U_k U_kᵀ R, from one symmetric eigenproblem of the smaller side.

    Args:
        weight: W, (m, n), any float type.
        target: What `prepare` made for the layer's group.
        rank: k, 1 ≤ k ≤ min(m, n).

    Raises:
        ValueError: If the rank or the weight's shape does not fit.
    """
    outputs, inputs = weight.shape
    if not 1 <= rank <= min(outputs, inputs):
        full = min(outputs, inputs)
        raise ValueError(f"rank {rank} must lie between 1 and {full} for a {outputs} x {inputs} weight")
    if len(target.gram) != inputs:
        raise ValueError(f"weight has {inputs} inputs but its covariance has {len(target.gram)}")
    r, matrix, wide = _eigenproblem(weight, target)
    values, left = torch.linalg.eigh(matrix)
    if wide is not None:
        left = wide @ left
    values, left = _descending(values, min(outputs, inputs)), left.flip(1)
    basis = _orthonormal(left[:, :rank], rank)
    v = basis.T @ r
    # AdamW moves all entries alike, so the split of σ matters to refinement. As in the paper each factor
    # gets √σ, with σ in the units of one token's output; where σ vanishes, any split will do.
    sigma = (values[:rank] / target.token_count).sqrt()
    # Where nothing is excited at all there is no scale either, and 1 keeps both factors within float32.
    excited = sigma[0] > torch.finfo(torch.float32).tiny
    scale = sigma.clamp_min(torch.where(excited, _SMALLEST_SIGMA * sigma[0], 1.0)).sqrt()
    energy = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return Factors(basis * scale, v / scale[:, None], values, (values[:rank].sum() / energy).item())


def spectrum(weight: Tensor, target: Target) -> Tensor:
    """Return the spectrum of `factorize` alone, in a fraction of its time: (min(m, n),) float64.

    Args:
        weight: W, (m, n), any float type.
        target: What `prepare` made for the layer's group.
    """
    _, matrix, _ = _eigenproblem(weight, target)
    return _descending(torch.linalg.eigvalsh(matrix), min(weight.shape))


def _eigenproblem(weight: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return R, a matrix of the smaller side with the eigenvalues of R C Rᵀ, and what maps its eigenvectors.

    The last is None where the matrix is R C Rᵀ itself.
    """
    w = weight.to(torch.float64)
    r = w if target.transfer is None else w @ target.transfer
    if target.root is None:
        return r, r @ target.gram @ r.T, None
    m = r @ target.root
    return (r, m @ m.T, None) if weight.shape[0] <= weight.shape[1] else (r, m.T @ m, m)


def _descending(values: Tensor, count: int) -> Tensor:
    values = values.flip(0).clamp_min(0)
    # A tall weight on a singular covariance: the root has fewer columns, the missing eigenvalues are zero.
    return torch.nn.functional.pad(values, (0, max(0, count - len(values))))


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of a matrix's `rank` leading left and right singular subspaces."""
    wide = matrix.shape[0] <= matrix.shape[1]
    m = matrix if wide else matrix.T
    rank = min(rank, len(m))
    left = torch.linalg.eigh(m @ m.T)[1].flip(1)[:, :rank]
    right = _orthonormal(m.T @ left, rank)
    return (left, right) if wide else (right, left)


def _orthonormal(left: Tensor, rank: int) -> Tensor:
    """Return `rank` orthonormal columns spanning the leading ones of `left`, completed where it has fewer.

    Fewer exist where the covariance is singular: any completion is then optimal, and QR's is deterministic.
    """
    missing = rank - left.shape[1]
    if missing > 0:
        left = torch.nn.functional.pad(left, (0, missing))
    q, upper = torch.linalg.qr(left)
    return q * upper.diagonal().sign().where(upper.diagonal() != 0, torch.ones_like(upper.diagonal()))


def relative_error(
    weight: Tensor,
    fitted: Tensor,
    *,
    original: Tensor,
    cross_gram: Tensor | None = None,
    shifted: Tensor | None = None,
) -> float:
    """Return ‖W X − W' X'‖ / ‖W X‖ from the Gram matrices; with X' = X where no shifted ones are given.

    Args:
        weight: W, (m, n).
        fitted: W', (m, n).
        original: XXᵀ, (n, n) float64.
        cross_gram: XX'ᵀ, (n, n).
        shifted: X'X'ᵀ, (n, n).
    """
    w, f = weight.to(torch.float64), fitted.to(torch.float64)
    energy = (w @ original * w).sum()
    if cross_gram is None or shifted is None:
        difference = w - f
        error = (difference @ original * difference).sum()
    else:
        error = energy - 2 * (w @ cross_gram * f).sum() + (f @ shifted * f).sum()
    return (error.clamp_min(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt().item()
