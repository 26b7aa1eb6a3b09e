import itertools
import tracemalloc

import numpy as np
import pytest

from aasvd import knapsack
from aasvd.knapsack import choose


def problem(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Return up to four items with up to seven options: ranks and, for some, one more that jumps (dense)."""
    chance = np.random.default_rng(seed)
    costs, values = [], []
    for _ in range(chance.integers(1, 5)):
        count, unit = chance.integers(1, 7), chance.integers(1, 9)
        gains = chance.random(count) - (0.4 if seed % 7 == 0 else 0.0)  # measured worth may be below nothing
        cost, value = np.arange(1, count + 1) * unit, np.cumsum(np.sort(gains)[::-1] if seed % 2 else gains)
        if seed % 3 == 0:
            cost = np.append(cost, cost[-1] + chance.integers(1, 5))
            value = np.append(value, value[-1] + chance.random())
        if seed % 5 == 0:  # as pivoted storage: the more, the cheaper each further one
            cost = np.floor(cost**0.8 * 3).astype(np.int64)
        costs.append(cost.astype(np.int64))
        values.append(value)
    least, most = (sum(int(extreme(cost)) for cost in costs) for extreme in (np.min, np.max))
    return costs, values, int(chance.integers(least, most + 2))


def by_brute_force(costs: list[np.ndarray], values: list[np.ndarray], budget: int) -> float:
    return max(
        sum(value[option] for value, option in zip(values, options, strict=True))
        for options in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(cost[option] for cost, option in zip(costs, options, strict=True)) <= budget
    )


def test_choice_is_the_best_of_all() -> None:
    for seed in range(300):
        costs, values, budget = problem(seed)
        found = choose(costs, values, budget=budget)
        spent = sum(int(cost[option]) for cost, option in zip(costs, found.options, strict=True))
        assert spent <= budget
        assert found.exact
        # Sums of at most four values of up to 7, in another order.
        best = by_brute_force(costs, values, budget)
        assert found.value == pytest.approx(best, abs=1e-12)
        assert found.bound >= best - 1e-12


def test_greedy_alone_is_not_the_best() -> None:
    """The comparison above means something: the relaxed solution misses the best in many of these cases."""
    missed = 0
    for seed in range(300):
        costs, values, budget = problem(seed)
        hulls = [knapsack._hull(cost, value) for cost, value in zip(costs, values, strict=True)]
        _, chosen = knapsack._relaxed(hulls, costs, values, budget)
        value = sum(value[option] for value, option in zip(values, chosen, strict=True))
        missed += value < by_brute_force(costs, values, budget) - 1e-9
    assert missed > 20


def test_a_search_cut_short_says_so_and_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_LOOKED_AT", (1,))
    cut = 0
    for seed in range(100):
        costs, values, budget = problem(seed)
        found = choose(costs, values, budget=budget)
        best = by_brute_force(costs, values, budget)
        assert found.value <= best + 1e-12 <= found.bound + 2e-12
        assert not found.exact or found.value == pytest.approx(best, abs=1e-12)
        cut += not found.exact
    assert cut


def test_work_is_bounded_where_all_options_are_nearly_worth_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat spectrum leaves every rank within the gap: states times options would be looked at."""
    monkeypatch.setattr(knapsack, "_LOOKED_AT", (1_000, 20_000))
    chance = np.random.default_rng(0)
    costs = [np.arange(1, 1001) * chance.integers(5000, 9000) for _ in range(30)]
    values = [np.cumsum(1 + 1e-6 * chance.random(1000)) * (cost[0] / 7000) for cost in costs]
    tracemalloc.start()
    found = choose(costs, values, budget=int(0.6 * sum(int(cost[-1]) for cost in costs)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not found.exact
    assert found.bound - found.value <= 1e-4 * found.value
    assert peak < 200 * 20_000  # some numbers for each of them and of what is left


def test_a_model_of_two_hundred_linears_is_solved_exactly() -> None:
    chance = np.random.default_rng(0)
    costs, values = [], []
    for rows, columns in [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (576, 1536)] * 30:
        count = (rows * columns - 1) // (rows + columns)
        gains = np.exp(-np.arange(min(rows, columns)) * chance.uniform(0.005, 0.03) + chance.normal())
        costs.append(np.append(np.arange(1, count + 1) * (rows + columns), rows * columns).astype(np.int64))
        values.append(np.append(np.cumsum(gains)[:count], gains.sum()))
    for ratio in (0.4, 0.8):
        budget = int(ratio * sum(int(cost[-1]) for cost in costs))
        found = choose(costs, values, budget=budget)
        spent = sum(int(cost[option]) for cost, option in zip(costs, found.options, strict=True))
        assert found.exact
        assert 0.999 * budget <= spent <= budget
        assert found.bound - found.value <= 1e-6 * found.value


def test_a_budget_below_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest options cost 3 in all, more than the budget of 2"):
        choose([np.array([3, 4])], [np.array([1.0, 2.0])], budget=2)
