def maybe_temp(path):
    """Activations are kept unless params.yaml says otherwise.

    Without them a lost artifact costs more: Snakemake remakes the activations from the first block on, and
    with each of them whatever reads it.
    """
    return path if config["calibration"]["keep_activations"] else temp(path)


def calibration_text(wildcards):
    """The table of the run's calibration text."""
    return checked(params.text_file, config, run_of(wildcards).settings["calibration"]["text"], "train")


def original_input(wildcards, block):
    """The original activations that enter a block."""
    folder = paths_of(wildcards).original
    return f"{folder}/block_{block - 1:03d}/output.safetensors" if block else f"{folder}/embedded.safetensors"


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
        output=maybe_temp(f"{ORIGINAL}/embedded.safetensors"),
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
        outputs=maybe_temp(f"{ORIGINAL}/block_{{block}}/output.safetensors"),
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


rule describe_calibration:
    """Write down, in readable form, what a calibration key was made from."""
    output:
        f"{ORIGINAL}/key.json",
    log:
        "logs/{model}/{calibration}/key.log",
    params:
        ingredients=lambda w: checked(params.calibration_ingredients, config, run_of(w)),
    run:
        stages(wildcards).write_key(ingredients=params.ingredients, output=output[0])
