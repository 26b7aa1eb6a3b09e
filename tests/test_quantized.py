import pytest
import torch
from torch import Tensor

from aasvd.formats import FORMATS, format_name
from aasvd.lowrank import CompressedLinear
from aasvd.quantized import balanced, dynamic_code_book

QUANTIZED = ["factors-int8", "pivoted-int8", "remapped"]
SIZES = [(48, 48, 20), (64, 32, 20), (32, 64, 20), (24, 24, 24), (40, 24, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(storage: str, u: Tensor, v: Tensor, bias: Tensor | None = None) -> CompressedLinear:
    layer = FORMATS[storage](v.shape[1], len(u), u.shape[1], bias=bias is not None, dtype=torch.float32)
    tensors = FORMATS[storage].pack(u, v, torch.float32)
    layer.load_state_dict(tensors if bias is None else {**tensors, "bias": bias.float()})
    return layer


def lost(layer: CompressedLinear, weight: Tensor) -> float:
    return ((layer.dense().double() - weight).norm() / weight.norm()).item()


def test_code_book_is_the_published_one() -> None:
    """By its description: decades of 1, 2, 4 ... 64 values, their spacing, and the two extra values."""
    book = dynamic_code_book().double()
    assert len(book) == len(set(book.tolist())) == 256
    assert torch.equal(book, book.sort().values)
    assert book[-1] == 1 and (book == 0).sum() == 1
    positive = book[(book > 0) & (book < 1)]
    torch.testing.assert_close(book[book < 0].flip(0), -positive, rtol=0, atol=0)
    decades = [positive[(positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))] for i in range(7)]
    assert [len(decade) for decade in decades] == [2**i for i in range(7)]
    for i, decade in enumerate(decades):
        scale = 10.0 ** (i - 6)
        assert decade[0].item() == pytest.approx((0.1 + 0.45 / 2**i) * scale, rel=1e-6)
        steps = decade.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 0.9 / 2**i * scale), rtol=1e-4, atol=0)


def test_code_book_error_is_the_measured_one() -> None:
    """Methods section 8: 1.17 % on Gaussian columns of 576 entries."""
    columns = random(576, 200)
    scaled = columns / columns.abs().amax(0)
    book = dynamic_code_book().double()
    nearest = book[(scaled[..., None] - book).abs().argmin(-1)]
    assert ((nearest - scaled).norm() / scaled.norm()).item() == pytest.approx(0.0117, abs=0.0004)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("storage", QUANTIZED)
def test_error_is_that_of_eight_bits(storage: str, sizes: tuple[int, int, int]) -> None:
    """About 1 % per factor of Gaussian entries; the pivoted coefficients amplify it a little."""
    out_features, in_features, rank = sizes
    u, v = random(out_features, rank), random(rank, in_features, seed=1)
    assert lost(layer_of(storage, u, v), u @ v) < 0.03


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_remapped_entries_are_nearest_values_of_the_book(shape: tuple[int, int]) -> None:
    m, n = shape
    u, v = random(m, 6), random(6, n, seed=1)
    layer = layer_of("remapped", u, v)
    found_u, found_v = layer.factors()
    left, right = balanced(u, v)
    book = dynamic_code_book().double()
    for found, wanted in ((found_u, left), (found_v.T, right.T)):
        coded = wanted[: min(m, n)]
        scales = coded.abs().amax(0)
        error = ((coded / scales)[..., None] - book).abs().amin(-1) * scales
        # A scale in float16 is up to 2^-10 larger than the largest entry.
        assert ((found[: min(m, n)].double() - coded).abs() <= error + 2**-9 * scales).all()
        torch.testing.assert_close(found[min(m, n) :].double(), wanted[min(m, n) :], rtol=2**-11, atol=1e-7)
    assert layer.slots.numel() == 6 * max(m, n) and layer.slots.dtype == torch.int16


def test_feedback_makes_int8_better_than_nearest_codes() -> None:
    u, v = random(200, 60), random(60, 150, seed=1)
    left, right = balanced(u, v)

    def nearest(matrix: Tensor) -> Tensor:
        scales = matrix.abs().amax(1, keepdim=True) / 127
        return (matrix / scales).round() * scales

    plain = nearest(left.T).T @ nearest(right)
    weight = u @ v
    assert lost(layer_of("factors-int8", u, v), weight) < (plain - weight).norm() / weight.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("storage", QUANTIZED)
def test_output_is_that_of_the_expanded_weight(storage: str, tokens: int, bias: bool) -> None:
    u, v, offset = random(40, 12), random(12, 24, seed=1), random(40, seed=2) if bias else None
    layer, x = layer_of(storage, u, v, offset), random(2, tokens, 24, seed=3).float()
    expected = torch.nn.functional.linear(x, layer.dense(), None if offset is None else offset.float())
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", QUANTIZED)
def test_gradients_reach_the_input_and_casts_leave_the_codes(storage: str) -> None:
    layer, x = layer_of(storage, random(20, 8), random(8, 16, seed=1)), random(3, 16).float().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(3, 16), rtol=1e-4, atol=1e-4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", QUANTIZED)
def test_extreme_factors(storage: str) -> None:
    zero = layer_of(storage, torch.zeros(9, 4, dtype=torch.float64), random(4, 7))
    assert zero.dense().abs().max() < 1e-6
    u, v = random(9, 4) * 1e-9, random(4, 7, seed=1) * 1e9
    if not storage.startswith("pivoted"):
        assert lost(layer_of(storage, u, v), u @ v) < 0.03
    with pytest.raises(ValueError, match="too large"):
        layer_of(storage, random(9, 4) * 1e9, random(4, 7) * 1e9)


def test_balanced_factors_are_those_of_the_svd() -> None:
    u, v = random(30, 8), random(8, 20, seed=1)
    left, right = balanced(u, v)
    torch.testing.assert_close(left @ right, u @ v, rtol=0, atol=1e-12)
    singular = torch.linalg.svdvals(u @ v)[:8]
    torch.testing.assert_close(left.T @ left, torch.diag(singular), rtol=0, atol=1e-11)
    torch.testing.assert_close(right @ right.T, torch.diag(singular), rtol=0, atol=1e-11)


def test_precision_names_a_format() -> None:
    assert format_name("pivoted", "int8") == "pivoted-int8"
    assert format_name("factors", "bfloat16") == format_name("factors", "model") == "factors"
    assert all(format_name(name, "model") in FORMATS for name in ("factors", "pivoted", "remapped"))
