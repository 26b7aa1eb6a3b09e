"""Map the retained-parameter ratio to ranks and back: the one place that knows what a storage costs."""

import math


def stored_parameters(out_features: int, in_features: int, rank: int | None) -> int:
    """Return how many numbers one linear stores, biases not counted: k (m + n), or m n if it stays dense."""
    if rank is None:
        return out_features * in_features
    return rank * (out_features + in_features)


def uniform_rank(out_features: int, in_features: int, *, parameter_ratio: float) -> int | None:
    """Return the rank at which two factors keep a given share of a matrix's parameters.

    k = floor(r m n / (m + n)), at least 1 (AA-SVD and SVD-LLM; methods section 6).

    Args:
        out_features: Rows m of the weight.
        in_features: Columns n of the weight.
        parameter_ratio: Share r of the m n parameters that is kept.

    Returns:
        The rank, or None where the factors would not be smaller than the matrix, which then stays dense.

    Raises:
        ValueError: If `parameter_ratio` is not between 0 and 1.
    """
    if not 0 < parameter_ratio < 1:
        raise ValueError(f"parameter ratio {parameter_ratio} must lie between 0 and 1 (the share kept)")
    full = out_features * in_features
    # The small term keeps an exact multiple, such as 0.6 * 4096 * 4096 / 8192, from being rounded down.
    rank = max(1, math.floor(parameter_ratio * full / (out_features + in_features) + 1e-9))
    return rank if stored_parameters(out_features, in_features, rank) < full else None
