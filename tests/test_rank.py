import math
from fractions import Fraction

import pytest

from aasvd.formats import FORMATS
from aasvd.rank import COSTS, stored_parameters, uniform_rank

RATIOS = ["0.05", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.99"]
# The tests' own, SmolLM2-135M, Llama-7B, Llama-3-8B, and prime sizes.
SHAPES = [
    (32, 32),
    (48, 32),
    (32, 48),
    (192, 576),
    (576, 1536),
    (4096, 4096),
    (11008, 4096),
    (1024, 4096),
    (97, 31),
]


def closed_form(storage: str, ratio: Fraction, m: int, n: int) -> int:
    """The published rules, in exact arithmetic, so that a ratio such as 0.6 means three fifths."""
    if storage == "factors":
        return math.floor(ratio * m * n / (m + n))
    if storage == "remapped":
        return math.floor(ratio * min(m, n))
    if storage == "pruned":
        return math.floor(ratio * m * n)
    # The smaller root of k² − (m + n) k + r m n: the largest k below it, from an integer square root.
    scale = ratio.denominator
    root = math.isqrt((m + n) ** 2 * scale**2 - 4 * ratio.numerator * scale * m * n)
    k = ((m + n) * scale - root) // (2 * scale)
    return k if k * (m + n - k) <= ratio * m * n else k - 1


@pytest.mark.parametrize("storage", COSTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_rank_is_the_largest_that_keeps_the_ratio(shape: tuple[int, int], ratio: str, storage: str) -> None:
    rows, columns = shape
    rank = uniform_rank(rows, columns, parameter_ratio=float(ratio), storage=storage)
    assert rank == max(1, closed_form(storage.removesuffix("-int8"), Fraction(ratio), rows, columns))

    def stored(rank: int | None) -> int:
        return stored_parameters(rows, columns, rank, storage=storage)

    assert stored(rank) < stored(None) == rows * columns
    if rank > 1:
        assert stored(rank) <= Fraction(ratio) * rows * columns
    assert stored(rank + 1) > Fraction(ratio) * rows * columns


def test_pivoted_rank_grows_by_what_the_square_matrix_says() -> None:
    """On a square matrix at 0.6: k = (1 − √0.4) n instead of 0.3 n, 22 % more."""
    pivoted = uniform_rank(4096, 4096, parameter_ratio=0.6, storage="pivoted")
    factors = uniform_rank(4096, 4096, parameter_ratio=0.6, storage="factors")
    assert pivoted == math.floor(4096 * (1 - math.sqrt(0.4)))
    assert 1.22 < pivoted / factors < 1.23


@pytest.mark.parametrize(
    ("shape", "rank"), [((1, 6), None), ((2, 2), None), ((6, 1), None), ((3, 2), 1), ((2, 8), 1)]
)
def test_matrix_stays_dense_where_factors_would_not_be_smaller(
    shape: tuple[int, int], rank: int | None
) -> None:
    """Even one direction costs m + n numbers: 2 x 2 gains nothing, 3 x 2 gains one."""
    for ratio in (0.01, 0.5, 0.99):
        assert uniform_rank(*shape, parameter_ratio=ratio, storage="factors") == rank


@pytest.mark.parametrize("storage", sorted(set(COSTS) - {"factors", "factors-int8", "pruned"}))
def test_smaller_storages_keep_only_vectors_dense(storage: str) -> None:
    for ratio in (0.01, 0.5, 0.99):
        assert uniform_rank(1, 6, parameter_ratio=ratio, storage=storage) is None
        assert uniform_rank(6, 1, parameter_ratio=ratio, storage=storage) is None
        assert uniform_rank(2, 2, parameter_ratio=ratio, storage=storage) == 1


def test_every_format_has_its_cost() -> None:
    assert list(COSTS) == [*FORMATS, "pruned"]
    assert all(COSTS[name].overhead(7, 5, 3) > 0 for name, layer in FORMATS.items() if layer.OVERHEAD)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5, 60.0, math.nan])
def test_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"{ratio} must lie between 0 and 1"):
        uniform_rank(32, 32, parameter_ratio=ratio, storage="factors")
