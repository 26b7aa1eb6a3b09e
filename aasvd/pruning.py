"""Structured pruning: which heads and neurons (Wanda-sp) or branches (BlockPruner) of a model go.

ShortGPT, which drops whole blocks, needs no more than an allocation (`aasvd.allocation`).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd.artifacts import Activations
from aasvd.capture import without
from aasvd.units import Units

Masks = dict[str, tuple[Tensor | None, Tensor | None]]


@torch.inference_mode()
def channel_squares(
    block: nn.Module,
    names: Sequence[str],
    *,
    inputs: Activations,
    arguments: Mapping[str, Any],
    batch: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return Σ x² of every input channel of named linears, (in,) float64, over passes of a block.

    Args:
        block: A block on `device`.
        names: The linears.
        inputs: Inputs of the block, (sequences, tokens, width).
        arguments: The block's keyword arguments.
        batch: Sequences per forward pass.
        device: Where the block is.
    """
    dtype = next(block.parameters()).dtype
    totals: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, read: tuple[Tensor, ...]) -> None:
            squares = read[0].double().square().flatten(0, -2).sum(0)
            totals[name] = totals[name] + squares if name in totals else squares

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(adding(name)) for name in names]
    try:
        for hidden in inputs.batches(batch):
            block(hidden.to(device, dtype), **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def wanda_sp(
    linears: Mapping[str, nn.Linear],
    units: Mapping[str, Units],
    squares: Mapping[str, Tensor],
    *,
    budget: int,
) -> Masks:
    """Choose the heads and neurons of a block that stay (Wanda-sp, as in the code of FLAP).

    A column of the last linear of attention or the MLP scores mean over rows of |W| √(Σ x²); a head scores
    the sum of its columns. The lowest ⌊(1 − r) heads⌋ heads go, then the lowest neurons.

    Code: ⌊(1 − r) neurons⌋ neurons go, whatever the heads left over. Here: as many as it takes to keep no
    more than the block's budget, so that all methods are compared at one number of parameters. Code: heads
    of 128 numbers with keys and values of their own. Here: heads of any width; keys and values that several
    heads share go with the last of them.

    Args:
        linears: All linears of the block.
        units: Its heads and neurons, by branch (`aasvd.units.heads_and_neurons`).
        squares: Σ x² of every channel that the last linears read (`channel_squares`).
        budget: How many numbers the block's linears may keep.

    Returns:
        By linear, the rows and the columns that stay; None stands for all.

    Raises:
        ValueError: If not one neuron fits the budget.
    """
    dense = sum(linear.weight.numel() for linear in linears.values())
    heads, neurons = units["attention"], units["mlp"]
    # A budget is a whole number, so it may miss a share of a head that is one.
    gone = math.floor((1 - budget / dense) * heads.number + 1e-3)
    kept = torch.ones(heads.number, dtype=torch.bool)
    kept[_scores(linears, heads, squares).argsort(stable=True)[:gone]] = False
    masks = heads.masks(kept)
    left = (
        budget
        - dense
        + sum(linears[name].weight.numel() - _stored(linears[name], masks[name]) for name in masks)
    )
    # What every neuron costs: its rows and its column.
    costs = torch.full((neurons.number,), linears[neurons.output].out_features)
    for name, sources in neurons.rows.items():
        fed = torch.bincount(sources[sources >= 0], minlength=neurons.number)
        costs += fed * linears[name].in_features
    left += int(costs.sum())
    order = _scores(linears, neurons, squares).argsort(stable=True, descending=True)
    staying = int((costs[order].cumsum(0) <= left).sum())
    if not staying:
        raise ValueError(
            f"compression.objective wanda_sp: {budget} numbers for a block's linears leave no neuron beside "
            f"{heads.number - gone} heads: choose a larger ratio, or leave it out of a comparison"
        )
    kept = torch.zeros(neurons.number, dtype=torch.bool)
    kept[order[:staying]] = True
    return masks | neurons.masks(kept)


def _scores(linears: Mapping[str, nn.Linear], units: Units, squares: Mapping[str, Tensor]) -> Tensor:
    """Return what each unit scores, (units,) float64 on the host."""
    weight = linears[units.output].weight.detach().double()
    columns = (weight.abs() * squares[units.output].sqrt()).mean(0).cpu()
    return torch.zeros(units.number, dtype=torch.float64).index_add(0, units.columns, columns)


def _stored(linear: nn.Linear, masks: tuple[Tensor | None, Tensor | None]) -> int:
    """Return how many numbers of a linear stay."""
    counts = [
        size if mask is None else int(mask.sum())
        for mask, size in zip(masks, linear.weight.shape, strict=True)
    ]
    return math.prod(counts)


class Branch(NamedTuple):
    """Attention or MLP of one block: the block's number, which of the two, and the names of its linears."""

    block: int
    kind: str
    names: list[str]


class Removal(NamedTuple):
    """A branch that goes, as its place in the list of branches, and the model's perplexity without it."""

    branch: int
    perplexity: float


class Removals:
    """BlockPruner's search: branches in the order in which they go, the least missed one first.

    Every step tries each branch that is left, and removes the one without which the perplexity on the
    calibration sequences is lowest (the first of them, attention before MLPs, where several are). A trial
    starts from what reaches its block, which earlier blocks do not change.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        branches: Sequence[Branch],
        *,
        arguments: Sequence[Mapping[str, Any]],
        hidden: Tensor,
        loss: Callable[[Tensor, slice], float],
        batch: int,
    ) -> None:
        """Prepare a search.

        Args:
            blocks: All blocks of the model, of which each branch returns zero without its linears.
            branches: All branches, in the order that decides between equals.
            arguments: Keyword arguments of every block.
            hidden: What reaches the first block, (sequences, tokens, width).
            loss: The mean loss per token of some of the sequences as a function of what leaves the last
                block for them; weighed equally.
            batch: Sequences per forward pass.
        """
        self._blocks, self._branches, self._arguments = blocks, branches, arguments
        self._hidden, self._loss, self._batch = hidden, loss, batch
        self._parts = [
            {i for i, branch in enumerate(branches) if branch.block == b} for b in range(len(blocks))
        ]

    def steps(
        self, done: Sequence[int] = (), *, on_trial: Callable[[], object] = lambda: None
    ) -> Iterator[Removal]:
        """Yield one removal after the other until nothing is left, going on after those that are done.

        Raises:
            ValueError: If whatever is removed next, the loss is not finite.
        """
        gone = list(done)
        with contextlib.ExitStack() as removed:
            for index in gone:
                removed.enter_context(self._without(index))
            while len(gone) < len(self._branches):
                losses = self._try_all(gone, on_trial)
                best = min(losses, key=lambda index: losses[index])
                if losses[best] == math.inf:
                    raise ValueError("without any further branch the loss is not finite")
                removed.enter_context(self._without(best))
                gone.append(best)
                yield Removal(best, math.exp(losses[best]))

    # Not inference mode: a model's head counts the versions of what it is given.
    @torch.no_grad()
    def _try_all(self, gone: Sequence[int], on_trial: Callable[[], object]) -> dict[int, float]:
        """Return the mean loss without each branch that is left, by its place."""
        losses = {index: 0.0 for index in range(len(self._branches)) if index not in gone}
        for start in range(0, len(self._hidden), self._batch):
            some = slice(start, start + self._batch)
            reached = [self._hidden[some]]
            for block in range(len(self._blocks) - 1):
                reached.append(self._through(block, reached[-1], gone))
            for index in losses:
                block = self._branches[index].block
                with self._without(index):
                    hidden = reached[block]
                    for later in range(block, len(self._blocks)):
                        hidden = self._through(later, hidden, [*gone, index])
                loss = self._loss(hidden, some) * len(reached[0]) / len(self._hidden)
                losses[index] += loss if math.isfinite(loss) else math.inf
                on_trial()
        return losses

    def _through(self, block: int, hidden: Tensor, gone: Sequence[int]) -> Tensor:
        if self._parts[block].issubset(gone):
            return hidden  # what the block would do
        parameter = next(self._blocks[block].parameters())
        output: Tensor = self._blocks[block](
            hidden.to(parameter.device, parameter.dtype), **self._arguments[block]
        )
        return output

    def _without(self, index: int) -> contextlib.AbstractContextManager[None]:
        branch = self._branches[index]
        return without(self._blocks[branch.block], branch.names)
