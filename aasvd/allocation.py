"""Ranks of all linears of a model under one parameter budget, by the rules of several papers and our own.

Most rules give each linear a share of its parameters to keep; the shares are then rounded to ranks that
meet the budget as closely as single ranks allow. `optimal` chooses the ranks themselves, from what each
further direction of each linear is worth to the model's loss. Functions are found by their names in
`aasvd.methods.ALLOCATIONS`, which says which measures (`aasvd.measures`) they need; they return shares or an
`Allocation`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aasvd.knapsack import choose
from aasvd.methods import ALLOCATIONS, functions_of
from aasvd.rank import COSTS, stored_parameters, uniform_rank

# ASVD's candidate ratios.
CANDIDATES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# LoRAP: v and o keep this many times the share of q and k.
_LORAP_IMBALANCE = 3.0
# SVD-LLM V2: its rule can ask for more than everything; what is removed of a matrix at most.
_V2_LARGEST_REMOVAL = 0.95
# Swift-SVD: exponent of the block's importance (0.6 used in its paper), and the floor in mean ranks.
_SWIFT_ALPHA, _SWIFT_FLOOR = 0.6, 0.5
# AdaSVD: minimum retention relative to the target; the paper gives no number.
_ADASVD_MINIMUM = 0.8
# DipSVD: weight of the sensitivity, width of the ratios around the target, and their bounds.
_DIPSVD_BETA, _DIPSVD_WIDTH, _DIPSVD_BOUNDS = 0.3, 0.25, (0.3, 0.98)
_DIPSVD_ENERGY = 0.95
# How far ranks from a file may stay below the budget, relative to it.
_TOLERANCE = 1e-3
# The coarsest step between the ranks that `optimal` chooses from: rows of a matrix unit's tile.
_COARSEST_STEP = 16

Floats = NDArray[np.float64]
Ranks = dict[str, int | None]


class Layer(NamedTuple):
    """One linear: the number of its block, its name in it, and its shape (m, n)."""

    block: int
    name: str
    shape: tuple[int, int]

    @property
    def label(self) -> str:
        """Its name among all linears of the model, as in ranks.json."""
        return f"{self.block}.{self.name}"

    @property
    def size(self) -> int:
        """Its number of parameters when dense."""
        return self.shape[0] * self.shape[1]


class Problem(NamedTuple):
    """What an allocation looks at.

    Attributes:
        layers: All linears of the model.
        ratio: Share of their parameters that is kept in all.
        measures: By measure, the tensors of every block.
        compression: The section of params.yaml.
    """

    layers: Sequence[Layer]
    ratio: float
    measures: Mapping[str, Sequence[Mapping[str, Tensor]]]
    compression: Mapping[str, Any]

    @property
    def budget(self) -> int:
        """Largest number of parameters that may be stored."""
        return math.floor(self.ratio * sum(layer.size for layer in self.layers) + 1e-6)

    @property
    def storage(self) -> str:
        """What a rank costs depends on how it is stored."""
        return str(self.compression["storage"])

    def cost(self, layer: Layer, rank: int | None) -> int:
        """Return how many parameters a linear of a rank stores."""
        return stored_parameters(*layer.shape, rank, storage=self.storage)

    def rank(self, layer: Layer, share: float) -> int | None:
        """Return the rank at which a linear keeps a share of its parameters; None for dense."""
        if share >= 1:
            return None
        return uniform_rank(*layer.shape, parameter_ratio=max(float(share), 1e-12), storage=self.storage)

    def stored(self, ranks: Sequence[int | None]) -> int:
        """Return how many parameters all linears store."""
        return sum(self.cost(layer, rank) for layer, rank in zip(self.layers, ranks, strict=True))

    def of_layer(self, measure: str, layer: Layer) -> Tensor:
        """Return what a measure says of one linear."""
        return self.measures[measure][layer.block][layer.name]

    def of_blocks(self, measure: str, name: str) -> list[Tensor]:
        """Return what a measure says of every block under a name."""
        return [tensors[name] for tensors in self.measures[measure]]


class Allocation(NamedTuple):
    """Ranks in the order of the layers, None for dense, and what there is to say about them."""

    ranks: list[int | None]
    notes: dict[str, Any]


def allocate(name: str, problem: Problem) -> Allocation:
    """Choose the rank of every linear.

    Raises:
        ValueError: If there is no such allocation, or it cannot be made for this model and ratio.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {name!r}; there are {', '.join(ALLOCATIONS)}")
    found = FUNCTIONS[name](problem)
    return found if isinstance(found, Allocation) else _rounded(problem, found, {})


def _rounded(problem: Problem, shares: Floats, notes: dict[str, Any]) -> Allocation:
    """Return the ranks of shares, which its notes hold too."""
    listed = [float(share) for share in shares]
    return Allocation(round_shares(problem, shares), {"shares": listed, **notes})


# --- from shares to ranks ---------------------------------------------------------------------------------


def round_shares(problem: Problem, shares: Floats) -> list[int | None]:
    """Round shares of parameters to ranks that meet the budget: down, then up again where most was lost."""
    layers = problem.layers
    ranks = [problem.rank(layer, share) for layer, share in zip(layers, shares, strict=True)]
    wanted = [share * layer.size for layer, share in zip(layers, shares, strict=True)]

    def lost(index: int) -> float:
        return wanted[index] - problem.cost(layers[index], ranks[index])

    left = problem.budget - problem.stored(ranks)
    while left < 0:
        # Every linear keeps at least one direction, and some round up to dense.
        shrinkable = [i for i in range(len(layers)) if _smaller(problem, layers[i], ranks[i]) is not None]
        if not shrinkable:
            raise ValueError(f"ratio {problem.ratio} is below one direction for every linear")
        index = min(shrinkable, key=lost)
        left += problem.cost(layers[index], ranks[index])
        ranks[index] = _smaller(problem, layers[index], ranks[index])
        left -= problem.cost(layers[index], ranks[index])
    _fill(problem, ranks, larger=lambda index, rank: _larger(problem, layers[index], rank), wanting=lost)
    return ranks


def _fill(
    problem: Problem,
    ranks: list[int | None],
    *,
    larger: Callable[[int, int], int | None],
    wanting: Callable[[int], float],
) -> None:
    """Raise ranks, in place, as long as something fits what the budget leaves.

    Args:
        problem: What is allocated.
        ranks: Ranks within the budget.
        larger: The next rank of a linear, given by its place and its rank; None is dense.
        wanting: How much a linear wants its next rank: each is raised at most once before it is asked again.
    """
    left = problem.budget - problem.stored(ranks)
    progress = True
    while progress:
        progress = False
        for index in sorted(range(len(ranks)), key=wanting, reverse=True):
            rank, layer = ranks[index], problem.layers[index]
            if rank is None:
                continue
            above = larger(index, rank)
            step = problem.cost(layer, above) - problem.cost(layer, rank)
            if step <= left:
                ranks[index], left, progress = above, left - step, True


def largest_rank(problem: Problem, layer: Layer) -> int:
    """Return the largest rank whose stored form is smaller than the matrix; 0 if there is none."""
    low, high = 0, COSTS[problem.storage].largest(*layer.shape)
    while low < high:
        middle = (low + high + 1) // 2
        smaller = problem.cost(layer, middle) < layer.size
        low, high = (middle, high) if smaller else (low, middle - 1)
    return low


def _larger(problem: Problem, layer: Layer, rank: int) -> int | None:
    return None if rank >= largest_rank(problem, layer) else rank + 1


def _smaller(problem: Problem, layer: Layer, rank: int | None) -> int | None:
    """Return the next smaller rank; None where there is none."""
    below = largest_rank(problem, layer) if rank is None else rank - 1
    return below or None


def spread(weights: Floats, sizes: Floats, ratio: float, *, low: float = 0.0, high: float = 1.0) -> Floats:
    """Return shares in proportion to weights, within bounds, whose mean over parameters is a ratio.

    What the bounds cut off goes to the others in the same proportion (water-filling).
    """
    if not low <= ratio <= high:
        raise ValueError(f"a mean of {ratio} is not possible with shares from {low} to {high}")
    smallest = float(weights[weights > 0].min(initial=np.inf))
    if not np.isfinite(smallest):
        return np.full(len(weights), ratio)
    floor = np.maximum(weights, smallest * 1e-6)
    below, above = 0.0, high / float(floor.min())
    for _ in range(200):
        middle = (below + above) / 2
        mean = float((np.clip(middle * floor, low, high) * sizes).sum() / sizes.sum())
        below, above = (middle, above) if mean < ratio else (below, middle)
    return np.clip(above * floor, low, high)


def _sizes(layers: Sequence[Layer]) -> Floats:
    return np.array([layer.size for layer in layers], dtype=np.float64)


def _by_type(problem: Problem, shares_of: Callable[[list[Layer]], Floats]) -> Floats:
    """Give every type of linear (all q_proj, ...) the same mean, and share it out within the type."""
    shares = np.empty(len(problem.layers))
    for name in dict.fromkeys(layer.name for layer in problem.layers):
        places = [index for index, layer in enumerate(problem.layers) if layer.name == name]
        shares[places] = shares_of([problem.layers[place] for place in places])
    return shares


def _by_block(problem: Problem, weights: Floats, **bounds: float) -> Floats:
    """Give all linears of a block the share of the block."""
    sizes = np.zeros(len(weights))
    np.add.at(sizes, [layer.block for layer in problem.layers], _sizes(problem.layers))
    return spread(weights, sizes, problem.ratio, **bounds)[[layer.block for layer in problem.layers]]


def _scaled(values: Floats) -> Floats:
    """Scale to 0..1; all one half where they do not differ."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


# --- rules that give shares -------------------------------------------------------------------------------


def uniform(problem: Problem) -> Floats:
    """The same share everywhere.

    AA-SVD and SVD-LLM round every rank down and stay below the budget. Here what rounding leaves over goes
    to the linears that lost most, a rank each.
    """
    return np.full(len(problem.layers), problem.ratio)


def lorap(problem: Problem) -> Floats:
    """LoRAP: within attention, v and o keep three times the share of q and k; the MLP keeps the ratio.

    The paper has square attention matrices: (v, o) keep 1.5 r and (q, k) 0.5 r, and where v and o would be
    dense, q and k get the rest. This is the same for matrices of any shape.
    """
    parts = [layer.name.rpartition(".") for layer in problem.layers]
    leaves = [leaf for _, _, leaf in parts]
    # Phi's o is called `dense`, a name that some models' MLPs have too: it stands where q does.
    beside = {path for path, _, leaf in parts if leaf == "q_proj"}
    outputs = np.array(
        [leaf in ("o_proj", "out_proj") or (leaf == "dense" and path in beside) for path, _, leaf in parts]
    )
    if not {"q_proj", "k_proj", "v_proj"} <= set(leaves) or not outputs.any():
        raise ValueError("LoRAP's split needs q, k, v and o as linears of their own, and this model has none")
    high = outputs | np.array([leaf == "v_proj" for leaf in leaves])
    attention = high | np.array([leaf in ("q_proj", "k_proj") for leaf in leaves])
    weights = np.where(high, _LORAP_IMBALANCE, 1.0)
    shares = np.full(len(leaves), problem.ratio)
    shares[attention] = spread(weights[attention], _sizes(problem.layers)[attention], problem.ratio)
    return shares


def strs(problem: Problem) -> Floats:
    """ASVD's sensitivity-based truncation rank search.

    Every linear alone was compressed to six ratios and the model's perplexity taken. All trials are sorted
    by it, worst first; with a cut through the list, every linear takes its smallest ratio at or after the
    cut, or stays dense. The cut is searched that meets the budget.

    Paper: the released loop may end one entry off the target. Here: the last cut within the budget, and
    what it leaves over is shared out in proportion. Below the smallest of the six ratios no cut is within
    it, and all shares are scaled down from there. Paper: lm_head counts. Here: the blocks' linears.
    The trials are ASVD's own, U and V, whatever objective and storage get the ranks. One that is not a
    number counts as the worst.
    """
    trials = sorted(
        (
            (math.inf if value.isnan() else float(value), index, ratio)
            for index, layer in enumerate(problem.layers)
            for value, ratio in zip(problem.of_layer("sensitivity", layer), CANDIDATES, strict=True)
        ),
        key=lambda trial: (-trial[0], trial[1], trial[2]),
    )
    sizes = _sizes(problem.layers)

    def shares_after(cut: int) -> Floats:
        shares = np.ones(len(problem.layers))
        for _, index, ratio in trials[cut:]:
            shares[index] = min(shares[index], ratio)
        return shares

    def kept(cut: int) -> float:
        return float((shares_after(cut) * sizes).sum() / sizes.sum())

    # Later cuts keep more, so the last one within the budget is found by bisection.
    low, high = 0, len(trials)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kept(middle) <= problem.ratio else (low, middle - 1)
    return spread(shares_after(low), sizes, problem.ratio)


def effective_rank(problem: Problem) -> Floats:
    """Shares in proportion to the effective rank of each linear's outputs, exp of the spectrum's entropy.

    The normalised effective rank of Swift-SVD's code, over all linears of the model.
    """
    weights = []
    for layer in problem.layers:
        sigma = problem.of_layer("spectra", layer).clamp_min(0).sqrt()
        p = sigma / sigma.sum().clamp_min(1e-300)
        weights.append(math.exp(float(-torch.special.xlogy(p, p).sum())) / min(layer.shape))
    return spread(np.array(weights), _sizes(problem.layers), problem.ratio)


def swift(problem: Problem) -> Floats:
    """Swift-SVD: half the uniform share, and the rest within each type by β^α log(e + ε)^(1 − α).

    β in [1, 2] is the block's influence, 1 − cos(input, output); ε the norm of the linear's outputs over
    the calibration tokens, as in the code.

    Code: the floor is a quarter of the ratio's share of the full rank and the score has log(1 + ε). Here:
    the paper's floor and logarithm. Paper: α is the best of an 11-point grid on validation text. Here: the
    0.6 that it reports, so that no evaluation decides.
    """
    influence = 1 - np.array([float(x) for x in problem.of_blocks("profile", "cosine")])
    beta = 1 + _scaled(influence)

    def shares(layers: list[Layer]) -> Floats:
        norms = [math.sqrt(float(problem.of_layer("spectra", layer).sum())) for layer in layers]
        scores = np.array(
            [
                beta[layer.block] ** _SWIFT_ALPHA * math.log(math.e + norm) ** (1 - _SWIFT_ALPHA)
                for layer, norm in zip(layers, norms, strict=True)
            ]
        )
        floor = _SWIFT_FLOOR * problem.ratio
        return floor + spread(scores, _sizes(layers), problem.ratio - floor, high=1 - floor)

    return _by_type(problem, shares)


def adasvd(problem: Problem) -> Floats:
    """AdaSVD's adaCR: a block keeps mrr + (I / mean I) (r − mrr), I = cos(input, output) of the block.

    Paper: of each layer, whose input and output have no cosine where their widths differ. Here: of each
    block. Its minimum retention mrr is 0.8 r.
    """
    similarity = np.array([float(x) for x in problem.of_blocks("profile", "cosine")]).clip(min=0)
    minimum = _ADASVD_MINIMUM * problem.ratio
    weights = minimum + similarity / max(similarity.mean(), 1e-12) * (problem.ratio - minimum)
    return _by_block(problem, weights)


def dobi(problem: Problem) -> Floats:
    """Dobi-SVD: what its trained truncation positions keep (`aasvd.truncation`).

    The penalty that they were trained with meets the budget only nearly, so the shares are scaled alike.
    """
    trained = [float(problem.of_layer("positions", layer)) for layer in problem.layers]
    return spread(np.array(trained), _sizes(problem.layers), problem.ratio)


def dipsvd(problem: Problem) -> Floats:
    """DipSVD: a block keeps more, the more sensitive the loss and the higher the rank of its outputs.

    What the paper says it wants; its code has both signs the other way round (`dipsvd_inverted`) and takes
    gradients on 26 short texts. Here: on the calibration text. Its scripts have β = 0.3 or 0.25 and widths
    of 0.25 or 0.2: the former of each. No block keeps less than 0.3, so up to that ratio all keep the same.
    """
    return _dipsvd(problem, sign=1)


def dipsvd_inverted(problem: Problem) -> Floats:
    """DipSVD as in its code, where the reciprocal of the sensitivity and the negated rank raise the share."""
    return _dipsvd(problem, sign=-1)


def _dipsvd(problem: Problem, *, sign: int) -> Floats:
    sensitivity = np.array(
        [sum(float(x) for x in tensors.values()) for tensors in problem.measures["relative_gradients"]]
    ).clip(min=1e-300)
    for quarter in np.array_split(np.arange(len(sensitivity)), 4):
        if len(quarter):
            sensitivity[quarter] /= sensitivity[quarter].mean()
    ranks = []
    for singular in problem.of_blocks("profile", "singular"):
        total = singular.cumsum(0) / singular.sum().clamp_min(1e-300)
        ranks.append(float((total < _DIPSVD_ENERGY).sum() + 1))
    first = _scaled(sensitivity**sign) + 1e-5
    second = _scaled(sign * np.array(ranks)) + 1e-5
    score = _scaled(first**_DIPSVD_BETA * second ** (1 - _DIPSVD_BETA))
    weights = problem.ratio + _DIPSVD_WIDTH * (2 * score - 1)
    low, high = _DIPSVD_BOUNDS
    bounds = {"low": min(low, problem.ratio), "high": max(high, problem.ratio)}
    return _by_block(problem, weights.clip(min=bounds["low"]), **bounds)


# --- rules that give ranks --------------------------------------------------------------------------------


def svdllm_v2(problem: Problem) -> Allocation:
    """SVD-LLM V2: within each type, what is removed is in proportion to 1 / log(loss at the uniform ratio).

    Paper: log L, which is negative for losses below 1. Here: log(1 + L), with L = ‖W X − W' X‖ over all
    calibration tokens. What its rule removes beyond 95 % of a matrix is taken from the others of its type.
    The notes name the linears on which either mattered.
    """
    below_one: list[str] = []
    capped: list[str] = []

    def shares(layers: list[Layer]) -> Floats:
        scores = []
        for layer in layers:
            rank = problem.rank(layer, problem.ratio) or min(layer.shape)
            loss = math.sqrt(float(problem.of_layer("spectra", layer)[rank:].sum()))
            scores.append(1 / max(math.log1p(loss), 1e-12))
            if loss < 1:
                below_one.append(layer.label)
        removed = 1 - problem.ratio
        high = max(_V2_LARGEST_REMOVAL, removed)
        found = spread(np.array(scores), _sizes(layers), removed, high=high)
        capped.extend(layer.label for layer, gone in zip(layers, found, strict=True) if gone >= high)
        return 1 - found

    found = _by_type(problem, shares)
    return _rounded(problem, found, {"losses_below_one": below_one, "removals_capped": capped})


def optimal(problem: Problem) -> Allocation:
    """Ours: the ranks, 'keep dense' among them, that lose least of what all directions are worth.

    Every direction of every linear comes with what it is worth to the model's loss beside those before it
    (measure `influence`). Losses add up, so this is a knapsack of one option per linear, and is solved
    exactly. Large linears get round ranks (`_round_ranks`), and the bound in the notes is that of these.
    Where steps, or directions that are worth nothing, would leave the budget unmet, it is filled as far as
    ranks allow, even by directions of less worth than nothing: that is noise of the measurement.
    """
    options: list[list[int | None]] = []
    # By rank, what the directions up to there are worth together.
    worth: list[Floats] = []
    costs, values = [], []
    for layer in problem.layers:
        gains = problem.of_layer("influence", layer).double().cpu().numpy()
        worth.append(np.append(0.0, np.cumsum(gains)))
        ranks = _round_ranks(layer, largest_rank(problem, layer))
        options.append([*ranks, None])
        costs.append(np.array([*(problem.cost(layer, rank) for rank in ranks), layer.size], dtype=np.int64))
        # At full rank, dense or not, nothing is lost.
        values.append(worth[-1][[*ranks, -1]])
    choice = choose(costs, values, budget=problem.budget)
    chosen = [some[option] for some, option in zip(options, choice.options, strict=True)]

    def next_option(index: int, rank: int) -> int | None:
        return options[index][options[index].index(rank) + 1]

    def next_rank(index: int, rank: int) -> int | None:
        return _larger(problem, problem.layers[index], rank)

    for larger in (next_option, next_rank):
        # Below that, a rank that no other linear has is not worth what it would fill.
        if problem.budget - problem.stored(chosen) > _TOLERANCE / 2 * problem.budget:
            _fill(problem, chosen, larger=larger, wanting=_by_gain(problem, worth, chosen, larger))
    total = sum(float(some[-1]) for some in worth)
    kept = (some[-1 if rank is None else rank] for some, rank in zip(worth, chosen, strict=True))
    notes = {
        "predicted_loss": total - sum(map(float, kept)),
        "predicted_loss_bound": max(0.0, total - choice.bound),
        "exact": choice.exact,
    }
    return Allocation(chosen, notes)


def _by_gain(
    problem: Problem,
    worth: Sequence[Floats],
    ranks: Sequence[int | None],
    larger: Callable[[int, int], int | None],
) -> Callable[[int], float]:
    """Return what each linear's next rank is worth per parameter, as a function of its place."""

    def gain(index: int) -> float:
        rank, layer = ranks[index], problem.layers[index]
        if rank is None:
            return 0.0
        above = larger(index, rank)
        gained = float(worth[index][-1 if above is None else above] - worth[index][rank])
        return gained / (problem.cost(layer, above) - problem.cost(layer, rank))

    return gain


def _round_ranks(layer: Layer, largest: int) -> list[int]:
    """Return the ranks that a linear may get: multiples of a power of two, and the powers below it.

    The power is about a thirtieth of full rank, at most 16, so hardly anything is lost. What is gained:
    matrix units work on whole tiles, and linears share ranks. A rank that no other linear has costs kernels
    of its own: on a CPU oneDNN compiles them at their first call, for milliseconds each, and keeps them.
    """
    step = min(_COARSEST_STEP, 1 << max(0, (min(layer.shape) // 32).bit_length() - 1))
    finer = [1 << power for power in range(step.bit_length() - 1)]
    return [rank for rank in (*finer, *range(step, largest + 1, step)) if rank <= largest]


def file(problem: Problem) -> Allocation:
    """Ranks from a JSON file: an object of linears (`<block>.<name>`) and ranks, null for dense.

    Raises:
        ValueError: If the file is no JSON, or does not fit the model, the storage or the budget.
    """
    path = Path(problem.compression["ranks_file"]).expanduser()
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected JSON, such as a run's ranks.json") from error
    given = found.get("ranks", found) if isinstance(found, dict) else None
    given = given if isinstance(given, dict) else {}
    names = [layer.label for layer in problem.layers]
    if difference := sorted(set(given) ^ set(names)):
        raise ValueError(
            f"{path}: expected an object with the rank of all {len(names)} linears, such as {names[0]!r}; "
            f"{difference[0]!r} is missing or unknown"
        )
    pruned = problem.storage == "pruned"  # which has no ranks: all of a linear or nothing
    for layer, name in zip(problem.layers, names, strict=True):
        rank = given[name]
        largest = 0 if pruned else COSTS[problem.storage].largest(*layer.shape)
        if rank is not None and (type(rank) is not int or not 0 <= rank <= largest):
            ranks_of_others = "" if pruned else f"1 to {largest}, "
            raise ValueError(
                f"{path}: rank {rank!r} of {name}: expected {ranks_of_others}0 to remove it, or null"
            )
    ranks: list[int | None] = [given[name] for name in names]
    stored = problem.stored(ranks)
    if not (1 - _TOLERANCE) * problem.budget <= stored <= problem.budget:
        kept = stored / sum(layer.size for layer in problem.layers)
        # Up to five significant digits, so that what they keep is this ratio or a little less.
        digits = 10 ** (4 - math.floor(math.log10(kept))) if kept else 1
        near = f"{math.ceil(kept * digits) / digits:g}"
        hint = f": ask for that ratio (results/<model>_r{near}_...)" if 0 < kept < 1 else ""
        raise ValueError(
            f"{path}: its ranks keep {near} of the parameters, not {problem.ratio:g} or a little less{hint}"
        )
    return Allocation(ranks, {})


# --- rules that remove whole parts ------------------------------------------------------------------------


def shortgpt(problem: Problem) -> Allocation:
    """ShortGPT: the blocks with the least influence go, 1 − cos(input, output) averaged over tokens, at once.

    Paper: a number of blocks. Here: as few as meet the budget, so at most it is kept.
    """
    influence = 1 - np.array([float(x) for x in problem.of_blocks("profile", "cosine")])
    parts = [
        [index for index, layer in enumerate(problem.layers) if layer.block == block]
        for block in np.argsort(influence, kind="stable")
    ]
    return _remove("shortgpt", problem, parts, {"influence": [float(x) for x in influence]})


def blockpruner(problem: Problem) -> Allocation:
    """BlockPruner: attention or MLP of a block go, in the order of its search (`aasvd.pruning.Removals`).

    Paper: a number of them. Here: as few, in that order, as meet the budget.
    """
    (measured,) = problem.measures["removal"]
    places = [measured.get(layer.label) for layer in problem.layers]
    parts = [
        [index for index, own in enumerate(places) if own is not None and int(own) == place]
        for place in range(len(measured["perplexity"]))
    ]
    return _remove("blockpruner", problem, parts, {})


def _remove(rule: str, problem: Problem, parts: Sequence[Sequence[int]], notes: dict[str, Any]) -> Allocation:
    """Remove parts, each a list of layers, in their order until the budget is met; the rest stays dense."""
    ranks: list[int | None] = [None] * len(problem.layers)
    gone = 0
    while problem.stored(ranks) > problem.budget and gone < len(parts):
        for index in parts[gone]:
            ranks[index] = 0
        gone += 1
    if gone == len(parts):
        raise ValueError(
            f"compression.allocation {rule}: ratio {problem.ratio} is below what one part of the model "
            "takes: choose a larger one, or leave such methods out of a comparison"
        )
    return Allocation(ranks, notes | {"removed": gone, "parts": len(parts)})


FUNCTIONS: dict[str, Callable[[Problem], Floats | Allocation]] = functions_of(ALLOCATIONS, globals())
