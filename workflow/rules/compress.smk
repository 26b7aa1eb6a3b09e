def shifted_input(wildcards, block):
    """The shifted activations that enter a block; the first block's are the original ones."""
    if block == 0:
        return original_input(wildcards, 0)
    return f"{paths_of(wildcards).compressed}/block_{block - 1:03d}/shifted.safetensors"


def finished_factors(wildcards, block):
    """A block's factors as they end up in the checkpoint: refined, unless refinement is off."""
    paths, refinement = paths_of(wildcards), run_of(wildcards).settings["refinement"]
    return f"{paths.compressed}/block_{block:03d}/{'refined' if refinement['epochs'] else 'solved'}.safetensors"


def factors(path):
    """A block's factors are kept unless params.yaml says otherwise: a hundred runs take a hundred times their space.

    Each is needed until the checkpoint is whole, so an interrupted run goes on all the same.
    """
    return path if config["compression"]["keep_factors"] else temp(path)


def all_blocks(function):
    """An input function that gives a file for every block."""
    return lambda w: [ancient(function(w, block)) for block in range(blocks_of(run_of(w).model))]


def measured_blocks(wildcards):
    """The files that a run's allocation looks at, of all blocks or of the whole model."""
    found = layout.measure_files(run_of(wildcards), blocks=blocks_of(wildcards.model))
    return [ancient(f"{paths_of(wildcards).original}/{file}") for files in found.values() for file in files]


def by_measure(wildcards, files):
    """The files of `measured_blocks` by measure."""
    found = layout.measure_files(run_of(wildcards), blocks=blocks_of(wildcards.model))
    left = iter(files)
    return {measure: list(itertools.islice(left, len(some))) for measure, some in found.items()}


rule allocate:
    """Choose the rank of every linear at the parameter budget."""
    input:
        outline=lambda w: ancient(dense_source(w).replace("source.json", "outline.json")),
        measured=measured_blocks,
        positions=lambda w: [ancient(str(paths_of(w).positions))] if paths_of(w).positions else [],
    output:
        output=f"{COMPRESSED}/ranks.json",
        record=f"{COMPRESSED}/allocate.json",
    log:
        "logs/{model}/{calibration}/{compression}/allocate.log",
    priority:
        turn
    params:
        ratio=lambda w: run_of(w).ratio,
        settings=settings_of("compression"),
    run:
        stages(wildcards).allocate(
            outline=input.outline,
            measured=by_measure(wildcards, input.measured),
            positions=given(input)["positions"],
            **output,
            parameter_ratio=params.ratio,
            compression=params.settings,
            log=log[0],
        )


rule solve_block:
    """Solve the low-rank factors of one block's linears, group by group, or prune them."""
    input:
        source=lambda w: ancient(dense_source(w)),
        covariances=ancient(f"{ORIGINAL}/block_{{block}}/covariances.safetensors"),
        ranks=ancient(f"{COMPRESSED}/ranks.json"),
        original=where_needed("shifted", lambda w: original_input(w, int(w.block))),
        shifted=where_needed("shifted", lambda w: shifted_input(w, int(w.block))),
        gradients=where_needed(
            "gradients", lambda w: f"{paths_of(w).original}/block_{w.block}/gradients.safetensors"
        ),
        fisher=where_needed("fisher", lambda w: f"{paths_of(w).original}/block_{w.block}/fisher.safetensors"),
        buckets=where_needed(
            "buckets",
            lambda w: f"{paths_of(w).original}/block_{w.block}/buckets_"
            f"{run_of(w).settings['compression']['buckets']}.safetensors",
        ),
    output:
        output=factors(f"{COMPRESSED}/block_{{block}}/solved.safetensors"),
        record=f"{COMPRESSED}/block_{{block}}/solve.json",
    log:
        "logs/{model}/{calibration}/{compression}/solve_{block}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=lambda w: run_of(w).settings,
    run:
        stages(wildcards).solve_block(
            **given(input),
            **output,
            index=int(wildcards.block),
            calibration=params.settings["calibration"],
            compression=params.settings["compression"],
            log=log[0],
        )


rule refine_block:
    """Fit one solved block, factors and norms together, to the original block's outputs."""
    input:
        source=lambda w: ancient(dense_source(w)),
        shifted=lambda w: ancient(shifted_input(w, int(w.block))),
        target=ancient(f"{ORIGINAL}/block_{{block}}/output.safetensors"),
        solved=ancient(f"{COMPRESSED}/block_{{block}}/solved.safetensors"),
    output:
        output=factors(f"{COMPRESSED}/block_{{block}}/refined.safetensors"),
        record=f"{COMPRESSED}/block_{{block}}/refine.json",
    log:
        "logs/{model}/{calibration}/{compression}/refine_{block}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=lambda w: run_of(w).settings,
    run:
        stages(wildcards).refine_block(
            **input,
            **output,
            index=int(wildcards.block),
            seed=params.settings["seed"],
            calibration=params.settings["calibration"],
            refinement=params.settings["refinement"],
            log=log[0],
        )


rule propagate:
    """Push shifted activations through one compressed block into the next."""
    input:
        source=lambda w: ancient(dense_source(w)),
        shifted=lambda w: ancient(shifted_input(w, int(w.block))),
        target=ancient(f"{ORIGINAL}/block_{{block}}/output.safetensors"),
        factors=lambda w: ancient(finished_factors(w, int(w.block))),
    output:
        output=activations(f"{COMPRESSED}/block_{{block}}/shifted.safetensors"),
        record=f"{COMPRESSED}/block_{{block}}/propagate.json",
    log:
        "logs/{model}/{calibration}/{compression}/propagate_{block}.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=settings_of("calibration"),
    run:
        stages(wildcards).propagate(
            **input, **output, index=int(wildcards.block), calibration=params.settings, log=log[0]
        )


rule assemble:
    """Assemble the blocks and the dense rest into an ordinary Hugging Face checkpoint."""
    input:
        source=lambda w: ancient(dense_source(w)),
        outline=lambda w: ancient(dense_source(w).replace("source.json", "outline.json")),
        factors=all_blocks(finished_factors),
    output:
        checksums=f"{COMPRESSED}/model/SHA256SUMS",
        record=f"{COMPRESSED}/assemble.json",
    log:
        "logs/{model}/{calibration}/{compression}/assemble.log",
    priority:
        turn
    params:
        settings=settings_of("compression"),
        details=lambda w: identity.compression_ingredients(config, run_of(w)),
    run:
        stages(wildcards).assemble(
            **input,
            **output,
            storage=params.settings["storage"],
            precision=params.settings["precision"],
            details=params.details,
            log=log[0],
        )


rule adapt:
    """Update all factors of an assembled checkpoint on the calibration tokens (post-step)."""
    input:
        source=lambda w: ancient(dense_source(w)),
        tokens=ancient(f"{CALIBRATION}/tokens.parquet"),
        checksums=ancient(f"{COMPRESSED}/model/SHA256SUMS"),
    output:
        adapted=f"{COMPRESSED}/adapted/SHA256SUMS",
        record=f"{COMPRESSED}/adapt.json",
    log:
        "logs/{model}/{calibration}/{compression}/adapt.log",
    priority:
        turn
    resources:
        gpu=1,
    params:
        settings=lambda w: run_of(w).settings,
        details=lambda w: identity.compression_ingredients(config, run_of(w)),
    run:
        stages(wildcards).adapt_model(
            **input,
            **output,
            details=params.details,
            seed=params.settings["seed"],
            calibration_settings=params.settings["calibration"],
            post=params.settings["post"],
            log=log[0],
        )


rule describe_compression:
    """Write down, in readable form, what a compression key was made from."""
    output:
        f"{COMPRESSED}/key.json",
    log:
        "logs/{model}/{calibration}/{compression}/key.log",
    params:
        ingredients=lambda w: identity.compression_ingredients(config, run_of(w)),
    run:
        stages(wildcards).write_key(ingredients=params.ingredients, output=output[0])
