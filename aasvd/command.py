"""The `snakemake` command of this environment: Snakemake's own, but a target may follow a greedy option.

Snakemake takes every word after `--resources NAME=VALUE` for another resource, so that
`snakemake --cores 1 --resources gpu=1 results/x/eval.json`, the natural way to write it, ends in a
traceback; so it does with settings after `--config`, and with files after `--configfile`. Here words that
are none of the option's are read as the targets they are; all else is unchanged.
"""

import sys
from collections.abc import Sequence


def _assigns(word: str) -> bool:
    return "=" in word


def _may_configure(word: str) -> bool:
    """Return whether a word may be a file of settings, and no target: no rule makes YAML."""
    return not word.startswith("results/") or word.endswith((".yaml", ".yml"))


# By greedy option, whether a word after it is its own.
_GREEDY = {
    **dict.fromkeys(("--resources", "--res", "--config", "-C"), _assigns),
    **dict.fromkeys(("--configfile", "--configfiles"), _may_configure),
}


def targets_first(words: Sequence[str]) -> list[str]:
    """Return a command line's words with the targets that follow a greedy option moved to its front."""
    targets: list[str] = []
    rest: list[str] = []
    is_own = None
    for word in words:
        if word.startswith("-"):
            is_own = _GREEDY.get(word)
            rest.append(word)
        else:
            (rest if is_own is None or is_own(word) else targets).append(word)
    return targets + rest


def main() -> None:
    """Run Snakemake on this process's arguments."""
    from snakemake.cli import main as snakemake

    snakemake(targets_first(sys.argv[1:]))
