"""The stage that searches in which order attention and MLPs go (BlockPruner)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aasvd import blocks, calibration, progress, pruning, units
from aasvd.artifacts import Activations, replacing, write_tensors
from aasvd.device import compute_device
from aasvd.stages.loading import SHORT
from aasvd.stages.stage import PASSES, stage

_logger = logging.getLogger(__name__)


def order_branches(
    *,
    source: str,
    tokens: str,
    inputs: str,
    output: str,
    record: str,
    probe: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Search the order in which BlockPruner removes attention and MLPs, on the first calibration sequences.

    The whole model is in memory, as in an evaluation. A search that was interrupted goes on after its last
    removal.
    """
    with stage("order branches", log=Path(log), record=Path(record), advice=PASSES) as measured:
        dense = blocks.Source(Path(source))
        parts = blocks.skeleton(dense.folder)
        x, ids = Activations(Path(inputs)), calibration.read_tokens(Path(tokens))[:probe]
        call: dict[str, Any] = {"device": compute_device(), "dtype": x.dtype}
        arguments = blocks.forward_arguments(parts, tokens=x.shape[1], **call)
        model = [
            blocks.load_block(dense, parts, index, **call).requires_grad_(False)
            for index in range(len(parts.blocks))
        ]
        found = []
        # Of short sequences, which show as much.
        short = blocks.forward_arguments(parts, tokens=SHORT, **call)
        for index, block in enumerate(model):
            example = units.Example(short[index], x.shape[2], SHORT)
            units.require_residual(block, example)
            for kind, names in units.branches(block, example).items():
                found.append(pruning.Branch(index, kind, names))
        found.sort(key=lambda branch: units.BRANCHES.index(branch.kind))
        head = blocks.Head(dense, parts, **call)
        search = pruning.Removals(
            model,
            found,
            arguments=arguments,
            hidden=x.read(list(range(len(ids)))),
            loss=lambda hidden, some: head.mean_loss(hidden, ids[some]),
            batch=settings["batch"],
        )
        removals = _searched(search, len(found), Path(output), batches=-(-len(ids) // settings["batch"]))
        tensors = {"perplexity": torch.tensor([step.perplexity for step in removals], dtype=torch.float64)}
        for place, step in enumerate(removals):
            branch = found[step.branch]
            tensors |= {f"{branch.block}.{name}": torch.tensor(place) for name in branch.names}
        measured["removals"] = [
            {"block": found[s.branch].block, "branch": found[s.branch].kind, "perplexity": s.perplexity}
            for s in removals
        ]
        write_tensors(Path(output), tensors)


def _searched(search: pruning.Removals, count: int, output: Path, *, batches: int) -> list[pruning.Removal]:
    """Return all removals, writing each down as it is found, and beginning with those written down before."""
    kept = output.with_name(f"{output.stem}.partial.json")
    done = _written_down(kept)
    trials = batches * count * (count + 1) // 2
    left = batches * (count - len(done)) * (count - len(done) + 1) // 2
    with progress.Bar(
        total=trials, initial=trials - left, desc="order of removal", unit="trial", dynamic_ncols=True
    ) as bar:
        for step in search.steps([step.branch for step in done], on_trial=bar.update):
            done.append(step)
            # No artifact: no rule makes it anew, so it has no checksum to be damaged by.
            with replacing(kept) as temporary:
                temporary.write_text(json.dumps(done))
            bar.set_postfix_str(f"{len(done)} of {count}, perplexity {step.perplexity:.4g}", refresh=False)
            _logger.info("removal %d: branch %d, perplexity %.4g", len(done), step.branch, step.perplexity)
    kept.unlink(missing_ok=True)
    return done


def _written_down(file: Path) -> list[pruning.Removal]:
    """Return the removals that an interrupted search wrote down: none where they cannot be read."""
    try:
        return [pruning.Removal(*step) for step in json.loads(file.read_text())]
    except (FileNotFoundError, ValueError):
        return []
