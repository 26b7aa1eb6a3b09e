"""The `snakemake` command of this environment: Snakemake's own, but a target may follow `--resources`.

Snakemake takes every word after `--resources NAME=VALUE` for another resource, so that
`snakemake --cores 1 --resources gpu=1 results/x/eval.json`, the natural way to write it, ends in a
traceback. Here words that assign nothing are read as the targets they are; all else is unchanged.
"""

import sys
from collections.abc import Sequence

_GREEDY = ("--resources", "--res")


def targets_first(words: Sequence[str]) -> list[str]:
    """Return a command line's words with the targets that follow `--resources` moved to its front."""
    targets: list[str] = []
    rest: list[str] = []
    after_resources = False
    for word in words:
        if word.startswith("-"):
            after_resources = word in _GREEDY
        (targets if after_resources and not word.startswith("-") and "=" not in word else rest).append(word)
    return targets + rest


def main() -> None:
    """Run Snakemake on this process's arguments."""
    from snakemake.cli import main as snakemake

    snakemake(targets_first(sys.argv[1:]))
