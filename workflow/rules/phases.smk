"""One target per phase over the runs that params.yaml lists; each is a stage in dvc.yaml."""


def phase(name):
    """An input function that gives what a finished phase leaves behind, for all listed runs."""

    def files(wildcards):
        runs = [checked(params.parse_run, config, run) for run in config["runs"]]
        REQUESTED.update(dict.fromkeys(config["runs"]))
        return [
            file
            for run in runs
            for file in layout.phase_targets(config, run, name, blocks=lambda: blocks_of(run.model))
        ]

    return files


rule fetch:
    """Fetch models, texts and task data of all runs."""
    input:
        phase("fetch"),


rule sample:
    """Sample the calibration tokens of all runs."""
    input:
        phase("sample"),


rule capture:
    """Capture the original side of all runs."""
    input:
        phase("capture"),


rule compress:
    """Compress all runs."""
    input:
        phase("compress"),


rule evaluate:
    """Evaluate all runs."""
    input:
        phase("evaluate"),
