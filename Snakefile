"""AA-SVD and its comparisons as a resumable pipeline. Start with README.md; `snakemake --list` names the rules."""

from snakemake.utils import min_version

min_version("9.19")


configfile: "params.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/state.smk"
include: "workflow/rules/sources.smk"
include: "workflow/rules/original.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/results.smk"
include: "workflow/rules/paper.smk"
include: "workflow/rules/compare.smk"
include: "workflow/rules/phases.smk"


rule all:
    """Make every run that params.yaml lists; `--report` shows every finished run."""
    input:
        expand("results/{run}/eval.json", run=layout.finished_runs(config) if REPORTING else config["runs"]),
    default_target: True
