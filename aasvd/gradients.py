"""Gradients of the dense model's loss, block by block from the last to the first.

With the original activations on disk, one block at a time is run forward and backward: it turns the
gradient at its output into that at its input, which is written for the block before it. So no more than
one block is in memory, and the whole costs about three forward passes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd import blocks
from aasvd.artifacts import Activations
from aasvd.covariance import Gram


class Fisher(NamedTuple):
    """What is kept of the gradients ∂loss/∂W of one linear; the loss is each sequence's, summed over tokens.

    Attributes:
        squared: Fisher information of each input channel: the mean over sequences of (∂loss/∂W)², summed
            over outputs, (n,) float64.
        norm: Frobenius norm of ∂loss/∂W, averaged over sequences before the norm is taken.
    """

    squared: Tensor
    norm: Tensor


def head_gradient(
    head: blocks.Head, hidden: Activations, ids: Tensor, *, on_gradient: Callable[[Tensor], None]
) -> float:
    """Differentiate the loss with respect to what leaves the last block.

    Args:
        head: The model behind its blocks.
        hidden: What leaves the last block, (sequences, tokens, width).
        ids: The tokens of the first sequences: as many as are to count, (sequences, tokens).
        on_gradient: Called with each sequence's gradient, (1, tokens, width).

    Returns:
        The mean loss per predicted token, in nats.
    """
    total = 0.0
    for index in range(len(ids)):
        x = hidden.read([index]).requires_grad_(True)
        loss = head.loss(x, ids[index : index + 1]).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        on_gradient(gradient)
        total += loss.item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def block_gradients(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    *,
    inputs: Activations,
    upstream: Activations,
    arguments: Mapping[str, Any],
    device: torch.device,
    on_gradient: Callable[[Tensor], None],
) -> dict[str, Tensor]:
    """Return the second moment E[g gᵀ] of the gradients g = ∂loss/∂y at the outputs y of every linear.

    Args:
        block: The original block on `device`; its parameters need no gradients.
        groups: Names of its linears.
        inputs: Inputs of the block, (sequences, tokens, width).
        upstream: ∂loss/∂output of the block, of as many of its first sequences as are to count.
        arguments: The block's keyword arguments.
        device: Where the block is.
        on_gradient: Called with each sequence's ∂loss/∂input, (1, tokens, width).

    Returns:
        A mean over tokens by linear, (m, m) float64.

    Raises:
        ValueError: If a gradient is not finite (names the layer).
    """
    linears = _linears(block, groups)
    # float32: nothing is inverted, and a metric from a few thousand tokens has no more digits than that.
    outer = {
        name: Gram(linear.out_features, device=device, dtype=torch.float32)
        for name, linear in linears.items()
    }

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(outer[name].add)  # type: ignore[no-untyped-call]

        return hook

    with _hooked(linears, watch):
        for x in _backward(block, inputs, upstream, arguments, device):
            assert x.grad is not None
            on_gradient(x.grad)
    tokens = upstream.shape[0] * upstream.shape[1]
    return _finite({name: gram.matrix() / tokens for name, gram in outer.items()})


def block_fisher(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    *,
    inputs: Activations,
    upstream: Activations,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Fisher]:
    """Return what is kept of the gradients of every linear's weight; arguments as in `block_gradients`.

    Raises:
        ValueError: If a gradient is not finite (names the layer).
    """
    linears = _linears(block, groups)
    count = len(upstream)
    squared, mean = {}, {}
    for name, linear in linears.items():
        linear.weight.requires_grad_(True)
        squared[name] = torch.zeros(linear.in_features, dtype=torch.float64, device=device)
        mean[name] = torch.zeros_like(linear.weight, dtype=torch.float32, requires_grad=False)
    # One sequence at a time: the square of each sequence's gradient counts.
    for _ in _backward(block, inputs, upstream, arguments, device):
        for name, linear in linears.items():
            gradient = linear.weight.grad
            assert gradient is not None, f"{name} does not reach the block's output"
            columns = torch.linalg.vector_norm(gradient, dim=0, dtype=torch.float32)
            squared[name] += columns.double().square() / count
            mean[name].add_(gradient, alpha=1 / count)
            linear.weight.grad = None
    _finite(squared)
    return {name: Fisher(squared[name], mean[name].norm().double()) for name in linears}


def truncation_losses(
    block: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    inputs: Activations,
    upstream: Activations,
    arguments: Mapping[str, Any],
    device: torch.device,
    on_sequence: Callable[[], object],
) -> dict[str, Tensor]:
    """Return what the loss gains where one linear keeps only its first k directions, for every k.

    To second order, with Fisher's approximation of the Hessian and tokens on their own: E[(gᵀe)²] / 2 in
    nats per token, g the loss's gradient at the linear's output and e = Σ_{i > k} u_i v_i x what is missing
    there. g and x are those of the same token: where few tokens have both large gradients and large inputs,
    or never both, E[g gᵀ] and E[x xᵀ] alone (as in K-FAC) say too little or too much.

    Args:
        block: The original block on `device`; its parameters need no gradients.
        factors: By linear u (m, r) and v (r, n), the directions in their order; with all of them no output
            changes.
        inputs: Inputs of the block, (sequences, tokens, width).
        upstream: ∂loss/∂output of the block, of as many of its first sequences as are to count.
        arguments: The block's keyword arguments.
        device: Where the block is.
        on_sequence: Called after each sequence.

    Returns:
        By linear, the losses at k = 0, ..., r − 1, (r,) float64.

    Raises:
        ValueError: If a gradient is not finite (names the layer).
    """
    linears = _linears(block, [list(factors)])
    found = {
        name: torch.zeros(len(v), dtype=torch.float64, device=device) for name, (_, v) in factors.items()
    }

    def watch(name: str) -> Callable[..., None]:
        u, v = (factor.to(device, torch.float32) for factor in factors[name])

        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                parts = (gradient.flatten(0, -2).float() @ u) * (x.float() @ v.mT)
                missing = parts.flip(1).cumsum(1)
                found[name] += missing.square().sum(0, dtype=torch.float64).flip(0)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    with _hooked(linears, watch):
        for _ in _backward(block, inputs, upstream, arguments, device):
            on_sequence()
    tokens = upstream.shape[0] * upstream.shape[1]
    return _finite({name: losses / (2 * tokens) for name, losses in found.items()})


def _linears(block: nn.Module, groups: Sequence[Sequence[str]]) -> dict[str, nn.Linear]:
    linears = blocks.linears(block)
    return {name: linears[name] for group in groups for name in group}


def _backward(
    block: nn.Module,
    inputs: Activations,
    upstream: Activations,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Tensor]:
    """Run a block forward and backward over the first sequences, one at a time; yield each input."""
    dtype = next(block.parameters()).dtype
    for index in range(len(upstream)):
        x = inputs.read([index]).to(device, dtype).requires_grad_(True)
        block(x, **arguments).backward(upstream.read([index]).to(device, dtype))
        yield x


def _finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the gradient of {name} is not finite; set calibration.dtype to float32")
    return found


@contextmanager
def _hooked(linears: Mapping[str, nn.Module], watch: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Let a hook that is made for each linear, by its name, see its calls."""
    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
