"""Stages that choose ranks: what an allocation looks at, block by block, and the allocation."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from aasvd import allocation, blocks, calibration, measures, objectives
from aasvd.artifacts import Activations, read_json, read_tensors, write_json, write_tensors
from aasvd.rank import uniform_rank
from aasvd.stages.loading import Block, statistics_of
from aasvd.stages.stage import PASSES, stage


def measure_block(
    *,
    source: str,
    covariances: str,
    gradients: str | None,
    fisher: str | None,
    tokens: str | None,
    inputs: str | None,
    outputs: str | None,
    output: str,
    record: str,
    index: int,
    measure: str,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Measure what an allocation of ranks looks at, on one original block."""
    with stage(f"measure block {index}", log=Path(log), record=Path(record), advice=PASSES):
        around = Block(source, index, settings, record=record)
        kind, _, number = measure.partition("-")
        if kind == "profile":
            assert inputs and outputs
            found = measures.profile(
                Activations(Path(inputs)), Activations(Path(outputs)), device=around.device
            )
            return write_tensors(Path(output), found)
        groups = statistics_of(covariances, gradients=gradients, device=around.device)
        statistics = {name: known for group, known in groups.items() for name in group}
        linears = blocks.linears(around.original())
        weights = {name: linears[name].weight for name in statistics}
        if kind == "spectra":
            found = measures.spectra(weights, groups)
        elif kind == "influence":
            found = measures.influence(weights, groups, objective=number)
        elif kind == "relative_gradients":
            norms = read_tensors(Path(fisher or ""), device=around.device)
            found = {
                name: (norms[f"norm:{name}"] / weight.double().norm())[None]
                for name, weight in weights.items()
            }
        else:
            assert inputs and tokens
            found = _sensitivity(around, weights, statistics, Path(inputs), Path(tokens), int(number))
        write_tensors(Path(output), found)


def _sensitivity(
    around: Block,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, objectives.Statistics],
    inputs: Path,
    tokens: Path,
    sequences: int,
) -> dict[str, Tensor]:
    """Try ASVD's truncation of every linear at every candidate ratio."""
    x = Activations(inputs)
    ids = calibration.read_tokens(tokens)[:sequences]
    trials: dict[str, list[Tensor]] = {}
    options = objectives.Options(blend=0.0, ridge=0.0)
    for name, weight in weights.items():
        solve = objectives.solver("asvd", statistics[name], options=options)
        trials[name] = []
        for ratio in allocation.CANDIDATES:
            rank = uniform_rank(*weight.shape, parameter_ratio=ratio, storage="factors")
            factors = None if rank is None else solve(name, weight, rank).factors
            trials[name].append(weight if factors is None else factors.u @ factors.v)
    later = range(around.index, len(around.parts.blocks))
    loaded = [
        functools.partial(
            blocks.load_block, around.source, around.parts, block, device=around.device, dtype=around.dtype
        )
        for block in later
    ]
    arguments = blocks.forward_arguments(
        around.parts, tokens=x.shape[1], device=around.device, dtype=around.dtype
    )
    head = blocks.Head(around.source, around.parts, device=around.device, dtype=around.dtype)
    return measures.sensitivity(
        loaded,
        arguments[around.index :],
        trials,
        hidden=x.read(list(range(len(ids)))),
        loss=lambda hidden: float(head.loss(hidden, ids).sum()) / (len(ids) * (ids.shape[1] - 1)),
    )


def allocate(
    *,
    outline: str,
    measured: Mapping[str, Sequence[str]],
    output: str,
    record: str,
    parameter_ratio: float,
    compression: Mapping[str, Any],
    log: str,
) -> None:
    """Choose the rank of every linear at the parameter budget; `measured` are files by measure and block."""
    with stage("allocate", log=Path(log), record=Path(record), advice=PASSES) as described:
        model = read_json(Path(outline))
        layers = []
        for name, shape in model["linears"].items():
            index, _, inner = name.removeprefix(f"{model['path']}.").partition(".")
            layers.append(allocation.Layer(int(index), inner, tuple(shape)))
        host = torch.device("cpu")
        problem = allocation.Problem(
            layers,
            parameter_ratio,
            {
                measure.partition("-")[0]: [read_tensors(Path(file), device=host) for file in files]
                for measure, files in measured.items()
            },
            compression,
        )
        ranks, notes = allocation.allocate(compression["allocation"], problem)
        stored = problem.stored(ranks)
        achieved = stored / sum(layer.size for layer in layers)
        described |= {"budget": problem.budget, "stored": stored, "achieved": achieved, **notes}
        named = {f"{layer.block}.{layer.name}": rank for layer, rank in zip(layers, ranks, strict=True)}
        write_json(Path(output), {"ranks": named})
        dense = sum(rank is None for rank in ranks)
        tqdm.write(f"allocated ranks to {len(layers)} linears, {dense} dense: {achieved:.4f} kept")
