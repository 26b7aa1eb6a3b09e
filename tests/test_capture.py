from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import TINY
from stored import Stored
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aasvd import attention
from aasvd.capture import recording, watching


def hooked(block: nn.Module, groups: list[list[str]], call: Callable[[], object]) -> dict[str, Tensor]:
    """Return what every linear of a block reads, by ordinary hooks."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name in [name for group in groups for name in group]:

        def record(
            _module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor, name: str = name
        ) -> None:
            inputs[name] = arguments[0].clone()

        handles.append(block.get_submodule(name).register_forward_hook(record))
    call()
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("architecture", TINY)
@torch.no_grad()
def test_recorded_inputs_are_those_of_a_whole_pass(
    stored: Callable[[str], Stored], architecture: str
) -> None:
    tiny = stored(architecture)
    block, groups, arguments = tiny.block(), tiny.groups(), tiny.arguments()[0]
    hidden = tiny.hidden(3)
    expected = hooked(block, groups, lambda: block(hidden, **arguments))
    with watching(block, groups) as seen:
        whole = block(hidden, **arguments)
        for group, inputs in zip(groups, seen, strict=True):
            assert all(torch.equal(inputs, expected[name]) for name in group)
    for index, group in enumerate(groups):
        with recording(block, groups, index) as recorder:
            block(hidden, **arguments)
            inputs = recorder.take()
        assert all(torch.equal(inputs, expected[name]) for name in group)
    assert torch.equal(block(hidden, **arguments), whole)


@torch.no_grad()
def test_linears_from_the_recorded_group_on_do_no_work(stored: Callable[[str], Stored]) -> None:
    """Their weights may be anything: they are not read, and memory for their outputs is not taken."""
    tiny = stored("llama")
    groups, arguments, hidden = tiny.groups(), tiny.arguments()[0], tiny.hidden(2)
    for index, group in enumerate(groups):
        block = tiny.block()
        expected = hooked(block, groups, lambda block=block: block(hidden, **arguments))
        for later in groups[index:]:
            for name in later:
                block.get_submodule(name).weight.fill_(torch.nan)
        with recording(block, groups, index) as recorder:
            assert torch.isfinite(block(hidden, **arguments)).all()
            assert torch.equal(recorder.take(), expected[group[0]])
            output = block.get_submodule(group[0])(hidden)
            assert output.untyped_storage().nbytes() == hidden.element_size()


class Pair(nn.Module):
    """Two linears in a row; fails in between if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        middle = self.first(x)
        if self.fail:
            raise RuntimeError("out of memory")
        return self.second(middle)


GROUPS = [["first"], ["second"]]


def clean(block: nn.Module) -> bool:
    return all(
        "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks
        for module in block.modules()
    )


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_block_is_as_before_also_after_an_error(fail: bool, index: int) -> None:
    block, x = Pair(), torch.ones(5, 3)
    before = block(x)
    block.fail = fail
    for context in (recording(block, GROUPS, index), watching(block, GROUPS)):
        if fail:
            with pytest.raises(RuntimeError, match="out of memory"), context:
                block(x)
        else:
            with context:
                block(x)
        assert clean(block)
    block.fail = False
    assert torch.equal(block(x), before)


def test_hooks_of_others_stay() -> None:
    block, calls = Pair(), []
    block.first.register_forward_pre_hook(lambda *_: calls.append("mine"))
    with recording(block, GROUPS, 0), watching(block, GROUPS):
        block(torch.ones(1, 3))
    block(torch.ones(1, 3))
    assert calls == ["mine", "mine"]


def test_recorded_input_is_handed_out_once() -> None:
    block = Pair()
    with recording(block, GROUPS, 1) as recorder:
        block(torch.ones(1, 3))
        recorder.take()
        with pytest.raises(AssertionError, match="the block was not called"):
            recorder.take()


def test_watched_inputs_are_forgotten_at_the_end() -> None:
    """So that no activation outlives the pass it belongs to."""
    block = Pair()
    with watching(block, GROUPS) as seen:
        block(torch.ones(1, 3))
        assert [tuple(x.shape) for x in seen] == [(1, 3), (1, 4)]
    assert seen == []


@torch.no_grad()
def test_attention_is_spared_where_its_values_are_not_computed(
    stored: Callable[[str], Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take longest of all that a pass up to the first group still does, and on the slowest path."""
    tiny, calls = stored("llama"), []
    block, groups, arguments, hidden = tiny.block(), tiny.groups(), tiny.arguments()[0], tiny.hidden(2)

    def counted(*arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
        calls.append(arguments)
        return sdpa_attention_forward(*arguments, **keywords)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    for index, expected in enumerate([0, 1, 1, 1]):
        calls.clear()
        with recording(block, groups, index):
            block(hidden, **arguments)
        assert len(calls) == expected
