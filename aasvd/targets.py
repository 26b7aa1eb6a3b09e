"""Check the targets under results/ that a command line asks for; imports nothing heavy.

Snakemake answers a name that no rule makes with an exception, and meets a wrong part of another deep inside
the graph: here each is one sentence before anything starts.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from aasvd.params import RATIOS, RUN, Config, choose, parse_comparison, parse_run


class Form(NamedTuple):
    """What the names of some targets look like.

    Attributes:
        shown: As messages show it, without the ending.
        pattern: The same as a regular expression, whose groups name what params.yaml has to know.
        endings: The types of the files that their rule makes.
    """

    shown: str
    pattern: str
    endings: tuple[str, ...]


_NUMBER = r"(\d+\.?\d*|\.\d+)"
_RATIOS = rf"_r(?P<ratios>{RATIOS})"
_TABLE, _FIGURE = ("html", "md", "tex"), ("png", "svg")

# By kind, what lies under results/paper/<kind>/ (workflow/rules/paper.smk); the first few are of one rule.
TABLES = ("main", "pruning", "breakdown", "models", "ablation")
PAPER = {
    **dict.fromkeys(TABLES, Form("<model>_r<ratio>[-<ratio>...]", rf"(?P<models>[^+]+){_RATIOS}", _TABLE)),
    "models": Form("<model>[+<model>...]_r<ratio>[-<ratio>...]", rf"(?P<models>.+){_RATIOS}", _TABLE),
    "budget": Form(
        "<model>_<GB>[-<GB>...]GB_<tokens>", rf"(?P<models>[^+]+)_{_NUMBER}(-{_NUMBER})*GB_\d+", _TABLE
    ),
    **dict.fromkeys(
        ("depth", "calibration"),
        Form("<model>_r<ratio>", r"(?P<models>[^+]+)_r(?P<ratios>[0-9.]+)", _FIGURE),
    ),
    "layers": Form("<run>", r"(?P<run>.+)", _FIGURE),
}
# Under results/compare/; what is wrong with another name, parse_comparison says.
COMPARED = Form(
    "[<table>/]<model>_r<ratio>[-<ratio>...]",
    r"(?P<comparison>.+)",
    ("html", "md", "tex", "parquet", "json", "svg"),
)
# Of a run, results/<run>/.
PUBLISHED = ("eval.json", "model", "results.html", "figures/distortion.svg", "blocks.json")


def check(config: Config, words: Iterable[str]) -> None:
    """Check those words of a command line that are targets under results/.

    Artifacts, downloads and files directly under results/ are left to Snakemake.

    Args:
        config: The whole configuration, validated.
        words: Options, their values and targets, as they were given.

    Raises:
        ValueError: If no rule makes one of them, or it names something that params.yaml has not.
    """
    for word in words:
        top, _, below = Path(word).as_posix().partition("/")
        folder, _, name = below.partition("/")
        if top != "results" or folder in ("", "artifacts", "downloads"):
            continue
        if folder == "compare":
            _check_form(config, "results/compare", name, COMPARED)
        elif folder == "paper":
            kind, _, name = name.partition("/")
            _check_form(config, f"results/paper/{kind}", name, _kind(kind))
        elif name or "." not in folder or RUN.fullmatch(folder):
            parse_run(config, folder)
            if name not in PUBLISHED:
                raise ValueError(f"no rule makes {word}: ask for results/{folder}/eval.json")


def _kind(kind: str) -> Form:
    if kind not in PAPER:
        raise ValueError(f"results/paper/ has no {kind!r}; there are {', '.join(PAPER)}")
    return PAPER[kind]


def _check_form(config: Config, folder: str, name: str, form: Form) -> None:
    """Check the form of a target's name, and that params.yaml knows what it names."""
    stem, _, ending = name.rpartition(".")
    match = re.fullmatch(form.pattern, stem)
    if match is None or ending not in form.endings:
        first, *others = (f".{ending}" for ending in form.endings)
        raise ValueError(
            f"{folder}/{name} must have the form {folder}/{form.shown}{first} (or {', '.join(others)})"
        )
    named = match.groupdict()
    if "comparison" in named:
        parse_comparison(config, named["comparison"])
    elif "run" in named:
        parse_run(config, named["run"])
    else:
        for model in named["models"].split("+"):
            choose(model, config["models"], "model")
            for ratio in named["ratios"].split("-") if "ratios" in named else []:
                parse_run(config, f"{model}_r{ratio}")
