"""The paper's tables and figures, each a target of its own under results/paper/ (docs/evaluation.md)."""

RUNS = "results/runs.parquet"  # tables and figures gather it anew before they read it
SWEEP = {"calibration": ["sequences"]}
LAYERS = layout.unkeyed_measurement("layers_{block}")
MEMORY = layout.unkeyed_measurement("memory_bfloat16_{context}")
ABLATION = {"compression": ["objective", "blend", "ridge", "allocation"], "refinement": ["epochs"]}


wildcard_constraints:
    table="|".join(targets.TABLES),
    names=r"[A-Za-z0-9][A-Za-z0-9._+-]*",
    ratios=params.RATIOS,
    ratio=r"[0-9.]+",
    gigabytes=r"[0-9.]+(-[0-9.]+)*",
    context=r"[0-9]+",


def numbers(text):
    """The numbers of a target's name, joined there by hyphens."""
    return [float(part) for part in text.split("-")]


def variants(kinds):
    """The variants that differ from the default settings in nothing else than these keys."""
    return params.variants_of(config, kinds)


def made(names):
    """The published numbers of runs; that a target needs them makes them asked-for runs."""
    for name in names:
        checked(params.parse_run, config, name)
    REQUESTED.update(dict.fromkeys(names))
    return [f"results/{name}/eval.json" for name in names]


def table_runs(wildcards):
    """The runs that a table cannot do without; other finished runs are shown too."""
    names = [f"{model}_r{ratio}" for model in wildcards.names.split("+") for ratio in wildcards.ratios.split("-")]
    beside = {"ablation": lambda: variants(ABLATION), "pruning": lambda: params.pruning_methods(config)}
    return made(names + [f"{name}_{part}" for name in names for part in beside.get(wildcards.table, list)()])


def unseen(pattern):
    """An input function that gives a marker where a run was published after a file of this pattern was written.

    Published runs are no inputs: a run of other parameters than today's would be made anew.
    """

    def newer(wildcards):
        written = pathlib.Path(pattern.format(**wildcards))
        if not written.exists():
            return []
        times = [file.stat().st_mtime_ns for file in pathlib.Path("results").glob("*/eval.json")]
        return [marker(written)] if max(times, default=0) > written.stat().st_mtime_ns else []

    return newer


def table_arguments(wildcards):
    """What a table's function takes beside the runs and its outputs."""
    models = wildcards.names.split("+")
    arguments = {"models": models} if wildcards.table == "models" else {"model": wildcards.names}
    if wildcards.table == "ablation":
        arguments["variants"] = variants(ABLATION)
    return arguments | {"name": wildcards.table, "ratios": numbers(wildcards.ratios)}


rule collect_runs:
    """Gather all finished runs in one table: a row per run and metric."""
    input:
        unseen("results/runs.parquet"),
    output:
        "results/runs.parquet",
    log:
        "logs/paper/runs.log",
    run:
        unwatched.collect(output=output[0], log=log[0])


rule paper_table:
    """Write one table: main, pruning, breakdown, ablation (of one model) or models (several, joined by +)."""
    input:
        needed=table_runs,
        unseen=unseen("results/paper/{table}/{names}_r{ratios}.html"),
    output:
        report(
            "results/paper/{table}/{names}_r{ratios}.html",
            caption="../report/paper_table.rst",
            category="Paper",
            labels={"what": "table: {table}", "model": "{names}", "ratios": "{ratios}"},
        ),
        "results/paper/{table}/{names}_r{ratios}.md",
        "results/paper/{table}/{names}_r{ratios}.tex",
    log:
        "logs/paper/{table}_{names}_r{ratios}.log",
    params:
        arguments=table_arguments,
    run:
        unwatched.present(**params.arguments, runs=RUNS, outputs=output, log=log[0])


def layers_of(run):
    """The errors of every block of a run."""
    folder = paths_by_name(run.name).evaluation
    return [f"{folder}/{LAYERS.format(block=f'{block:03d}')}" for block in range(blocks_of(run.model))]


def unfollowed(wildcards):
    """The errors of blocks, by run, of shown runs whose own stages send nothing through the compressed blocks."""
    needed = f"{wildcards.model}_r{wildcards.ratio}"
    runs = {needed: parse_run(needed)} | layout.published_runs(config, wildcards.model, wildcards.ratio)
    return {name: layers_of(run) for name, run in runs.items() if "propagate" not in layout.block_stages(run)}


rule figure_depth:
    """Draw the distortion of block outputs over depth, for every finished run of a model at a ratio."""
    input:
        needed=lambda w: made([f"{w.model}_r{w.ratio}"]),
        layers=lambda w: [ancient(file) for files in unfollowed(w).values() for file in files],
        unseen=unseen("results/paper/depth/{model}_r{ratio}.png"),
    output:
        report(
            "results/paper/depth/{model}_r{ratio}.png",
            caption="../report/depth.rst",
            category="Paper",
            labels={"what": "figure: distortion over depth", "model": "{model}", "ratios": "{ratio}"},
        ),
        "results/paper/depth/{model}_r{ratio}.svg",
    log:
        "logs/paper/depth_{model}_r{ratio}.log",
    params:
        layers=unfollowed,
    run:
        unwatched.present(
            name="depth",
            runs=RUNS,
            model=wildcards.model,
            ratio=float(wildcards.ratio),
            layers=params.layers,
            outputs=output,
            log=log[0],
        )


def sequences(wildcards):
    """The number of calibration sequences of each variant of the sweep."""
    return {name: config["variants"][name]["calibration"]["sequences"] for name in variants(SWEEP)}


rule figure_calibration:
    """Draw the effect of the calibration set's size: the sweep over the variants that change nothing else."""
    input:
        needed=lambda w: made([f"{w.model}_r{w.ratio}_{variant}" for variant in variants(SWEEP)]),
        unseen=unseen("results/paper/calibration/{model}_r{ratio}.png"),
    output:
        report(
            "results/paper/calibration/{model}_r{ratio}.png",
            caption="../report/calibration.rst",
            category="Paper",
            labels={"what": "figure: calibration set", "model": "{model}", "ratios": "{ratio}"},
        ),
        "results/paper/calibration/{model}_r{ratio}.svg",
    log:
        "logs/paper/calibration_{model}_r{ratio}.log",
    params:
        sequences=sequences,
    run:
        unwatched.present(
            name="calibration",
            runs=RUNS,
            model=wildcards.model,
            ratio=float(wildcards.ratio),
            sequences=params.sequences,
            outputs=output,
            log=log[0],
        )


rule layer_errors:
    """Measure the outputs of every linear of one finished block against the original's."""
    input:
        source=lambda w: ancient(dense_source(w)),
        original=lambda w: ancient(original_input(w, int(w.block))),
        shifted=lambda w: ancient(shifted_input(w, int(w.block))),
        factors=lambda w: ancient(finished_factors(w, int(w.block))),
    output:
        f"{EVALUATION}/{{calibration}}/{{compression}}/{LAYERS}",
    log:
        "logs/{model}/{calibration}/{compression}/layers_{block}.log",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        unwatched.measure_layers(
            **input, output=output[0], index=int(wildcards.block), calibration=params.settings, log=log[0]
        )


rule figure_layers:
    """Draw the errors of attention's and the MLP's last linear and of block outputs over depth, for one run."""
    input:
        files=lambda w: [ancient(file) for file in layers_of(run_of(w))],
        published=lambda w: made([w.run]),  # it is newer where the figure shows other parameters than today's
    output:
        report(
            "results/paper/layers/{run}.png",
            caption="../report/layers.rst",
            category="Paper",
            labels={"what": "figure: errors over depth", "model": "{run}", "ratios": ""},
        ),
        "results/paper/layers/{run}.svg",
    log:
        "logs/paper/layers_{run}.log",
    run:
        unwatched.present(name="layers", files=input.files, run=wildcards.run, outputs=output, log=log[0])


rule memory:
    """Measure the memory that a dense or compressed model needs to read a context and to generate."""
    input:
        model=lambda w: ancient(subject_model(w)),
        again=failed(f"{EVALUATION}/{{subject}}/{MEMORY}"),
    output:
        f"{EVALUATION}/{{subject}}/{MEMORY}",
    log:
        "logs/{model}/{subject}/memory_bfloat16_{context}.log",
    resources:
        gpu=1,
    run:
        unwatched.measure_memory(model=input.model, context=int(wildcards.context), output=output[0], log=log[0])


def budget_plan(wildcards):
    """Per memory budget: the ratio that fits, its run, and where its measured memory lies."""
    blocks_of(wildcards.model)  # the model has to be there before anything can be estimated
    folder = checked(layout.model_folder, config, wildcards.model)
    memory = importlib.import_module("aasvd.memory")
    return checked(
        memory.plan,
        config,
        model=wildcards.model,
        source=folder / "source.json",
        outline=folder / "outline.json",
        budgets=[1e9 * size for size in numbers(wildcards.gigabytes)],
        context=int(wildcards.context),
    )


rule paper_budget:
    """Write the table of memory budgets in GB for a context length, each with the ratio that fits it."""
    input:
        needed=lambda w: made([entry["run"] for entry in budget_plan(w) if entry["run"]]),
        measured=lambda w: [settled(entry["measured"]) for entry in budget_plan(w) if entry["run"]],
        unseen=unseen("results/paper/budget/{model}_{gigabytes}GB_{context}.html"),
    output:
        report(
            "results/paper/budget/{model}_{gigabytes}GB_{context}.html",
            caption="../report/paper_table.rst",
            category="Paper",
            labels={"what": "table: memory budgets", "model": "{model}", "ratios": ""},
        ),
        "results/paper/budget/{model}_{gigabytes}GB_{context}.md",
        "results/paper/budget/{model}_{gigabytes}GB_{context}.tex",
    log:
        "logs/paper/budget_{model}_{gigabytes}GB_{context}.log",
    params:
        plan=budget_plan,
    run:
        unwatched.present(
            name="budget",
            runs=RUNS,
            model=wildcards.model,
            context=int(wildcards.context),
            plan=params.plan,
            outputs=output,
            log=log[0],
        )
