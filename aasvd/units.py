"""What a block can lose whole: its attention and MLP branches, and the heads and neurons in them.

Nothing here knows an architecture. Whose linears are attention's is seen from the module that calls
attention. Which rows of which linears feed a head or a neuron, and which columns of the last linear of a
branch read it, is seen from derivatives: every linear's output and attention's are replaced by independent
variables, and what depends on what shows where gradients arrive.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd import attention
from aasvd.blocks import linears, place
from aasvd.capture import instead, without

BRANCHES = ("attention", "mlp")
# Relative: derivatives are exact up to rounding, which is float32's where models have such norms of heads.
_TOLERANCE = 1e-4
_MIXED = -1


class Example(NamedTuple):
    """How a block is called on sequences that show how it is built; what they hold does not matter.

    Attributes:
        arguments: The block's keyword arguments for sequences of `tokens`.
        width: Width of its input.
        tokens: Length of the sequences.
    """

    arguments: Mapping[str, Any]
    width: int
    tokens: int


class Units(NamedTuple):
    """The heads of an attention branch, or the neurons of an MLP.

    Rows and units are tied through sources: a source is a head's query, a group's key and value, or a
    neuron. It is needed as long as any unit that uses it is there.

    Attributes:
        number: How many units there are.
        output: The linear whose columns read them.
        columns: Unit that each of its columns reads, (in,) int64.
        rows: By linear before it, the source that each row feeds, (out,) int64; -1 for a row that feeds
            none or several, which always stays.
        uses: Whether a unit uses a source, (units, sources) bool; None where each is its own source.
    """

    number: int
    output: str
    columns: Tensor
    rows: dict[str, Tensor]
    uses: Tensor | None

    def masks(self, kept: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Return the rows and columns that stay of every linear where some units, (units,) bool, stay.

        None stands for all rows or all columns.
        """
        needed = kept if self.uses is None else self.uses[kept].any(0)
        # At the end, where -1 finds it: what feeds none or several stays.
        needed = torch.cat((needed, torch.ones(1, dtype=torch.bool)))
        found: dict[str, tuple[Tensor | None, Tensor | None]] = {
            name: (needed[sources], None) for name, sources in self.rows.items()
        }
        found[self.output] = (None, kept[self.columns])
        return found


class _Trace(NamedTuple):
    """One call of a block in which nothing depends on anything but what follows it directly.

    Attributes:
        inputs: What each linear read, by name.
        outputs: The variable in the place of each linear's output.
        heads: Query, key and value as attention got them, (1, heads, tokens, width) each.
        attended: The variable in the place of attention's output, (1, tokens, heads, width).
        attending: For every call of attention, the linears inside the module that called.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    heads: list[Tensor]
    attended: list[Tensor]
    attending: list[list[str]]


def branches(block: nn.Module, example: Example) -> dict[str, list[str]]:
    """Return the names of a block's linears by branch: those of the module that attends, and the others.

    Args:
        block: A block, on any device; the weights of its linears are not looked at.
        example: How it is called.

    Raises:
        ValueError: If the block does not attend exactly once.
    """
    return _branches(block, _trace(block, example))


def heads_and_neurons(block: nn.Module, example: Example) -> dict[str, Units]:
    """Return the units of both branches of a block.

    Args:
        block: A block, on any device; the weights of its linears are not looked at.
        example: How it is called.

    Raises:
        ValueError: If the block does not attend exactly once, or the columns of a branch's last linear do
            not belong to one head or neuron each.
    """
    trace = _trace(block, example)
    names = _branches(block, trace)
    return {"attention": _heads(trace, names["attention"]), "mlp": _neurons(trace, names["mlp"])}


def is_residual(block: nn.Module, example: Example) -> bool:
    """Tell whether a block without its linears returns its input: whether its branches can be removed."""
    parameter = next(block.parameters())
    x = _variable(1, example.tokens, example.width).to(parameter.device, parameter.dtype)
    with torch.no_grad(), without(block, linears(block)):
        return torch.equal(block(x.detach(), **example.arguments), x)


def require_residual(block: nn.Module, example: Example) -> None:
    """Make sure that branches of a block can be removed.

    Raises:
        ValueError: If they cannot, since the block does not only add them to its input.
    """
    if not is_residual(block, example):
        raise ValueError(
            f"{type(block).__name__} does not only add what its linears make of its input to it, so neither "
            "it nor its attention or MLP can be removed"
        )


def _trace(block: nn.Module, example: Example) -> _Trace:
    """Call a block, in float64 on the host, with independent variables behind its linears and attention."""
    trace = _Trace({}, {}, [], [], [])

    def linear(name: str) -> Callable[[nn.Linear, Tensor], Tensor]:
        def call(module: nn.Linear, x: Tensor) -> Tensor:
            trace.inputs[name] = x
            trace.outputs[name] = _variable(*x.shape[:-1], module.out_features)
            return trace.outputs[name]

        return call

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inside = {id(part) for part in module.modules()}
        trace.attending.append([name for name, part in linears(light).items() if id(part) in inside])
        trace.heads.extend((query, key, value))
        sequences, heads, length, _ = query.shape
        trace.attended.append(_variable(sequences, length, heads, value.shape[3]))
        return trace.attended[-1]

    host = torch.device("cpu")
    placed = place(example.arguments, device=host, dtype=torch.float64)
    weights = [parameter for module in linears(block).values() for parameter in module.parameters()]
    zero = torch.zeros((), dtype=torch.float64)
    # A copy without memory for its linears' weights: nothing looks at more of them than their shapes.
    light = copy.deepcopy(block, {id(weight): nn.Parameter(zero.expand(weight.shape)) for weight in weights})
    light.to(host, torch.float64)
    with attention.replaced(attend), instead(light, {name: linear(name) for name in linears(light)}):
        light(_variable(1, example.tokens, example.width), **placed)
    return trace


def _variable(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def _branches(block: nn.Module, trace: _Trace) -> dict[str, list[str]]:
    if len(trace.attending) != 1:
        raise ValueError(
            f"{type(block).__name__} calls attention {len(trace.attending)} times in a way known here; "
            "branches, heads and neurons are found only in blocks that do it once"
        )
    (own,) = trace.attending
    # Those that are called, in their order.
    return {
        "attention": [name for name in trace.outputs if name in own],
        "mlp": [name for name in trace.outputs if name not in own],
    }


def _heads(trace: _Trace, names: Sequence[str]) -> Units:
    """Return the heads of an attention branch; heads that share keys and values use the same source."""
    query, key, value = trace.heads
    attended = trace.attended[0]
    count, groups = query.shape[1], key.shape[1]
    output = _reading(trace, names, [attended])
    columns = _owners(trace.inputs[output], attended, _labels(attended, torch.arange(count), dim=2))
    sources = [
        (query, _labels(query, torch.arange(count), dim=1)),
        (key, _labels(key, count + torch.arange(groups), dim=1)),
        (value, _labels(value, count + torch.arange(groups), dim=1)),
        # Some models have a gate on what attention returns.
        (trace.inputs[output], columns.expand(trace.inputs[output].shape)),
    ]
    uses = torch.zeros(count, count + groups, dtype=torch.bool)
    uses[torch.arange(count), torch.arange(count)] = True
    uses[torch.arange(count), count + torch.arange(count) // (count // groups)] = True
    return Units(count, output, columns, _rows(trace, names, output, sources), uses)


def _neurons(trace: _Trace, names: Sequence[str]) -> Units:
    """Return the neurons of an MLP: the columns of its last linear."""
    output = _reading(trace, names, [trace.outputs[name] for name in names])
    read = trace.inputs[output]
    columns = torch.arange(read.shape[-1])
    rows = _rows(trace, names, output, [(read, columns.expand(read.shape))])
    return Units(len(columns), output, columns, rows, None)


def _reading(trace: _Trace, names: Sequence[str], variables: Sequence[Tensor]) -> str:
    """Return the one linear of a branch whose input depends on variables of the branch."""
    found = [
        name
        for name in names
        if trace.inputs[name].requires_grad
        and any(
            gradient is not None
            for gradient in torch.autograd.grad(
                trace.inputs[name].sum(), list(variables), retain_graph=True, allow_unused=True
            )
        )
    ]
    if len(found) != 1:
        raise ValueError(
            f"{', '.join(found) or 'no linear'} of {', '.join(names)} reads what the others of its branch "
            "make; heads and neurons are found only where one linear does"
        )
    return found[0]


def _labels(tensor: Tensor, labels: Tensor, *, dim: int) -> Tensor:
    """Return, shaped like a tensor, labels that differ along one dimension."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return labels.view(shape).expand(tensor.shape)


def _owners(read: Tensor, variable: Tensor, labels: Tensor) -> Tensor:
    """Return the label of the part of attention's output that each column of what is read reads.

    Raises:
        ValueError: If a column reads several.
    """
    columns = torch.arange(read.shape[-1])
    # Which column a feature of the variable feeds, found as ever; then the other way round.
    fed = _follow(variable, [(read, columns.expand(read.shape))], features=2).flatten()
    owners, own = torch.full_like(columns, _MIXED), labels[0, 0].flatten()
    clean = bool((fed >= 0).all())
    if clean:
        owners[fed] = own
        clean = torch.equal(owners[fed], own) and bool((owners >= 0).all())
    if not clean:
        raise ValueError("what attention returns is not read head by head, so heads cannot be removed")
    return owners


def _rows(
    trace: _Trace, names: Sequence[str], output: str, targets: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the source that each row of the linears before a branch's last one feeds."""
    return {name: _follow(trace.outputs[name], targets) for name in names if name != output}


def _follow(variable: Tensor, targets: Sequence[tuple[Tensor, Tensor]], *, features: int = 1) -> Tensor:
    """Return the label of what each feature of a variable feeds.

    With random weights r of what may be fed, and labels l, the derivatives of Σ r, Σ r (l + 1) and
    Σ r (l + 1)² with respect to an element that feeds label l alone are g, g (l + 1) and g (l + 1)².

    Args:
        variable: Its features are followed.
        targets: What it may feed, and a label for every element of that.
        features: How many of its last dimensions are features; those before are tokens.

    Returns:
        Labels, int64, shaped like the features; -1 where one feeds nothing, or different labels.
    """
    sums = [torch.zeros_like(variable) for _ in range(3)]
    generator = torch.Generator().manual_seed(1)
    for target, labels in targets:
        if not target.requires_grad:
            continue
        weights = torch.rand(target.shape, generator=generator, dtype=torch.float64) + 0.5
        for power, total in enumerate(sums):
            summed = (target * weights * (labels + 1).double() ** power).sum()
            (gradient,) = torch.autograd.grad(summed, variable, retain_graph=True, allow_unused=True)
            if gradient is not None:
                total += gradient
    first, second, third = (total.flatten(0, -1 - features) for total in sums)
    # Where it shows most: for some tokens a neuron is off.
    largest, token = first.abs().max(0)
    fed = largest > 0
    quotient = second.gather(0, token[None])[0] / torch.where(fed, first.gather(0, token[None])[0], 1.0)
    number = quotient.round()
    allowed = _TOLERANCE * number.abs() * largest
    alone = ((second - number * first).abs() <= allowed).all(0)
    alone &= ((third - number * second).abs() <= number.abs() * allowed).all(0)
    return torch.where(fed & alone, number.to(torch.int64) - 1, _MIXED)
