"""Compress one decoder block: the original's statistics, then factors, group by group."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd import blocks
from aasvd.artifacts import Activations
from aasvd.capture import recording, watching
from aasvd.covariance import CrossGram, Gram
from aasvd.lowrank import LowRankLinear
from aasvd.methods import OBJECTIVES
from aasvd.objectives import Options, Statistics, solver
from aasvd.pruned import removed


class Stream(NamedTuple):
    """The activations entering a block on both sides, and how the block is called.

    Attributes:
        original: Inputs of the original block.
        shifted: Inputs of the compressed block, the same sequences.
        arguments: The block's keyword arguments, on `device`.
        batch: Sequences per forward pass.
        device: Where passes run.
        dtype: Float type of the passes.
    """

    original: Activations
    shifted: Activations
    arguments: Mapping[str, Any]
    batch: int
    device: torch.device
    dtype: torch.dtype


class Captured(NamedTuple):
    """What a group of linears reads in the original block.

    Attributes:
        gram: X Xᵀ, (features, features) float64.
        absolute: Σ over tokens of |x|, (features,) float64.
    """

    gram: Tensor
    absolute: Tensor


@torch.inference_mode()
def capture_block(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    *,
    inputs: Activations,
    arguments: Mapping[str, Any],
    batch: int,
    device: torch.device,
    on_output: Callable[[Tensor], None],
) -> list[Captured]:
    """Run the original block over all calibration sequences and accumulate its statistics.

    Args:
        block: The original block on `device`.
        groups: Names of its linears, grouped by shared input.
        inputs: Inputs of the original block, (sequences, tokens, width).
        arguments: The block's keyword arguments.
        batch: Sequences per forward pass.
        device: Where the block is.
        on_output: Called with each batch of the block's outputs.

    Returns:
        The statistics of each group.

    Raises:
        ValueError: If an output or a covariance (names its layers) is not finite.
    """
    dtype = next(block.parameters()).dtype
    grams = [Gram(_features(block, group), device=device) for group in groups]
    absolute = [torch.zeros(_features(block, g), dtype=torch.float64, device=device) for g in groups]
    with watching(block, groups) as seen:
        for hidden in inputs.batches(batch):
            output = block(hidden.to(device, dtype), **arguments)
            if not torch.isfinite(output).all():
                cause = _not_finite(block, groups, seen)
                raise ValueError(f"the original block's output is not finite: {cause}")
            on_output(output)
            for gram, total, x in zip(grams, absolute, seen, strict=True):
                gram.add(x)
                total += x.abs().flatten(0, -2).sum(0, dtype=torch.float32)
            seen.clear()
    matrices = [gram.matrix() for gram in grams]
    for group, matrix in zip(groups, matrices, strict=True):
        if not torch.isfinite(matrix).all():
            raise ValueError(f"the covariance of the inputs of {', '.join(group)} is not finite")
    return [Captured(*pair) for pair in zip(matrices, absolute, strict=True)]


@torch.inference_mode()
def bucket_grams(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    *,
    inputs: Activations,
    buckets: Sequence[Sequence[int]],
    arguments: Mapping[str, Any],
    device: torch.device,
) -> list[Tensor]:
    """Return each group's X Xᵀ with X averaged over the sequences of each bucket (AdaSVD's stack of batch).

    Args:
        block: The original block on `device`.
        groups: Names of its linears, grouped by shared input.
        inputs: Inputs of the original block, (sequences, tokens, width).
        buckets: The sequences of each bucket.
        arguments: The block's keyword arguments.
        device: Where the block is.
    """
    dtype = next(block.parameters()).dtype
    grams = [Gram(_features(block, group), device=device) for group in groups]
    with watching(block, groups) as seen:
        for sequences in buckets:
            totals: list[Tensor] = []
            for sequence in sequences:
                block(inputs.read([sequence]).to(device, dtype), **arguments)
                read = [x.to(torch.float64) for x in seen]
                totals = [total + x for total, x in zip(totals, read, strict=True)] if totals else read
                seen.clear()
            for gram, total in zip(grams, totals, strict=True):
                gram.add(total / len(sequences))
    return [gram.matrix() for gram in grams]


def _not_finite(block: nn.Module, groups: Sequence[Sequence[str]], seen: Sequence[Tensor]) -> str:
    """Say where numbers first stop being finite: in a block's weights, or in what reaches its linears."""
    weights = [name for name, weight in block.named_parameters() if not torch.isfinite(weight).all()]
    if weights:
        return f"the model's own {', '.join(weights)} is not"
    remedy = "set calibration.dtype to float32 if it is not"
    for group, x in zip(groups, seen, strict=True):
        if not torch.isfinite(x).all():
            return f"the input of {', '.join(group)} is not; {remedy}"
    return f"it overflows behind {', '.join(groups[-1])}; {remedy}"


class Solution(NamedTuple):
    """What solving one block gives.

    Attributes:
        tensors: `<linear>.u` and `<linear>.v` of every factorized linear, float32 on the host, and those of
            `aasvd.pruned.PrunedLinear` of every linear that was removed.
        report: Per linear: rank (None where it stays dense), relative errors and the numerics used.
    """

    tensors: dict[str, Tensor]
    report: dict[str, dict[str, float | int | None]]


def solve_block(
    original: nn.Module,
    compressed: nn.Module,
    groups: Sequence[Sequence[str]],
    *,
    objective: str,
    options: Options,
    weights: Mapping[str, Tensor],
    ranks: Mapping[str, int | None],
    statistics: Sequence[Statistics],
    stream: Stream | None,
) -> Solution:
    """Factorize a block's linears, group by group in the order they are called.

    Where the objective looks at shifted inputs, each group sees those that the groups compressed before
    it cause; factors are put into `compressed` as they are found.

    Args:
        original: The original block.
        compressed: A copy of it, changed in place.
        groups: Names of its linears, grouped by shared input.
        objective: A name in `aasvd.methods.OBJECTIVES`.
        options: Blend and ridge.
        weights: Those of the linears as they are stored; `original` has them in the passes' float type.
        ranks: Rank of every linear; None leaves it dense, 0 removes it.
        statistics: What is known of each group on the original side.
        stream: Activations of both sides; needed by objectives that look at shifted inputs.

    Raises:
        ValueError: If a covariance is not finite (names the layers).
    """
    needs, linears = OBJECTIVES[objective].needs, blocks.linears(original)
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, float | int | None]] = {}
    for index, group in enumerate(groups):
        known = statistics[index]
        if "shifted" in needs:
            assert stream is not None
            shifted, cross = _shifted_statistics(
                original, compressed, groups, index, need_cross="cross" in needs, stream=stream
            )
            known = known._replace(shifted=shifted, cross=cross)
        for matrix in (known.gram, known.shifted, known.cross, known.buckets):
            if matrix is not None and not torch.isfinite(matrix).all():
                raise ValueError(f"the covariance of the inputs of {', '.join(group)} is not finite")
        for name in (name for name in group if ranks[name] == 0):
            layer = removed(linears[name])
            report[name] = {"rank": 0}
            tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in layer.state_dict().items()}
            compressed.set_submodule(name, layer)
        if not any(ranks[name] for name in group):
            report |= {name: {"rank": None} for name in group if ranks[name] is None}
            continue
        solve = solver(objective, known, options=options)
        for name in (name for name in group if ranks[name] != 0):
            linear, rank = linears[name], ranks[name]
            report[name] = {"rank": rank}
            if rank is None:
                continue
            factors, numbers = solve(name, weights[name], rank)
            report[name] |= numbers
            tensors[f"{name}.u"] = factors.u.float().cpu()
            tensors[f"{name}.v"] = factors.v.float().cpu()
            put(
                compressed,
                name,
                tensors[f"{name}.u"],
                tensors[f"{name}.v"],
                bias=linear.bias,
                like=linear.weight,
            )
    return Solution(tensors, report)


def put(block: nn.Module, name: str, u: Tensor, v: Tensor, *, bias: Tensor | None, like: Tensor) -> None:
    """Replace a linear of a block by copies of its factors, on the device and in the float type of `like`."""
    # Copies, since refinement trains the block in place.
    low_rank = LowRankLinear.from_factors(
        u.to(like.device, like.dtype, copy=True),
        v.to(like.device, like.dtype, copy=True),
        None if bias is None else bias.detach().clone(),
    )
    block.set_submodule(name, low_rank)


@torch.inference_mode()
def _shifted_statistics(
    original: nn.Module,
    compressed: nn.Module,
    groups: Sequence[Sequence[str]],
    index: int,
    *,
    need_cross: bool,
    stream: Stream,
) -> tuple[Tensor, Tensor | None]:
    """Return X'X'ᵀ of one group and, where the objective fits original outputs, XX'ᵀ."""
    features = _features(compressed, groups[index])
    gram = Gram(features, device=stream.device)
    cross = CrossGram(features, device=stream.device) if need_cross else None
    pairs = zip(stream.original.batches(stream.batch), stream.shifted.batches(stream.batch), strict=True)
    with recording(compressed, groups, index) as shifted, recording(original, groups, index) as unshifted:
        for x, x_shifted in pairs:
            compressed(x_shifted.to(stream.device, stream.dtype), **stream.arguments)
            inputs = shifted.take()
            gram.add(inputs)
            if cross is not None:
                original(x.to(stream.device, stream.dtype), **stream.arguments)
                cross.add(unshifted.take(), inputs)
    return gram.matrix(), None if cross is None else cross.matrix()


def _features(block: nn.Module, group: Sequence[str]) -> int:
    return blocks.linears(block)[group[0]].in_features
