"""Settings, keys and the few functions that tell rules what they read. Paths come from aasvd.layout alone."""

import functools
import importlib
import itertools
import json
import pathlib
import sys

from snakemake.exceptions import WorkflowError

from aasvd import identity, layout, methods, params, targets, workers

CACHE = "results/downloads"
ARTIFACTS = str(layout.ARTIFACTS)
CALIBRATION = f"{ARTIFACTS}/calibration/{{model}}/{{calibration}}"
ORIGINAL = f"{ARTIFACTS}/original/{{model}}/{{calibration}}"
COMPRESSED = f"{ARTIFACTS}/compressed/{{model}}/{{calibration}}/{{compression}}"
EVALUATION = f"{ARTIFACTS}/evaluation/{{model}}"
MODEL = f"{ARTIFACTS}/sources/models/{{model}}/{{key}}"


wildcard_constraints:
    model=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    calibration=r"[0-9a-f]{10}",
    compression=r"r[0-9.]+-[0-9a-f]{10}",
    key=r"[0-9a-f]{10}",
    block=r"\d{3}",
    split=r"train|test",
    measure=r"(spectra|influence|relative_gradients|profile|sensitivity)(-\w+)?",
    buckets=r"\d+",
    positions=r"r[0-9.]+-[0-9a-f]{10}",


def checked(function, *args, **kwargs):
    """Call a function; errors with a message are the user's to mend, so they come without a traceback."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise WorkflowError(str(error)) from None


params.read_strings(config)
checked(params.validate, config)
checked(targets.check, config, sys.argv[1:])  # Snakemake tells a Snakefile no targets


# Every job asks for its run a few times, and working out a key reads local models and texts.
parse_run = functools.cache(lambda name: checked(params.parse_run, config, name))
find_run = functools.cache(
    lambda model, calibration, compression, positions=None: checked(
        layout.find_run, config, model=model, calibration=calibration, compression=compression, positions=positions
    )
)
paths_by_name = functools.cache(lambda name: layout.Paths(config, parse_run(name)))


def run_of(wildcards):
    """The run that a rule's wildcards belong to."""
    if "run" in wildcards.keys():
        REQUESTED[wildcards.run] = None
        return parse_run(wildcards.run)
    return find_run(wildcards.model, wildcards.calibration, wildcards.get("compression"), wildcards.get("positions"))


def paths_of(wildcards):
    """Where the artifacts of a rule's run lie."""
    return paths_by_name(run_of(wildcards).name)


def where_needed(statistic, function):
    """An input function that gives a file only to runs whose objective needs a statistic."""
    return lambda w: [ancient(function(w))] if statistic in params.needs(run_of(w)) else []


def given(inputs):
    """A rule's inputs by name, None for those that its input function left out."""
    return {name: (files if isinstance(files, str) else next(iter(files), None)) for name, files in inputs.items()}


def settings_of(section):
    """A function that gives a rule one section of its run's settings."""
    return lambda wildcards: run_of(wildcards).settings[section]


def dense_source(wildcards):
    """The description of the dense model."""
    return f"{checked(layout.model_folder, config, wildcards.model)}/source.json"


def blocks_of(model):
    """How many blocks a model has; known once it is fetched."""
    key = checked(layout.model_folder, config, model).name
    return layout.block_count(checkpoints.fetch_model.get(model=model, key=key).output.outline)
