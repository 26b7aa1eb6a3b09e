"""Stages that choose ranks: what an allocation looks at, block by block, and the allocation."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from aasvd import (
    allocation,
    blocks,
    calibration,
    gradients,
    measures,
    methods,
    objectives,
    progress,
    truncation,
)
from aasvd.artifacts import Activations, read_json, read_tensors, write_json, write_tensors
from aasvd.rank import uniform_rank
from aasvd.stages.loading import Block, load_model, model_folder, statistics_of
from aasvd.stages.stage import PASSES, SEQUENCES, stage

_WHOLE = (
    "the allocation dobi trains on the whole model with one sequence at a time: set fewer "
    "calibration.tokens, or another compression.allocation, in params.yaml"
)


def measure_block(
    *,
    source: str,
    covariances: str,
    gradients: str | None,
    fisher: str | None,
    tokens: str | None,
    inputs: str | None,
    outputs: str | None,
    upstream: str | None,
    output: str,
    record: str,
    index: int,
    measure: str,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Measure what an allocation of ranks looks at, on one original block."""
    with stage(f"measure block {index}", log=Path(log), record=Path(record), advice=SEQUENCES):
        x = Activations(Path(inputs)) if inputs else None
        around = Block(source, index, settings, record=record, like=x)
        kind, _, number = measure.partition("-")
        if kind == "profile":
            assert x is not None and outputs
            found = measures.profile(x, Activations(Path(outputs)), device=around.device)
            return write_tensors(Path(output), found)
        if kind == "influence":
            assert x is not None and upstream
            factors = _directions(around, covariances, gradients, objective=number)
            found = _influence(around, factors, x, Activations(Path(upstream)))
            return write_tensors(Path(output), found)
        groups = statistics_of(covariances, device=around.device)
        statistics = {name: known for group, known in groups.items() for name in group}
        weights = _weights(around, statistics)
        if kind == "spectra":
            found = measures.spectra(weights, groups)
        elif kind == "relative_gradients":
            norms = read_tensors(Path(fisher or ""), device=around.device)
            found = measures.relative_gradients(weights, norms)
        else:
            assert x is not None and tokens
            found = _sensitivity(around, weights, statistics, x, Path(tokens), int(number))
        write_tensors(Path(output), found)


def _weights(around: Block, names: Iterable[str]) -> dict[str, Tensor]:
    """Return linears' weights as they are stored, whatever type the passes have."""
    linears = blocks.linears(around.original(torch.float32))
    return {name: linears[name].weight for name in names}


def _directions(
    around: Block, covariances: str, gradients: str | None, *, objective: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return all directions of the block's linears; what they are made from is gone before any pass."""
    needed = gradients if "gradients" in methods.OBJECTIVES[objective].needs else None
    groups = statistics_of(covariances, gradients=needed, device=around.device)
    weights = _weights(around, (name for group in groups for name in group))
    return measures.directions(weights, groups, objective=objective)


def _influence(
    around: Block, factors: Mapping[str, tuple[Tensor, Tensor]], x: Activations, above: Activations
) -> dict[str, Tensor]:
    """Take the loss's gradients at every linear's output with the inputs of the same tokens."""
    with around.bar("influence", len(above)) as bar:
        losses = gradients.truncation_losses(
            around.original(),
            factors,
            inputs=x,
            upstream=above,
            arguments=around.arguments(x),
            device=around.device,
            on_sequence=bar.update,
        )
    return measures.influence(losses)


def _sensitivity(
    around: Block,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, objectives.Statistics],
    x: Activations,
    tokens: Path,
    sequences: int,
) -> dict[str, Tensor]:
    """Try ASVD's truncation of every linear at every candidate ratio."""
    ids = calibration.read_tokens(tokens)[:sequences]
    trials: dict[str, list[Tensor]] = {}
    options = objectives.Options(blend=0.0, ridge=0.0)
    for name, weight in weights.items():
        ranks = [
            uniform_rank(*weight.shape, parameter_ratio=ratio, storage="factors")
            for ratio in allocation.CANDIDATES
        ]
        # Of one solution, that of a smaller rank is the first directions.
        largest = max(rank or 0 for rank in ranks)
        solve = objectives.solver("asvd", statistics[name], options=options)
        factors = solve(name, weight, largest).factors if largest else None
        trials[name] = [
            # As the passes take it: there are dozens of them.
            (weight if rank is None or factors is None else factors.u[:, :rank] @ factors.v[:rank])
            .to(around.dtype)
            .cpu()
            for rank in ranks
        ]
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
        loss=lambda hidden: head.mean_loss(hidden, ids),
    )


def train_positions(
    *,
    source: str,
    outline: str,
    tokens: str,
    output: str,
    record: str,
    parameter_ratio: float,
    seed: int,
    calibration_settings: Mapping[str, Any],
    compression: Mapping[str, Any],
    log: str,
) -> None:
    """Train truncation positions (Dobi-SVD): what share of its parameters each linear is to keep."""
    with stage("train positions", log=Path(log), record=Path(record), advice=_WHOLE) as described:
        model, _ = load_model(model_folder(source), calibration_settings)
        recipe = truncation.Recipe(**compression["dobi"])
        ids = calibration.read_tokens(Path(tokens))
        with progress.training("train positions") as on_step:
            found = truncation.train(
                model,
                {name: (m, n) for name, (m, n) in read_json(Path(outline))["linears"].items()},
                ids,
                ratio=parameter_ratio,
                storage=compression["storage"],
                recipe=recipe,
                seed=seed,
                on_step=on_step,
            )
        write_tensors(
            Path(output), {name: torch.tensor([share]).double() for name, share in found.shares.items()}
        )
        means = (
            torch.tensor(found.steps).view(recipe.epochs, -1, len(truncation.Step._fields)).mean(1).tolist()
        )
        described |= {
            "best": {"step": found.best + 1, **found.steps[found.best]._asdict()},
            "epochs": [truncation.Step(*mean)._asdict() for mean in means],
        }


def allocate(
    *,
    outline: str,
    measured: Mapping[str, Sequence[str]],
    positions: str | None,
    output: str,
    record: str,
    parameter_ratio: float,
    compression: Mapping[str, Any],
    log: str,
) -> None:
    """Choose the rank of every linear at the parameter budget.

    Args:
        outline: The model's outline.json.
        measured: Files by measure and block.
        positions: File of `train_positions`, where the allocation looks at it.
        output: ranks.json.
        record: Where what was chosen is summed up.
        parameter_ratio: Share of the linears' parameters that is kept.
        compression: The section of params.yaml.
        log: Log file.
    """
    with stage("allocate", log=Path(log), record=Path(record), advice=PASSES) as described:
        model = read_json(Path(outline))
        layers = []
        for name, shape in model["linears"].items():
            index, _, inner = name.removeprefix(f"{model['path']}.").partition(".")
            layers.append(allocation.Layer(int(index), inner, tuple(shape)))
        host = torch.device("cpu")
        looked_at = {
            measure.partition("-")[0]: [read_tensors(Path(file), device=host) for file in files]
            for measure, files in measured.items()
        }
        if positions:
            trained = read_tensors(Path(positions), device=host)
            looked_at["positions"] = [
                {name.removeprefix(f"{model['path']}.{block}."): share for name, share in trained.items()}
                for block in range(model["blocks"])
            ]
        problem = allocation.Problem(layers, parameter_ratio, looked_at, compression)
        ranks, notes = allocation.allocate(compression["allocation"], problem)
        stored = problem.stored(ranks)
        achieved = stored / sum(layer.size for layer in layers)
        described |= {"budget": problem.budget, "stored": stored, "achieved": achieved, **notes}
        named = {layer.label: rank for layer, rank in zip(layers, ranks, strict=True)}
        write_json(Path(output), {"ranks": named})
        dense = sum(rank is None for rank in ranks)
        tqdm.write(f"allocated ranks to {len(layers)} linears, {dense} dense: {achieved:.4f} kept")
