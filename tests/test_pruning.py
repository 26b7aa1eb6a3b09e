"""What Wanda-sp and BlockPruner choose, against plain implementations on dense models."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from stored import CPU, TOKENS, WIDTH, Stored, activations, random_tokens, store
from torch import Tensor, nn

from aasvd.blocks import Head, linears
from aasvd.pruning import Branch, Removals, channel_squares, wanda_sp
from aasvd.units import BRANCHES, Example, branches, heads_and_neurons

HEADS, WIDTH_OF_HEAD, NEURONS = 4, 8, 48


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def around(stored: Stored) -> Example:
    return Example(stored.arguments(torch.float64)[0], WIDTH, TOKENS)


def inputs_of(block: nn.Module, name: str, x: Tensor, call: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        block(x, **call)
    handle.remove()
    return seen[0]


def test_channel_squares_are_summed_over_all_tokens(llama: Stored, tmp_path: Path) -> None:
    block, call = llama.block(dtype=torch.float64), around(llama).arguments
    x = torch.randn(5, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = ["self_attn.o_proj", "mlp.down_proj"]
    found = channel_squares(
        block, names, inputs=activations(tmp_path / "x", x), arguments=call, batch=2, device=CPU
    )
    for name in names:
        expected = inputs_of(block, name, x, call).square().sum((0, 1))
        torch.testing.assert_close(found[name], expected)


def test_a_pass_that_fails_leaves_no_hooks(llama: Stored, tmp_path: Path) -> None:
    block, call = llama.block(), llama.arguments()[0]
    x = activations(tmp_path / "x", torch.zeros(1, TOKENS, WIDTH + 1))
    with pytest.raises(RuntimeError):
        channel_squares(block, ["mlp.down_proj"], inputs=x, arguments=call, batch=1, device=CPU)
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.5, 0.6, 0.8, 0.95])
def test_wanda_sp_drops_the_lowest_heads_and_fills_the_budget_with_the_highest_neurons(
    llama: Stored, ratio: float
) -> None:
    block, call = llama.block(dtype=torch.float64), around(llama).arguments
    x = torch.randn(4, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layers = linears(block)
    squares = {
        name: inputs_of(block, name, x, call).square().sum((0, 1))
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    dense = sum(linear.weight.numel() for linear in layers.values())
    budget = int(ratio * dense)
    masks = wanda_sp(layers, heads_and_neurons(block, around(llama)), squares, budget=budget)
    assert set(masks) == set(layers)

    # By the published formula: mean over outputs of |W_ij| ‖x_j‖, summed over the columns of a head.
    scores = {name: (layers[name].weight.abs() * squares[name].sqrt()).mean(0).detach() for name in squares}
    by_head = scores["self_attn.o_proj"].view(HEADS, WIDTH_OF_HEAD).sum(1)
    gone = by_head.argsort()[: int((1 - ratio) * HEADS + 1e-9)].tolist()
    stay = [head for head in range(HEADS) if head not in gone]
    columns = masks["self_attn.o_proj"][1]
    assert columns is not None
    assert columns.view(HEADS, WIDTH_OF_HEAD).all(1).nonzero()[:, 0].tolist() == stay
    assert int(columns.sum()) == len(stay) * WIDTH_OF_HEAD
    assert torch.equal(masks["self_attn.q_proj"][0], columns)  # type: ignore[arg-type]
    for name in ("k_proj", "v_proj"):
        rows = masks[f"self_attn.{name}"][0]
        assert rows is not None
        groups = rows.view(2, WIDTH_OF_HEAD).all(1).nonzero()[:, 0].tolist()
        assert groups == sorted({head // 2 for head in stay})

    neurons = masks["mlp.down_proj"][1]
    assert neurons is not None
    assert all(torch.equal(masks[f"mlp.{name}_proj"][0], neurons) for name in ("gate", "up"))  # type: ignore[arg-type]
    ranked = scores["mlp.down_proj"].argsort(descending=True)
    assert set(ranked[: int(neurons.sum())].tolist()) == set(neurons.nonzero()[:, 0].tolist())
    stored = sum(
        linears_of.weight[rows if rows is not None else slice(None)][
            :, cols if cols is not None else slice(None)
        ].numel()
        for name, linears_of in layers.items()
        for rows, cols in [masks[name]]
    )
    # Within the budget, and one neuron more is not, or there is none.
    assert stored <= budget
    assert stored + 3 * WIDTH > budget or int(neurons.sum()) == NEURONS


def test_a_budget_without_a_neuron_is_refused(llama: Stored) -> None:
    block = llama.block(dtype=torch.float64)
    squares = {"self_attn.o_proj": torch.ones(WIDTH).double(), "mlp.down_proj": torch.ones(NEURONS).double()}
    with pytest.raises(ValueError, match="leave no neuron beside 1 heads"):
        wanda_sp(linears(block), heads_and_neurons(block, around(llama)), squares, budget=900)


# --- BlockPruner -------------------------------------------------------------------------------------------


class Searched:
    """A model of three blocks in which branches matter differently, and its search."""

    def __init__(self, folder: Path) -> None:
        self.stored = store(tiny_model("gemma3"), folder)
        self.ids = random_tokens(3)
        self.blocks = [self.stored.block(index, torch.float64) for index in range(3)]
        self.calls = self.stored.arguments(torch.float64)
        found = [
            Branch(index, kind, names)
            for index, block in enumerate(self.blocks)
            for kind, names in branches(block, Example(self.calls[index], WIDTH, TOKENS)).items()
        ]
        self.branches = sorted(found, key=lambda branch: BRANCHES.index(branch.kind))
        self.head = Head(self.stored.source, self.stored.parts, device=CPU, dtype=torch.float64)
        self.trials = 0

    def loss(self, hidden: Tensor, some: slice) -> float:
        return float(self.head.loss(hidden, self.ids[some]).double().mean()) / (TOKENS - 1)

    def search(self) -> Removals:
        return Removals(
            self.blocks,
            self.branches,
            arguments=self.calls,
            hidden=self.stored.hidden(3, torch.float64),
            loss=self.loss,
            batch=2,
        )

    def perplexity(self, gone: list[int]) -> float:
        """Of the whole transformers model with the weights of some branches set to zero."""
        model = copy.deepcopy(self.stored.model).double()
        with torch.no_grad():
            for index in gone:
                branch = self.branches[index]
                for name in branch.names:
                    model.get_submodule(f"model.layers.{branch.block}.{name}").weight.zero_()
            logits = model(self.ids).logits[:, :-1].flatten(0, 1)
        return float(nn.functional.cross_entropy(logits, self.ids[:, 1:].flatten()).exp())


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return Searched(tmp_path_factory.mktemp("searched"))


def test_branches_go_as_a_greedy_search_on_the_whole_model_says(searched: Searched) -> None:
    trials: list[None] = []
    found = list(searched.search().steps(on_trial=lambda: trials.append(None)))
    gone: list[int] = []
    while len(gone) < len(searched.branches):
        left = [index for index in range(6) if index not in gone]
        expected = {index: searched.perplexity([*gone, index]) for index in left}
        best = min(left, key=lambda index: expected[index])
        assert found[len(gone)].branch == best
        assert found[len(gone)].perplexity == pytest.approx(expected[best], rel=1e-5)
        gone.append(best)
    assert len(found) == 6
    # Two batches each.
    assert len(trials) == 2 * sum(range(1, 7))


def test_a_search_goes_on_where_it_was(searched: Searched) -> None:
    found = list(searched.search().steps())
    done = [step.branch for step in found[:2]]
    assert list(searched.search().steps(done)) == found[2:]


def test_a_search_that_is_left_leaves_the_blocks_as_they_were(searched: Searched) -> None:
    x = searched.stored.hidden(3, torch.float64)
    with torch.no_grad():
        before = searched.blocks[0](x, **searched.calls[0])
        steps = searched.search().steps()
        list(itertools.islice(steps, 3))
        steps.close()
        assert torch.equal(searched.blocks[0](x, **searched.calls[0]), before)


def test_losses_that_are_not_finite_are_told(searched: Searched) -> None:
    search = searched.search()
    search._loss = lambda _hidden, _some: float("nan")
    with pytest.raises(ValueError, match="the loss is not finite"):
        next(search.steps())
