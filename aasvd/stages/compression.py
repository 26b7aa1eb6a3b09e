"""Stages that compress one block: solve its factors, refine them, propagate activations through it."""

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from aasvd import blocks, compress, methods, objectives, progress, pruning, refine, units
from aasvd.artifacts import Activations, read_json, read_tensors, write_tensors
from aasvd.pruned import prune
from aasvd.stages.loading import Block, pruned, seconds_left, statistics_of
from aasvd.stages.stage import PASSES, peak_memory_mb, stage

_logger = logging.getLogger(__name__)

_STEPS = "lower refinement.batch in params.yaml"
# Sequences on which refinement compares a block with what it was.
_MEASURED = 16


def solve_block(
    *,
    source: str,
    covariances: str,
    ranks: str,
    original: str | None,
    shifted: str | None,
    gradients: str | None,
    fisher: str | None,
    buckets: str | None,
    output: str,
    record: str,
    index: int,
    calibration: Mapping[str, Any],
    compression: Mapping[str, Any],
    log: str,
) -> None:
    """Solve one block's factors, or prune it; statistics that the objective does not need are None."""
    with stage(f"solve block {index}", log=Path(log), record=Path(record), advice=PASSES) as measured:
        x, x_shifted = (Activations(Path(file)) if file else None for file in (original, shifted))
        around = Block(source, index, calibration, record=record, like=x_shifted)
        named = read_json(Path(ranks))["ranks"]
        mine = f"{index}."
        chosen = {name.removeprefix(mine): rank for name, rank in named.items() if name.startswith(mine)}
        if compression["objective"] == "wanda_sp":
            assert x_shifted is not None
            return write_tensors(Path(output), _wanda_sp(around, x_shifted, chosen, measured))
        if 0 in chosen.values():
            units.require_residual(around.original(), around.short())
        known = statistics_of(
            covariances, gradients=gradients, fisher=fisher, buckets=buckets, device=around.device
        )
        stream, groups = None, [list(group) for group in known]
        if "shifted" in methods.OBJECTIVES[compression["objective"]].needs:
            assert x is not None and x_shifted is not None
            arguments = around.arguments(x)
            # Only here does it matter which group comes first.
            groups = around.groups(x, arguments)
            stream = compress.Stream(x, x_shifted, arguments, around.batch, around.device, around.dtype)
        unrefined = around.original()
        stored = unrefined if around.dtype == torch.float32 else around.original(torch.float32)
        solution = compress.solve_block(
            unrefined,
            copy.deepcopy(unrefined),
            groups,
            objective=compression["objective"],
            options=objectives.options_of(compression),
            weights={name: linear.weight for name, linear in blocks.linears(stored).items()},
            ranks={name: chosen[name] for group in groups for name in group},
            statistics=[known[tuple(group)] for group in groups],
            stream=stream,
        )
        measured["linears"] = solution.report
        for name, numbers in solution.report.items():
            if numbers.get("directions_dropped"):
                _logger.warning("%s of block %d: singular covariance, %s", name, index, numbers)
        write_tensors(Path(output), solution.tensors)


def _wanda_sp(
    around: Block, shifted: Activations, entries: Mapping[str, int | None], measured: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what Wanda-sp leaves of a block, by what the pruned blocks before it make of the text."""
    # The weights as they are stored; their statistics come from passes in the pipeline's float type.
    block = around.original(torch.float32)
    linears = blocks.linears(block)
    found = units.heads_and_neurons(block, around.short())
    squares = pruning.channel_squares(
        around.original(),
        [some.output for some in found.values()],
        inputs=shifted,
        arguments=around.arguments(shifted),
        batch=around.batch,
        device=around.device,
    )
    budget = sum(linears[name].weight.numel() if count is None else count for name, count in entries.items())
    masks = pruning.wanda_sp(linears, found, squares, budget=budget)
    layers = {
        name: prune(linears[name], rows=rows, columns=columns) for name, (rows, columns) in masks.items()
    }
    measured["linears"] = {name: {"kept": list(layer.kept.shape)} for name, layer in layers.items()}
    return {
        f"{name}.{part}": tensor
        for name, layer in layers.items()
        for part, tensor in layer.state_dict().items()
    }


def refine_block(
    *,
    source: str,
    shifted: str,
    target: str,
    solved: str,
    output: str,
    record: str,
    index: int,
    seed: int,
    calibration: Mapping[str, Any],
    refinement: Mapping[str, Any],
    log: str,
) -> None:
    """Refine one solved block, factors and norms together, against the original block's outputs."""
    with stage(f"refine block {index}", log=Path(log), record=Path(record), advice=_STEPS) as measured:
        x, y = Activations(Path(shifted)), Activations(Path(target))
        around = Block(source, index, calibration, record=record, like=x)
        factors = read_tensors(Path(solved), device=around.device)
        streams: dict[str, Any] = {
            "inputs": x,
            "targets": y,
            "arguments": around.arguments(x),
            "device": around.device,
        }
        solved_block = around.compressed(factors, around.dtype)
        # On some sequences: a pass over all of them would take as long as many steps. On the same ones
        # whatever the batch is, which is in no key: they decide which factors stay.
        some: dict[str, Any] = {"batch": around.batch, "first": _MEASURED}
        measured["before"] = refine.distortion(solved_block, **streams, **some)
        measured["before"]["sequences"] = min(_MEASURED, len(x))
        recipe, gone = refine.Recipe(**refinement), pruned(factors)
        called = [name for group in around.groups(x, streams["arguments"]) for name in group]
        if all(gone.get(name) == [0, 0] for name in called) or measured["before"][recipe.loss] == 0:
            # A block that was removed, or that nothing has changed yet, has nothing to refine.
            measured |= {"losses": [], "refined": measured["before"], "kept": "solved"}
            return write_tensors(Path(output), factors)
        block = around.compressed(factors, torch.float32)
        with progress.training(f"{around.label}: refine") as on_step:
            measured["losses"] = refine.refine(
                block,
                **streams,
                recipe=recipe,
                dtype=around.dtype,
                # A generator per block: a resumed run continues as an uninterrupted one would.
                generator=torch.Generator().manual_seed(seed * 1_000_003 + index),
                on_step=on_step,
            )
        measured["refined"] = refine.distortion(copy.deepcopy(block).to(around.dtype), **streams, **some)
        better = measured["refined"][recipe.loss] < measured["before"][recipe.loss]
        measured["kept"] = "refined" if better else "solved"
        if not better:
            # Too few steps for the learning rate: better the start than a block that training made worse.
            _logger.warning("refinement did not bring block %d closer, so its solved factors stay", index)
            block = around.compressed(factors, torch.float32)
        write_tensors(Path(output), block.state_dict())


def propagate(
    *,
    source: str,
    shifted: str,
    target: str,
    factors: str,
    output: str,
    record: str,
    index: int,
    calibration: Mapping[str, Any],
    log: str,
) -> None:
    """Push shifted activations through one compressed block and measure its distortion."""
    with stage(f"propagate block {index}", log=Path(log), record=Path(record), advice=PASSES) as measured:
        start = time.perf_counter()
        x, y = Activations(Path(shifted)), Activations(Path(target))
        around = Block(source, index, calibration, record=record, like=x)
        block = around.compressed(read_tensors(Path(factors), device=around.device), around.dtype)
        with around.writing(output, like=x, label="propagate") as append:
            measured["after"] = refine.distortion(
                block,
                inputs=x,
                targets=y,
                arguments=around.arguments(x),
                batch=around.batch,
                device=around.device,
                on_output=append,
            )
        seconds = time.perf_counter() - start
        tqdm.write(_block_line(around, measured["after"], seconds=seconds))


def _error(numbers: Mapping[str, Any]) -> str:
    return f"{numbers['relative_error']:.3f}" if "relative_error" in numbers else "dense"


def _block_line(around: Block, after: Mapping[str, float], *, seconds: float) -> str:
    """Return what a finished block's records say, on one line."""
    files = [around.folder / f"{name}.json" for name in ("solve", "refine")]
    made = [read_json(file) for file in files if file.exists()]
    linears = [item for record in made for item in record.get("linears", {}).items()]
    errors = ""
    if any("relative_error" in numbers for _, numbers in linears):
        each = (f"{name.rpartition('.')[2]} {_error(numbers)}" for name, numbers in linears)
        errors = f"relative errors {' '.join(each)}; "
    before = next((record["before"] for record in made if "before" in record), None)
    distortion = ", ".join(
        f"{metric} " + (f"{before[metric]:.4g} → " if before else "") + f"{after[metric]:.4g}"
        for metric in ("mse", "cosine")
    )
    distortion += f" (solved: {before['sequences']:.0f} sequences)" if before else ""
    seconds += sum(record["seconds"] for record in made)
    peak = max([peak_memory_mb(), *(record["peak_memory_mb"] for record in made)])
    left = seconds_left(around.folder.parent, done=around.index + 1, count=around.count) or 0.0
    return (
        f"{around.label}: {errors}distortion {distortion}; {seconds:.1f} s, {peak:.0f} MB; "
        f"about {left / 60:.1f} min left for the other blocks"
    )
