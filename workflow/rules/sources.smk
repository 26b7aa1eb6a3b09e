def todays(folder):
    """An input function that gives no file, but refuses a source under another key than today's parameters give it.

    A name alone says what is fetched: it would be kept under a key that it was not made from.
    """

    def nothing(wildcards):
        checked(layout.require_key, wildcards.key, checked(folder, wildcards))
        return []

    return nothing


def unfetched(wildcards):
    """The marker of a run that was published from another model, until this one is fetched.

    What such a run reads is known then only, and until then its eval.json leaves Snakemake nothing to do.
    """
    if pathlib.Path(f"{MODEL}/source.json".format(**wildcards)).exists():
        return []
    runs = [parse_run(name) for name in REQUESTED if parse_run(name).model == wildcards.model]
    return [marker(run.name) for run in runs if not layout.is_published(run, paths_by_name(run.name))]


checkpoint fetch_model:
    """Fetch a dense model as safetensors and describe its tensors and blocks."""
    input:
        todays(lambda w: layout.model_folder(config, w.model)),
        unfetched,
    output:
        source=f"{MODEL}/source.json",
        outline=f"{MODEL}/outline.json",
        record=f"{MODEL}/fetch.json",
    log:
        "logs/{model}/fetch_model_{key}.log",
    # First and alone: see `forgotten` in state.smk.
    priority: 2
    threads: workflow.resource_settings.cores or 1
    params:
        source=lambda w: checked(params.choose, w.model, config["models"], "model"),
    run:
        stages(wildcards).fetch_model(
            source=params.source,
            output=output.source,
            outline=output.outline,
            record=output.record,
            cache=CACHE,
            log=log[0],
        )


rule fetch_text:
    """Fetch one split of a text as a table of documents."""
    input:
        todays(lambda w: layout.text_file(config, w.text, w.split).parent),
        failed(f"{ARTIFACTS}/sources/texts/{{text}}/{{key}}/{{split}}.parquet"),
    output:
        f"{ARTIFACTS}/sources/texts/{{text}}/{{key}}/{{split}}.parquet",
    log:
        "logs/texts/{text}_{split}_{key}.log",
    params:
        source=lambda w: checked(params.choose, w.text, config["texts"], "text"),
    run:
        stages(wildcards).fetch_text(
            source=params.source,
            name=wildcards.text,
            split=wildcards.split,
            data_dir=config["data_dir"],
            output=output[0],
            cache=CACHE,
            log=log[0],
        )


rule fetch_task:
    """Fetch the rows of a zero-shot task in the schema that lm-eval's stock task reads."""
    input:
        todays(lambda w: layout.task_file(config, w.task).parent),
        failed(f"{ARTIFACTS}/sources/tasks/{{task}}/{{key}}/rows.parquet"),
    output:
        f"{ARTIFACTS}/sources/tasks/{{task}}/{{key}}/rows.parquet",
    log:
        "logs/tasks/{task}_{key}.log",
    priority: 1  # a mistyped name ends a run before hours of work
    run:
        stages(wildcards).fetch_task(
            task=wildcards.task,
            data_dir=config["data_dir"],
            output=output[0],
            cache=CACHE,
            log=log[0],
        )
