"""The shipped params.yaml, and where the artifacts of its runs lie."""

import functools
from pathlib import Path
from typing import Any

import yaml

from aasvd import layout, params

ROOT = Path(__file__).parent.parent
Config = dict[str, Any]


@functools.cache
def shipped() -> Config:
    loaded = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def paths(config: Config, run: str = "mine_r0.6") -> layout.Paths:
    return layout.Paths(config, params.parse_run(config, run))


def where(found: layout.Paths) -> dict[str, Path]:
    return {name: value for name, value in vars(found).items() if isinstance(value, Path)}
