"""What an artifact was made with: versions, source code, commit."""

import functools
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

_DISTRIBUTIONS = ("aasvd", "torch", "transformers", "safetensors", "datasets", "lm_eval", "snakemake", "dvc")


def versions() -> dict[str, str]:
    """Return the versions of what an artifact was made with."""
    found = {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
    return {"python": platform.python_version(), **found}


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's source files, as they were when first asked for."""
    summary = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        summary.update(file.read_bytes())
    return summary.hexdigest()[:12]


def git_state() -> str:
    """Return the commit this runs from, marked where the tree differs from it; "" outside a repository."""
    git = shutil.which("git")
    if git is None:
        return ""
    described = subprocess.run(
        [git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip()
