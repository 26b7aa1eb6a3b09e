"""Measure how far the output of every linear of a compressed block lies from the original's."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aasvd.artifacts import Activations
from aasvd.refine import Distance

OUTPUT = "output"  # stands for the block's own output among the names of linears


@torch.inference_mode()
def layer_errors(
    original: nn.Module,
    compressed: nn.Module,
    names: Sequence[str],
    *,
    inputs: Activations,
    shifted: Activations,
    arguments: Mapping[str, Any],
    batch: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Compare outputs of the original block on original inputs with the compressed one's on shifted inputs.

    Args:
        original: The original block on `device`.
        compressed: The compressed block on `device`.
        names: Linears to compare.
        inputs: Inputs of the original block, (sequences, tokens, width).
        shifted: Inputs of the compressed block, the same sequences.
        arguments: The blocks' keyword arguments.
        batch: Sequences per forward pass.
        device: Where the blocks are.

    Returns:
        The means of `refine.Distance` per linear, and as `output` for the block.
    """
    dtype = next(original.parameters()).dtype
    distances = {name: Distance() for name in [*names, OUTPUT]}
    with _outputs(original, names) as wanted, _outputs(compressed, names) as found:
        for x, x_shifted in zip(inputs.batches(batch), shifted.batches(batch), strict=True):
            wanted[OUTPUT] = original(x.to(device, dtype), **arguments)
            found[OUTPUT] = compressed(x_shifted.to(device, dtype), **arguments)
            for name, distance in distances.items():
                distance.add(found[name], wanted[name])
    return {name: distance.means() for name, distance in distances.items()}


@contextlib.contextmanager
def _outputs(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the named modules return, by name, for a while."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [block.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
