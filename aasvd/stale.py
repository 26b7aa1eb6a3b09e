"""List, and on request remove, artifacts that no run of today's params.yaml refers to: `make clean-stale`."""

import shutil
import sys
from pathlib import Path

from aasvd import layout, params


def stale(config: params.Config) -> list[Path]:
    """Return the key folders of artifacts that no run refers to.

    A run counts if params.yaml lists it, or if its folder lies under results/, finished or not, and today's
    params.yaml knows what its name says.

    Raises:
        ValueError: If a local model or text that one of them uses is not there: its key, and with it what is
            stale, cannot be worked out.
    """
    # progress.json is there from a run's first stage on.
    begun = [
        file.parent.name for name in ("eval", "progress") for file in Path("results").glob(f"*/{name}.json")
    ]
    current: set[Path] = set()
    for name in dict.fromkeys([*config["runs"], *begun]):
        try:
            run = params.parse_run(config, name)
        except ValueError:
            continue
        _require_sources(config, run)
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


def _require_sources(config: params.Config, run: params.Run) -> None:
    texts = [run.settings["calibration"]["text"], *run.settings["evaluation"]["texts"]]
    for kind, name in (("models", run.model), *(("texts", text) for text in texts)):
        path = config[kind][name].get("path")
        if path is not None and not Path(path).expanduser().exists():
            raise ValueError(
                f"params.yaml: {kind}.{name}.path: {path} does not exist, so what was made from it would "
                f"seem stale; bring it back, or remove results/{run.name} and its name under `runs`"
            )


def main() -> None:
    """Print stale folders and their sizes; with `--remove`, delete them."""
    try:
        config = params.load(Path("params.yaml"))
        params.validate(config)
        found = stale(config)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for folder in found:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        sys.stdout.write(f"{size / 2**20:10.1f} MB  {folder}\n")
        if "--remove" in sys.argv[1:]:
            shutil.rmtree(folder)
    sys.stdout.write(f"{len(found)} stale\n")


if __name__ == "__main__":
    main()
