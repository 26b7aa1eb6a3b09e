"""Compress one decoder block: the original's covariances, then anchored factors, group by group."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd.artifacts import Activations
from aasvd.capture import recording, watching
from aasvd.covariance import CrossGram, Gram
from aasvd.lowrank import LowRankLinear
from aasvd.rank import uniform_rank
from aasvd.solve import factorize, prepare, relative_error


class Objective(NamedTuple):
    """A layer objective as the statistics it needs and the blend it uses (see `aasvd.solve`).

    Attributes:
        shifted: Whether it looks at the inputs that the partly compressed model sees.
        original: Whether it looks at the original inputs.
        blend: Weight of the original outputs W X against W X' in what is fitted.
    """

    shifted: bool
    original: bool
    blend: float


OBJECTIVES = {
    "input_agnostic": Objective(shifted=False, original=False, blend=0.0),
    "input_aware": Objective(shifted=False, original=True, blend=0.0),
    "shift_aware": Objective(shifted=True, original=False, blend=0.0),
    "anchored": Objective(shifted=True, original=True, blend=1.0),
}


def objective(name: str, *, blend: float) -> Objective:
    """Return the objective of a name in params.yaml; `blended` takes its blend from there too.

    Raises:
        ValueError: If there is no such objective.
    """
    if name == "blended":
        return Objective(shifted=True, original=True, blend=blend)
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join([*OBJECTIVES, 'blended'])}")
    return OBJECTIVES[name]


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
) -> list[Tensor]:
    """Run the original block over all calibration sequences and accumulate its covariances.

    Args:
        block: The original block on `device`.
        groups: Names of its linears, grouped by shared input.
        inputs: Inputs of the original block, (sequences, tokens, width).
        arguments: The block's keyword arguments.
        batch: Sequences per forward pass.
        device: Where the block is.
        on_output: Called with each batch of the block's outputs.

    Returns:
        One Gram matrix X Xᵀ per group, (features, features) float64.

    Raises:
        ValueError: If an output or a covariance (names its layers) is not finite.
    """
    dtype = next(block.parameters()).dtype
    grams = [Gram(_features(block, group), device=device) for group in groups]
    with watching(block, groups) as seen:
        for hidden in inputs.batches(batch):
            output = block(hidden.to(device, dtype), **arguments)
            if not torch.isfinite(output).all():
                cause = _not_finite(block, groups, seen)
                raise ValueError(f"the original block's output is not finite: {cause}")
            on_output(output)
            for gram, x in zip(grams, seen, strict=True):
                gram.add(x)
            seen.clear()
    matrices = [gram.matrix() for gram in grams]
    for group, matrix in zip(groups, matrices, strict=True):
        if not torch.isfinite(matrix).all():
            raise ValueError(f"the covariance of the inputs of {', '.join(group)} is not finite")
    return matrices


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
        tensors: `<linear>.u` and `<linear>.v` of every compressed linear, float32 on the host.
        report: Per linear: rank (None where it stays dense), relative errors and the numerics used.
    """

    tensors: dict[str, Tensor]
    report: dict[str, dict[str, float | int | None]]


def solve_block(
    original: nn.Module,
    compressed: nn.Module,
    groups: Sequence[Sequence[str]],
    *,
    objective: Objective,
    parameter_ratio: float,
    storage: str,
    ridge: float,
    grams: Sequence[Tensor],
    token_count: int,
    stream: Stream | None,
    device: torch.device,
) -> Solution:
    """Factorize a block's linears, group by group in the order they are called.

    Each group sees the shifted inputs that the groups compressed before it cause; factors are put into
    `compressed` as they are found.

    Args:
        original: The original block on `device`.
        compressed: A copy of it, changed in place.
        groups: Names of its linears, grouped by shared input.
        objective: What is minimised.
        parameter_ratio: Share of each matrix's parameters that is kept.
        storage: Format whose cost decides the rank at that share (see `aasvd.rank`).
        ridge: Pull towards W, relative to the mean diagonal of the covariance.
        grams: X Xᵀ of each group on the original side.
        token_count: Number of tokens the covariances sum over.
        stream: Activations of both sides; needed by objectives that look at shifted inputs.
        device: Where the block is.

    Raises:
        ValueError: If a covariance is not finite (names the layers).
    """
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, float | int | None]] = {}
    for index, group in enumerate(groups):
        weights = {name: _linear(original, name).weight.detach() for name in group}
        ranks = {
            name: uniform_rank(*w.shape, parameter_ratio=parameter_ratio, storage=storage)
            for name, w in weights.items()
        }
        gram = unshifted = grams[index].to(device)
        cross = None
        if objective.shifted:
            assert stream is not None
            gram, cross = _shifted_statistics(
                original, compressed, groups, index, objective=objective, stream=stream
            )
        elif not objective.original:
            # As if every token excited all directions alike.
            gram = torch.eye(len(unshifted), dtype=torch.float64, device=device) * token_count
        for matrix in (gram, cross):
            if matrix is not None and not torch.isfinite(matrix).all():
                raise ValueError(f"the covariance of the inputs of {', '.join(group)} is not finite")
        need_root = any(ranks[name] is not None and w.shape[0] > w.shape[1] for name, w in weights.items())
        target = prepare(
            gram,
            cross_gram=cross,
            blend=objective.blend,
            ridge=ridge,
            need_root=need_root,
            token_count=token_count,
        )
        for name, weight in weights.items():
            rank = ranks[name]
            entry: dict[str, float | int | None] = {"rank": rank}
            report[name] = entry
            if rank is None:
                continue
            factors = factorize(weight, target, rank=rank)
            fitted = factors.u @ factors.v
            entry |= {
                # Each objective's own error: against W X where it is anchored, else on the inputs it uses.
                "relative_error": relative_error(
                    weight,
                    fitted,
                    original=gram if cross is None else unshifted,
                    cross_gram=cross,
                    shifted=None if cross is None else gram,
                ),
                "energy_kept": factors.kept,
                "directions_dropped": target.dropped,
                "cutoff": target.cutoff,
                "ridge": target.ridge,
            }
            tensors[f"{name}.u"] = factors.u.float().cpu()
            tensors[f"{name}.v"] = factors.v.float().cpu()
            bias = _linear(original, name).bias
            put(compressed, name, tensors[f"{name}.u"], tensors[f"{name}.v"], bias=bias, like=weight)
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
    objective: Objective,
    stream: Stream,
) -> tuple[Tensor, Tensor | None]:
    """Return X'X'ᵀ of one group and, where the objective fits original outputs, XX'ᵀ."""
    features = _features(compressed, groups[index])
    gram = Gram(features, device=stream.device)
    cross = CrossGram(features, device=stream.device) if objective.blend > 0 else None
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
    return _linear(block, group[0]).in_features


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
