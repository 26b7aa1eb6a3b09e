import math

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from aasvd.lowrank import LowRankLinear
from aasvd.pivoted import BOUND, PivotedLinear, choose_pivots
from aasvd.rounding import round_with_feedback

EPS = torch.finfo(torch.float64).eps
# (out, in, rank): one direction, all of them, wide, tall, and the rank in between.
SIZES = [(6, 6, 1), (6, 6, 6), (5, 12, 3), (12, 5, 5), (40, 30, 17), (30, 40, 30)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(singular: Tensor, *shape: int) -> Tensor:
    """A matrix with the given singular values and random singular vectors."""
    left = torch.linalg.qr(random(shape[0], len(singular), seed=1)).Q
    right = torch.linalg.qr(random(shape[1], len(singular), seed=2)).Q
    return left * singular @ right.T


def kahan(n: int, sine: float = 0.285) -> Tensor:
    """Kahan's matrix, on whose transpose column pivoting swaps nothing and misses the small singular value.

    Golub and Van Loan, Matrix Computations, section 5.5.7.
    """
    cosine = math.sqrt(1 - sine**2)
    upper = torch.eye(n, dtype=torch.float64) - cosine * torch.triu(
        torch.ones(n, n, dtype=torch.float64), diagonal=1
    )
    # The columns shrink by rounding's worth, so that pivoting has no ties to break.
    return (
        (sine ** torch.arange(n, dtype=torch.float64))[:, None]
        * upper
        * (1 - 1e-8 * torch.arange(n, dtype=torch.float64))
    )


def layer_of(
    u: Tensor, v: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> PivotedLinear:
    layer = PivotedLinear(v.shape[1], len(u), u.shape[1], bias=bias is not None, dtype=dtype)
    tensors = PivotedLinear.pack(u, v, dtype)
    layer.load_state_dict(tensors if bias is None else {**tensors, "bias": bias.to(dtype)})
    return layer


ADVERSARIAL = {
    "random": random(40, 12),
    "all rows": random(12, 12),
    "one column": random(40, 1),
    "kahan": kahan(40).T[:, :39].contiguous(),
    "kahan tall": torch.cat((kahan(30).T, random(30, 30, seed=3) * 1e-9)),
    "wilkinson": torch.eye(30, dtype=torch.float64)
    - torch.tril(torch.ones(30, 30, dtype=torch.float64), -1)[:, :]
    + 0.0,
    "hilbert": 1
    / (1 + torch.arange(60.0, dtype=torch.float64)[:, None] + torch.arange(25.0, dtype=torch.float64)),
    "vandermonde": torch.linspace(-1, 1, 80, dtype=torch.float64)[:, None] ** torch.arange(40),
    "badly scaled": random(50, 20) * 10.0 ** torch.linspace(-150, 150, 20, dtype=torch.float64),
    "equal rows": random(10, 8).repeat(5, 1),
    "rank deficient": random(40, 5) @ random(5, 12, seed=1),
    "zero": torch.zeros(9, 4, dtype=torch.float64),
    "zero rows": torch.cat((torch.zeros(20, 6, dtype=torch.float64), random(10, 6))),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("bound", [BOUND, 2.0])
def test_coefficients_are_bounded_and_exact(name: str, bound: float) -> None:
    u = ADVERSARIAL[name]
    pivots, others, coefficients = choose_pivots(u, bound=bound)
    assert sorted([*pivots.tolist(), *others.tolist()]) == list(range(len(u)))
    assert coefficients.shape == (len(u) - u.shape[1], u.shape[1])
    if coefficients.numel():
        assert coefficients.abs().max() <= bound
    # Column by column, since the columns of a badly scaled matrix have nothing to do with each other.
    error = (coefficients @ u[pivots] - u[others]).abs().amax(0, keepdim=True) if len(others) else u[:1] * 0
    scale = u.abs().amax(0)
    assert (error <= 200 * len(u) * EPS * scale).all()


def test_column_pivoting_alone_would_break_the_bound() -> None:
    """What the swaps are for: on this matrix the first pivots of a pivoted QR give a large coefficient."""
    u = torch.cat((kahan(40).T[:, :39].contiguous(),))
    basis = torch.linalg.qr(u).Q
    found = []
    for candidate in (u, basis):
        ranking = scipy.linalg.qr(candidate.T.numpy(), mode="r", pivoting=True)[1]
        first, last = torch.from_numpy(ranking[:39]).long(), torch.from_numpy(ranking[39:]).long()
        found.append(torch.linalg.solve(u[first].T, u[last].T).abs().max().item())
    assert max(found) > 100 * BOUND


@pytest.mark.parametrize("sizes", SIZES)
def test_packing_is_exact(sizes: tuple[int, int, int]) -> None:
    out_features, in_features, rank = sizes
    u, v = random(out_features, rank), random(rank, in_features, seed=1)
    layer = layer_of(u, v)
    # Coefficients of about one in sums of k terms, after a QR and a solve of well-conditioned matrices.
    tolerance = 200 * rank * EPS
    torch.testing.assert_close(layer.dense().detach(), u @ v, rtol=0, atol=tolerance)
    places = layer.order[:out_features] < rank
    # The rows themselves are stored; a product of some rows may end in other last bits than one of all.
    rows = layer.rows.detach()[layer.order[places]]
    torch.testing.assert_close(rows, (u @ v)[places], rtol=0, atol=4 * rank * EPS)


@pytest.mark.parametrize("condition", [1e3, 1e8, 1e15])
@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_packing_is_exact_when_ill_conditioned(condition: float, shape: tuple[int, int]) -> None:
    """Every row to the precision of the largest entry, wherever the factors put the singular values."""
    singular = torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64)
    weight = with_spectrum(singular, *shape)
    left, found, right = torch.linalg.svd(weight, full_matrices=False)
    left, found, right = left[:, :20], found[:20], right[:20]
    for u, v in (
        (left * found, right),
        (left, found[:, None] * right),
        (left * found**2, right / found[:, None]),
    ):
        layer = layer_of(u, v)
        error = (layer.dense() - u @ v).abs().max()
        # The product u v itself has this accuracy when its terms are large and cancel.
        assert error <= 100 * EPS * (u.abs() @ v.abs()).max()


def test_rank_deficient_factors_keep_their_shape() -> None:
    for u, v in (
        (random(20, 3) @ random(3, 7, seed=1), random(7, 15, seed=2)),
        (random(20, 7), random(7, 3, seed=1) @ random(3, 15, seed=2)),
        (torch.zeros(20, 7, dtype=torch.float64), random(7, 15)),
    ):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
            layer = layer_of(u, v, dtype=dtype)
            assert layer.rank == 7
            scale = (u @ v).abs().max()
            torch.testing.assert_close(layer.dense().double(), u @ v, rtol=0, atol=tolerance * float(scale))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_is_that_of_the_factors(sizes: tuple[int, int, int], tokens: int, bias: bool) -> None:
    """Both ways of ordering: outputs of few tokens, rows of the weight for many."""
    out_features, in_features, rank = sizes
    u, v = random(out_features, rank), random(rank, in_features, seed=1)
    offset = random(out_features, seed=2) if bias else None
    x = random(2, tokens, in_features, seed=3)
    expected = LowRankLinear.from_factors(u, v, offset)(x)
    torch.testing.assert_close(layer_of(u, v, offset)(x), expected, rtol=0, atol=1000 * rank * EPS)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("sizes", [(6, 4, 3), (4, 4, 4)])
def test_gradients_match_finite_differences(sizes: tuple[int, int, int], tokens: int) -> None:
    out_features, in_features, rank = sizes
    layer = layer_of(random(out_features, rank), random(rank, in_features, seed=1), random(out_features))
    x = random(tokens, in_features).requires_grad_()

    def output(x: Tensor, rows: Tensor, coefficients: Tensor, bias: Tensor) -> Tensor:
        tensors = {"rows": rows, "coefficients": coefficients, "bias": bias}
        return torch.func.functional_call(layer, tensors, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.rows, layer.coefficients, layer.bias))


@pytest.mark.parametrize("tokens", [2, 30])
def test_traces_as_one_graph(tokens: int) -> None:
    layer, x = layer_of(random(12, 5), random(5, 8, seed=1), random(12)), random(tokens, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1000 * EPS)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=0, atol=1000 * EPS)


@pytest.mark.parametrize("tokens", [2, 30])
def test_autocast_computes_in_bfloat16(tokens: int) -> None:
    layer, x = (
        layer_of(random(12, 5), random(5, 8, seed=1), random(12), torch.float32),
        random(tokens, 8).float(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0, atol=0.3)


def test_moves_and_casts_without_touching_the_order() -> None:
    layer = layer_of(random(12, 5), random(5, 8, seed=1))
    order = layer.order.clone()
    layer.to(torch.bfloat16)
    assert layer.rows.dtype == torch.bfloat16 and torch.equal(layer.order, order)
    assert "order" not in dict(layer.named_parameters())
    assert isinstance(layer, nn.Module) and "rank=5" in repr(layer)


def model_shaped(out_features: int, in_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """Factors with the sizes and the slowly falling spectrum of a language model's weights."""
    weight = with_spectrum(torch.linspace(1, 0.2, rank, dtype=torch.float64), out_features, in_features)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"), [(192, 192, 70), (256, 96, 48), (96, 256, 48)]
)
def test_rounding_in_bfloat16_loses_little(out_features: int, in_features: int, rank: int) -> None:
    """Rounding with feedback: well below plain rounding, and within twice what rounding u and v loses."""
    u, v = model_shaped(out_features, in_features, rank)
    weight = u @ v

    def lost(approximation: Tensor) -> float:
        return ((approximation.double() - weight).norm() / weight.norm()).item()

    def cast(matrix: Tensor) -> Tensor:
        return matrix.to(torch.bfloat16).double()

    exact = layer_of(u, v)
    plain = lost(
        torch.cat((torch.eye(rank, dtype=torch.float64), cast(exact.coefficients)))[exact.order]
        @ cast(exact.rows)
    )
    packed = layer_of(u, v, dtype=torch.bfloat16)
    assert packed.coefficients.abs().max() <= 1.2 * BOUND
    found = lost(packed.double().dense())
    assert found < 0.8 * plain
    assert found < 2 * lost(cast(u) @ cast(v))


def test_feedback_rounds_plainly_where_nothing_is_amplified() -> None:
    matrix = random(130, 20)
    rounded = round_with_feedback(
        matrix, torch.eye(130, dtype=torch.float64), lambda _row, values: values.round()
    )
    assert torch.equal(rounded, matrix.round())


def test_feedback_beats_plain_rounding_where_errors_are_amplified() -> None:
    left, matrix = with_spectrum(torch.logspace(0, -3, 130, dtype=torch.float64), 150, 130), random(130, 20)
    rounded = round_with_feedback(matrix, left.T @ left, lambda _row, values: values.round())
    assert torch.equal(rounded, rounded.round())
    assert (left @ (rounded - matrix)).norm() < 0.5 * (left @ (matrix.round() - matrix)).norm()
