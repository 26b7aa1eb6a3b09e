wildcard_constraints:
    subject=r"dense/[0-9a-f]{10}|[0-9a-f]{10}/r[0-9.]+-[0-9a-f]{10}",


def subject_model(wildcards):
    """The file that stands for the measured model: a dense source or a compressed checkpoint."""
    kind, key = wildcards.subject.split("/")
    if kind == "dense":
        source = dense_source(wildcards)
        checked(layout.require_key, key, pathlib.Path(source).parent)
        return source
    return f"{paths_by_name(find_run(wildcards.model, kind, key).name).checkpoint}/SHA256SUMS"


find_measurement = functools.cache(
    lambda model, measurement: checked(layout.find_measurement, config, model=model, measurement=measurement)
)


def measured_settings(name):
    """A function that gives a rule the settings of the run that asks for a measurement."""
    return lambda w: find_measurement(w.model, name.format(**w)).settings


rule perplexity:
    """Measure a model's perplexity on the test split of one text."""
    input:
        model=lambda w: ancient(subject_model(w)),
        text=lambda w: settled(str(checked(layout.text_file, config, w.text, "test"))),
        again=failed(f"{EVALUATION}/{{subject}}/perplexity_{{text}}-{{key}}.json"),
    output:
        f"{EVALUATION}/{{subject}}/perplexity_{{text}}-{{key}}.json",
    log:
        "logs/{model}/{subject}/perplexity_{text}-{key}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=measured_settings("perplexity_{text}-{key}"),
    run:
        stages(wildcards).evaluate_perplexity(
            model=input.model,
            text=input.text,
            output=output[0],
            settings=params.settings["evaluation"],
            calibration=params.settings["calibration"],
            log=log[0],
        )


rule accuracy:
    """Measure a model's zero-shot accuracy on one lm-eval task."""
    input:
        model=lambda w: ancient(subject_model(w)),
        rows=lambda w: settled(str(checked(layout.task_file, config, w.task))),
        again=failed(f"{EVALUATION}/{{subject}}/accuracy_{{task}}-{{key}}.json"),
    output:
        f"{EVALUATION}/{{subject}}/accuracy_{{task}}-{{key}}.json",
    log:
        "logs/{model}/{subject}/accuracy_{task}-{key}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=measured_settings("accuracy_{task}-{key}"),
    run:
        stages(wildcards).evaluate_accuracy(
            model=input.model,
            rows=input.rows,
            task=wildcards.task,
            output=output[0],
            settings=params.settings["evaluation"],
            calibration=params.settings["calibration"],
            log=log[0],
        )
