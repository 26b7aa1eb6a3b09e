"""What earlier runs left undone, and where this one is."""

import time

REQUESTED = {}  # names of the runs that are asked for, in the order in which input functions meet them


def marker(name):
    """An input that makes what exists be made anew: for that it has to exist, to be newer, and to be another."""
    file = pathlib.Path(ARTIFACTS) / "outdated" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(time.time_ns()))
    return str(file)


def failed(pattern):
    """An input function that gives a marker where an artifact holds a failure, so that it is tried again."""

    def again(wildcards):
        artifact = pattern.format(**wildcards)
        return [marker(artifact)] if layout.failure_file(artifact).exists() else []

    return again


def settled(file):
    """An input whose age does not matter, unless it holds a failure: then what makes it is tried again.

    What read the failure has to follow, and Snakemake looks at no job by itself that lies behind one it runs.
    """
    return file if layout.failure_file(file).exists() else ancient(file)


def status_files(wildcards):
    """The progress.json of each asked-for run that a job works for; in a cluster's job, of the listed runs."""
    names = REQUESTED or config["runs"]
    runs = [parse_run(name) for name in sorted(names)]
    return [f"results/{run.name}/progress.json" for run in runs if works_for(run, wildcards)]


def works_for(run, wildcards):
    """Whether a job's wildcards fit a run."""
    paths = paths_by_name(run.name)
    if "measure" in wildcards.keys() and wildcards.measure not in params.measures(run):
        return False
    own = {
        "run": run.name,
        "model": run.model,
        "calibration": paths.calibration.name,
        "compression": paths.compressed.name,
        "positions": paths.positions and paths.positions.stem,
    }
    subject = f"{own['calibration']}/{own['compression']}"
    return all(wildcards[name] == own[name] for name in own if name in wildcards.keys()) and (
        "subject" not in wildcards.keys() or wildcards.subject in (subject, f"dense/{paths.model.name}")
    )


def turn(wildcards):
    """A job's priority: that of the first run it works for, so that runs end one after the other and not all at the end."""
    runs = (parse_run(name) for name in REQUESTED)
    return -next((place for place, run in enumerate(runs) if works_for(run, wildcards)), 0)


# How many stages compute at a time; without an accelerator they share the cores.
AT_A_TIME = min(workflow.resource_settings.cores or 1, int(workflow.global_resources["gpu"].value)) if "gpu" in workflow.global_resources else 1
run_stage = workers.Workers(AT_A_TIME).run_stage if AT_A_TIME > 1 else workers.run_stage


class Stages:
    """The stages as functions of keyword arguments, wherever they run."""

    def __init__(self, status_files):
        self.status_files = status_files

    def __getattr__(self, name):
        return lambda **arguments: checked(run_stage, name, self.status_files, arguments)


def stages(wildcards):
    """The functions of aasvd.stages; the traceback of an error is in the stage's log."""
    return Stages(status_files(wildcards))


# The same for what shows finished runs: it says nothing of how far one is, and would leave `running` behind.
unwatched = Stages([])


def forgotten():
    """The files that were asked for and are not there, though Snakemake ends well.

    When a model is fetched, Snakemake looks anew at what has to run. A job whose output is there but which has not
    ended yet then hides all jobs behind it, where they read that output as `ancient`: they are never run.
    """
    files = (file for job in workflow.dag.targetjobs for file in (job.output or job.input))
    return [file for file in files if not pathlib.Path(file).exists()]


onstart:
    # Stages compute in Snakemake's own process, or are waited for there. Its limit of jobs per second, which is for clusters, makes it look for
    # jobs to start every second as many times as jobs ended while others waited: soon that takes the interpreter.
    if workflow.local_exec:
        workflow.scheduler.job_rate_limiter = None
