"""Settings, keys and the few functions that tell rules what they read. Paths come from aasvd.params alone."""

import importlib
import pathlib
import sys

from snakemake.exceptions import WorkflowError

from aasvd import params

CACHE = "results/downloads"
ARTIFACTS = str(params.ARTIFACTS)
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


def checked(function, *args, **kwargs):
    """Call a function; errors with a message are the user's to mend, so they come without a traceback."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise WorkflowError(str(error)) from None


class Stages:
    """The stages, imported when the first one runs: torch and transformers take seconds."""

    def __init__(self, status_files):
        self.status_files = status_files

    def __getattr__(self, name):
        def run(**arguments):
            stage = getattr(importlib.import_module("aasvd.stages"), name)
            with importlib.import_module("aasvd.progress").watched_by(self.status_files):
                checked(stage, **arguments)

        return run


def stages(wildcards):
    """The functions of aasvd.stages; the traceback of an error is in the stage's log."""
    return Stages(status_files(wildcards))


checked(params.validate, config)
# A mistyped run is found here, in one line, rather than deep inside the graph. Snakemake tells a Snakefile no targets.
for run in params.named_runs(sys.argv[1:]):
    checked(params.parse_run, config, run)


def run_of(wildcards):
    """The run that a rule's wildcards belong to."""
    if "run" in wildcards.keys():
        REQUESTED.add(wildcards.run)
        return checked(params.parse_run, config, wildcards.run)
    compression = wildcards.compression if "compression" in wildcards.keys() else None
    return checked(
        params.find_run,
        config,
        model=wildcards.model,
        calibration=wildcards.calibration,
        compression=compression,
    )


def paths_of(wildcards):
    """Where the artifacts of a rule's run lie."""
    return params.Paths(config, run_of(wildcards))


def settings_of(section):
    """A function that gives a rule one section of its run's settings."""
    return lambda wildcards: run_of(wildcards).settings[section]


def dense_source(wildcards):
    """The description of the dense model."""
    return f"{checked(params.model_folder, config, wildcards.model)}/source.json"


def blocks_of(model):
    """How many blocks a model has; known once it is fetched."""
    key = checked(params.model_folder, config, model).name
    return params.block_count(checkpoints.fetch_model.get(model=model, key=key).output.outline)
