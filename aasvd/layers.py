"""Measure how far the output of every linear of a compressed block lies from the original's."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aasvd.artifacts import Activations

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
        Per linear, and as `output` for the block: `mse`, the mean over elements, and `cosine`, the mean over
        tokens of 1 - cosine similarity.
    """
    dtype = next(original.parameters()).dtype
    sums = {name: {"squared": 0.0, "cosine": 0.0, "tokens": 0, "width": 0} for name in [*names, OUTPUT]}
    with _outputs(original, names) as wanted, _outputs(compressed, names) as found:
        for x, x_shifted in zip(inputs.batches(batch), shifted.batches(batch), strict=True):
            wanted[OUTPUT] = original(x.to(device, dtype), **arguments)
            found[OUTPUT] = compressed(x_shifted.to(device, dtype), **arguments)
            for name, total in sums.items():
                a, b = (side[name].float().flatten(0, -2) for side in (wanted, found))
                total["squared"] += float((a - b).square().sum(dtype=torch.float64))
                total["cosine"] += float((1 - F.cosine_similarity(a, b, dim=-1)).sum(dtype=torch.float64))
                total["tokens"] += len(a)
                total["width"] = a.shape[1]
    return {
        name: {
            "mse": total["squared"] / (total["tokens"] * total["width"]),
            "cosine": total["cosine"] / total["tokens"],
        }
        for name, total in sums.items()
    }


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
