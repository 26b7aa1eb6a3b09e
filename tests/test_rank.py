import math
from fractions import Fraction

import pytest

from aasvd.rank import stored_parameters, uniform_rank

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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_rank_is_the_largest_that_keeps_the_ratio(shape: tuple[int, int], ratio: str) -> None:
    rows, columns = shape
    rank = uniform_rank(rows, columns, parameter_ratio=float(ratio))
    # In exact arithmetic, so that a ratio such as 0.6 means three fifths.
    assert rank == max(1, math.floor(Fraction(ratio) * rows * columns / (rows + columns)))
    assert stored_parameters(rows, columns, rank) < stored_parameters(rows, columns, None) == rows * columns
    if rank > 1:
        assert stored_parameters(rows, columns, rank) <= Fraction(ratio) * rows * columns
    assert stored_parameters(rows, columns, rank + 1) > Fraction(ratio) * rows * columns


@pytest.mark.parametrize(
    ("shape", "rank"), [((1, 6), None), ((2, 2), None), ((6, 1), None), ((3, 2), 1), ((2, 8), 1)]
)
def test_matrix_stays_dense_where_factors_would_not_be_smaller(
    shape: tuple[int, int], rank: int | None
) -> None:
    """Even one direction costs m + n numbers: 2 x 2 gains nothing, 3 x 2 gains one."""
    for ratio in (0.01, 0.5, 0.99):
        assert uniform_rank(*shape, parameter_ratio=ratio) == rank


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5, 60.0, math.nan])
def test_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"{ratio} must lie between 0 and 1"):
        uniform_rank(32, 32, parameter_ratio=ratio)
