"""Turn params.yaml and the name of a run into settings, keys and paths; imports nothing heavy.

An artifact's path names everything it was made from (design section 3), so that nothing ever depends on
file times: `results/artifacts/<phase>/<model>/<key>/...`, where a key is a short hash of the parameters,
the identity of the sources and the format version of the artifact. Phases come first because each is an
output of one DVC stage, and those must not overlap.
"""

import copy
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

from aasvd.methods import ALLOCATIONS, DIFFERENTIATED, OBJECTIVES, PRUNING, REMOVING, WHOLE

Config = Mapping[str, Any]

SCHEMA = Path(__file__).parent.parent / "workflow" / "schemas" / "params.schema.yaml"
ARTIFACTS = Path("results") / "artifacts"
DEFAULT = "default"  # the run whose model and ratio are those of params.yaml
RUN = re.compile(r"(?P<model>.+)_r(?P<ratio>[0-9.]+)(?P<parts>(?:_[A-Za-z0-9-]+){,2})")

_POWER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # a number that YAML 1.1 may take for a string

# Raised when a stage's output would change for the same parameters; part of every key below it.
VERSIONS = {
    "model": 1,
    "text": 1,
    "task": 1,
    "calibration": 5,
    "compression": 6,
    "evaluation": 2,
    "positions": 1,
}

# Settings that change how a result is computed, but not which result it is.
_NOT_IN_KEYS = {
    "calibration": {"batch", "keep_activations"},
    # What a method is called; what it does is in the other keys, so equal methods share their artifacts.
    "compression": {"ratio", "method", "keep_factors"},
}
# What is kept of artifacts that runs share: no run's own settings.
_KEPT = {"calibration": "keep_activations", "compression": "keep_factors"}
# Digests of sources: weights, and files larger than this, are sampled.
_WEIGHTS, _WHOLE_BYTES = (".safetensors", ".gguf"), 1 << 30
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


class Run(NamedTuple):
    """One target: a model, a retained-parameter ratio, and the settings with method and variants merged in.

    Attributes:
        name: Folder under results/.
        model: Name in the registry.
        ratio: Share of the compressed linears' parameters that is kept, as written in the name.
        settings: The sections of params.yaml that a variant may override.
    """

    name: str
    model: str
    ratio: float
    settings: dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    """Read a params.yaml with numbers as Snakemake's side of the pipeline has them, not yet validated."""
    config = yaml.safe_load(path.read_text())
    read_strings(config)
    return config


def read_strings(config: dict[str, Any]) -> None:
    """Read strings that the schema says cannot be any, in place.

    Snakemake leaves the values inside a mapping given to `--config` as strings: they are read as YAML, so
    that `evaluation={limit: 500}` gives a number. YAML itself takes 1e-4, without a point, for a string.
    """
    for error in list(_validator().iter_errors(config)):
        if error.validator == "type" and isinstance(error.instance, str) and error.absolute_path:
            *parents, name = error.absolute_path
            value = yaml.safe_load(error.instance)
            if error.validator_value == "number" and isinstance(value, str) and _POWER.fullmatch(value):
                value = float(value)
            functools.reduce(lambda part, key: part[key], parents, config)[name] = value


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(yaml.safe_load(SCHEMA.read_text()))


def validate(config: Config) -> None:
    """Check a configuration against the schema, and all names in it.

    Raises:
        ValueError: Names the key, what is wrong with it and what is allowed.
    """
    error = jsonschema.exceptions.best_match(_validator().iter_errors(config))
    if error is not None:
        place = ".".join(map(str, error.absolute_path)) or "top level"
        raise ValueError(f"params.yaml: {place}: {error.message}")
    overrides = dict(_overrides(config))
    for place, section in {"": config, **overrides}.items():
        for piece, known in (("objective", OBJECTIVES), ("allocation", ALLOCATIONS)):
            name = section.get("compression", {}).get(piece)
            if name is not None and name not in known:
                raise ValueError(
                    f"params.yaml: {place}compression.{piece}: unknown {piece} {name!r}; "
                    f"there are {', '.join(known)}"
                )
        if "suite" in section.get("evaluation", {}):
            choose(section["evaluation"]["suite"], config["suites"], "evaluation suite")
        for text in [*_texts(section)]:
            choose(text, config["texts"], "text")
        if method := section.get("compression", {}).get("method"):
            choose(method, config["methods"], "method")
    for suite in config["suites"].values():
        for text in suite["texts"]:
            choose(text, config["texts"], "text")
    choose(config["model"], config["models"], "model")
    for place, section in overrides.items():
        if "ratio" in section.get("compression", {}):
            raise ValueError(f"params.yaml: {place}compression.ratio: the ratio is part of a run's name")
        for concern, key in _KEPT.items():
            if key in section.get(concern, {}):
                raise ValueError(
                    f"params.yaml: {place}{concern}.{key}: runs share artifacts, "
                    f"so only {concern}.{key} itself says whether they are kept"
                )
        for name in section.get("methods", {}):
            choose(name, config["methods"], "method")
    if twice := sorted(set(config["methods"]) & set(config["variants"])):
        raise ValueError(f"params.yaml: {twice[0]} is both a method and a variant; rename one")
    for name in config["runs"]:
        parse_run(config, name)
    for compared in [config["comparison"], *config["comparisons"].values()]:
        for kind in ("methods", "variants"):
            for name in compared[kind]:
                if name or kind == "methods":  # "" stands for no variant
                    choose(name, config[kind], kind[:-1])


def _overrides(config: Config) -> Iterable[tuple[str, Config]]:
    """Yield everything that is laid over the default settings, with the beginning of its keys' names."""
    for kind in ("methods", "variants"):
        for name, section in config[kind].items():
            yield f"{kind}.{name}.", section
            for method, own in section.get("methods", {}).items():
                yield f"{kind}.{name}.methods.{method}.", own


class Comparison(NamedTuple):
    """One table: a model's runs.

    Attributes:
        model: Name in the registry.
        ratios: Retained-parameter ratios.
        runs: By method, variant ("" for the method as it is declared) and ratio as written.
        left_out: By method and variant, why there is no such run.
    """

    model: str
    ratios: list[float]
    runs: dict[tuple[str, str, str], Run]
    left_out: dict[tuple[str, str], str]


def parse_comparison(config: Config, name: str) -> Comparison:
    """Return the runs of a comparison `[<table>/]<model>_r<ratio>[-<ratio>...]`: all methods, all variants.

    A variant that changes nothing of a method, or the same as one before it, makes no run of its own, so
    that no model stands in the table twice under one method. What does not go together is left out.

    Raises:
        ValueError: If the name has another form, a variant would make all methods the same, or no run is
            left.
    """
    table, named, runs_of = name.rpartition("/")
    model, separator, ratios = runs_of.rpartition("_r")
    if not separator:
        raise ValueError(f"comparison {name!r} must have the form [<table>/]<model>_r<ratio>[-<ratio>...]")
    compared = choose(table, config["comparisons"], "comparison") if named else config["comparison"]
    for variant in compared["variants"]:
        if "objective" in config["variants"].get(variant, {}).get("compression", {}):
            raise ValueError(
                f"comparison {name!r}: variant {variant!r} sets compression.objective, which "
                "would make one of all methods; an empty variant shows each method as it is declared"
            )
    runs: dict[tuple[str, str, str], Run] = {}
    left_out: dict[tuple[str, str], str] = {}
    for ratio, method in itertools.product(ratios.split("-"), compared["methods"]):
        shown: list[dict[str, Any]] = []
        for variant in compared["variants"]:
            parts = filter(None, (f"{model}_r{ratio}", method, variant))
            run = _read_run(config, "_".join(parts))
            if conflict := _conflict(run.settings):
                left_out[method, variant] = conflict
            elif run.settings not in shown:
                runs[method, variant, ratio] = run
                shown.append(run.settings)
    if not runs:
        raise ValueError(f"comparison {name!r} has no run: {', '.join(left_out.values())}")
    return Comparison(model, [float(ratio) for ratio in ratios.split("-")], runs, left_out)


def _texts(section: Config) -> Iterable[str]:
    if "text" in section.get("calibration", {}):
        yield section["calibration"]["text"]
    yield from section.get("evaluation", {}).get("texts") or []


def choose(name: str, registry: Mapping[str, Any], kind: str) -> Any:
    """Return an entry of a registry.

    Raises:
        ValueError: If it has none of that name; lists those it has.
    """
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; params.yaml has {', '.join(sorted(registry)) or 'none'}")
    return registry[name]


def parse_run(config: Config, name: str) -> Run:
    """Return the run of a folder name `<model>_r<ratio>[_<method or variant>][_<variant>]`, or of `default`.

    Raises:
        ValueError: If the name has another form, its model, method or variant is unknown, its ratio is not
            in (0, 1), or its settings do not go together.
    """
    run = _read_run(config, name)
    if conflict := _conflict(run.settings):
        raise ValueError(f"run {name!r}: {conflict}")
    return run


def _read_run(config: Config, name: str) -> Run:
    if name == DEFAULT:
        named = f"{config['model']}_r{written_ratio(config['compression']['ratio'])}"
        return _read_run(config, named)._replace(name=name)
    match = RUN.fullmatch(name)
    if match is None:
        raise ValueError(f"run {name!r} must have the form <model>_r<ratio>[_<method>][_<variant>]")
    choose(match["model"], config["models"], "model")
    if not re.fullmatch(r"\d*\.?\d+", match["ratio"]) or not 0 < float(match["ratio"]) < 1:
        raise ValueError(
            f"run {name!r}: ratio {match['ratio']} must lie between 0 and 1; it is the share kept"
        )
    parts = match["parts"].split("_")[1:]
    method = [part for part in parts[:1] if part in config["methods"]]
    variants = parts[len(method) :]
    known = config["variants"] if method else {**config["methods"], **config["variants"]}
    for part in variants[:1]:
        choose(part, known, "variant" if method else "method or variant")
    overrides = [choose(part, config["variants"], "variant") for part in variants]
    settings = _settings(config, method, overrides)
    return Run(name, match["model"], float(match["ratio"]), settings)


def _conflict(settings: Mapping[str, Any]) -> str | None:
    """Return why settings do not go together, or None where they do."""
    storage, eight_bit = settings["compression"]["storage"], settings["compression"]["precision"] == "int8"
    objective, allocation = settings["compression"]["objective"], settings["compression"]["allocation"]
    if (objective in PRUNING) != (storage == "pruned"):
        return (
            f"compression.objective {objective} does not go with compression.storage {storage}: "
            f"{' and '.join(PRUNING)} are stored as pruned, and nothing else is"
        )
    if allocation not in PRUNING.get(objective, {*ALLOCATIONS} - {*REMOVING}):
        return f"compression.objective {objective} does not go with compression.allocation {allocation}"
    if storage == "pruned" and eight_bit:
        return "compression.precision int8 is for low-rank matrices, not for compression.storage pruned"
    if storage == "remapped" and eight_bit:
        return (
            "compression.precision int8 does not go with compression.storage remapped, "
            "which has 8 bit already"
        )
    if settings["post"]["epochs"] and (storage != "factors" or eight_bit):
        return (
            "the post-step trains U and V, so it needs compression.storage factors and "
            "another compression.precision than int8"
        )
    return None


def written_ratio(ratio: float) -> str:
    """Return a ratio as names and paths hold it: every digit, so that it is read back, and no exponent."""
    return format(Decimal(repr(float(ratio))), "f")


def named_runs(words: Iterable[str]) -> list[str]:
    """Return the runs that the words of a command line ask for: names in `results/<run>/...`."""
    parts = [Path(word).parts for word in words]
    others = {ARTIFACTS.name, "downloads", "compare", "paper"}
    return [p[1] for p in parts if len(p) > 2 and p[0] == "results" and p[1] not in others]


def _settings(config: Config, method: list[str], overrides: list[Config]) -> dict[str, Any]:
    """Merge a method's settings over the default ones, and those of variants over both.

    The method is the one that a run names, else the one that its variants or the default settings name.
    """
    named = [
        *method,
        *(o["compression"]["method"] for o in overrides if "method" in o.get("compression", {})),
    ]
    chosen = (named or [config["compression"]["method"]])[0]
    sections = ("seed", "calibration", "compression", "refinement", "post", "evaluation")
    settings = {section: copy.deepcopy(config[section]) for section in sections}
    for override in [config["methods"][chosen], *overrides]:
        for part in (override, override.get("methods", {}).get(chosen, {})):
            settings = merged(settings, {name: part[name] for name in sections if name in part})
    settings["compression"]["method"] = chosen
    settings["evaluation"] = measurements(config, settings["evaluation"])
    return settings


def merged(settings: Config, override: Config) -> dict[str, Any]:
    """Return settings with those of an override in their places, however deep."""
    return {
        **settings,
        **{
            name: merged(settings.get(name, {}), value) if isinstance(value, Mapping) else value
            for name, value in override.items()
        },
    }


def measurements(config: Config, evaluation: Config) -> dict[str, Any]:
    """Return what is measured and how: an evaluation's suite, with what the evaluation itself says on top."""
    suite = choose(evaluation["suite"], config["suites"], "evaluation suite")
    own = {name: value for name, value in evaluation.items() if value is not None}
    return copy.deepcopy({**suite, **own})


def key_of(ingredients: object) -> str:
    """Return the short hash under which artifacts made from these ingredients are kept."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def _section(settings: Config, name: str) -> dict[str, Any]:
    return {key: value for key, value in settings[name].items() if key not in _NOT_IN_KEYS.get(name, ())}


def model_ingredients(config: Config, model: str) -> dict[str, Any]:
    """Return what identifies a dense model: its source and, for a local folder, its content."""
    source = choose(model, config["models"], "model")
    return {"version": VERSIONS["model"], "source": dict(source), "content": _content(source)}


def text_ingredients(config: Config, text: str) -> dict[str, Any]:
    """Return what identifies a text."""
    source = choose(text, config["texts"], "text")
    local = config["data_dir"] if "hub" in source else ""
    content = _content({"path": str(Path(local) / text)} if local else source)
    return {"version": VERSIONS["text"], "source": dict(source), "data_dir": local, "content": content}


def task_ingredients(config: Config, task: str) -> dict[str, Any]:
    """Return what identifies the rows of a zero-shot task."""
    local = Path(config["data_dir"]).expanduser() / f"{task}.jsonl" if config["data_dir"] else None
    content = _content({"path": str(local)}) if local is not None and local.exists() else None
    return {"version": VERSIONS["task"], "task": task, "content": content}


def _content(source: Config) -> str | None:
    """Return a digest of local files: of all bytes, or of bytes sampled all over weights and huge files.

    Reading 140 GB whenever a workflow starts would be too slow; any fine-tuning changes sampled weights.
    """
    if "path" not in source:
        return None
    path = Path(source["path"]).expanduser()
    files = sorted(_visible_files(path)) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    states = [file.stat() for file in files]
    names = [str(file.relative_to(path)) if path.is_dir() else "" for file in files]
    return _digest(path, tuple((n, s.st_size, s.st_mtime_ns) for n, s in zip(names, states, strict=True)))


def _visible_files(folder: Path) -> Iterable[Path]:
    """Yield the files below a folder without hidden ones: .git and .cache change while the model does not."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield file


@functools.cache
def _digest(path: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Return the digest of a file, or of the named files below a folder; keys ask for it many times over."""
    summary = hashlib.sha256()
    for name, size, _ in files:
        summary.update(f"{name}:{size}\n".encode())
        file = path / name if name else path
        whole = file.suffix not in _WEIGHTS and size <= _WHOLE_BYTES
        step = _SAMPLE_BYTES if whole else max(_SAMPLE_BYTES, size // _SAMPLES)
        with file.open("rb") as stream:
            for start in range(0, size, step):
                stream.seek(start)
                summary.update(stream.read(_SAMPLE_BYTES))
    return summary.hexdigest()


def calibration_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return what identifies the original side: tokens, activations and covariances."""
    return {
        "version": VERSIONS["calibration"],
        "model": model_ingredients(config, run.model),
        "text": text_ingredients(config, run.settings["calibration"]["text"]),
        "calibration": _section(run.settings, "calibration"),
        "seed": run.settings["seed"],
    }


def compression_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return what identifies the compressed blocks."""
    compression = _section(run.settings, "compression")
    # What only other pieces read makes no difference.
    everybody = [*OBJECTIVES.values(), *ALLOCATIONS.values()]
    own = [OBJECTIVES[compression["objective"]], ALLOCATIONS[compression["allocation"]]]
    unused = {option for piece in everybody for option in piece.options}
    for option in unused - {option for piece in own for option in piece.options}:
        del compression[option]
    if compression["allocation"] == "file":
        if not Path(compression["ranks_file"]).expanduser().is_file():
            raise ValueError(
                f"compression.ranks_file {compression['ranks_file']!r} is no file: `file` reads the "
                "rank of every linear from it, as in the ranks.json of a finished run"
            )
        compression["ranks_content"] = _content({"path": compression["ranks_file"]})
    if trains_positions(run):
        compression["positions"] = key_of(positions_ingredients(config, run))
    refinement, post = _section(run.settings, "refinement"), _section(run.settings, "post")
    return {
        "version": VERSIONS["compression"],
        "calibration": key_of(calibration_ingredients(config, run)),
        "ratio": run.ratio,
        "compression": compression,
        "refinement": refinement if refinement["epochs"] else {"epochs": 0},
        "post": post if post["epochs"] else {"epochs": 0},
        "seed": run.settings["seed"],
    }


def positions_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return what identifies trained truncation positions: other methods' settings make no difference."""
    compression = run.settings["compression"]
    return {
        "version": VERSIONS["positions"],
        "calibration": key_of(calibration_ingredients(config, run)),
        "ratio": run.ratio,
        "storage": compression["storage"],
        "dobi": compression["dobi"],
    }


def needs(run: Run) -> set[str]:
    """Return the statistics that a run's objective needs."""
    return set(OBJECTIVES[run.settings["compression"]["objective"]].needs)


def measures(run: Run) -> list[str]:
    """Return the measures (`aasvd.methods`) that a run's allocation looks at, as their files are named.

    A measure that depends on a setting carries it in its name, so that it is shared where that is the same.
    """
    compression = run.settings["compression"]
    own = "loss_aware" if "gradients" in needs(run) else "input_aware"
    probe = f"-{compression['probe']}"
    detail = {"influence": f"-{own}", "sensitivity": probe, "removal": probe}
    looked_at = ALLOCATIONS[compression["allocation"]].needs
    return [name + detail.get(name, "") for name in looked_at if name != "positions"]


def trains_positions(run: Run) -> bool:
    """Return whether a run's allocation looks at trained truncation positions."""
    return "positions" in ALLOCATIONS[run.settings["compression"]["allocation"]].needs


def is_whole(measure: str) -> bool:
    """Return whether a measure is one file of the whole model, and not one of every block."""
    return measure.partition("-")[0] in WHOLE


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


def evaluation_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return, for every text and task of a run, what identifies its measurement."""
    settings = run.settings["evaluation"]
    common = {"evaluation": VERSIONS["evaluation"], "dtype": run.settings["calibration"]["dtype"]}
    window = {"window": settings["window"], "windows": settings["windows"]}
    texts = {
        f"perplexity_{text}": {**text_ingredients(config, text), **common, **window}
        for text in settings["texts"]
    }
    tasks = {
        f"accuracy_{task}": {**task_ingredients(config, task), **common, "limit": settings["limit"]}
        for task in settings["tasks"]
    }
    return texts | tasks


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
    for run in _runs(config, model, (compression or positions or "r0.5").split("-", 1)[0]):
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


def _runs(config: Config, model: str, ratio: str) -> Iterable[Run]:
    """Yield the run of a model and ratio by every name that it could have, the short ones first."""
    variants = [f"_{name}" for name in config["variants"]]
    methods = [f"_{name}" for name in config["methods"]]
    for names in (["", *methods, *variants], itertools.product([*methods, *variants], variants)):
        for parts in names:
            run = _read_run(config, f"{model}_{ratio}{''.join(parts)}")
            # No run has such a name, but others have each part of it.
            if _conflict(run.settings) is None:
                yield run


def find_measurement(config: Config, *, model: str, measurement: str) -> Run:
    """Return a run that asks for a measurement, given by its file name without the ending.

    Raises:
        ValueError: If none does.
    """
    tried = []
    for run in _runs(config, model, "r0.5"):
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


def failure_file(artifact: str | Path) -> Path:
    """Return the file that, where it exists, says why an artifact holds no result and is tried again."""
    return Path(f"{artifact}.error")


def variants_of(config: Config, allowed: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the variants that override these keys of these sections, some of them and nothing else."""
    return [
        name
        for name, overrides in config["variants"].items()
        if overrides
        and all(
            section in allowed and isinstance(values, Mapping) and set(values) <= set(allowed[section])
            for section, values in overrides.items()
        )
    ]


def pruning_methods(config: Config) -> list[str]:
    """Return the methods that prune structures without a search of the whole model, which takes hours."""
    pieces = {
        name: merged(config["compression"], m.get("compression", {})) for name, m in config["methods"].items()
    }
    return [
        name
        for name, own in pieces.items()
        if own["storage"] == "pruned" and not any(map(is_whole, ALLOCATIONS[own["allocation"]].needs))
    ]


def published_runs(config: Config, model: str, ratio: str) -> dict[str, Run]:
    """Return the published runs of a model and ratio whose checkpoints are those of today's parameters.

    Args:
        config: The whole configuration.
        model: Name in the registry.
        ratio: The ratio as runs' names spell it.
    """
    found = {}
    for run in _runs(config, model, f"r{ratio}"):
        file = Path("results") / run.name / "eval.json"
        if file.exists():
            made_from = json.loads(file.read_text())["provenance"]["keys"]
            paths = Paths(config, run)
            if (made_from["calibration"], made_from["compression"]) == (
                paths.calibration.name, paths.compressed.name,
            ):  # fmt: skip
                found[run.name] = run
    return found
