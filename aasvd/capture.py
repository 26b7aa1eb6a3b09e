"""Record what named linear layers read, or let something else be called in their place."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Recorder:
    """The latest input of one group of linears."""

    def __init__(self) -> None:
        """Start empty."""
        self.inputs: Tensor | None = None

    def take(self) -> Tensor:
        """Return the recorded tensor, shape (..., features), and forget it."""
        assert self.inputs is not None, "the block was not called"
        inputs, self.inputs = self.inputs, None
        return inputs


@contextlib.contextmanager
def recording(block: nn.Module, groups: Sequence[Sequence[str]], index: int) -> Iterator[Recorder]:
    """Record the input of group `index` while the block is called; groups from there on do no work.

    A pass cannot be stopped without raising, so the linears that come later return zeros of no size in
    memory instead: what remains of the pass behind them is elementwise and costs little.

    Args:
        block: A block, original or partly compressed.
        groups: Names of its linears in the order they are called.
        index: The group to record.
    """
    recorder = Recorder()

    def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorder.inputs = inputs[0]

    handle = block.get_submodule(groups[index][0]).register_forward_pre_hook(record)
    try:
        with without(block, [name for group in groups[index:] for name in group]):
            yield recorder
    finally:
        handle.remove()


@contextlib.contextmanager
def without(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let linears of a block return zeros, of no size in memory, for a while."""
    with instead(block, dict.fromkeys(names, _zeros)):
        yield


def _zeros(linear: nn.Linear, x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)


@contextlib.contextmanager
def instead(block: nn.Module, calls: Mapping[str, Callable[[nn.Linear, Tensor], Tensor]]) -> Iterator[None]:
    """Call functions, with the linear and its input, in the place of linears of a block for a while."""
    modules = {name: block.get_submodule(name) for name in calls}
    for name, module in modules.items():
        module.forward = functools.partial(calls[name], module)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


@contextlib.contextmanager
def watching(block: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[list[Tensor]]:
    """Collect the inputs of all groups, in their order, during ordinary calls of a block."""
    inputs: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])

    handles = [block.get_submodule(group[0]).register_forward_pre_hook(record) for group in groups]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
        inputs.clear()


@contextlib.contextmanager
def sharing(modules: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """Yield a list that fills with the names of modules as they are called, grouped by the tensor they read.

    Modules that receive the same tensor object form a group; groups are in the order of their first call.
    """
    inputs: list[Tensor] = []
    found: list[list[str]] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for tensor, names in zip(inputs, found, strict=True):
                if tensor is arguments[0]:
                    names.append(name)
                    return
            inputs.append(arguments[0])
            found.append([name])

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
