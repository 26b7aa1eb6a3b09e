import copy
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from made_up import made_up
from torch import Tensor

from aasvd import methods
from aasvd.allocation import (
    CANDIDATES,
    FUNCTIONS,
    Allocation,
    Floats,
    Layer,
    Problem,
    allocate,
    largest_rank,
    round_shares,
    spread,
)
from aasvd.knapsack import choose
from aasvd.rank import stored_parameters

# A Llama block of width 96 with two key-value heads for six query heads.
SHAPES = {
    "self_attn.q_proj": (96, 96),
    "self_attn.k_proj": (32, 96),
    "self_attn.v_proj": (32, 96),
    "self_attn.o_proj": (96, 96),
    "mlp.gate_proj": (256, 96),
    "mlp.up_proj": (256, 96),
    "mlp.down_proj": (96, 256),
}
BLOCKS = 6
COMPRESSION: dict[str, Any] = {"ranks_file": "", "storage": "factors"}
LAYERS = [Layer(block, name, shape) for block in range(BLOCKS) for name, shape in SHAPES.items()]
FROM_MEASURES = [name for name in methods.ALLOCATIONS if name not in ("file", *methods.REMOVING)]


MEASURES = made_up(SHAPES, BLOCKS)


def problem(ratio: float, **measures: list[dict[str, Tensor]]) -> Problem:
    return Problem(LAYERS, ratio, {**MEASURES, **measures}, COMPRESSION)


def kept(ranks: list[int | None]) -> float:
    return problem(0.5).stored(ranks) / sum(layer.size for layer in LAYERS)


def mean_share(ranks: list[int | None], chosen: Any) -> float:
    """Return the share of their parameters that some of the linears keep."""
    pairs = [(layer, rank) for layer, rank in zip(LAYERS, ranks, strict=True) if chosen(layer)]
    return sum(stored_parameters(*layer.shape, rank, storage="factors") for layer, rank in pairs) / sum(
        layer.size for layer, _ in pairs
    )


def test_every_name_is_a_function_of_one_signature() -> None:
    assert set(FUNCTIONS) == set(methods.ALLOCATIONS)
    with pytest.raises(ValueError, match=r"methods\.py lists 'mine', but .*test_allocation\.py has no such"):
        methods.functions_of([*FUNCTIONS, "mine"], FUNCTIONS | {"__file__": __file__})
    with pytest.raises(ValueError, match=r"'mine' needs 'gradient'; there are shifted, .*gradients"):
        methods.require_known({"mine": methods.Piece(("gradient",))})
    for name, function in FUNCTIONS.items():
        assert function.__module__ == "aasvd.allocation" and function.__name__ == name
        assert get_type_hints(function) in (
            {"problem": Problem, "return": Floats},
            {"problem": Problem, "return": Allocation},
        )


@pytest.mark.parametrize("name", FROM_MEASURES)
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_budget_is_met_and_ranks_are_possible(name: str, ratio: float) -> None:
    ranks = allocate(name, problem(ratio)).ranks
    assert kept(ranks) <= ratio
    # One rank of a linear that has the smallest cost per rank is 128 of 608,256 parameters.
    assert kept(ranks) > ratio * (1 - 1e-3) or (ratio == 0.2 and kept(ranks) > ratio - 2.2e-4)
    for layer, rank in zip(LAYERS, ranks, strict=True):
        if rank is not None:
            assert 1 <= rank <= min(layer.shape)
            assert (
                stored_parameters(*layer.shape, rank, storage="factors") < layer.size
            )  # else it stays dense


@pytest.mark.parametrize("name", FROM_MEASURES)
def test_a_larger_ratio_keeps_more(name: str) -> None:
    shares = [kept(allocate(name, problem(ratio)).ranks) for ratio in (0.3, 0.45, 0.6, 0.75, 0.9)]
    assert shares == sorted(shares)


@pytest.mark.parametrize("name", ["uniform", "lorap", "effective_rank"])
def test_no_linear_shrinks_where_the_ratio_grows(name: str) -> None:
    """Where the shares are in fixed proportions; rounding may take one rank away."""
    before = [0] * len(LAYERS)
    for ratio in (0.3, 0.45, 0.6, 0.75, 0.9):
        ranks = allocate(name, problem(ratio)).ranks
        numbers = [
            min(layer.shape) if rank is None else rank for layer, rank in zip(LAYERS, ranks, strict=True)
        ]
        assert all(now >= then - 1 for now, then in zip(numbers, before, strict=True))
        before = numbers


def test_predicted_loss_of_optimal_falls_with_the_ratio() -> None:
    losses = [allocate("optimal", problem(r)).notes["predicted_loss"] for r in (0.2, 0.4, 0.6, 0.8)]
    assert losses == sorted(losses, reverse=True)


def test_uniform_is_the_papers_floor_or_some_ranks_more() -> None:
    for ratio in (0.4, 0.6, 0.8):
        for layer, rank in zip(LAYERS, allocate("uniform", problem(ratio)).ranks, strict=True):
            floor = math.floor(ratio * layer.size / sum(layer.shape) + 1e-9)
            assert rank in (floor, floor + 1)


# Optimal


def loss_of(ranks: tuple[int | None, ...] | list[int | None], layers: list[Layer], gains: Any) -> float:
    return sum(
        0.0 if rank is None else float(gains[layer.block][layer.name][rank:].sum())
        for layer, rank in zip(layers, ranks, strict=True)
    )


@pytest.mark.parametrize("seed", range(10))
def test_optimal_is_the_best_of_all_ranks(seed: int) -> None:
    """Against all combinations of ranks and dense of four small linears, at several budgets."""
    chance = torch.Generator().manual_seed(seed)
    shapes = [(6, 9), (9, 6), (8, 8), (4, 12)]
    layers = [Layer(0, str(number), shape) for number, shape in enumerate(shapes)]
    gains = [
        {
            str(number): torch.rand(min(shape), generator=chance).double() * 10 ** float(number % 3 - 1)
            for number, shape in enumerate(shapes)
        }
    ]
    for ratio, storage in itertools.product((0.4, 0.6, 0.8, 0.9), ("factors", "pivoted")):
        asked = Problem(layers, ratio, {"influence": gains}, {"storage": storage})
        choices = [[*range(1, largest_rank(asked, layer) + 1), None] for layer in layers]
        found = allocate("optimal", asked)
        assert asked.stored(found.ranks) <= asked.budget
        best = min(
            loss_of(ranks, layers, gains)
            for ranks in itertools.product(*choices)
            if asked.stored(ranks) <= asked.budget
        )
        assert found.notes["exact"]
        assert loss_of(found.ranks, layers, gains) == pytest.approx(best, abs=1e-12)
        assert found.notes["predicted_loss"] == pytest.approx(best, abs=1e-12)


def test_optimal_is_the_best_of_all_round_ranks() -> None:
    """Against all combinations of those that larger linears may get: every second rank, 1 and dense."""
    chance = torch.Generator().manual_seed(0)
    layers = [Layer(0, str(number), shape) for number, shape in enumerate([(64, 96), (80, 64), (72, 72)])]
    gains = [{layer.name: torch.rand(min(layer.shape), generator=chance).double() for layer in layers}]
    compared = 0
    for ratio, storage in itertools.product((0.4, 0.55, 0.7), ("factors", "pivoted")):
        asked = Problem(layers, ratio, {"influence": gains}, {"storage": storage})
        choices = [[1, *range(2, largest_rank(asked, layer) + 1, 2), None] for layer in layers]
        worth = [np.append(0, gains[0][layer.name].cumsum(0).numpy()) for layer in layers]
        first, second, third = (
            [(asked.cost(layer, rank), some[-1 if rank is None else rank]) for rank in ranks]
            for layer, ranks, some in zip(layers, choices, worth, strict=True)
        )
        best = max(
            a[1] + b[1] + c[1]
            for a, b, c in itertools.product(first, second, third)
            if a[0] + b[0] + c[0] <= asked.budget
        )
        found = allocate("optimal", asked)
        assert found.notes["exact"]
        lost = sum(some[-1] for some in worth) - best
        assert found.notes["predicted_loss_bound"] <= lost + 1e-9
        if all(rank in some for rank, some in zip(found.ranks, choices, strict=True)):
            assert found.notes["predicted_loss"] == pytest.approx(lost, abs=1e-9)
            compared += 1
        else:  # what the steps left of the budget was worth something too
            assert found.notes["predicted_loss"] < lost
    assert compared


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.6, 0.8])
def test_optimal_gives_large_linears_round_ranks_and_loses_hardly_anything(
    ratio: float, storage: str
) -> None:
    """Against the best of all ranks, whose bound the knapsack gives, for the linears of 8 real blocks."""
    chance = torch.Generator().manual_seed(0)
    shapes = {"q": (576, 576), "k": (192, 576), "gate": (1536, 576), "down": (576, 1536)}
    layers = [Layer(block, name, shape) for block in range(8) for name, shape in shapes.items()]
    gains: list[dict[str, torch.Tensor]] = [{} for _ in range(8)]
    for layer in layers:
        decay = 0.5 + float(torch.rand(1, generator=chance))
        gains[layer.block][layer.name] = torch.arange(1, min(layer.shape) + 1).double() ** -decay
    asked = Problem(layers, ratio, {"influence": gains}, {"storage": storage})
    found = allocate("optimal", asked)
    assert asked.budget * (1 - 1e-3) < asked.stored(found.ranks) <= asked.budget
    steps = {"q": 16, "k": 4, "gate": 16, "down": 16}
    for layer, rank in zip(layers, found.ranks, strict=True):
        below = [1 << power for power in range(steps[layer.name].bit_length() - 1)]
        assert rank is None or rank % steps[layer.name] == 0 or rank in below
    costs = [
        np.array([*(asked.cost(layer, k) for k in range(1, largest_rank(asked, layer) + 1)), layer.size])
        for layer in layers
    ]
    kept = [gains[layer.block][layer.name].cumsum(0).numpy() for layer in layers]
    values = [np.append(some[: len(cost) - 1], some[-1]) for some, cost in zip(kept, costs, strict=True)]
    lost = sum(some[-1] for some in kept) - choose(costs, values, budget=asked.budget).value
    assert lost <= found.notes["predicted_loss"] <= 1.01 * lost


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_no_other_allocation_is_worth_more_by_what_optimal_maximises(ratio: float) -> None:
    """That its search misses nothing; what it does to a model's loss is in `test_allocation_measured.py`."""
    best = loss_of(allocate("optimal", problem(ratio)).ranks, LAYERS, MEASURES["influence"])
    for name in FROM_MEASURES:
        other = loss_of(allocate(name, problem(ratio)).ranks, LAYERS, MEASURES["influence"])
        assert other >= best - 1e-9, name
        assert other > 1.02 * best or name == "optimal", name


def test_optimal_keeps_dense_what_is_worth_it() -> None:
    influence = [dict(block) for block in MEASURES["influence"]]
    influence[2]["mlp.down_proj"] = torch.full((96,), 1e6, dtype=torch.float64)
    ranks = allocate("optimal", problem(0.5, influence=influence)).ranks
    assert ranks[LAYERS.index(Layer(2, "mlp.down_proj", (96, 256)))] is None


# The rules of the papers


def test_lorap_keeps_three_times_as_much_of_v_and_o() -> None:
    ranks = allocate("lorap", problem(0.5)).ranks
    high = mean_share(ranks, lambda layer: layer.name[10:] in ("v_proj", "o_proj"))
    low = mean_share(ranks, lambda layer: layer.name[10:] in ("q_proj", "k_proj"))
    assert high == pytest.approx(0.75, abs=0.02) and low == pytest.approx(0.25, abs=0.02)
    assert mean_share(ranks, lambda layer: layer.name.startswith("mlp")) == pytest.approx(0.5, abs=0.01)
    # As in the paper: where v and o would be more than whole, they stay dense and q and k get the rest.
    ranks = allocate("lorap", problem(0.8)).ranks
    for layer, rank in zip(LAYERS, ranks, strict=True):
        assert (rank is None) == (layer.name[10:] in ("v_proj", "o_proj"))
    low = mean_share(ranks, lambda layer: layer.name[10:] in ("q_proj", "k_proj"))
    assert low == pytest.approx(0.6, abs=0.02)


def test_lorap_finds_the_output_of_attention_by_where_it_stands() -> None:
    """Phi calls it `dense`; other models call a linear of their MLP so."""
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64)}
    phi = {**shapes, "self_attn.dense": (64, 64), "mlp.fc1": (128, 64), "mlp.dense": (64, 128)}
    layers = [Layer(block, name, shape) for block in range(2) for name, shape in phi.items()]
    shares = allocate("lorap", Problem(layers, 0.5, {}, COMPRESSION)).notes["shares"]
    assert shares == pytest.approx([0.25, 0.25, 0.75, 0.75, 0.5, 0.5] * 2)


@pytest.mark.parametrize(
    "names",
    [
        ["attention.query_key_value", "attention.dense"],
        ["attn.q_proj", "attn.v_proj", "attn.o_proj"],
        ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.dense"],
        ["attn.kv_proj", "attn.q_proj", "attn.o_proj"],
    ],
)
def test_lorap_needs_separate_attention_linears(names: list[str]) -> None:
    layers = [Layer(0, name, (96, 32)) for name in names]
    with pytest.raises(ValueError, match="LoRAP's split needs q, k, v and o"):
        allocate("lorap", Problem(layers, 0.5, {}, COMPRESSION))


def test_strs_cuts_through_the_trials() -> None:
    """The most sensitive linears stay dense, and every share below is one of the candidates, scaled alike."""
    allocation = allocate("strs", problem(0.7))
    sensitivity = [float(MEASURES["sensitivity"][layer.block][layer.name][0]) for layer in LAYERS]
    order = np.argsort(sensitivity)
    shares = np.array(allocation.notes["shares"])
    assert shares[order[0]] < shares[order[-1]]
    # Perplexity falls with the ratio, so the cut keeps more of what is more sensitive at every ratio.
    assert (np.diff(shares[order]) >= -1e-9).all()
    scaled = shares[shares < 1 - 1e-9]
    first = scaled.min()
    steps = [c / CANDIDATES[0] for c in CANDIDATES]
    assert all(min(abs(share / first - step) for step in steps) < 1e-6 for share in scaled)


def test_a_trial_that_is_not_a_number_counts_as_the_worst() -> None:
    """Not as whatever makes a sorted list of none."""
    broken, worst = (copy.deepcopy(MEASURES) for _ in range(2))
    layer = LAYERS[3]
    for measures, value in ((broken, math.nan), (worst, math.inf)):
        measures["sensitivity"][layer.block][layer.name][2] = value
    found = [
        allocate("strs", Problem(LAYERS, 0.7, measures, COMPRESSION)).ranks for measures in (broken, worst)
    ]
    assert found[0] == found[1]


def test_v2_removes_less_of_what_loses_more_and_each_type_keeps_the_ratio() -> None:
    shares = allocate("svdllm_v2", problem(0.6)).notes["shares"]
    for name, shape in SHAPES.items():
        own = [share for layer, share in zip(LAYERS, shares, strict=True) if layer.name == name]
        rank = math.floor(0.6 * shape[0] * shape[1] / sum(shape) + 1e-9)
        losses = [math.sqrt(float(block[name][rank:].sum())) for block in MEASURES["spectra"]]
        assert np.argsort(own).tolist() == np.argsort(losses).tolist()
        assert np.mean(own) == pytest.approx(0.6)
        scores = np.array([1 / math.log1p(loss) for loss in losses])
        assert own == pytest.approx(1 - 0.4 * len(own) * scores / scores.sum())


def test_v2_says_where_its_rule_had_to_be_mended() -> None:
    """Where log(loss) would be negative, and where more than 95 % would be removed."""
    notes = allocate("svdllm_v2", problem(0.8)).notes
    assert notes["losses_below_one"] == notes["removals_capped"] == []
    spectra = [dict(block) for block in MEASURES["spectra"]]
    rank = math.floor(0.8 * 256 * 96 / (256 + 96))
    for block, loss in ((1, 0.5), (4, 1e-6)):
        values = spectra[block]["mlp.up_proj"]
        spectra[block]["mlp.up_proj"] = values * loss**2 / values[rank:].sum()
    notes = allocate("svdllm_v2", problem(0.8, spectra=spectra)).notes
    assert notes["losses_below_one"] == ["1.mlp.up_proj", "4.mlp.up_proj"]
    assert notes["removals_capped"] == ["4.mlp.up_proj"]
    shares = dict(zip([layer.label for layer in LAYERS], notes["shares"], strict=True))
    assert shares["4.mlp.up_proj"] == pytest.approx(0.05)


def test_adasvd_is_its_formula() -> None:
    similarity = np.array([float(block["cosine"]) for block in MEASURES["profile"]])
    expected = 0.48 + similarity / similarity.mean() * (0.6 - 0.48)
    shares = allocate("adasvd", problem(0.6)).notes["shares"]
    assert [share for layer, share in zip(LAYERS, shares, strict=True) if "down" in layer.name] == (
        pytest.approx(expected)
    )


def numpy_of(measure: str, name: str) -> list[Any]:
    return [block[name].numpy() for block in MEASURES[measure]]


def stretched(values: Any) -> Any:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("ratio", [0.6, 0.9])
@pytest.mark.parametrize(("name", "power"), [("dipsvd", 1), ("dipsvd_inverted", -1)])
def test_dipsvd_is_its_formula(name: str, power: int, ratio: float) -> None:
    """S^0.3 U^0.7, each in 0..1; within 0.25 of the ratio, between 0.3 and 0.98, scaled to the mean."""
    gradients = np.array([sum(float(x) for x in block.values()) for block in MEASURES["relative_gradients"]])
    # Quarters of six blocks.
    for quarter in ([0, 1], [2, 3], [4], [5]):
        gradients[quarter] = gradients[quarter] / np.mean(gradients[quarter])
    ranks = []
    for singular in numpy_of("profile", "singular"):
        enough = [k for k in range(1, len(singular) + 1) if singular[:k].sum() >= 0.95 * singular.sum()]
        ranks.append(min(enough))
    assert len(set(ranks)) > 3 and len(set(gradients.round(6))) > 3
    sensitivity = stretched(gradients if power == 1 else 1 / gradients) + 1e-5
    rank = stretched(power * np.array(ranks)) + 1e-5
    score = stretched(sensitivity**0.3 * rank**0.7)
    wanted = np.maximum(ratio - 0.25 + 0.5 * score, 0.3)
    expected = wanted * ratio / wanted.mean()
    for _ in range(100):  # what the bound cuts off goes to the others in proportion
        below = expected < 0.98
        expected = np.where(
            below, wanted * (BLOCKS * ratio - 0.98 * (~below).sum()) / wanted[below].sum(), 0.98
        )
        expected = np.minimum(expected, 0.98)
    assert expected.min() > 0.3 and (ratio == 0.6 or (expected == 0.98).any())
    shares = allocate(name, problem(ratio)).notes["shares"]
    assert shares == pytest.approx([float(expected[layer.block]) for layer in LAYERS])


def test_dipsvd_and_its_code_pull_in_opposite_directions() -> None:
    right, inverted = (allocate(name, problem(0.6)).notes["shares"] for name in ("dipsvd", "dipsvd_inverted"))
    # Later blocks are more sensitive and of higher rank.
    assert right[-1] > right[0] and inverted[-1] < inverted[0]
    for shares in (right, inverted):
        assert all(0.3 - 1e-9 <= share <= 0.98 + 1e-9 for share in shares)


@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_swift_is_its_formula(ratio: float) -> None:
    """Half the ratio, and the other half in proportion to β^0.6 log(e + ε)^0.4 within a type of linear."""
    beta = 1 + stretched(np.array([1 - float(block["cosine"]) for block in MEASURES["profile"]]))
    shares = allocate("swift", problem(ratio)).notes["shares"]
    for name in SHAPES:
        norm = np.sqrt([spectrum.sum() for spectrum in numpy_of("spectra", name)])
        score = beta**0.6 * np.log(np.e + norm) ** 0.4
        expected = ratio / 2 * (1 + score / score.mean())
        assert expected.max() < 1
        own = [share for layer, share in zip(LAYERS, shares, strict=True) if layer.name == name]
        assert own == pytest.approx(list(expected))


def test_swift_gives_influential_blocks_more_and_everyone_half() -> None:
    shares = allocate("swift", problem(0.6)).notes["shares"]
    assert min(shares) >= 0.3
    # The first block turns its input most, and has the smallest norms: a rank of both.
    equal = [
        {**block, "self_attn.q_proj": MEASURES["spectra"][0]["self_attn.q_proj"]}
        for block in MEASURES["spectra"]
    ]
    shares = allocate("swift", problem(0.6, spectra=equal)).notes["shares"]
    own = [share for layer, share in zip(LAYERS, shares, strict=True) if "q_proj" in layer.name]
    assert own == sorted(own, reverse=True) and own[0] > own[-1]


def test_effective_rank_is_its_formula() -> None:
    """exp of the entropy of normalised singular values of W X, relative to full rank, over all linears."""
    weights = []
    for layer in LAYERS:
        singular = np.sqrt(MEASURES["spectra"][layer.block][layer.name].numpy())
        p = singular / singular.sum()
        weights.append(np.exp(-sum(x * np.log(x) for x in p)) / min(layer.shape))
    sizes = np.array([rows * columns for rows, columns in (layer.shape for layer in LAYERS)])
    expected = 0.4 * np.array(weights) * sizes.sum() / (np.array(weights) * sizes).sum()
    assert expected.max() < 1 and expected.max() > 1.3 * expected.min()
    assert allocate("effective_rank", problem(0.4)).notes["shares"] == pytest.approx(list(expected))


def test_effective_rank_follows_the_entropy() -> None:
    flat = [dict(block) for block in MEASURES["spectra"]]
    flat[3]["mlp.up_proj"] = torch.ones(96, dtype=torch.float64)
    shares = allocate("effective_rank", problem(0.5, spectra=flat)).notes["shares"]
    assert max(shares) == shares[LAYERS.index(Layer(3, "mlp.up_proj", (256, 96)))]


def test_dobi_scales_what_was_trained_to_the_budget() -> None:
    shares = np.array(allocate("dobi", problem(0.4)).notes["shares"])
    trained = np.array([float(MEASURES["positions"][layer.block][layer.name]) for layer in LAYERS])
    below = shares < 1
    scale = shares[below] / trained[below]
    assert scale == pytest.approx(scale[0])
    assert (trained[~below] * scale[0] >= 1).all()
    sizes = np.array([layer.size for layer in LAYERS])
    assert (shares * sizes).sum() / sizes.sum() == pytest.approx(0.4)


# Ranks from a file


def test_ranks_come_from_a_file(tmp_path: Path) -> None:
    expected = allocate("optimal", problem(0.6)).ranks
    names = [f"{layer.block}.{layer.name}" for layer in LAYERS]
    for content in (
        {"ranks": dict(zip(names, expected, strict=True))},
        dict(zip(names, expected, strict=True)),
    ):
        (tmp_path / "ranks.json").write_text(json.dumps(content))
        asked = problem(0.6)._replace(compression={**COMPRESSION, "ranks_file": str(tmp_path / "ranks.json")})
        assert allocate("file", asked).ranks == expected
    with pytest.raises(ValueError, match=r"ranks\.json: its ranks keep 0\.\d+ of the parameters, not 0\.7"):
        allocate("file", asked._replace(ratio=0.7))
    # The budget is met from below, however little is missing; the message says where it is.
    with pytest.raises(
        ValueError, match=r"keep 0\.\d+ of the parameters, not 0\.5998 or a little less"
    ) as raised:
        allocate("file", asked._replace(ratio=0.5998))
    hint = re.search(r"<model>_r([0-9.]+)_", str(raised.value))
    assert hint is not None
    assert allocate("file", asked._replace(ratio=float(hint[1]))).ranks == expected
    # No ratio stands for all of a model.
    (tmp_path / "ranks.json").write_text(json.dumps(dict.fromkeys(names)))
    with pytest.raises(ValueError, match=r"keep 1 of the parameters, not 0\.6 or a little less$"):
        allocate("file", asked._replace(ratio=0.6))
    for change, message in [
        ({"0.mlp.up_proj": 97}, r"rank 97 of 0\.mlp\.up_proj: expected 1 to 96, 0 to remove it, or null"),
        ({"0.mlp.up_proj": True}, "rank True of"),
        (
            {"9.mlp.up_proj": 3},
            r"all 42 linears, such as '0\.self_attn\.q_proj'; '9\.mlp\.up_proj' is missing or",
        ),
    ]:
        (tmp_path / "ranks.json").write_text(json.dumps(dict(zip(names, expected, strict=True)) | change))
        with pytest.raises(ValueError, match=message):
            allocate("file", asked)


@pytest.mark.parametrize(
    "text", ['{"0.mlp.up_proj": 3', "", "[1, 2]", '{"ranks": [[1]]}', '{"ranks": 5}', "3"]
)
def test_a_file_that_holds_no_ranks_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    asked = problem(0.6)._replace(compression={**COMPRESSION, "ranks_file": str(tmp_path / "mine.json")})
    with pytest.raises(ValueError, match=r"mine\.json: .*expected (JSON|an object with the rank of all 42)"):
        allocate("file", asked)


def test_where_linears_are_only_removed_a_file_has_no_ranks(tmp_path: Path) -> None:
    """Any number of entries would fit the cost of pruned storage, but nothing makes a linear of them."""
    ranks: list[int | None] = [None] * len(LAYERS)
    ranks[:7] = [0] * 7
    names = [f"{layer.block}.{layer.name}" for layer in LAYERS]
    asked = problem(5 / 6)._replace(
        compression={"storage": "pruned", "ranks_file": str(tmp_path / "ranks.json")}
    )
    (tmp_path / "ranks.json").write_text(json.dumps(dict(zip(names, ranks, strict=True))))
    assert allocate("file", asked).ranks == ranks
    ranks[7] = LAYERS[7].size - 1
    (tmp_path / "ranks.json").write_text(json.dumps(dict(zip(names, ranks, strict=True))))
    with pytest.raises(ValueError, match=r"rank 9215 of 1\.self_attn\.q_proj: expected 0 .* or null"):
        allocate("file", asked)


# Removing whole parts


def parts_of(ranks: list[int | None]) -> set[tuple[int, str]]:
    """Return the branches that are gone; none may be gone in part."""
    found: dict[tuple[int, str], set[int | None]] = {}
    for layer, rank in zip(LAYERS, ranks, strict=True):
        found.setdefault((layer.block, layer.name.partition(".")[0]), set()).add(rank)
    assert all(some in ({0}, {None}) for some in found.values())
    return {part for part, some in found.items() if some == {0}}


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.5, 0.6, 0.8, 0.95])
def test_shortgpt_removes_the_blocks_that_change_least(ratio: float) -> None:
    """As few as meet the budget; influence is 1 − cosine, whatever the order of the blocks."""
    cosines = [0.91, 0.3, 0.97, 0.9, 0.99, 0.6]
    profile = [{"cosine": torch.tensor([value]).double()} for value in cosines]
    ranks, notes = allocate("shortgpt", problem(ratio, profile=profile))
    gone = math.ceil((1 - ratio) * BLOCKS - 1e-9)
    least = sorted(range(BLOCKS), key=lambda block: -cosines[block])[:gone]
    assert parts_of(ranks) == {(block, name) for block in least for name in ("self_attn", "mlp")}
    assert kept(ranks) == pytest.approx(1 - gone / BLOCKS)
    assert notes["removed"] == gone
    assert notes["influence"] == pytest.approx([1 - value for value in cosines])


def removal(order: list[tuple[int, str]]) -> list[dict[str, Tensor]]:
    places = {
        f"{layer.block}.{layer.name}": torch.tensor(order.index((layer.block, layer.name.partition(".")[0])))
        for layer in LAYERS
    }
    return [{**places, "perplexity": torch.arange(len(order)).double()}]


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_blockpruner_removes_in_the_order_that_was_found(ratio: float) -> None:
    order = [(block, name) for name in ("self_attn", "mlp") for block in (3, 0, 5, 1, 4, 2)]
    order[2], order[7] = order[7], order[2]
    sizes = {
        part: sum(layer.size for layer in LAYERS if (layer.block, layer.name.partition(".")[0]) == part)
        for part in order
    }
    ranks, notes = allocate("blockpruner", problem(ratio, removal=removal(order)))
    gone = parts_of(ranks)
    assert gone == set(order[: len(gone)]) and notes["removed"] == len(gone)
    whole = sum(sizes.values())
    assert whole - sum(sizes[part] for part in gone) <= ratio * whole
    assert whole - sum(sizes[part] for part in order[: len(gone) - 1]) > ratio * whole


def test_a_ratio_below_one_part_is_refused() -> None:
    for name in methods.REMOVING:
        order = [(block, kind) for block in range(BLOCKS) for kind in ("mlp", "self_attn")]
        with pytest.raises(
            ValueError, match=rf"allocation {name}: ratio 0\.01 is below what one part of the model"
        ):
            allocate(name, problem(0.01, removal=removal(order)))


def test_ranks_of_a_file_may_remove_linears(tmp_path: Path) -> None:
    ranks = allocate("shortgpt", problem(0.5)).ranks
    names = [f"{layer.block}.{layer.name}" for layer in LAYERS]
    (tmp_path / "ranks.json").write_text(json.dumps(dict(zip(names, ranks, strict=True))))
    asked = problem(0.5)._replace(compression={**COMPRESSION, "ranks_file": str(tmp_path / "ranks.json")})
    assert allocate("file", asked).ranks == ranks


# Rounding and water-filling


def test_rounding_keeps_one_direction_of_everything() -> None:
    shares = np.full(len(LAYERS), 1e-9)
    shares[0] = 1.0
    ranks = round_shares(problem(0.05), shares)
    assert all(rank is None or rank >= 1 for rank in ranks)
    assert kept(ranks) <= 0.05
    with pytest.raises(ValueError, match="below one direction for every linear"):
        round_shares(problem(0.001), shares)


def test_spread_keeps_proportions_within_bounds_and_the_mean() -> None:
    weights, sizes = np.array([1.0, 2.0, 8.0]), np.array([4.0, 1.0, 3.0])
    shares = spread(weights, sizes, 0.6)
    assert shares[2] == 1.0
    assert shares[1] == pytest.approx(2 * shares[0])
    assert (shares * sizes).sum() / sizes.sum() == pytest.approx(0.6)
    assert spread(np.zeros(3), sizes, 0.6) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"a mean of 0\.6 is not possible with shares from 0\.7 to 1"):
        spread(weights, sizes, 0.6, low=0.7)


def test_unknown_allocation_says_which_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown allocation .best.; there are uniform, .*optimal"):
        allocate("best", problem(0.6))
