"""Turn params.yaml and the names of runs and comparisons into settings; imports nothing heavy."""

import copy
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

from aasvd.methods import ALLOCATIONS, OBJECTIVES, PRUNING, REMOVING, WHOLE

Config = Mapping[str, Any]

SCHEMA = Path(__file__).parent.parent / "workflow" / "schemas" / "params.schema.yaml"
DEFAULT = "default"  # the run whose model and ratio are those of params.yaml
RUN = re.compile(r"(?P<model>.+)_r(?P<ratio>[0-9.]+)(?P<parts>(?:_[A-Za-z0-9-]+){,2})")
RATIOS = r"[0-9.]+(-[0-9.]+)*"  # as the names of tables join them
_COMPARISON = re.compile(rf"((?P<table>[^/]+)/)?(?P<model>[^/]+)_r(?P<ratios>{RATIOS})")

_POWER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # a number that YAML 1.1 may take for a string

# Where things of a kind are declared.
_REGISTRIES = {
    "model": "models",
    "text": "texts",
    "method": "methods",
    "variant": "variants",
    "evaluation suite": "suites",
}

# No run's own settings: keys leave them out, so that runs share artifacts whatever they say.
_SHARED = {
    "calibration": ("keep_activations", "batch"),
    "compression": ("keep_factors",),
    "evaluation": ("batch",),
}


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
    """Read a params.yaml with numbers as Snakemake's side of the pipeline has them, not yet validated.

    Raises:
        ValueError: If the file is not YAML.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or what looks like a date
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}{line}: not YAML: {reason}") from error
    read_strings(config)
    return config


def read_strings(config: dict[str, Any]) -> None:
    """Read strings that the schema says cannot be any, in place.

    Snakemake leaves the values inside a mapping given to `--config` as strings: they are read as YAML, so
    that `evaluation={limit: 500}` gives a number. YAML itself takes 1e-4, without a point, for a string.
    One that is not YAML either stays, for `validate` to refuse.
    """
    for error in list(_validator().iter_errors(config)):
        if error.validator == "type" and isinstance(error.instance, str) and error.absolute_path:
            *parents, name = error.absolute_path
            try:
                value = yaml.safe_load(error.instance)
            except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date
                continue
            if error.validator_value == "number" and isinstance(value, str) and _POWER.fullmatch(value):
                value = float(value)
            functools.reduce(lambda part, key: part[key], parents, config)[name] = value


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(yaml.safe_load(SCHEMA.read_text()))


def _numbers(section: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """Yield every float of a configuration with its key."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{place}{key}.")
        elif isinstance(value, float):
            yield f"{place}{key}", value


def validate(config: Config) -> None:
    """Check a configuration against the schema, and all names in it.

    Raises:
        ValueError: Names the key, what is wrong with it and what is allowed.
    """
    # The most relevant one; `best_match` would go on to one of several alternatives, of which none was meant.
    errors = _validator().iter_errors(config)
    if error := max(errors, key=jsonschema.exceptions.relevance, default=None):
        place = ".".join(map(str, error.absolute_path)) or "top level"
        raise ValueError(f"params.yaml: {place}: {_explained(error)}")
    # Which every bound of the schema lets through.
    if wrong := next((key for key, number in _numbers(config) if not math.isfinite(number)), None):
        raise ValueError(f"params.yaml: {wrong}: expected a finite number")
    for kind in ("models", "texts"):
        for name, source in config[kind].items():
            acting = _source_keys(kind, source)
            if idle := [key for key in source if key not in acting]:
                raise ValueError(
                    f"params.yaml: {kind}.{name}.{idle[0]}: does nothing beside {acting[0]}; "
                    f"such a {kind[:-1]} has {', '.join(acting)}"
                )
    if config["data_dir"] and not Path(config["data_dir"]).expanduser().is_dir():
        raise ValueError(f'params.yaml: data_dir: {config["data_dir"]!r} is no folder; "" uses the hub')
    overrides = dict(_overrides(config))
    for place, section in {"": config, **overrides}.items():
        for piece, known in (("objective", OBJECTIVES), ("allocation", ALLOCATIONS)):
            name = section.get("compression", {}).get(piece)
            if name is not None and name not in known:
                raise ValueError(
                    f"params.yaml: {place}compression.{piece}: unknown {piece} {name!r}; "
                    f"there are {', '.join(known)}"
                )
    for place, section in overrides.items():
        if "ratio" in section.get("compression", {}):
            raise ValueError(f"params.yaml: {place}compression.ratio: the ratio is part of a run's name")
        for concern, keys in _SHARED.items():
            for key in keys:
                if key in section.get(concern, {}):
                    raise ValueError(
                        f"params.yaml: {place}{concern}.{key}: runs share artifacts whatever it is, "
                        f"so only {concern}.{key} itself counts"
                    )
    for key, name, kind in _references(config, overrides):
        choose(name, config[_REGISTRIES[kind]], kind, key=key)
    if twice := sorted(set(config["methods"]) & set(config["variants"])):
        raise ValueError(f"params.yaml: {twice[0]} is both a method and a variant; rename one")
    for name in config["runs"]:
        parse_run(config, name)


def _references(config: Config, overrides: Mapping[str, Config]) -> Iterable[tuple[str, str, str]]:
    """Yield every key that names something declared elsewhere in params.yaml, with the name and its kind."""
    yield "model", config["model"], "model"
    for suite, measured in config["suites"].items():
        for text in measured["texts"]:
            yield f"suites.{suite}.texts", text, "text"
    for place, section in {"": config, **overrides}.items():
        evaluation = section.get("evaluation", {})
        if "suite" in evaluation:
            yield f"{place}evaluation.suite", evaluation["suite"], "evaluation suite"
        for text in evaluation.get("texts") or []:
            yield f"{place}evaluation.texts", text, "text"
        if "text" in section.get("calibration", {}):
            yield f"{place}calibration.text", section["calibration"]["text"], "text"
        if method := section.get("compression", {}).get("method"):
            yield f"{place}compression.method", method, "method"
        if place:
            for method in section.get("methods", {}):
                yield f"{place}methods", method, "method"
    tables = {f"comparisons.{name}": compared for name, compared in config["comparisons"].items()}
    for place, compared in {"comparison": config["comparison"], **tables}.items():
        for method in compared["methods"]:
            yield f"{place}.methods", method, "method"
        for variant in filter(None, compared["variants"]):  # "" stands for no variant
            yield f"{place}.variants", variant, "variant"


def _explained(error: jsonschema.ValidationError) -> str:
    """Return what is wrong with a value, and what is allowed."""
    schema: Any = error.schema
    expected = schema.get("description", "").removesuffix(".")
    if error.validator in ("pattern", "oneOf"):
        return f"{error.instance!r} does not match; expected: {expected}"
    if error.validator == "type" and ("oneOf" in schema or "pattern" in schema):
        return f"{error.message}; expected: {expected}"
    if error.validator in ("additionalProperties", "type") and "properties" in schema:
        return f"{error.message}; there are {', '.join(schema['properties'])}"
    return error.message


def _source_keys(kind: str, source: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that act on a source of `models` or `texts` (aasvd.sources)."""
    model = kind == "models"
    if "hub" in source:
        return ("hub", "revision") if model else ("hub", "config", "revision")
    if "package" in source:
        return ("package", "file", "sha256", "dtype") if model else ("package", "file", "sha256")
    return ("path", "sha256", "dtype") if model and source["path"].endswith(".gguf") else ("path",)


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
        ValueError: If the name has another form, a variant would make all methods the same, runs are
            measured in different ways, a file of ranks is missing, or no run is left.
    """
    match = _COMPARISON.fullmatch(name)
    if match is None:
        raise ValueError(f"comparison {name!r} must have the form [<table>/]<model>_r<ratio>[-<ratio>...]")
    table, model, ratios = match["table"], match["model"], match["ratios"]
    compared = choose(table, config["comparisons"], "comparison") if table else config["comparison"]
    for variant in compared["variants"]:
        if "objective" in config["variants"].get(variant, {}).get("compression", {}):
            raise ValueError(
                f"comparison {name!r}: variant {variant!r} sets compression.objective, which "
                "would make one of all methods; an empty variant shows each method as it is declared"
            )
    runs: dict[tuple[str, str, str], Run] = {}
    left_out: dict[tuple[str, str], str] = {}
    shown: list[tuple[str, float, dict[str, Any]]] = []
    every = itertools.product(ratios.split("-"), compared["methods"], compared["variants"])
    for ratio, method, variant in every:
        run = _read_run(config, "_".join(filter(None, (f"{model}_r{ratio}", method, variant))))
        row = (method, run.ratio, effective(run.settings))  # by number: 0.60 is 0.6 once more
        if conflict := _conflict(run.settings):
            left_out[method, variant] = conflict
        elif row not in shown:
            runs[method, variant, ratio] = _with_ranks(run)
            shown.append(row)
    if not runs:
        raise ValueError(f"comparison {name!r} has no run: {', '.join(left_out.values())}")
    first, *others = runs.values()
    for run in others:
        if differing := _measured_differently(first.settings, run.settings):
            raise ValueError(
                f"comparison {name!r}: the runs {first.name!r} and {run.name!r} differ in "
                f"{', '.join(differing)}, but rows of one table have to be measured alike"
            )
    return Comparison(model, list(dict.fromkeys(run.ratio for run in runs.values())), runs, left_out)


def _measured_differently(some: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Return the keys by whose values two runs' measurements cannot be compared."""
    (first, second) = (
        {f"evaluation.{key}": value for key, value in settings["evaluation"].items() if key != "suite"}
        | {"calibration.dtype": settings["calibration"]["dtype"]}
        for settings in (some, others)
    )
    return [key for key, value in first.items() if second[key] != value]


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that nothing reads: other pieces' options, and training that is off."""
    compression = settings["compression"]
    own = (OBJECTIVES[compression["objective"]], ALLOCATIONS[compression["allocation"]])
    every = (*OBJECTIVES.values(), *ALLOCATIONS.values())
    unread = {option for piece in every for option in piece.options}
    unread -= {option for piece in own for option in piece.options}
    return {
        **settings,
        "compression": {key: value for key, value in compression.items() if key not in unread},
        **{
            training: settings[training] if settings[training]["epochs"] else {"epochs": 0}
            for training in ("refinement", "post")
        },
    }


def choose(name: str, registry: Mapping[str, Any], kind: str, *, key: str = "") -> Any:
    """Return an entry of a registry.

    Args:
        name: The entry's.
        registry: Entries by name.
        kind: What they are, for the message.
        key: What names it in params.yaml, for the message.

    Raises:
        ValueError: If it has none of that name; lists those it has.
    """
    if name not in registry:
        place = f"params.yaml: {key}: " if key else ""
        known = ", ".join(sorted(registry)) or "none"
        raise ValueError(f"{place}unknown {kind} {name!r}; params.yaml has {known}")
    return registry[name]


def parse_run(config: Config, name: str) -> Run:
    """Return the run of a folder name `<model>_r<ratio>[_<method or variant>][_<variant>]`, or of `default`.

    Raises:
        ValueError: If the name has another form, its model, method or variant is unknown, its ratio is not
            in (0, 1), its settings do not go together, or its file of ranks is missing.
    """
    run = _read_run(config, name)
    if conflict := _conflict(run.settings):
        raise ValueError(f"run {name!r}: {conflict}")
    return _with_ranks(run)


def _with_ranks(run: Run) -> Run:
    """Return a run, unless it reads ranks from a file that is not there."""
    compression = run.settings["compression"]
    if compression["allocation"] == "file" and not Path(compression["ranks_file"]).expanduser().is_file():
        raise ValueError(
            f"run {run.name!r}: compression.ranks_file {compression['ranks_file']!r} is no file: "
            "`file` reads the rank of every linear from it, as in the ranks.json of a finished run"
        )
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


def runs_of(config: Config, model: str, ratio: str) -> Iterable[Run]:
    """Yield the run of a model and ratio by every name that it could have, the short ones first."""
    variants = [f"_{name}" for name in config["variants"]]
    methods = [f"_{name}" for name in config["methods"]]
    for names in (["", *methods, *variants], itertools.product([*methods, *variants], variants)):
        for parts in names:
            run = _read_run(config, f"{model}_{ratio}{''.join(parts)}")
            # No run has such a name, but others have each part of it.
            if _conflict(run.settings) is None:
                yield run


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
