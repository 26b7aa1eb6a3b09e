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

from aasvd.artifacts import Activations
from aasvd.blocks import Head
from aasvd.covariance import Gram


class Gradients(NamedTuple):
    """What is kept of the gradients of one linear y = W x; the loss is each sequence's, summed over tokens.

    Attributes:
        squared: Fisher information of each input channel: the mean over sequences of (∂loss/∂W)², summed
            over outputs, (n,) float64.
        outer: Mean over tokens of g gᵀ with g = ∂loss/∂y, (m, m) float64.
        norm: Frobenius norm of ∂loss/∂W, averaged over sequences before the norm is taken.
    """

    squared: Tensor
    outer: Tensor
    norm: Tensor


def head_gradient(
    head: Head, hidden: Activations, ids: Tensor, *, on_gradient: Callable[[Tensor], None]
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
) -> dict[str, Gradients]:
    """Run one original block forward and backward over the first sequences, one at a time.

    Args:
        block: The original block on `device`; its linears' weights are made to require gradients.
        groups: Names of its linears.
        inputs: Inputs of the block, (sequences, tokens, width).
        upstream: ∂loss/∂output of the block, of as many of its first sequences as are to count.
        arguments: The block's keyword arguments.
        device: Where the block is.
        on_gradient: Called with each sequence's ∂loss/∂input, (1, tokens, width).

    Raises:
        ValueError: If a gradient is not finite (names the layer).
    """
    dtype = next(block.parameters()).dtype
    names = [name for group in groups for name in group]
    linears = {name: block.get_submodule(name) for name in names}
    weights: dict[str, Tensor] = {}
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        linear.weight.requires_grad_(True)
        weights[name] = linear.weight
    outer = {name: Gram(len(weight), device=device) for name, weight in weights.items()}
    squared = {
        name: torch.zeros(weight.shape[1], dtype=torch.float64, device=device)
        for name, weight in weights.items()
    }
    mean = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    with _watching_outputs(linears, outer):
        for index in range(len(upstream)):
            x = inputs.read([index]).to(device, dtype).requires_grad_(True)
            output = block(x, **arguments)
            output.backward(upstream.read([index]).to(device, dtype))
            assert x.grad is not None
            on_gradient(x.grad)
            for name, weight in weights.items():
                assert weight.grad is not None, f"{name} does not reach the block's output"
                columns = torch.linalg.vector_norm(weight.grad, dim=0, dtype=torch.float32)
                squared[name] += columns.double().square() / len(upstream)
                mean[name].add_(weight.grad, alpha=1 / len(upstream))
                weight.grad = None
    tokens = upstream.shape[0] * upstream.shape[1]
    result = {
        name: Gradients(squared[name], outer[name].matrix() / tokens, mean[name].norm().double())
        for name in names
    }
    for name, gradients in result.items():
        if not all(torch.isfinite(part).all() for part in gradients):
            raise ValueError(f"the gradient of {name} is not finite; set calibration.dtype to float32")
    return result


@contextmanager
def _watching_outputs(linears: Mapping[str, nn.Module], outer: Mapping[str, Gram]) -> Iterator[None]:
    """Add the gradient at every linear's output to its Gram matrix during backward passes."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(outer[name].add)  # type: ignore[no-untyped-call]

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
