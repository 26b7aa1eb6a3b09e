"""Stages of the original side: what the dense model does with the calibration tokens."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aasvd import blocks, calibration, compress, gradients
from aasvd.artifacts import Activations, read_table, write_tensors, writing_activations
from aasvd.covariance import pack
from aasvd.device import compute_device, compute_dtype
from aasvd.stages.loading import Block, too_long
from aasvd.stages.stage import PASSES, SEQUENCES, stage

_logger = logging.getLogger(__name__)


def sample_calibration(
    *, source: str, text: str, output: str, settings: Mapping[str, Any], seed: int, log: str
) -> None:
    """Sample calibration tokens from a text."""
    with stage("sample calibration", log=Path(log), record=None, advice=PASSES):
        folder = blocks.Source(Path(source)).folder
        config = blocks.open_config(folder)
        if reason := too_long(settings["tokens"], config, setting="calibration.tokens"):
            raise ValueError(reason)
        tokens = calibration.sample(
            read_table(Path(text)),
            blocks.open_tokenizer(folder),
            sequences=settings["sequences"],
            tokens=settings["tokens"],
            sampling=settings["sampling"],
            seed=seed,
            vocabulary=config.get_text_config().vocab_size,
        )
        calibration.write_tokens(Path(output), tokens)


def embed(
    *, source: str, tokens: str, output: str, record: str, settings: Mapping[str, Any], log: str
) -> None:
    """Write what reaches the first block for the calibration tokens."""
    with stage("embed", log=Path(log), record=Path(record), advice=PASSES):
        model = blocks.Source(Path(source))
        parts = blocks.skeleton(model.folder)
        ids = calibration.read_tokens(Path(tokens))
        dtype = compute_dtype(settings["dtype"], compute_device())
        batches = list(torch.split(ids, settings["batch"]))
        width = parts.model.config.get_text_config().hidden_size
        with writing_activations(Path(output), shape=(*ids.shape, width), dtype=dtype) as append:
            for hidden in blocks.embed(model, parts, batches, dtype=dtype):
                append(hidden)


def capture_block(
    *,
    source: str,
    inputs: str,
    outputs: str,
    covariances: str,
    record: str,
    index: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block: its outputs, and a covariance per group of linears that share an input."""
    with stage(f"capture block {index}", log=Path(log), record=Path(record), advice=PASSES):
        hidden = Activations(Path(inputs))
        around = Block(source, index, settings, record=record, like=hidden)
        arguments = around.arguments(hidden)
        groups = around.groups(hidden, arguments)
        with around.writing(outputs, like=hidden, label="capture originals") as append:
            captured = compress.capture_block(
                around.original(),
                groups,
                inputs=hidden,
                arguments=arguments,
                batch=around.batch,
                device=around.device,
                on_output=append,
            )
        tensors = {"token_count": torch.tensor(hidden.shape[0] * hidden.shape[1])}
        for group, found in zip(groups, captured, strict=True):
            tensors[f"gram:{'+'.join(group)}"] = pack(found.gram)
            tensors[f"absolute:{'+'.join(group)}"] = found.absolute
        write_tensors(Path(covariances), tensors)


def differentiate_head(
    *,
    source: str,
    tokens: str,
    hidden: str,
    gradient: str,
    record: str,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Differentiate the dense model's loss with respect to what leaves its last block."""
    with stage("differentiate head", log=Path(log), record=Path(record), advice=SEQUENCES) as measured:
        x = Activations(Path(hidden))
        around = Block(source, 0, settings, record=record, like=x)
        head = blocks.Head(around.source, around.parts, device=around.device, dtype=around.dtype)
        ids = calibration.read_tokens(Path(tokens))[: settings["gradients"] or None]
        # float32: a gradient is a sum of many small terms.
        with writing_activations(
            Path(gradient), shape=(len(ids), *x.shape[1:]), dtype=torch.float32
        ) as append:
            measured["loss"] = gradients.head_gradient(head, x, ids, on_gradient=append)


def differentiate_block(
    *,
    source: str,
    inputs: str,
    upstream: str,
    gradient: str,
    statistics: str,
    record: str,
    index: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block forward and backward: its linears' gradients, and that of its input."""
    with stage(f"differentiate block {index}", log=Path(log), record=Path(record), advice=SEQUENCES):
        x, above = Activations(Path(inputs)), Activations(Path(upstream))
        around = Block(source, index, settings, record=record, like=x)
        arguments = around.arguments(x)
        with around.writing(gradient, like=above, label="gradients", dtype=torch.float32) as append:
            found = gradients.block_gradients(
                around.original(),
                around.groups(x, arguments),
                inputs=x,
                upstream=above,
                arguments=arguments,
                device=around.device,
                on_gradient=append,
            )
        # What was summed in float32 is stored so.
        write_tensors(
            Path(statistics), {f"outer:{name}": pack(outer).float() for name, outer in found.items()}
        )


def differentiate_weights(
    *,
    source: str,
    inputs: str,
    upstream: str,
    output: str,
    record: str,
    index: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block forward and backward for the gradients of its linears' weights."""
    with stage(f"fisher block {index}", log=Path(log), record=Path(record), advice=SEQUENCES):
        x = Activations(Path(inputs))
        around = Block(source, index, settings, record=record, like=x)
        arguments = around.arguments(x)
        found = gradients.block_fisher(
            around.original(),
            around.groups(x, arguments),
            inputs=x,
            upstream=Activations(Path(upstream)),
            arguments=arguments,
            device=around.device,
        )
        tensors = {f"squared:{name}": some.squared for name, some in found.items()}
        write_tensors(Path(output), tensors | {f"norm:{name}": some.norm for name, some in found.items()})


def average_block(
    *,
    source: str,
    inputs: str,
    output: str,
    record: str,
    index: int,
    buckets: int,
    seed: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block for the covariances of inputs averaged over buckets of sequences (AdaSVD).

    Buckets hold as many sequences each, but for the last: there are at most as many as asked for.
    """
    with stage(f"average block {index}", log=Path(log), record=Path(record), advice=SEQUENCES) as measured:
        x = Activations(Path(inputs))
        around = Block(source, index, settings, record=record, like=x)
        arguments = around.arguments(x)
        groups = around.groups(x, arguments)
        # The same buckets in every block.
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        sequences = [some.tolist() for some in order.chunk(buckets)]
        measured["buckets"] = len(sequences)
        if len(sequences) == len(x):
            _logger.warning(
                "compression.buckets %d for %d calibration sequences: each is a bucket of its own, nothing "
                "is averaged, and what adasvd fits to are the inputs themselves, as in input_aware",
                buckets,
                len(x),
            )
        grams = compress.bucket_grams(
            around.original(),
            groups,
            inputs=x,
            buckets=sequences,
            arguments=arguments,
            device=around.device,
        )
        write_tensors(
            Path(output),
            {f"gram:{'+'.join(group)}": pack(gram) for group, gram in zip(groups, grams, strict=True)},
        )
