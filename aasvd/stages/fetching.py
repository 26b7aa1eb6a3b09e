"""Stages that bring models, texts and tasks onto the disk."""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aasvd import blocks, sources
from aasvd.artifacts import mark_failure, write_json
from aasvd.stages.loading import SHORT
from aasvd.stages.stage import PASSES, report_failure, stage


def fetch_model(
    *, source: Mapping[str, Any], output: str, outline: str, record: str, cache: str, log: str
) -> None:
    """Fetch a dense model and describe its blocks: their number, and which linears each calls."""
    with stage("fetch model", log=Path(log), record=Path(record), advice=PASSES):
        sources.fetch_model(source, output=Path(output), cache=Path(cache))
        model = blocks.Source(Path(output))
        parts = blocks.skeleton(model.folder)
        width = parts.model.config.get_text_config().hidden_size
        calls = blocks.forward_arguments(parts, tokens=SHORT, device=torch.device("cpu"), dtype=torch.float32)
        linears: dict[str, list[int]] = {}
        for index, arguments in enumerate(calls):
            groups = blocks.groups(parts, index, arguments=arguments, width=width, tokens=SHORT)
            # One whose weight the block reads itself (Mamba's dt_proj) stays dense and counts nowhere.
            called = set(itertools.chain(*groups))
            linears |= {
                f"{parts.path}.{index}.{name}": list(module.weight.shape)
                for name, module in blocks.linears(parts.blocks[index]).items()
                if name in called
            }
        write_json(
            Path(outline),
            {
                "architecture": type(parts.model).__name__,
                "path": parts.path,
                "blocks": len(parts.blocks),
                "linears": linears,
            },
        )


def fetch_text(
    *, source: Mapping[str, Any], name: str, split: str, data_dir: str, output: str, cache: str, log: str
) -> None:
    """Fetch one split of a text."""
    with stage(f"fetch text {name}", log=Path(log), record=None, advice=PASSES):
        fetch = functools.partial(
            sources.fetch_text, source, name=name, split=split, data_dir=data_dir, cache=Path(cache)
        )
        # Calibration cannot do without its text; a text that only perplexity is taken on fails alone.
        if split == "test":
            _fetch(f"text {name}", Path(output), fetch)
        else:
            fetch(output=Path(output))


def fetch_task(*, task: str, data_dir: str, output: str, cache: str, log: str) -> None:
    """Fetch the rows of a zero-shot task."""
    with stage(f"fetch task {task}", log=Path(log), record=None, advice=PASSES):
        # Not among what fails alone: a mistyped name stays wrong however often it is tried.
        definition = sources.task_definition(task)
        fetch = functools.partial(sources.fetch_task, definition, data_dir=data_dir, cache=Path(cache))
        _fetch(f"task {task}", Path(output), fetch)


def _fetch(name: str, output: Path, fetch: Callable[..., None]) -> None:
    """Fetch what one measurement reads, or write down why that failed: other measurements go on."""
    error = None
    try:
        fetch(output=output)
    except sources.SourceError as reason:
        error = str(reason)
        report_failure(f"fetch {name}", error)
        sources.write_failure(output, error)
    mark_failure(output, error)
