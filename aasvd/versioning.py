"""Record finished results with DVC after a plain Snakemake run."""

import logging
import os
from pathlib import Path

import yaml

from aasvd import layout, params

_PIPELINE = "dvc.yaml"

_logger = logging.getLogger(__name__)


def finished_phases(config: params.Config) -> list[str]:
    """Return the phases of which every file of every run in params.yaml is there and holds a result."""
    runs = [params.parse_run(config, name) for name in config["runs"]]
    return [phase for phase in layout.PHASES if all(_finished(config, run, phase) for run in runs)]


def _finished(config: params.Config, run: params.Run, phase: str) -> bool:
    outline = layout.Paths(config, run).model / "outline.json"
    if not outline.exists():
        return False
    files = layout.phase_targets(config, run, phase, blocks=lambda: layout.block_count(str(outline)))
    return all(Path(file).exists() and not layout.failure_file(file).exists() for file in files)


def commit() -> list[str]:
    """Record the outputs of every finished DVC stage, so that `dvc status` and `dvc push` know them.

    What is finished is judged by params.yaml as it stands on disk, because that is what DVC records:
    a run made with `--configfile` on top says nothing about it. Does nothing inside `dvc repro`, which
    holds the lock and commits by itself, or where the folder is not under DVC.

    Returns:
        The names of the stages that were recorded.
    """
    if "DVC_STAGE" in os.environ or not Path(".dvc").is_dir() or not Path(_PIPELINE).exists():
        return []
    # Imported here: DVC takes a second, and only finished runs need it.
    from dvc.repo import Repo

    config = params.load(Path("params.yaml"))
    phases = finished_phases(config)
    published = [
        f"publish@{name}"
        for name in config["runs"]
        if phases == list(layout.PHASES) and _published(config, params.parse_run(config, name))
    ]
    names = [*phases, *published]
    # DVC reads and writes all of dvc.lock for every target, which takes it a second or more.
    together = len(published) == len(config["runs"]) and _declares_ours_alone()
    with Repo() as repo:
        for target in [_PIPELINE] if together else names:
            repo.commit(target=target, force=True)
    _logger.info("recorded with DVC: %s", ", ".join(names) or "nothing")
    return names


def _declares_ours_alone() -> bool:
    """Tell whether dvc.yaml has no stage of the user's own: what it made is not known to be up to date."""
    return set(yaml.safe_load(Path(_PIPELINE).read_text())["stages"]) == {*layout.PHASES, "publish"}


def _published(config: params.Config, run: params.Run) -> bool:
    folder = Path("results") / run.name
    return (folder / "eval.json").exists() and layout.is_published(run, layout.Paths(config, run))
