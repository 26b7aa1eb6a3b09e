"""Where each artifact of a run lies; imports nothing heavy.

An artifact's path names everything it was made from, so that nothing ever depends on
file times: `results/artifacts/<phase>/<model>/<key>/...`. Phases come first because each is an output of
one DVC stage, and those must not overlap.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aasvd.identity import (
    VERSIONS,
    calibration_ingredients,
    compression_ingredients,
    evaluation_ingredients,
    key_of,
    model_ingredients,
    positions_ingredients,
    task_ingredients,
    text_ingredients,
)
from aasvd.methods import DIFFERENTIATED
from aasvd.params import (
    Config,
    Run,
    is_whole,
    measures,
    needs,
    parse_run,
    runs_of,
    trains_positions,
    written_ratio,
)

ARTIFACTS = Path("results") / "artifacts"


def measure_files(run: Run, *, blocks: int) -> dict[str, list[str]]:
    """Return, by measure, the files that a run's allocation looks at, below the original side's folder."""
    return {
        name: [f"{folder}measures/{name}.safetensors" for folder in folders]
        for name in measures(run)
        for folders in [[""] if is_whole(name) else [f"block_{block:03d}/" for block in range(blocks)]]
    }


def original_files(run: Run) -> dict[str, str]:
    """Return the files that a run needs of every block on the original side, with their stages' records."""
    files = {"covariances.safetensors": "capture.json"}
    found = measures(run)
    differentiated = needs(run) | {DIFFERENTIATED.get(name.partition("-")[0]) for name in found}
    if differentiated & {"gradients", "fisher"}:
        # Also where only weights' gradients count: it is the way by which they come from the loss.
        files["gradients.safetensors"] = "differentiate.json"
    if "fisher" in differentiated:
        files["fisher.safetensors"] = "fisher.json"
    if "buckets" in needs(run):
        buckets = run.settings["compression"]["buckets"]
        files[f"buckets_{buckets}.safetensors"] = f"average_{buckets}.json"
    return files | {
        f"measures/{name}.safetensors": f"measures/{name}.json" for name in found if not is_whole(name)
    }


def block_stages(run: Run) -> list[str]:
    """Return the stages that every block of a run goes through.

    Nothing goes through the compressed blocks where no block looks at what those before it make of the
    activations.
    """
    refined = bool(run.settings["refinement"]["epochs"])
    follows = refined or "shifted" in needs(run)
    return ["solve", *(["refine"] if refined else []), *(["propagate"] if follows else [])]


class Paths:
    """Where each artifact of a run lies, relative to the repository."""

    def __init__(self, config: Config, run: Run) -> None:
        """Work out the keys of a run."""
        self._config, self._run = config, run
        calibration = key_of(calibration_ingredients(config, run))
        compression = f"r{written_ratio(run.ratio)}-{key_of(compression_ingredients(config, run))}"
        self.model = model_folder(config, run.model)
        self.calibration = ARTIFACTS / "calibration" / run.model / calibration
        self.original = ARTIFACTS / "original" / run.model / calibration
        positions = f"r{written_ratio(run.ratio)}-{key_of(positions_ingredients(config, run))}.safetensors"
        self.positions = self.original / "positions" / positions if trains_positions(run) else None
        self.compressed = ARTIFACTS / "compressed" / run.model / calibration / compression
        # A post-step makes another checkpoint beside the one that it starts from.
        self.checkpoint = self.compressed / ("adapted" if run.settings["post"]["epochs"] else "model")
        self.evaluation = ARTIFACTS / "evaluation" / run.model / calibration / compression
        self.dense_evaluation = ARTIFACTS / "evaluation" / run.model / "dense" / self.model.name

    def measurements(self) -> list[str]:
        """Return the file names of a run's measurements, the same for the dense and the compressed model."""
        return [
            f"{name}-{key_of(ingredients)}.json"
            for name, ingredients in evaluation_ingredients(self._config, self._run).items()
        ]

    def publication(self) -> dict[str, Any]:
        """Return the keys that a published result must carry to be up to date."""
        return {
            "model": self.model.name,
            "calibration": self.calibration.name,
            "compression": self.compressed.name,
            "measurements": self.measurements(),
        }


def model_folder(config: Config, model: str) -> Path:
    """Return the folder of a fetched model."""
    return ARTIFACTS / "sources" / "models" / model / key_of(model_ingredients(config, model))


def text_file(config: Config, text: str, split: str) -> Path:
    """Return the file of a fetched text."""
    return (
        ARTIFACTS / "sources" / "texts" / text / key_of(text_ingredients(config, text)) / f"{split}.parquet"
    )


def task_file(config: Config, task: str) -> Path:
    """Return the file with the rows of a task."""
    return ARTIFACTS / "sources" / "tasks" / task / key_of(task_ingredients(config, task)) / "rows.parquet"


def unkeyed_measurement(name: str) -> str:
    """Return the file name of a measurement that no settings of its own make, as `layers_007`."""
    return f"{name}-v{VERSIONS['evaluation']}.json"


def require_key(key: str, todays: Path) -> None:
    """Check that a source's folder is asked for under the key that today's parameters give it.

    Args:
        key: The last part of the folder that is asked for.
        todays: The folder that `model_folder`, `text_file` or `task_file` name today.

    Raises:
        ValueError: If it has another key: what it holds was made with other parameters than those of today.
    """
    if key != todays.name:
        raise ValueError(
            f"no source of today's params.yaml lies in {todays.with_name(key)}, its key is {todays.name}; "
            "what lies under the other was made with other parameters"
        )


def find_run(
    config: Config,
    *,
    model: str,
    calibration: str,
    compression: str | None = None,
    positions: str | None = None,
) -> Run:
    """Return a run whose artifacts lie under the given keys.

    Keys cannot be read backwards: the runs of today's params.yaml are tried, at the ratio that the key of
    the compression or of trained positions starts with.

    Raises:
        ValueError: If none fits: the artifact was made with other parameters than those of today.
    """
    for run in runs_of(config, model, (compression or positions or "r0.5").split("-", 1)[0]):
        paths = Paths(config, run)
        if (
            paths.calibration.name == calibration
            and compression in (None, paths.compressed.name)
            and positions in (None, paths.positions and paths.positions.stem)
        ):
            return run
    named = {"compression": compression, "positions": positions}
    raise ValueError(
        f"no run of today's params.yaml has calibration key {calibration}"
        + "".join(f" and {what} key {key}" for what, key in named.items() if key)
        + f" for model {model}; these artifacts were made with other parameters (see key.json beside them)"
    )


def find_measurement(config: Config, *, model: str, measurement: str) -> Run:
    """Return a run that asks for a measurement, given by its file name without the ending.

    Raises:
        ValueError: If none does.
    """
    tried = []
    for run in runs_of(config, model, "r0.5"):
        # Names by the hundred, which measure in a handful of ways.
        way = (run.settings["evaluation"], run.settings["calibration"]["dtype"])
        if way in tried:
            continue
        tried.append(way)
        if any(
            f"{name}-{key_of(made)}" == measurement
            for name, made in evaluation_ingredients(config, run).items()
        ):
            return run
    raise ValueError(f"no run of today's params.yaml makes the measurement {measurement} of model {model}")


def block_count(outline: str) -> int:
    """Return the number of a fetched model's blocks."""
    return int(json.loads(Path(outline).read_text())["blocks"])


PHASES = ("fetch", "sample", "capture", "compress", "evaluate")


def phase_targets(config: Config, run: Run, phase: str, *, blocks: Callable[[], int]) -> list[str]:
    """Return the files that are there when a phase of a run is finished; one DVC stage covers each phase.

    Args:
        config: The whole configuration.
        run: The run.
        phase: One of PHASES.
        blocks: Gives the number of the model's blocks; asked for only where it matters.
    """
    paths, evaluation = Paths(config, run), run.settings["evaluation"]
    files: dict[str, Callable[[], list[Path]]] = {
        "fetch": lambda: [
            paths.model / "source.json",
            text_file(config, run.settings["calibration"]["text"], "train"),
            *(text_file(config, text, "test") for text in evaluation["texts"]),
            *(task_file(config, task) for task in evaluation["tasks"]),
        ],
        "sample": lambda: [paths.calibration / "tokens.parquet"],
        "capture": lambda: [
            paths.original / "key.json",
            *([paths.positions] if paths.positions else []),
            *(
                paths.original / f"block_{block:03d}" / file
                for block in range(blocks())
                for file in original_files(run)
            ),
            *(paths.original / f"measures/{name}.safetensors" for name in measures(run) if is_whole(name)),
        ],
        "compress": lambda: [
            paths.compressed / "key.json",
            paths.checkpoint / "SHA256SUMS",
            *(
                paths.compressed / f"block_{block:03d}" / f"{block_stages(run)[-1]}.json"
                for block in range(blocks())
            ),
        ],
        "evaluate": lambda: [
            folder / name
            for folder in (paths.dense_evaluation, paths.evaluation)
            for name in paths.measurements()
        ],
    }
    return [str(file) for file in files[phase]()]


def is_published(run: Run, paths: Paths) -> bool:
    """Return whether the files people look at were made from today's parameters and lack nothing.

    Their names hold no key, so this compares the keys that eval.json carries with today's. A measurement
    that failed is tried again whenever the run is asked for.
    """
    evaluation = Path("results") / run.name / "eval.json"
    if not evaluation.exists():
        return True  # nothing is out of date: Snakemake makes what is missing
    published = json.loads(evaluation.read_text())
    return bool(published["provenance"]["keys"] == paths.publication() and not published.get("errors"))


def finished_runs(config: Config) -> list[str]:
    """Return the names of the published runs that today's params.yaml knows and that lack nothing."""
    found = []
    for file in sorted(Path("results").glob("*/eval.json")):
        # A run of a model, method or variant that is no longer there is none of today's.
        with contextlib.suppress(ValueError):
            run = parse_run(config, file.parent.name)
            if is_published(run, Paths(config, run)):
                found.append(run.name)
    return found


def failure_file(artifact: str | Path) -> Path:
    """Return the file that, where it exists, says why an artifact holds no result and is tried again."""
    return Path(f"{artifact}.error")


def published_runs(config: Config, model: str, ratio: str) -> dict[str, Run]:
    """Return the published runs of a model and ratio whose checkpoints are those of today's parameters.

    Args:
        config: The whole configuration.
        model: Name in the registry.
        ratio: The ratio as runs' names spell it.
    """
    found = {}
    for run in runs_of(config, model, f"r{ratio}"):
        file = Path("results") / run.name / "eval.json"
        if file.exists():
            made_from = json.loads(file.read_text())["provenance"]["keys"]
            paths = Paths(config, run)
            if (made_from["calibration"], made_from["compression"]) == (
                paths.calibration.name, paths.compressed.name,
            ):  # fmt: skip
                found[run.name] = run
    return found
