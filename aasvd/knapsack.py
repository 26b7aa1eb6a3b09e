"""Choose one option for every item under a common budget, exactly: the multiple-choice knapsack problem.

Rank allocation is this problem: the items are a model's linears, the options their ranks and 'keep dense'.
The Lagrangian relaxation gives a price per unit of cost, a first solution and a bound; since there are many
small options the two nearly meet, and only few options of few items could still improve the solution.
Those are searched exhaustively, with dominated partial solutions left out.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Partial solutions looked at for one item: first few, which finds a solution so good that little is left for
# the exhaustive search to look at. Beyond the last number it goes on with the best, and says so: an item of a
# 7B model has hundreds of options, and where spectra are nearly equal all of them are left.
_LOOKED_AT = (10_000, 5_000_000)


class Choice(NamedTuple):
    """A solution.

    Attributes:
        options: Index of the chosen option of every item.
        value: Sum of the chosen options' values.
        bound: No choice within the budget has a larger value.
        exact: Whether the search was exhaustive, so that `value` is the largest there is.
    """

    options: list[int]
    value: float
    bound: float
    exact: bool


def choose(costs: Sequence[Integers], values: Sequence[Floats], *, budget: int) -> Choice:
    """Choose one option of every item so that the sum of values is largest within a budget of costs.

    Args:
        costs: Cost of every option, an array per item.
        values: Value of every option, an array per item.
        budget: Largest sum of costs.

    Raises:
        ValueError: If even the cheapest options exceed the budget.
    """
    least = sum(int(cost.min()) for cost in costs)
    if least > budget:
        raise ValueError(f"the cheapest options cost {least:,} in all, more than the budget of {budget:,}")
    hulls = [_hull(cost, value) for cost, value in zip(costs, values, strict=True)]
    price, chosen = _relaxed(hulls, costs, values, budget)
    # What each option loses against its item's best at this price; a solution loses its options' sum and
    # the price of the budget that it leaves.
    worth = [value - price * cost for cost, value in zip(costs, values, strict=True)]
    regrets = [some.max() - some for some in worth]
    bound = float(price * budget + sum(some.max() for some in worth))
    value = float(sum(v[option] for v, option in zip(values, chosen, strict=True)))
    exact = False
    for looked_at in _LOOKED_AT:
        gap = max(0.0, bound - value)
        options, exact = _search(
            costs, regrets, chosen, budget=budget, price=price, gap=gap, looked_at=looked_at
        )
        found = float(sum(v[option] for v, option in zip(values, options, strict=True)))
        if found > value:
            chosen, value = options, found
        if exact:
            break
    return Choice(chosen, value, max(bound, value), exact)


def _hull(cost: Integers, value: Floats) -> list[int]:
    """Return the options on the upper concave hull of value over cost, from the cheapest to the best."""
    hull: list[int] = []
    for option in np.lexsort((-value, cost)):
        option = int(option)
        if hull and value[option] <= value[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(cost, value, hull[-2], hull[-1]) <= _slope(
            cost, value, hull[-1], option
        ):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cost: Integers, value: Floats, first: int, second: int) -> float:
    return float((value[second] - value[first]) / max(1, cost[second] - cost[first]))


def _relaxed(
    hulls: Sequence[Sequence[int]], costs: Sequence[Integers], values: Sequence[Floats], budget: int
) -> tuple[float, list[int]]:
    """Take steps along the hulls by value per cost: the price at which the budget ends, and what fits."""
    steps = [
        (_slope(costs[item], values[item], before, after), item, after)
        for item, hull in enumerate(hulls)
        for before, after in itertools.pairwise(hull)
    ]
    steps.sort(key=lambda step: -step[0])
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(int(cost[option]) for cost, option in zip(costs, chosen, strict=True))
    price, closed = 0.0, [False] * len(hulls)
    for slope, item, after in steps:
        step = int(costs[item][after] - costs[item][chosen[item]])
        if closed[item]:
            continue
        if step > left:
            # The first step that does not fit sets the price; cheaper ones may still fill what is left.
            closed[item], price = True, price or slope
            continue
        chosen[item], left = after, left - step
    return price, chosen


def _search(
    costs: Sequence[Integers],
    regrets: Sequence[Floats],
    start: Sequence[int],
    *,
    budget: int,
    price: float,
    gap: float,
    looked_at: int,
) -> tuple[list[int], bool]:
    """Search all choices that lose at most `gap`, for the one that loses least."""
    # Rounding must not cut the start itself off.
    limit = gap * (1 + 1e-9) + 1e-12 * max((float(r.max()) for r in regrets), default=0.0)
    kept = [np.flatnonzero(some <= limit) for some in regrets]
    core = [item for item, options in enumerate(kept) if len(options) > 1]
    fixed = {item: int(options[0]) for item, options in enumerate(kept) if len(options) == 1}
    base = sum(int(costs[item][option]) for item, option in fixed.items())
    # What the items that are still to come cost at least and at most.
    least = np.cumsum([0, *(int(costs[item][kept[item]].min()) for item in reversed(core))])[::-1]
    most = np.cumsum([0, *(int(costs[item][kept[item]].max()) for item in reversed(core))])[::-1]
    window = limit / price if price > 0 else np.inf
    lost, spent = np.zeros(1), np.full(1, base, dtype=np.int64)
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    exact = True
    for position, item in enumerate(core):
        options = kept[item]
        all_lost = (lost[:, None] + regrets[item][options]).ravel()
        all_spent = (spent[:, None] + costs[item][options]).ravel()
        alive = np.flatnonzero(
            (all_lost <= limit)
            & (all_spent + least[position + 1] <= budget)
            & (all_spent + most[position + 1] >= budget - window)
        )
        # Dominated: one that has spent no less for no more value (value = price x spent - lost + constant).
        value = price * all_spent[alive] - all_lost[alive]
        order = np.lexsort((-value, all_spent[alive]))
        best = np.maximum.accumulate(value[order])
        front = order[np.concatenate([[True], best[1:] > best[:-1]])] if len(order) else order
        alive = alive[front]
        following = len(kept[core[position + 1]]) if position + 1 < len(core) else 1
        states = max(1, looked_at // following)
        if len(alive) > states:
            alive = alive[np.argsort(all_lost[alive], kind="stable")[:states]]
            exact = False
        trail.append((alive // len(options), options[alive % len(options)]))
        lost, spent = all_lost[alive], all_spent[alive]
    if not len(lost):
        return list(start), exact
    state = int(np.argmin(lost + price * (budget - spent)))
    chosen = dict(fixed)
    for item, (parents, picks) in zip(reversed(core), reversed(trail), strict=True):
        chosen[item] = int(picks[state])
        state = int(parents[state])
    return [chosen[item] for item in range(len(costs))], exact
