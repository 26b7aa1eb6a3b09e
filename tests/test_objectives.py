"""Every objective's optimality on raw data, and every published formula written out independently."""

import math
from collections.abc import Callable
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from aasvd import methods, objectives
from aasvd.objectives import FUNCTIONS, Options, Solved, Solver, Statistics, aces, solver
from aasvd.solve import Factors

EPS = torch.finfo(torch.float64).eps
SHAPES = [(6, 10), (10, 6), (8, 8)]
KINDS = ["plain", "few tokens", "dead channel", "duplicated channel", "outlier"]
# Those whose target is not what the weight itself makes of the inputs.
FITTED = ("anchored", "blended", "loss_blended")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer:
    """One layer with raw inputs on both sides, bucket averages and gradients."""

    def __init__(
        self, shape: tuple[int, int], kind: str = "plain", *, shift: float = 0.2, buckets: int = 0
    ) -> None:
        rows, features = shape
        self.weight = random(rows, features, seed=1)
        # Channels of sizes from 1 to 3, so that no weighting is a multiple of another.
        self.x = random(features, 60, seed=2) * torch.linspace(1, 3, features, dtype=torch.float64)[:, None]
        noise = shift * random(features, 60, seed=3)
        gradients = random(rows, 60, seed=5) * torch.linspace(1, 3, rows, dtype=torch.float64)[:, None]
        if kind == "few tokens":
            self.x, noise, gradients = (t[:, : features // 2] for t in (self.x, noise, gradients))
        elif kind == "dead channel":
            self.x[2], noise[2] = 0, 0
        elif kind == "duplicated channel":
            self.x[3], noise[3] = self.x[1], noise[1]
        elif kind == "outlier":
            direction = random(features, seed=4)
            direction /= direction.norm()
            self.x = self.x + 299 * torch.outer(direction, direction @ self.x)
            noise = noise + 299 * torch.outer(direction, direction @ noise)
        self.shifted = self.x + noise
        tokens = self.x.shape[1]
        groups = torch.arange(tokens).chunk(buckets or tokens)
        self.averages = torch.stack([self.x[:, some].mean(1) for some in groups], 1)
        # (∂loss/∂W)² of ten sequences, summed over outputs.
        per_sequence = [g @ x.T for g, x in zip(gradients.chunk(10, 1), self.x.chunk(10, 1), strict=True)]
        self.squared = torch.stack([g.square().sum(0) for g in per_sequence]).mean(0)
        self.outer = gradients @ gradients.T

    def statistics(self) -> Statistics:
        return Statistics(
            gram=self.x @ self.x.T,
            absolute=self.x.abs().sum(1),
            token_count=self.x.shape[1],
            shifted=self.shifted @ self.shifted.T,
            cross=self.x @ self.shifted.T,
            buckets=self.averages @ self.averages.T,
            squared={"w": self.squared},
            outer={"w": self.outer},
        )

    def solve(self, name: str, rank: int, *, blend: float = 0.4, ridge: float = 0.0) -> Solved:
        solve = solver(name, self.statistics(), options=Options(blend=blend, ridge=ridge))
        return solve("w", self.weight, rank)

    def fitted(self, name: str, rank: int, **options: float) -> Tensor:
        factors = self.solve(name, rank, **options).factors
        return factors.u @ factors.v


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]


def weighted(scale: Callable[[Layer], Tensor]) -> Callable[[Layer, Tensor], Tensor]:
    """Return the loss ‖(W − W') S‖² of a diagonal S, from its own formula."""
    return lambda layer, fitted: ((layer.weight - fitted) * scale(layer)).square().sum((-2, -1))


def fitted_to(target: Callable[[Layer], Tensor], inputs: Callable[[Layer], Tensor]) -> Callable[..., Tensor]:
    return lambda layer, fitted: (
        (layer.weight @ target(layer) - fitted @ inputs(layer)).square().sum((-2, -1))
    )


def dipsvd_scale(layer: Layer) -> Tensor:
    """The strongest 3 % of the channels, one at least, count 30 times."""
    gram = layer.x @ layer.x.T
    scale = torch.ones(len(gram), dtype=torch.float64)
    strongest = gram.square().sum(0).argsort(descending=True)
    scale[strongest[: {200: 6}.get(len(gram), 1)]] = 30
    return scale


def dipsvd_code_inputs(layer: Layer) -> Tensor:
    """S of U Σ Vᵀ = G D, S = U √Σ: what the code whitens with."""
    left, singular, _ = torch.linalg.svd((layer.x @ layer.x.T) @ torch.diag(dipsvd_scale(layer)))
    return left * singular.sqrt()


def kfac(target: Callable[[Layer], Tensor], inputs: Callable[[Layer], Tensor]) -> Callable[..., Tensor]:
    """Outputs weighted by the floored second moment of their gradients."""

    def loss(layer: Layer, fitted: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(layer.outer)
        metric = vectors * (values.clamp_min(0) / values.clamp_min(0).mean() + 0.01).sqrt()
        error = layer.weight @ target(layer) - fitted @ inputs(layer)
        return (metric.T @ error).square().sum((-2, -1))

    return loss


def between(layer: Layer) -> Tensor:
    """What the blend fits to."""
    return 0.6 * layer.shifted + 0.4 * layer.x


# What each objective minimises, on the data themselves. SAES-SVD has a loss for each chosen blend, AdaSVD
# minimises none: they have tests of their own.
LOSSES: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "input_agnostic": weighted(lambda layer: torch.ones(1)),
    "asvd": weighted(lambda layer: layer.x.abs().mean(1).sqrt()),
    "lorap": weighted(lambda layer: layer.x.square().mean(1).sqrt()),
    "fwsvd": weighted(lambda layer: layer.squared.sqrt()),
    "input_aware": fitted_to(lambda layer: layer.x, lambda layer: layer.x),
    "shift_aware": fitted_to(lambda layer: layer.shifted, lambda layer: layer.shifted),
    "anchored": fitted_to(lambda layer: layer.x, lambda layer: layer.shifted),
    "blended": fitted_to(between, lambda layer: layer.shifted),
    "dipsvd_paper": fitted_to(
        lambda layer: dipsvd_scale(layer)[:, None] * layer.x,
        lambda layer: dipsvd_scale(layer)[:, None] * layer.x,
    ),
    "dipsvd_code": fitted_to(dipsvd_code_inputs, dipsvd_code_inputs),
    "loss_aware": kfac(lambda layer: layer.x, lambda layer: layer.x),
    "loss_blended": kfac(between, lambda layer: layer.shifted),
}


@pytest.mark.parametrize("name", ["dipsvd_paper", "dipsvd_code"])
def test_dipsvd_scales_three_percent_of_the_channels(name: str) -> None:
    """Of 200 channels six: neither one, as in the small layers, nor five or seven."""
    layer = Layer((6, 200))
    scale = dipsvd_scale(layer)
    assert int((scale == 30).sum()) == 6
    inputs = scale[:, None] * layer.x if name == "dipsvd_paper" else dipsvd_code_inputs(layer)
    singular = torch.linalg.svdvals(layer.weight @ inputs).square()
    for rank in (1, 3, 5):
        found = float(LOSSES[name](layer, layer.fitted(name, rank)))
        assert found == pytest.approx(float(singular[rank:].sum()), rel=1e-9)


def test_every_name_is_a_function_of_one_signature() -> None:
    assert set(FUNCTIONS) == set(methods.OBJECTIVES) - set(methods.PRUNING)
    for name, function in FUNCTIONS.items():
        assert function.__module__ == "aasvd.objectives" and function.__name__ == name
        assert get_type_hints(function) == {"statistics": Statistics, "options": Options, "return": Solver}


def test_every_objective_is_tested_for_its_optimum() -> None:
    assert set(LOSSES) | {"saes", "adasvd"} == set(FUNCTIONS)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_perturbation_improves_the_result(name: str, shape: tuple[int, int], kind: str) -> None:
    """At any rank, on any covariance: 200 other matrices of the same rank, near and far, lose no less."""
    layer = Layer(shape, kind)
    for rank in (1, 3, min(shape)):
        assert_perturbations_lose_no_less(layer, LOSSES[name], layer.solve(name, rank).factors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_perturbation_improves_saes_at_the_blend_it_reports(shape: tuple[int, int], kind: str) -> None:
    layer = Layer(shape, kind)
    for rank in (1, 3, min(shape)):
        solved = layer.solve("saes", rank)
        assert_perturbations_lose_no_less(layer, saes_loss(solved), solved.factors)


def saes_loss(solved: Solved) -> Callable[[Layer, Tensor], Tensor]:
    """Return the loss that SAES-SVD minimises with the blend that it chose."""
    blend = solved.report["blend"]
    assert blend is not None
    return fitted_to(
        lambda layer: layer.shifted + blend * (layer.x - layer.shifted), lambda layer: layer.shifted
    )


def assert_perturbations_lose_no_less(
    layer: Layer, loss: Callable[[Layer, Tensor], Tensor], factors: Factors
) -> None:
    assert all(torch.isfinite(part).all() for part in (factors.u, factors.v, factors.spectrum))
    total = float(loss(layer, torch.zeros_like(layer.weight)))
    best = float(loss(layer, factors.u @ factors.v))
    size = 10 ** torch.linspace(-8, 0.5, 200, dtype=torch.float64)[:, None, None]
    u = factors.u + size * random(200, *factors.u.shape, seed=6)
    v = factors.v + size * random(200, *factors.v.shape, seed=7)
    # The loss is a difference of terms of the size of `total`, right to some eps of them. DipSVD's
    # code's S is a root by way of an SVD of numbers whose squares the outlier makes 1e5 large.
    assert (loss(layer, u @ v) >= best - 1000 * EPS * total).all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in FITTED])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_tail_of_the_spectrum(name: str, shape: tuple[int, int], kind: str) -> None:
    layer, loss = Layer(shape, kind), LOSSES[name]
    total = float(loss(layer, torch.zeros_like(layer.weight)))
    for rank in range(1, min(shape) + 1):
        factors = layer.solve(name, rank).factors
        share = float(factors.spectrum[rank:].sum() / factors.spectrum.sum())
        found = float(loss(layer, factors.u @ factors.v)) / total
        assert found == pytest.approx(share, abs=1000 * EPS)
        assert factors.kept == pytest.approx(1 - share, abs=100 * EPS)


@pytest.mark.parametrize("name", [*FITTED, "saes"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_what_the_kept_directions_do_not_explain(
    name: str, shape: tuple[int, int], kind: str
) -> None:
    """‖W X‖² − Σ_{i≤k} λ_i, of whatever target the objective has, in the metric that it has."""
    layer = Layer(shape, kind)
    for rank in range(1, min(shape) + 1):
        solved = layer.solve(name, rank)
        factors, loss = solved.factors, saes_loss(solved) if name == "saes" else LOSSES[name]
        total = float(loss(layer, torch.zeros_like(layer.weight)))
        found = float(loss(layer, factors.u @ factors.v))
        assert found == pytest.approx(total - float(factors.spectrum[:rank].sum()), abs=1000 * EPS * total)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_that_nothing_reaches_has_factors_of_float32(name: str, shape: tuple[int, int]) -> None:
    """Inputs, gradients and all covariances zero: what it makes of zeros is zero, not infinity times zero."""
    layer = Layer(shape)
    for tensor in (layer.x, layer.shifted, layer.averages, layer.squared, layer.outer):
        tensor.zero_()
    for rank in (1, min(shape)):
        solved = layer.solve(name, rank)
        u, v = solved.factors.u.float(), solved.factors.v.float()
        assert torch.isfinite(u).all() and torch.isfinite(v).all()
        assert not (u @ (v @ torch.zeros(shape[1]))).any()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_is_finite_on_every_covariance(name: str, kind: str) -> None:
    for shape in SHAPES:
        layer = Layer(shape, kind, buckets=5)
        for rank in range(1, min(shape) + 1):
            for ridge in (0.0, 0.01):
                solved = layer.solve(name, rank, ridge=ridge)
                assert all(torch.isfinite(part).all() for part in (solved.factors.u, solved.factors.v))
                error = solved.report["relative_error"]
                assert error is not None and math.isfinite(error)


# Published formulas that are the same problem


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_drone_svd_llm_and_v2_are_input_aware(shape: tuple[int, int], rank: int) -> None:
    layer = Layer(shape)
    w, x = layer.weight, layer.x
    gram = x @ x.T
    # DRONE: SVDs of W and X.
    _, s_w, v_w = torch.linalg.svd(w, full_matrices=False)
    u_x, s_x, _ = torch.linalg.svd(x, full_matrices=False)
    z = truncated(s_w[:, None] * (v_w @ u_x) * s_x, rank)
    drone = w @ ((v_w.T / s_w) @ z @ (u_x / s_x).T)
    # SVD-LLM (W): Cholesky.
    root = torch.linalg.cholesky(gram)
    svd_llm = truncated(w @ root, rank) @ torch.linalg.inv(root)
    # SVD-LLM V2: eigenvalues of the Gram.
    values, vectors = torch.linalg.eigh(gram)
    v2 = truncated(w @ vectors * values.sqrt(), rank) @ (vectors / values.sqrt()).T
    # Swift-SVD: eigenvectors of the outputs' covariance.
    basis = torch.linalg.eigh((w @ x) @ (w @ x).T)[1][:, -rank:]
    found = layer.fitted("input_aware", rank)
    for expected in (drone, svd_llm, v2, basis @ basis.T @ w):
        # Condition numbers of W and X below 100 each, gaps above 1e-2.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e6 * EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_dobi_svd_is_shift_aware(shape: tuple[int, int]) -> None:
    """Its weight update keeps the principal directions of the outputs on the inputs that reach the layer."""
    layer = Layer(shape)
    outputs = (layer.weight @ layer.shifted).T  # tokens x m
    principal = torch.linalg.svd(outputs, full_matrices=False).Vh[:3].T
    expected = principal @ principal.T @ layer.weight
    torch.testing.assert_close(layer.fitted("shift_aware", 3), expected, rtol=0, atol=1e5 * EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_shift_all_of_the_family_agree(shape: tuple[int, int]) -> None:
    layer = Layer(shape, shift=0.0)
    expected = layer.fitted("input_aware", 3)
    for name in ("shift_aware", "anchored", "blended", "saes"):
        torch.testing.assert_close(layer.fitted(name, 3), expected, rtol=0, atol=1e5 * EPS)
    found, expected = layer.fitted("loss_blended", 3), layer.fitted("loss_aware", 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e5 * EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_white_inputs_make_everything_plain_svd(shape: tuple[int, int]) -> None:
    layer = Layer(shape, shift=0.0)
    layer.x = torch.linalg.qr(layer.x.T).Q.T * 7
    layer.shifted = layer.x
    layer.outer = torch.eye(shape[0], dtype=torch.float64)
    layer.squared = torch.ones(shape[1], dtype=torch.float64)
    layer.averages = layer.x
    expected = truncated(layer.weight, 3)
    for name in set(FUNCTIONS) - {"asvd", "dipsvd_paper", "dipsvd_code"}:
        torch.testing.assert_close(layer.fitted(name, 3), expected, rtol=0, atol=1e5 * EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_weightings_are_the_papers_scaled_svd(shape: tuple[int, int]) -> None:
    layer = Layer(shape)
    for name, scale in {
        "asvd": layer.x.abs().mean(1).sqrt() + 1e-6,  # its code's summand makes no visible difference
        "lorap": layer.x.square().mean(1).sqrt(),
        "fwsvd": layer.squared.sqrt(),
    }.items():
        expected = truncated(layer.weight * scale, 3) / scale
        torch.testing.assert_close(layer.fitted(name, 3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_adasvd_without_buckets_changes_nothing(shape: tuple[int, int], kind: str) -> None:
    layer = Layer(shape, kind)
    scale = float((layer.weight @ layer.x).norm())
    for rank in (1, 3, min(shape)):
        found, expected = layer.fitted("adasvd", rank), layer.fitted("input_aware", rank)
        # On what the tokens excite; elsewhere any weight does.
        torch.testing.assert_close(found @ layer.x, expected @ layer.x, rtol=0, atol=1e5 * EPS * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_adasvd_with_buckets_fits_them_better_and_the_data_worse(shape: tuple[int, int]) -> None:
    layer = Layer(shape, buckets=12)
    start, found = layer.fitted("input_aware", 3), layer.fitted("adasvd", 3)

    def loss(fitted: Tensor, inputs: Tensor) -> float:
        return float(((layer.weight - fitted) @ inputs).square().sum())

    assert loss(found, layer.averages) < loss(start, layer.averages)
    assert loss(found, layer.x) > loss(start, layer.x)


@pytest.mark.parametrize(("bounds", "name"), [((0.0, 0.0), "shift_aware"), ((1.0, 1.0), "anchored")])
@pytest.mark.parametrize("kind", ["plain", "dead channel"])
def test_saes_at_its_ends(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[float, float], name: str, kind: str
) -> None:
    monkeypatch.setattr(objectives, "SAES_BOUNDS", bounds)
    for shape in SHAPES:
        layer = Layer(shape, kind)
        for rank in (1, 4):
            found, expected = layer.fitted("saes", rank), layer.fitted(name, rank)
            # On what the tokens excite; elsewhere any weight does.
            torch.testing.assert_close(
                found @ layer.shifted, expected @ layer.shifted, rtol=0, atol=1e6 * EPS
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_cealc_is_the_blend(shape: tuple[int, int]) -> None:
    """‖(W' − W) X'‖² + α ‖W' X' − W X‖² is minimal where the blend with β = α / (1 + α) is."""
    layer, alpha = Layer(shape), 0.6
    beta = alpha / (1 + alpha)
    factors = layer.solve("blended", 3, blend=beta).factors

    def loss(fitted: Tensor) -> Tensor:
        output, w = fitted @ layer.shifted, layer.weight
        return (output - w @ layer.shifted).square().sum((-2, -1)) + alpha * (
            output - w @ layer.x
        ).square().sum((-2, -1))

    best = float(loss(factors.u @ factors.v))
    size = 10 ** torch.linspace(-7, 0, 200, dtype=torch.float64)[:, None, None]
    others = (factors.u + size * random(200, *factors.u.shape, seed=8)) @ (
        factors.v + size * random(200, *factors.v.shape, seed=9)
    )
    assert (loss(others) >= best - 1000 * EPS * best).all()


@pytest.mark.parametrize("seed", range(5))
def test_aces_finds_the_smallest_residual_share(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted, change = random(7, 9, seed=seed), 0.5 * random(7, 9, seed=seed + 100)
    left, _, right = torch.linalg.svd(shifted)
    out_left, out_right = left[:, 3:] @ left[:, 3:].T, right[3:].T @ right[3:]

    def share(beta: float) -> float:
        rest = out_left @ (shifted + beta * change) @ out_right
        return float(rest.square().sum() / (shifted + beta * change).square().sum())

    for bounds in (objectives.SAES_BOUNDS, (0.0, 1.0), (-3.0, 3.0)):
        monkeypatch.setattr(objectives, "SAES_BOUNDS", bounds)
        found = aces(shifted, change, 3)
        assert bounds[0] <= found <= bounds[1]
        grid = torch.linspace(*bounds, 2001, dtype=torch.float64).tolist()
        assert share(found) <= min(map(share, grid)) + 1e-12


def test_saes_reports_the_blend_it_chose() -> None:
    blend = Layer((6, 10)).solve("saes", 2).report["blend"]
    assert blend is not None
    assert objectives.SAES_BOUNDS[0] <= blend <= objectives.SAES_BOUNDS[1]


def test_the_ridge_pulls_every_objective_towards_the_weights() -> None:
    layer = Layer((8, 8))
    # Its rounds would forget a ridge, so it has none, and says so.
    assert layer.solve("adasvd", 3, ridge=1e8).report["ridge"] == 0
    assert torch.equal(layer.fitted("adasvd", 3, ridge=1e8), layer.fitted("adasvd", 3))
    for name in set(FUNCTIONS) - {"adasvd"}:
        far = layer.fitted(name, 3, ridge=1e8)
        metric = torch.eye(8, dtype=torch.float64)
        if name.startswith("loss_"):
            values, vectors = torch.linalg.eigh(layer.outer)
            metric = (vectors * (values / values.mean() + 0.01).sqrt()) @ vectors.T
        expected = torch.linalg.inv(metric) @ truncated(metric @ layer.weight, 3)
        torch.testing.assert_close(far, expected, rtol=0, atol=1e-5)


def test_unknown_objective_says_which_exist() -> None:
    with pytest.raises(
        ValueError, match=r"unknown objective 'obj4'; there are input_agnostic, .*anchored, b"
    ):
        solver("obj4", Layer((6, 10)).statistics(), options=Options(blend=1, ridge=0))
