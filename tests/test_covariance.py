import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from aasvd import covariance
from aasvd.covariance import CrossGram, Gram, pack, unpack

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float64).eps
TILE = covariance._TILE
# One channel, less than a tile, exactly one, one more, and two and a bit.
FEATURES = [1, 7, TILE, TILE + 1, 2 * TILE + 64]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram_of(*batches: Tensor) -> Gram:
    gram = Gram(batches[0].shape[-1], device=CPU)
    for batch in batches:
        gram.add(batch)
    return gram


def cross_gram_of(*pairs: tuple[Tensor, Tensor]) -> CrossGram:
    gram = CrossGram(pairs[0][0].shape[-1], device=CPU)
    for original, shifted in pairs:
        gram.add(original, shifted)
    return gram


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("features", FEATURES)
def test_whole_numbers_are_summed_exactly(features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(features)
    x, y = torch.randint(-100, 100, (2, 2, 3, features), generator=generator)
    rows, shifted = x.reshape(-1, features).numpy(), y.reshape(-1, features).numpy()
    gram = gram_of(x.to(dtype))
    assert gram.matrix().dtype == torch.float64
    assert np.array_equal(gram.matrix().numpy(), rows.T @ rows)
    assert np.array_equal(cross_gram_of((x.to(dtype), y.to(dtype))).matrix().numpy(), rows.T @ shifted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", [7, TILE + 1])
def test_error_is_that_of_a_float64_sum(features: int, dtype: torch.dtype) -> None:
    tokens = 40
    x, y = random(tokens, features, dtype=dtype), random(tokens, features, dtype=dtype, seed=1)
    wide, shifted = x.double().numpy().astype(np.longdouble), y.double().numpy().astype(np.longdouble)
    # Products of two bfloat16 or float32 numbers are exact in float64, so only additions round, each by
    # at most eps / 2 of a partial sum, which is at most the sum of magnitudes.
    for found, expected, magnitude in (
        (gram_of(x).matrix(), wide.T @ wide, abs(wide).T @ abs(wide)),
        (cross_gram_of((x, y)).matrix(), wide.T @ shifted, abs(wide).T @ abs(shifted)),
    ):
        assert (abs(found.numpy() - expected) <= tokens * EPS / 2 * magnitude).all()


def test_outlier_direction_keeps_the_small_eigenvalues() -> None:
    """A float32 sum would return noise of 1e-7 x 1e10 = 1e3 here, far above the true smallest value."""
    x = random(200, 6, dtype=torch.float32)
    x[:, 0] *= 1e5
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    found = torch.linalg.eigvalsh(gram_of(x).matrix()).numpy()[::-1]
    # eigvalsh and the 200 additions both err by a multiple of eps times the largest eigenvalue.
    assert np.abs(found - expected).max() <= 200 * EPS * expected[0]
    assert expected[0] / expected[-1] > 1e9


def test_merging_batches_is_order_free() -> None:
    tokens, features = 60, 9
    x, y = random(tokens, features), random(tokens, features, seed=1)
    pieces = list(zip(x.split([5, 30, 25]), y.split([5, 30, 25]), strict=True))
    whole, cross = gram_of(x).matrix(), cross_gram_of((x, y)).matrix()
    # Two float64 sums of the same terms in different orders: each within tokens · eps / 2 of the truth.
    bound, cross_bound = tokens * EPS * (x.abs().T @ x.abs()), tokens * EPS * (x.abs().T @ y.abs())
    for order in itertools.permutations(pieces):
        assert ((gram_of(*(a for a, _ in order)).matrix() - whole).abs() <= bound).all()
        assert ((cross_gram_of(*order).matrix() - cross).abs() <= cross_bound).all()


def test_matrix_is_symmetric_to_the_last_bit_and_does_not_change_its_sum() -> None:
    gram = gram_of(random(30, TILE + 5, dtype=torch.float32))
    first = gram.matrix()
    assert torch.equal(first, first.T)
    assert torch.equal(first, gram.matrix())


def test_no_tokens_add_nothing() -> None:
    gram = gram_of(random(3, 5), random(0, 5))
    assert torch.equal(gram.matrix(), gram_of(random(3, 5)).matrix())


def test_every_leading_dimension_is_tokens() -> None:
    x = random(2, 3, 5, 7)
    assert torch.equal(gram_of(x).matrix(), gram_of(x.reshape(30, 7)).matrix())


def test_inputs_are_not_changed() -> None:
    x, y = random(4, 7), random(4, 7, seed=1)
    before = x.clone(), y.clone()
    gram_of(x)
    cross_gram_of((x, y))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("features", [1, 2, 3, 31, 32, 257])
def test_packing_keeps_every_bit_in_half_the_room(features: int) -> None:
    matrix = gram_of(random(5, features)).matrix()
    packed = pack(matrix)
    assert packed.shape == (features * (features + 1) // 2,)
    assert packed.dtype == torch.float64
    assert torch.equal(unpack(packed), matrix)
