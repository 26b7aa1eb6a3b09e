def activations(path):
    """Activations are kept unless params.yaml says otherwise.

    Without them a lost artifact costs more: Snakemake remakes the activations from the first block on, and
    with each of them whatever reads it.
    """
    return path if config["calibration"]["keep_activations"] else temp(path)


def calibration_text(wildcards):
    """The table of the run's calibration text."""
    return checked(layout.text_file, config, run_of(wildcards).settings["calibration"]["text"], "train")


def original_input(wildcards, block):
    """The original activations that enter a block."""
    folder = paths_of(wildcards).original
    return f"{folder}/block_{block - 1:03d}/output.safetensors" if block else f"{folder}/embedded.safetensors"


def upstream_gradient(wildcards, block):
    """The gradient at a block's output."""
    folder = paths_of(wildcards).original
    last = block + 1 == blocks_of(wildcards.model)
    return f"{folder}/gradient.safetensors" if last else f"{folder}/block_{block + 1:03d}/gradient.safetensors"


rule sample_calibration:
    """Sample windows of calibration tokens."""
    input:
        source=lambda w: ancient(dense_source(w)),
        text=lambda w: ancient(str(calibration_text(w))),
    output:
        f"{CALIBRATION}/tokens.parquet",
    log:
        "logs/{model}/{calibration}/sample.log",
    params:
        settings=settings_of("calibration"),
        seed=settings_of("seed"),
    run:
        stages(wildcards).sample_calibration(
            **input, output=output[0], settings=params.settings, seed=params.seed, log=log[0]
        )


rule embed:
    """Write what reaches the first block."""
    input:
        source=lambda w: ancient(dense_source(w)),
        tokens=ancient(f"{CALIBRATION}/tokens.parquet"),
    output:
        output=activations(f"{ORIGINAL}/embedded.safetensors"),
        record=f"{ORIGINAL}/embed.json",
    log:
        "logs/{model}/{calibration}/embed.log",
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).embed(**input, **output, settings=params.settings, log=log[0])


rule capture_block:
    """Run one original block: its covariances, and what reaches the next block."""
    input:
        source=lambda w: ancient(dense_source(w)),
        inputs=lambda w: ancient(original_input(w, int(w.block))),
    output:
        outputs=activations(f"{ORIGINAL}/block_{{block}}/output.safetensors"),
        covariances=f"{ORIGINAL}/block_{{block}}/covariances.safetensors",
        record=f"{ORIGINAL}/block_{{block}}/capture.json",
    log:
        "logs/{model}/{calibration}/capture_{block}.log",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).capture_block(
            **input, **output, index=int(wildcards.block), settings=params.settings, log=log[0]
        )


rule differentiate_head:
    """Differentiate the dense model's loss with respect to what leaves its last block."""
    input:
        source=lambda w: ancient(dense_source(w)),
        tokens=ancient(f"{CALIBRATION}/tokens.parquet"),
        hidden=lambda w: ancient(original_input(w, blocks_of(w.model))),
    output:
        gradient=activations(f"{ORIGINAL}/gradient.safetensors"),
        record=f"{ORIGINAL}/differentiate.json",
    log:
        "logs/{model}/{calibration}/differentiate_head.log",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).differentiate_head(**input, **output, settings=params.settings, log=log[0])


rule differentiate_block:
    """Run one original block backward: its linears' gradients, and the gradient for the block before it."""
    input:
        source=lambda w: ancient(dense_source(w)),
        inputs=lambda w: ancient(original_input(w, int(w.block))),
        upstream=lambda w: ancient(upstream_gradient(w, int(w.block))),
    output:
        gradient=activations(f"{ORIGINAL}/block_{{block}}/gradient.safetensors"),
        statistics=f"{ORIGINAL}/block_{{block}}/gradients.safetensors",
        record=f"{ORIGINAL}/block_{{block}}/differentiate.json",
    log:
        "logs/{model}/{calibration}/differentiate_{block}.log",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).differentiate_block(
            **input, **output, index=int(wildcards.block), settings=params.settings, log=log[0]
        )


rule differentiate_weights:
    """Run one original block backward for the gradients of its linears' weights."""
    input:
        source=lambda w: ancient(dense_source(w)),
        inputs=lambda w: ancient(original_input(w, int(w.block))),
        upstream=lambda w: ancient(upstream_gradient(w, int(w.block))),
    output:
        output=f"{ORIGINAL}/block_{{block}}/fisher.safetensors",
        record=f"{ORIGINAL}/block_{{block}}/fisher.json",
    log:
        "logs/{model}/{calibration}/fisher_{block}.log",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).differentiate_weights(
            **input, **output, index=int(wildcards.block), settings=params.settings, log=log[0]
        )


rule average_block:
    """Run one original block for the covariances of inputs averaged over buckets of sequences."""
    input:
        source=lambda w: ancient(dense_source(w)),
        inputs=lambda w: ancient(original_input(w, int(w.block))),
    output:
        output=f"{ORIGINAL}/block_{{block}}/buckets_{{buckets}}.safetensors",
        record=f"{ORIGINAL}/block_{{block}}/average_{{buckets}}.json",
    log:
        "logs/{model}/{calibration}/average_{block}_{buckets}.log",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
        seed=settings_of("seed"),
    run:
        stages(wildcards).average_block(
            **input,
            **output,
            index=int(wildcards.block),
            buckets=int(wildcards.buckets),
            seed=params.seed,
            settings=params.settings,
            log=log[0],
        )


def measured_from(kinds, function):
    """An input function that gives a file only to the measures that look at it."""
    return lambda w: [ancient(function(w))] if w.measure.partition("-")[0] in kinds else []


def differentiated(statistic):
    """An input function that gives a statistic of gradients only to the measures that are made from it."""
    kinds = [kind for kind, made_from in methods.DIFFERENTIATED.items() if made_from == statistic]
    return measured_from(kinds, lambda w: f"{ORIGINAL}/block_{{block}}/{statistic}.safetensors".format(**w))


rule measure_block:
    """Measure what an allocation of ranks looks at, on one original block."""
    input:
        source=lambda w: ancient(dense_source(w)),
        covariances=ancient(f"{ORIGINAL}/block_{{block}}/covariances.safetensors"),
        gradients=differentiated("gradients"),
        fisher=differentiated("fisher"),
        tokens=measured_from(("sensitivity",), lambda w: f"{CALIBRATION}/tokens.parquet".format(**w)),
        inputs=measured_from(("sensitivity", "profile", "influence"), lambda w: original_input(w, int(w.block))),
        outputs=measured_from(("profile",), lambda w: original_input(w, int(w.block) + 1)),
        upstream=measured_from(("influence",), lambda w: upstream_gradient(w, int(w.block))),
    output:
        output=f"{ORIGINAL}/block_{{block}}/measures/{{measure}}.safetensors",
        record=f"{ORIGINAL}/block_{{block}}/measures/{{measure}}.json",
    log:
        "logs/{model}/{calibration}/measure_{block}_{measure}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).measure_block(
            **given(input), **output,
            index=int(wildcards.block),
            measure=wildcards.measure,
            settings=params.settings,
            log=log[0],
        )


rule train_positions:
    """Train truncation positions on the whole model, for one ratio (Dobi-SVD)."""
    input:
        source=lambda w: ancient(dense_source(w)),
        outline=lambda w: ancient(dense_source(w).replace("source.json", "outline.json")),
        tokens=ancient(f"{CALIBRATION}/tokens.parquet"),
    output:
        output=f"{ORIGINAL}/positions/{{positions}}.safetensors",
        record=f"{ORIGINAL}/positions/{{positions}}.json",
    log:
        "logs/{model}/{calibration}/positions_{positions}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        run=run_of,
    run:
        stages(wildcards).train_positions(
            **input,
            **output,
            parameter_ratio=params.run.ratio,
            seed=params.run.settings["seed"],
            calibration_settings=params.run.settings["calibration"],
            compression=params.run.settings["compression"],
            log=log[0],
        )


rule order_branches:
    """Search the order in which BlockPruner removes attention and MLPs: one search for all ratios."""
    input:
        source=lambda w: ancient(dense_source(w)),
        tokens=ancient(f"{CALIBRATION}/tokens.parquet"),
        inputs=lambda w: ancient(original_input(w, 0)),
    output:
        output=f"{ORIGINAL}/measures/{{measure}}.safetensors",
        record=f"{ORIGINAL}/measures/{{measure}}.json",
    log:
        "logs/{model}/{calibration}/order_branches_{measure}.log",
    priority:
        turn
    wildcard_constraints:
        measure=r"removal-\d+",
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).order_branches(
            **input,
            **output,
            probe=int(wildcards.measure.removeprefix("removal-")),
            settings=params.settings,
            log=log[0],
        )


rule describe_calibration:
    """Write down, in readable form, what a calibration key was made from."""
    output:
        f"{ORIGINAL}/key.json",
    log:
        "logs/{model}/{calibration}/key.log",
    params:
        ingredients=lambda w: checked(identity.calibration_ingredients, config, run_of(w)),
    run:
        stages(wildcards).write_key(ingredients=params.ingredients, output=output[0])
