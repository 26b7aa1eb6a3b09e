"""Record finished results with DVC after a plain Snakemake run (design section 4)."""

import logging
import os
from pathlib import Path

_logger = logging.getLogger(__name__)


def commit() -> list[str]:
    """Record the outputs of every DVC stage that is complete, so that `dvc status` and `dvc push` know them.

    Does nothing inside `dvc repro`, which holds the lock and commits by itself, or where the folder is
    not under DVC.

    Returns:
        The names of the stages that were recorded.
    """
    if "DVC_STAGE" in os.environ or not Path(".dvc").is_dir():
        return []
    from dvc.repo import Repo

    recorded = []
    with Repo() as repo:
        for stage in repo.index.stages:
            if all(Path(out.fs_path).exists() for out in [*stage.deps, *stage.outs]):
                repo.commit(target=stage.addressing, force=True)
                recorded.append(stage.addressing)
    _logger.info("recorded with DVC: %s", ", ".join(recorded) or "nothing")
    return recorded
