"""Layer objectives: what each named method's factors minimise, as configurations of one solver.

Every function takes the statistics of a group of linears that read the same tensor, and returns a solver
of one linear of that rank. Most only choose the matrices of `aasvd.solve`'s problem: C in
min ‖(W − W') C^{1/2}‖ (a diagonal, or any covariance), or the blend of original and shifted outputs.
Functions are found by their names in `aasvd.methods.OBJECTIVES`, which says what they need.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aasvd.methods import OBJECTIVES, PRUNING, functions_of
from aasvd.solve import Factors, Target, factorize, prepare, principal, relative_error

# ASVD: s_j = (mean |x_j|)^α (paper; its code's default).
_ASVD_ALPHA = 0.5
# DipSVD's code: the strongest 3 % of channels count 30 times.
_DIPSVD_SHARE, _DIPSVD_FACTOR = 0.03, 30.0
# SAES-SVD: α in [0.25, 0.75] in its Table 4, and β = α / (1 + α).
SAES_BOUNDS = (0.25 / 1.25, 0.75 / 1.75)
# AdaSVD: one round is the best at 40 and 60 % in its paper.
_ADASVD_ROUNDS = 1
# Relative to the mean: what every output counts at least, whatever its gradient on the calibration text.
_FISHER_FLOOR = 0.01


class Statistics(NamedTuple):
    """What is known of a group of linears; what its objective does not need is None or empty.

    Attributes:
        gram: XXᵀ of the original inputs, summed over tokens, (n, n) float64.
        absolute: Σ |x|, (n,).
        token_count: Number of tokens in the sums.
        shifted: X'X'ᵀ, (n, n).
        cross: XX'ᵀ, (n, n).
        buckets: XXᵀ of inputs averaged over the sequences of each bucket, (n, n).
        squared: By linear, Fisher information of its input channels, (n,).
        outer: By linear, the mean over tokens of g gᵀ, g the gradient at its outputs, (m, m).
    """

    gram: Tensor
    absolute: Tensor
    token_count: int
    shifted: Tensor | None = None
    cross: Tensor | None = None
    buckets: Tensor | None = None
    squared: Mapping[str, Tensor] = {}
    outer: Mapping[str, Tensor] = {}


class Options(NamedTuple):
    """The numbers of `compression` in params.yaml that objectives read."""

    blend: float
    ridge: float


class Solved(NamedTuple):
    """A linear's factors, and numbers about them.

    Attributes:
        factors: The solution.
        report: Relative error in what the objective minimises, or, where its inputs are shifted, against the
            original outputs (a blend's need not fall with the rank); energy kept and the numerics used.
    """

    factors: Factors
    report: dict[str, float | int | None]


Solver = Callable[[str, Tensor, int], Solved]


def solver(name: str, statistics: Statistics, *, options: Options) -> Solver:
    """Return a function that solves one linear of a group: (name, weight, rank) → factors.

    Args:
        name: A name in `aasvd.methods.OBJECTIVES`.
        statistics: The group's statistics, those that the objective needs.
        options: Blend and ridge.

    Raises:
        ValueError: If there is no such objective.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(FUNCTIONS)}")
    return FUNCTIONS[name](statistics, options)


def _whitened(gram: Tensor, statistics: Statistics, options: Options) -> Solver:
    """Minimise ‖(W − W') C^{1/2}‖ for one C: nothing is inverted, and a singular C is harmless."""

    @functools.cache
    def target(need_root: bool) -> Target:
        return prepare(
            gram,
            cross_gram=None,
            blend=0.0,
            ridge=options.ridge,
            need_root=need_root,
            token_count=statistics.token_count,
        )

    def solve(_name: str, weight: Tensor, rank: int) -> Solved:
        found = target(weight.shape[0] > weight.shape[1])
        factors = factorize(weight, found, rank=rank)
        if options.ridge:
            error = relative_error(weight, factors.u @ factors.v, original=gram)
        else:
            # What is lost is the tail of the spectrum: three large products less.
            lost, whole = factors.spectrum[rank:].sum(), factors.spectrum.sum()
            error = (lost / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt().item()
        return Solved(factors, _report(factors, found, error))

    return solve


def _report(factors: Factors, target: Target, error: float) -> dict[str, float | int | None]:
    return {
        "relative_error": error,
        "energy_kept": factors.kept,
        "directions_dropped": target.dropped,
        "cutoff": target.cutoff,
        "ridge": target.ridge,
    }


def _diagonal(weights: Tensor, statistics: Statistics) -> Tensor:
    """Return C for ‖(W − W') D‖ with D² = weights, in the scale of a covariance summed over tokens."""
    return torch.diag(weights.to(torch.float64)) * statistics.token_count


def input_agnostic(statistics: Statistics, options: Options) -> Solver:
    """Plain SVD: min ‖W − W'‖ (AA-SVD's objective 1)."""
    # As if every token excited all directions alike.
    return _whitened(_diagonal(torch.ones_like(statistics.absolute), statistics), statistics, options)


def input_aware(statistics: Statistics, options: Options) -> Solver:
    """DRONE, SVD-LLM (W), SVD-LLM V2's truncation, Swift-SVD: min ‖W X − W' X‖ (AA-SVD's objective 2)."""
    return _whitened(statistics.gram, statistics, options)


def asvd(statistics: Statistics, options: Options) -> Solver:
    """ASVD: min ‖(W − W') S‖ with S = diag((mean |x|)^0.5).

    Paper: the same. Its code uses a randomised SVD, whose error depends on the seed, and adds 1e-6 to S so
    that it can be inverted. Here: the exact solution, in which nothing is inverted.
    """
    mean = statistics.absolute / statistics.token_count
    return _whitened(_diagonal(mean ** (2 * _ASVD_ALPHA), statistics), statistics, options)


def lorap(statistics: Statistics, options: Options) -> Solver:
    """LoRAP's attention objective: min ‖(W − W') D‖ with D = diag(√mean x²); here for every linear."""
    return _whitened(torch.diag(statistics.gram.diagonal()), statistics, options)


def fwsvd(statistics: Statistics, options: Options) -> Solver:
    """FWSVD: min ‖(W − W') D‖, D² the Fisher information of each input channel, summed over outputs."""

    def solve(name: str, weight: Tensor, rank: int) -> Solved:
        squared = statistics.squared[name]
        scale = squared.mean().clamp_min(torch.finfo(squared.dtype).tiny)
        gram = _diagonal(squared / scale, statistics)
        return _whitened(gram, statistics, options)(name, weight, rank)

    return solve


def _important(gram: Tensor) -> Tensor:
    """Return DipSVD's factor of every channel: large for those whose column of the Gram is longest.

    Paper: the score is √(x_jᵀ(XXᵀ)x_j), whose dimensions fit only if x_j is a channel's column. Here: the
    norm of the Gram's column, as in its code.
    """
    count = max(1, round(_DIPSVD_SHARE * len(gram)))
    factors = torch.ones_like(gram.diagonal())
    factors[gram.norm(dim=0).topk(count).indices] = _DIPSVD_FACTOR
    return factors


def dipsvd_paper(statistics: Statistics, options: Options) -> Solver:
    """DipSVD as in its paper: min ‖(W − W') D X‖ with the strongest channels scaled up by D."""
    factors = _important(statistics.gram)
    return _whitened(statistics.gram * factors * factors[:, None], statistics, options)


def dipsvd_code(statistics: Statistics, options: Options) -> Solver:
    """DipSVD as in its code: C = (G D² G)^{1/2}, from the SVD of the Gram G with one side scaled by D."""
    left, singular, _ = torch.linalg.svd(statistics.gram * _important(statistics.gram))
    return _whitened(left * singular @ left.T, statistics, options)


def shift_aware(statistics: Statistics, options: Options) -> Solver:
    """Min ‖W X' − W' X'‖ (AA-SVD's objective 3); Dobi-SVD's projection on the principal outputs.

    Dobi-SVD estimates the principal subspace of a layer's outputs by incremental PCA; here it is the exact
    one, from the covariance.
    """
    assert statistics.shifted is not None
    return _whitened(statistics.shifted, statistics, options)


def anchored(statistics: Statistics, options: Options) -> Solver:
    """AA-SVD: min ‖W X − W' X'‖, its objective 4."""
    return blended(statistics, options._replace(blend=1.0))


def blended(statistics: Statistics, options: Options) -> Solver:
    """Min ‖(1 − b) W X' + b W X − W' X'‖: SAES-SVD's CEALC with a fixed b, PIFA's target."""
    assert statistics.shifted is not None and statistics.cross is not None
    target = prepare(
        statistics.shifted,
        cross_gram=statistics.cross,
        blend=options.blend,
        ridge=options.ridge,
        need_root=True,
        token_count=statistics.token_count,
    )
    return functools.partial(_solve_blended, statistics, target)


def _solve_blended(statistics: Statistics, target: Target, _name: str, weight: Tensor, rank: int) -> Solved:
    factors = factorize(weight, target, rank=rank)
    # Each objective's own error is against W X here: what the original layer gives.
    error = relative_error(
        weight,
        factors.u @ factors.v,
        original=statistics.gram,
        cross_gram=statistics.cross,
        shifted=statistics.shifted,
    )
    return Solved(factors, _report(factors, target, error))


def saes(statistics: Statistics, options: Options) -> Solver:
    """SAES-SVD: the blend (CEALC) whose coefficient each layer chooses by itself (ACES).

    Single pass and uniform ranks as in the paper; it does not say in which order a block's layers are
    solved: here as in AA-SVD, each group seeing what the groups before it cause.
    """
    assert statistics.shifted is not None and statistics.cross is not None
    whole = prepare(
        statistics.shifted,
        cross_gram=statistics.cross,
        blend=1.0,
        ridge=options.ridge,
        need_root=True,
        token_count=statistics.token_count,
    )
    assert whole.root is not None and whole.transfer is not None
    root, transfer = whole.root, whole.transfer
    identity = torch.eye(len(whole.gram), dtype=torch.float64, device=whole.gram.device)

    def solve(name: str, weight: Tensor, rank: int) -> Solved:
        w = weight.to(torch.float64)
        # W Δ L with Δ = XX'ᵀ − X'X'ᵀ: the transfer at b = 1 less that at b = 0, times the root.
        blend = aces(w @ root, w @ (transfer - identity) @ root, rank)
        target = whole._replace(transfer=identity + blend * (transfer - identity))
        solved = _solve_blended(statistics, target, name, weight, rank)
        return Solved(solved.factors, solved.report | {"blend": blend})

    return solve


def aces(shifted: Tensor, change: Tensor, rank: int) -> float:
    """Choose the blend that leaves the smallest share of energy outside the kept subspaces (SAES-SVD, ACES).

    ρ(β) = ‖S⊥ + β D⊥‖² / ‖S + β D‖², where ⊥ removes the top-k left and right subspaces of S; its
    stationary points solve a quadratic equation.

    Args:
        shifted: S = W H L, (m, r).
        change: D = W Δ L, (m, r).
        rank: k.

    Returns:
        β within `SAES_BOUNDS`.
    """
    left, right = principal(shifted, rank)
    rest = shifted - left @ (left.T @ shifted)
    rest = rest - (rest @ right) @ right.T
    apart = change - left @ (left.T @ change)
    apart = apart - (apart @ right) @ right.T
    a, b, c = (float((x * y).sum()) for x, y in ((rest, rest), (rest, apart), (apart, apart)))
    whole = ((shifted, shifted), (shifted, change), (change, change))
    a_all, b_all, c_all = (float((x * y).sum()) for x, y in whole)

    def share(beta: float) -> float:
        energy = a_all + 2 * b_all * beta + c_all * beta**2
        return (a + 2 * b * beta + c * beta**2) / energy if energy > 0 else 0.0

    quadratic = (c * b_all - b * c_all, c * a_all - a * c_all, b * a_all - a * b_all)
    low, high = SAES_BOUNDS
    return min((low, high, *(x for x in _roots(*quadratic) if low < x < high)), key=share)


def _roots(a: float, b: float, c: float) -> list[float]:
    """Return the real roots of a x² + b x + c."""
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return []
    # The form without cancellation; it also covers a = 0.
    q = -0.5 * (b + (discriminant**0.5 if b >= 0 else -(discriminant**0.5)))
    return [x / y for x, y in ((q, a), (c, q)) if y != 0]


def adasvd(statistics: Statistics, options: Options) -> Solver:
    """AdaSVD: the input-aware solution, then least squares for U and V in turn on averaged sequences.

    On the inputs themselves the start is optimal and the rounds change nothing; on
    averages they do, for the worse by the objective's measure. The rounds would undo a ridge: there is none.
    """
    assert statistics.buckets is not None
    start, buckets = input_aware(statistics, options._replace(ridge=0.0)), statistics.buckets

    def solve(name: str, weight: Tensor, rank: int) -> Solved:
        factors, report = start(name, weight, rank)
        w, u, v = weight.to(torch.float64), factors.u, factors.v
        for _ in range(_ADASVD_ROUNDS):
            u = w @ buckets @ v.T @ torch.linalg.pinv(v @ buckets @ v.T, hermitian=True)
            v = torch.linalg.pinv(u) @ w
        error = relative_error(weight, u @ v, original=statistics.gram)
        return Solved(
            factors._replace(u=u, v=v), report | {"relative_error": error, "energy_kept": 1 - error**2}
        )

    return solve


def loss_aware(statistics: Statistics, options: Options) -> Solver:
    """Ours: min tr(G (W − W') XXᵀ (W − W')ᵀ), the model's loss to second order (as in K-FAC).

    G is the second moment of the loss's gradient at the layer's outputs, so that errors count by what they
    do to the loss. With G^{1/2} W in the place of W it is the input-aware problem.
    """
    return _by_loss(input_aware(statistics, options), statistics)


def loss_blended(statistics: Statistics, options: Options) -> Solver:
    """Ours: min tr(G E Eᵀ) with E = (1 − b) W X' + b W X − W' X': `loss_aware` on the shifted inputs."""
    return _by_loss(blended(statistics, options), statistics)


def _by_loss(inner: Solver, statistics: Statistics) -> Solver:
    """Let the errors of a solver's problem count by what they do to the loss."""

    def solve(name: str, weight: Tensor, rank: int) -> Solved:
        root = _loss_root(statistics.outer[name])
        factors, report = inner(name, root.mT @ weight.to(torch.float64), rank)
        u = torch.linalg.solve_triangular(root.mT, factors.u, upper=True)
        return Solved(factors._replace(u=u), report)

    return solve


def _loss_root(outer: Tensor) -> Tensor:
    """Return a root of `loss_aware`'s G up to a scale: L with L Lᵀ in proportion to outer + floor.

    Args:
        outer: The second moment of the loss's gradient at a linear's outputs, (m, m) float64.

    Returns:
        L, lower triangular, (m, m).
    """
    # Scaled to a mean of one, so that u and v keep the scale of the layer's outputs.
    scale = outer.diagonal().mean().clamp_min(torch.finfo(outer.dtype).tiny)
    metric = outer / scale + _FISHER_FLOOR * torch.eye(len(outer), dtype=outer.dtype, device=outer.device)
    # Any root of G will do, and this one takes a fortieth of the time of its eigenvectors.
    return torch.linalg.cholesky(metric)


# What prunes factorizes nothing.
FUNCTIONS: dict[str, Callable[[Statistics, Options], Solver]] = functions_of(
    (name for name in OBJECTIVES if name not in PRUNING), globals()
)


def options_of(compression: Mapping[str, Any]) -> Options:
    """Return what objectives read of `compression` in params.yaml."""
    return Options(blend=compression["blend"], ridge=compression["ridge"])
