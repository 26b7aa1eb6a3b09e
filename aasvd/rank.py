"""Map the retained-parameter ratio to ranks and back: the one place that knows what a storage costs."""

import bisect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

Count = Callable[[int, int, int], int]


class Cost(NamedTuple):
    """What one m x n linear of rank k costs in a storage.

    Attributes:
        numbers: How many numbers it stores, of (m, n, k): what the retained-parameter ratio counts.
        overhead: Bytes besides the numbers, of (m, n, k): indices and scales.
        itemsize: Bytes a number, or None where numbers have the model's float type.
        largest: Largest k there is, of (m, n).
    """

    numbers: Count
    overhead: Count
    itemsize: int | None
    largest: Callable[[int, int], int] = min


def _factors(m: int, n: int, k: int) -> int:
    return k * (m + n)


def _pivoted(m: int, n: int, k: int) -> int:
    return k * (m + n - k)


def _remapped(m: int, n: int, k: int) -> int:
    return k * max(m, n)


def _entries(_m: int, _n: int, k: int) -> int:
    return k


def _scales(_m: int, _n: int, k: int) -> int:
    return 4 * k


def _order(m: int, _n: int, _k: int) -> int:
    return 4 * m


def _both(m: int, n: int, k: int) -> int:
    return _order(m, n, k) + _scales(m, n, k)


# By the name that `quantization_config.storage` has; a place in the order of rows takes four bytes, a pair
# of scales for each of the k components too. What is pruned has no rank: k is the number of entries that
# stay, whose places cost four bytes for each row and column (not counted here).
COSTS = {
    "factors": Cost(_factors, lambda _m, _n, _k: 0, None),
    "pivoted": Cost(_pivoted, _order, None),
    "remapped": Cost(_remapped, _scales, 2),
    "factors-int8": Cost(_factors, _scales, 1),
    "pivoted-int8": Cost(_pivoted, _both, 1),
    "pruned": Cost(_entries, lambda _m, _n, _k: 0, None, lambda m, n: m * n),
}


def stored_parameters(out_features: int, in_features: int, rank: int | None, *, storage: str) -> int:
    """Return how many numbers one linear stores, biases not counted; m n if it stays dense (rank None)."""
    if rank is None:
        return out_features * in_features
    return COSTS[storage].numbers(out_features, in_features, rank)


def stored_bytes(
    out_features: int, in_features: int, rank: int | None, *, storage: str, itemsize: int
) -> int:
    """Return how many bytes one linear takes on disk, its bias not counted.

    Args:
        out_features: Rows m of the weight.
        in_features: Columns n of the weight.
        rank: Its rank, or None if it stays dense.
        storage: One of COSTS.
        itemsize: Bytes of a number in the model's float type.
    """
    if rank is None:
        return out_features * in_features * itemsize
    cost = COSTS[storage]
    numbers = cost.numbers(out_features, in_features, rank)
    return numbers * (cost.itemsize or itemsize) + cost.overhead(out_features, in_features, rank)


def uniform_rank(out_features: int, in_features: int, *, parameter_ratio: float, storage: str) -> int | None:
    """Return the largest rank at which a storage keeps at most a given share of a matrix's parameters.

    At least 1. For `factors` this is k = floor(r m n / (m + n)) (AA-SVD and SVD-LLM); for
    `pivoted` the largest k with k (m + n - k) ≤ r m n (PIFA); for `remapped`
    k = floor(r min(m, n)) (Dobi-SVD). For `pruned`, k entries stay: k = floor(r m n).

    Args:
        out_features: Rows m of the weight.
        in_features: Columns n of the weight.
        parameter_ratio: Share r of the m n parameters that is kept.
        storage: One of COSTS.

    Returns:
        The rank, or None where the stored form would not be smaller than the matrix, which then stays dense.

    Raises:
        ValueError: If `parameter_ratio` is not between 0 and 1.
    """
    if not 0 < parameter_ratio < 1:
        raise ValueError(f"parameter ratio {parameter_ratio} must lie between 0 and 1 (the share kept)")
    full = out_features * in_features
    # The ratio as it is written: 0.6 is three fifths, so that an exact multiple is not rounded down.
    budget = math.floor(Fraction(str(parameter_ratio)) * full)
    ranks = range(1, COSTS[storage].largest(out_features, in_features) + 1)
    numbers = COSTS[storage].numbers
    fitting = bisect.bisect_right(ranks, budget, key=lambda k: numbers(out_features, in_features, k))
    rank = max(1, fitting)
    return rank if numbers(out_features, in_features, rank) < full else None
