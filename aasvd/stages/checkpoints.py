"""Stages that write checkpoints: assemble the compressed blocks, and update what was assembled."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from aasvd import adapt, blocks, calibration, checkpoint, progress
from aasvd.artifacts import read_json, read_tensors, write_tensors
from aasvd.device import compute_device, one_thread_each
from aasvd.formats import FORMATS, format_name
from aasvd.stages.loading import factored, load_model, model_folder, pruned
from aasvd.stages.stage import PASSES, stage
from aasvd.weights import stored_tensors


def assemble(
    *,
    source: str,
    outline: str,
    factors: Sequence[str],
    checksums: str,
    record: str,
    storage: str,
    precision: str,
    details: Mapping[str, Any],
    log: str,
) -> None:
    """Assemble the compressed blocks and the dense rest into a Hugging Face checkpoint."""
    with stage("assemble", log=Path(log), record=Path(record), advice=PASSES) as measured:
        dense = blocks.Source(Path(source))
        parts = blocks.skeleton(dense.folder)
        path, folder = read_json(Path(outline))["path"], Path(checksums).parent
        dtype = torch.bfloat16 if precision == "bfloat16" else parts.model.config.dtype or torch.float32
        storage = format_name(storage, precision)
        ranks: dict[str, int] = {}
        kept: dict[str, list[int]] = {}
        # Snakemake removes the list of checksums before it runs this again; what is left is no checkpoint.
        shutil.rmtree(folder, ignore_errors=True)
        with _scratch(folder.with_name(".packed")) as packed:
            for index, file in enumerate(tqdm(factors, desc="Packing blocks", unit="block")):
                tensors = read_tensors(Path(file), device=compute_device())
                names = factored(tensors)
                ranks |= {f"{path}.{index}.{name}": tensors[f"{name}.u"].shape[1] for name in names}
                kept |= {f"{path}.{index}.{name}": size for name, size in pruned(tensors).items()}
                write_tensors(packed / str(index), _packed(tensors, names, storage=storage, dtype=dtype))

            # The checkpoint wants its tensors by type, then name: block by block, once for each type.
            @functools.lru_cache(maxsize=1)
            def block(index: int) -> dict[str, Tensor]:
                return read_tensors(packed / str(index), device=torch.device("cpu"))

            def tensor(name: str) -> Tensor:
                if name.startswith(f"{path}."):
                    index, _, inner = name.removeprefix(f"{path}.").partition(".")
                    compressed = block(int(index))
                    if inner in compressed:
                        return compressed[inner]
                return blocks.read(dense, parts, name)

            checkpoint.write(
                dense=dense.folder,
                output=folder,
                ranks=ranks,
                storage=storage,
                kept=kept,
                details=details,
                tensor=tensor,
                dtype=dtype,
            )
        measured |= {"ranks": ranks, "kept": kept}


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is gone when the block ends."""
    # One fixed name, so that what a killed stage left is cleared by the next one.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _packed(
    tensors: Mapping[str, Tensor], names: Sequence[str], *, storage: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a block's tensors as a checkpoint stores them: the factors of the named linears packed."""
    factors = {f"{name}.{factor}" for name in names for factor in ("u", "v")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in factors}

    def pack(name: str) -> dict[str, Tensor]:
        parts = FORMATS[storage].pack(tensors[f"{name}.u"], tensors[f"{name}.v"], dtype)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    # The host's threads, wherever the passes run: factors lie there.
    with one_thread_each(torch.device("cpu")) as each:
        for packed in each(pack, names):
            rest |= packed
    return rest


def adapt_model(
    *,
    source: str,
    tokens: str,
    checksums: str,
    adapted: str,
    record: str,
    details: Mapping[str, Any],
    seed: int,
    calibration_settings: Mapping[str, Any],
    post: Mapping[str, Any],
    log: str,
) -> None:
    """Update a checkpoint's factors on the calibration tokens, and write it as another checkpoint."""
    with stage("adapt", log=Path(log), record=Path(record), advice="lower post.batch") as measured:
        ids = calibration.read_tokens(Path(tokens))
        model, _ = load_model(model_folder(checksums), calibration_settings)
        with progress.training("post-step") as on_step:
            trained = adapt.adapt(
                model,
                ids,
                recipe=adapt.Recipe(**post),
                generator=torch.Generator().manual_seed(seed),
                on_step=on_step,
            )
        measured["losses"] = trained.losses
        described = json.loads((Path(checksums).parent / "config.json").read_text())
        stored_type = getattr(torch, described["dtype"])
        dense = blocks.Source(Path(source))
        # All comes from the checkpoint in its own type, not in that of the passes; updates add in float32.
        before = {
            name: tensor.file
            for name, tensor in stored_tensors(sorted(Path(checksums).parent.glob("*.safetensors"))).items()
        }

        def tensor(name: str) -> Tensor:
            with safe_open(before[name], framework="pt") as file:
                stored: Tensor = file.get_tensor(name)
            update = trained.updates.get(name)
            return stored if update is None else update.merged(stored)

        shutil.rmtree(Path(adapted).parent, ignore_errors=True)
        checkpoint.write(
            dense=dense.folder,
            output=Path(adapted).parent,
            ranks=model.config.quantization_config.ranks,
            storage=model.config.quantization_config.storage,
            kept=model.config.quantization_config.kept,
            details=details,
            tensor=tensor,
            dtype=stored_type,
        )
