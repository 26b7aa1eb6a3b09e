"""List, and on request remove, artifacts that no run of today's params.yaml refers to: `make clean-stale`."""

import shutil
import sys
from pathlib import Path

from aasvd import layout, params


def stale(config: params.Config) -> list[Path]:
    """Return the key folders that belong to no listed run and to no published run's model and ratio.

    A run counts if params.yaml lists it or its folder lies under results/.
    """
    published = [file.parent.name for file in Path("results").glob("*/eval.json")]
    current: set[Path] = set()
    for name in dict.fromkeys([*config["runs"], *published]):
        if not _is_run(config, name):
            continue
        run = params.parse_run(config, name)
        paths = layout.Paths(config, run)
        current |= {paths.calibration, paths.original, paths.compressed, paths.evaluation}
        current.add(paths.dense_evaluation)
        # What is fetched does not depend on the number of blocks.
        fetched = layout.phase_targets(config, run, "fetch", blocks=lambda: 0)
        current |= {Path(file).parent for file in fetched}
    folders = [
        *layout.ARTIFACTS.glob("sources/*/*/*"),
        *layout.ARTIFACTS.glob("calibration/*/*"),
        *layout.ARTIFACTS.glob("original/*/*"),
        *layout.ARTIFACTS.glob("compressed/*/*/*"),
        *layout.ARTIFACTS.glob("evaluation/*/*/*"),
    ]
    return sorted(folder for folder in folders if folder.is_dir() and folder not in current)


def _is_run(config: params.Config, name: str) -> bool:
    """Return whether today's params.yaml knows the model, method and variant that a folder's name says."""
    match = params.RUN.fullmatch(name)
    if match is None:
        return name == params.DEFAULT
    known = {*config["methods"], *config["variants"]}
    return match["model"] in config["models"] and known.issuperset(match["parts"].split("_")[1:])


def main() -> None:
    """Print stale folders and their sizes; with `--remove`, delete them."""
    config = params.load(Path("params.yaml"))
    params.validate(config)
    found = stale(config)
    for folder in found:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        sys.stdout.write(f"{size / 2**20:10.1f} MB  {folder}\n")
        if "--remove" in sys.argv[1:]:
            shutil.rmtree(folder)
    sys.stdout.write(f"{len(found)} stale\n")


if __name__ == "__main__":
    main()
