def measurements(folder):
    """An input function that gives a run's measurements of the dense or the compressed model."""

    def files(wildcards):
        paths = paths_of(wildcards)
        return [settled(f"{getattr(paths, folder)}/{name}") for name in paths.measurements()]

    return files


def records(wildcards):
    """The records of every stage that made a run's checkpoint."""
    paths, run = paths_of(wildcards), run_of(wildcards)
    blocks = range(blocks_of(run.model))
    # What runs share counts for every run that uses it.
    statistics = layout.original_files(run).values()
    return [
        ancient(str(file))
        for file in [
            paths.model / "fetch.json",
            paths.original / "embed.json",
            *([paths.original / "differentiate.json"] if "differentiate.json" in statistics else []),
            *(paths.original / f"block_{block:03d}" / record for block in blocks for record in statistics),
            *([paths.positions.with_suffix(".json")] if paths.positions else []),
            *(paths.original / f"measures/{name}.json" for name in params.measures(run) if params.is_whole(name)),
            *(
                paths.compressed / f"block_{block:03d}" / f"{stage}.json"
                for block in blocks
                for stage in layout.block_stages(run)
            ),
            paths.compressed / "allocate.json",
            paths.compressed / "assemble.json",
            *([paths.compressed / "adapt.json"] if run.settings["post"]["epochs"] else []),
        ]
    ]


def outdated(wildcards):
    """A marker newer than results/<run>/, where that was published from other parameters.

    Everything else under results/ has its parameters in its path; what people look at has not.
    """
    published = layout.is_published(run_of(wildcards), paths_of(wildcards))
    return [] if published else marker(wildcards.run)


# A report shows what is there: a listed run that was never made would be an error.
REPORTING = any(word.partition("=")[0] == "--report" for word in sys.argv) and "--report-after-run" not in sys.argv


rule publish:
    """Put a run's checkpoint, numbers and figure where people look."""
    input:
        source=lambda w: ancient(f"{paths_of(w).model}/source.json"),
        checksums=lambda w: ancient(f"{paths_of(w).checkpoint}/SHA256SUMS"),
        outline=lambda w: ancient(f"{paths_of(w).model}/outline.json"),
        ingredients=lambda w: [ancient(f"{folder}/key.json") for folder in (paths_of(w).original, paths_of(w).compressed)],
        records=records,
        dense=measurements("dense_evaluation"),
        compressed=measurements("evaluation"),
        outdated=outdated,
    output:
        evaluation="results/{run}/eval.json",
        model=directory("results/{run}/model"),
        table=report(
            "results/{run}/results.html",
            caption="../report/results.rst",
            category="Results",
            labels={"run": "{run}", "what": "perplexity and accuracy"},
        ),
        figure=report(
            "results/{run}/figures/distortion.svg",
            caption="../report/distortion.rst",
            category="Blocks",
            labels={"run": "{run}", "what": "distortion per block"},
        ),
        blocks_file="results/{run}/blocks.json",
    log:
        "logs/publish/{run}.log",
    priority:
        turn
    params:
        run=run_of,
        base=lambda w: config["models"][run_of(w).model],
        made_from=lambda w: paths_of(w).publication(),
    run:
        stages(wildcards).publish(
            source=input.source,
            checksums=input.checksums,
            outline=input.outline,
            records=input.records,
            dense=input.dense,
            compressed=input.compressed,
            outdated=input.outdated,
            **output,
            run=params.run,
            base=params.base,
            keys=params.made_from,
            log=log[0],
        )


onsuccess:
    if missing := forgotten():
        raise WorkflowError(
            f"{missing[0]} was not made: Snakemake lost sight of it while a model was fetched. "
            "Nothing is lost; run the same command again."
        )
    importlib.import_module("aasvd.versioning").commit()
