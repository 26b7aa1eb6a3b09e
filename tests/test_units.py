"""Branches, heads and neurons are found on every architecture, and their removal is a mask."""

from pathlib import Path

import pytest
import torch
from architectures import TINY, tiny_model
from stored import TOKENS, WIDTH, Stored, store
from torch import Tensor, nn

from aasvd import attention
from aasvd.blocks import linears
from aasvd.capture import without
from aasvd.pruned import prune, removed
from aasvd.units import Example, branches, heads_and_neurons, is_residual

HEADS = 4  # of every tiny model
GROUPS = {"opt": 4, "gpt_neox": 4}  # of keys and values; two in all others


@pytest.fixture(scope="module", params=TINY)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tiny_model(request.param), tmp_path_factory.mktemp(request.param))


def around(stored: Stored) -> Example:
    return Example(stored.arguments(torch.float64)[0], WIDTH, TOKENS)


def hidden() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def test_a_block_without_attention_is_one_message(tmp_path: Path) -> None:
    """Also where a linear's weight is read without a call, as Mamba's dt_proj is."""
    mamba = store(tiny_model("mamba"), tmp_path)
    with pytest.raises(ValueError, match="MambaBlock calls attention 0 times"):
        branches(mamba.block(), around(mamba))


def test_branches_are_attention_and_the_rest(stored: Stored) -> None:
    block = stored.block(dtype=torch.float64)
    found = branches(block, around(stored))
    assert sorted([*found["attention"], *found["mlp"]]) == sorted(linears(block))
    assert {name for name in linears(block) if "att" in name} == set(found["attention"])


def test_nothing_is_left_of_a_block_without_its_linears(stored: Stored) -> None:
    """A removed branch adds nothing; without both, a block returns its input to the last bit."""
    block = stored.block(dtype=torch.float64)
    call, x = around(stored).arguments, hidden()
    assert is_residual(block, around(stored))
    found = branches(block, around(stored))
    for names in found.values():
        emptied = stored.block(dtype=torch.float64)
        with torch.no_grad():
            for name in names:
                for parameter in emptied.get_submodule(name).parameters():
                    parameter.zero_()
            expected = emptied(x, **call)
            with without(block, names):
                torch.testing.assert_close(block(x, **call), expected, rtol=1e-12, atol=1e-12)
            for name in names:
                block.set_submodule(name, removed(linears(block)[name]))
            torch.testing.assert_close(block(x, **call), expected, rtol=1e-12, atol=1e-12)
            block = stored.block(dtype=torch.float64)
    for name, linear in linears(block).items():
        block.set_submodule(name, removed(linear))
    assert torch.equal(block(x, **call), x)


def test_a_block_that_does_more_than_add_is_told(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x + self.linear(x), (4,))

    assert not is_residual(Scaled(), Example({}, 4, 3))
    with pytest.raises(ValueError, match="calls attention 0 times"):
        branches(Scaled(), Example({}, 4, 3))


def masked_attention(gone: list[int]) -> attention.StandIn:
    """Attention by its formula, with the outputs of some heads replaced by zeros."""

    def attend(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        output = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        output[:, gone] = 0
        return output.transpose(1, 2).contiguous()

    return attend


@pytest.mark.parametrize("gone", [[1], [0, 2], [2, 3], [0, 1, 3]])
def test_removing_heads_is_masking_what_attention_returns(stored: Stored, gone: list[int]) -> None:
    """Also of layers with fused projections, norms of heads and shared keys and values."""
    dense, block = stored.block(dtype=torch.float64), stored.block(dtype=torch.float64)
    call, x = around(stored).arguments, hidden()
    heads = heads_and_neurons(block, around(stored))["attention"]
    assert heads.number == HEADS
    kept = torch.ones(HEADS, dtype=torch.bool)
    kept[gone] = False
    sizes = {}
    for name, (rows, columns) in heads.masks(kept).items():
        layer = prune(linears(block)[name], rows=rows, columns=columns)
        sizes[name] = list(layer.kept.shape)
        block.set_submodule(name, layer)
    with torch.no_grad(), attention.replaced(masked_attention(gone)):
        expected = dense(x, **call)
    with torch.no_grad(), attention.replaced(masked_attention([])):
        torch.testing.assert_close(block(x, **call), expected, rtol=1e-6, atol=1e-6)
    # Queries and columns of the heads that go, and keys and values of which nobody is left.
    count = GROUPS.get(stored.model.config.model_type, 2)
    groups = {head * count // HEADS for head in range(HEADS) if head not in gone}
    width = heads.columns.bincount()[0]
    stay = int(kept.sum())
    assert sizes[heads.output] == [WIDTH, stay * width]
    rows = sum(size[0] for other, size in sizes.items() if other != heads.output)
    assert rows == width * (stay + 2 * len(groups))


def test_removing_neurons_is_masking_them(stored: Stored) -> None:
    dense, block = stored.block(dtype=torch.float64), stored.block(dtype=torch.float64)
    call, x = around(stored).arguments, hidden()
    neurons = heads_and_neurons(block, around(stored))["mlp"]
    kept = torch.rand(neurons.number, generator=torch.Generator().manual_seed(2)) < 0.5
    stays = int(kept.sum())
    for name, (rows, columns) in neurons.masks(kept).items():
        layer = prune(linears(block)[name], rows=rows, columns=columns)
        fused = linears(dense)[name].out_features // neurons.number
        assert list(layer.kept.shape) == ([WIDTH, stays] if rows is None else [fused * stays, WIDTH])
        block.set_submodule(name, layer)
    handle = linears(dense)[neurons.output].register_forward_pre_hook(lambda _module, x: (x[0] * kept,))
    with torch.no_grad():
        torch.testing.assert_close(block(x, **call), dense(x, **call), rtol=1e-9, atol=1e-9)
    handle.remove()


def test_a_row_that_several_heads_need_stays(tmp_path: Path) -> None:
    """A norm over all heads together ties them."""
    stored = store(tiny_model("llama"), tmp_path)
    block = stored.block(dtype=torch.float64)
    plain = heads_and_neurons(block, around(stored))["attention"]

    class Joint(nn.Module):
        """Normalises all heads of a query together, as OLMo2 does."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y / y.square().mean(-1, keepdim=True).sqrt()

    query = block.get_submodule("self_attn.q_proj")
    assert isinstance(query, nn.Linear)
    block.set_submodule("self_attn.q_proj", Joint(query))
    tied = heads_and_neurons(block, around(stored))["attention"]
    assert (tied.rows["self_attn.q_proj.linear"] == -1).all()
    assert torch.equal(tied.rows["self_attn.k_proj"], plain.rows["self_attn.k_proj"])
    kept = torch.tensor([True, False, False, False])
    rows, _ = tied.masks(kept)["self_attn.q_proj.linear"]
    assert rows is not None and rows.all()
