"""What several stages load: one block with its surroundings and statistics, or a whole model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from aasvd import attention, blocks, checkpoint, compress, formats, objectives, progress, units
from aasvd.artifacts import Activations, read_json, read_tensors, writing_activations
from aasvd.covariance import unpack
from aasvd.device import compute_device, compute_dtype

# Tokens of sequences that show how a block is built, for which its inputs' values do not matter.
SHORT = 16


class Block:
    """One block's surroundings: model, arguments, groups, device and float type, for one stage."""

    def __init__(
        self,
        source: str,
        index: int,
        settings: Mapping[str, Any],
        *,
        record: str,
        like: Activations | None = None,
    ) -> None:
        """Load what surrounds a block.

        Args:
            source: The model's source.json.
            index: The block's number.
            settings: The section `calibration` of params.yaml.
            record: The stage's record.
            like: Activations that the stage reads, where it does: passes compute in their type.
        """
        self.source, self.index, self.batch = blocks.Source(Path(source)), index, settings["batch"]
        self.parts = blocks.skeleton(self.source.folder)
        self.device = compute_device()
        # Not what this machine is fast in, where another one may have begun: a key knows only `auto`.
        self.dtype = compute_dtype(settings["dtype"], self.device) if like is None else like.dtype
        self.count = len(self.parts.blocks)
        self.label = f"block {index + 1} of {self.count}"
        # Of this phase, capture or compression: the records of both lie in a folder per block.
        self.folder = Path(record).parent
        left = seconds_left(self.folder.parent, done=index, count=self.count)
        progress.report(now=True, block=index + 1, blocks=self.count, blocks_seconds_left=left)

    def arguments(self, hidden: Activations) -> dict[str, Any]:
        """Return the block's keyword arguments for sequences as long as these."""
        return self._arguments(hidden.shape[1])

    def _arguments(self, tokens: int) -> dict[str, Any]:
        found = blocks.forward_arguments(self.parts, tokens=tokens, device=self.device, dtype=self.dtype)
        return found[self.index]

    def short(self) -> units.Example:
        """Return how the block is called on short sequences: they show as much of how it is built."""
        width = self.parts.model.config.get_text_config().hidden_size
        return units.Example(self._arguments(SHORT), width, SHORT)

    def groups(self, hidden: Activations, arguments: Mapping[str, Any]) -> list[list[str]]:
        """Return the names of the block's linears, grouped by shared input, in the order they are called."""
        _, tokens, width = hidden.shape
        return blocks.groups(self.parts, self.index, arguments=arguments, width=width, tokens=tokens)

    def original(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the original block."""
        return blocks.load_block(
            self.source, self.parts, self.index, device=self.device, dtype=dtype or self.dtype
        ).requires_grad_(False)

    def compressed(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """Load the original block and put factors, and other parameters, in their places."""
        block = self.original(dtype)
        weights = blocks.linears(block)
        formats.replace_linears(block, {}, storage="factors", kept=pruned(tensors))
        block.requires_grad_(False)
        for name in factored(tensors):
            u, v = tensors[f"{name}.u"], tensors[f"{name}.v"]
            compress.put(block, name, u, v, bias=weights[name].bias, like=weights[name].weight)
        block.load_state_dict(dict(tensors), strict=False)
        return block

    def bar(self, label: str, total: int) -> progress.Bar:
        """Return a progress bar with time left for this block."""
        return progress.Bar(
            total=total, desc=f"{self.label}: {label}", unit="seq", leave=False, dynamic_ncols=True
        )

    @contextlib.contextmanager
    def writing(
        self, file: str, *, like: Activations, label: str, dtype: torch.dtype | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Write activations shaped like others, with a progress bar: yield what appends a batch of them."""
        bar = self.bar(label, len(like))
        with bar, writing_activations(Path(file), shape=like.shape, dtype=dtype or self.dtype) as append:

            def append_and_show(batch: Tensor) -> None:
                append(batch)
                bar.update(len(batch))

            yield append_and_show


def factored(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the linears of which a block's tensors hold factors."""
    return [name.removesuffix(".u") for name in tensors if name.endswith(".u")]


def pruned(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return how many rows and columns a block's tensors hold of each linear that was pruned, by name."""
    return {
        name.removesuffix(".kept"): list(tensor.shape)
        for name, tensor in tensors.items()
        if name.endswith(".kept")
    }


def seconds_left(folder: Path, *, done: int, count: int) -> float | None:
    """Estimate the time that the blocks which are not done take, from the records of those that are."""
    records = [file for block in range(done) for file in (folder / f"block_{block:03d}").glob("*.json")]
    if not records:
        return None
    return round(sum(read_json(file)["seconds"] for file in records) / done * (count - done), 1)


def statistics_of(
    covariances: str,
    *,
    device: torch.device,
    gradients: str | None = None,
    fisher: str | None = None,
    buckets: str | None = None,
) -> dict[tuple[str, ...], objectives.Statistics]:
    """Read what is known of a block's groups on the original side."""
    captured = read_tensors(Path(covariances), device=device)
    averaged = read_tensors(Path(buckets), device=device) if buckets else {}
    outer = read_tensors(Path(gradients), device=device) if gradients else {}
    weights = read_tensors(Path(fisher), device=device) if fisher else {}
    found = {}
    for key in captured:
        if not key.startswith("gram:"):
            continue
        group = tuple(key.removeprefix("gram:").split("+"))
        joined = "+".join(group)
        found[group] = objectives.Statistics(
            gram=unpack(captured[key]),
            absolute=captured[f"absolute:{joined}"],
            token_count=int(captured["token_count"]),
            buckets=unpack(averaged[key]) if averaged else None,
            squared={name: weights[f"squared:{name}"] for name in group} if weights else {},
            outer={name: unpack(outer[f"outer:{name}"].double()) for name in group} if outer else {},
        )
    return found


def load_model(folder: Path, settings: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Load a model to be run whole, on this machine's device and in its float type, and its tokenizer."""
    device = compute_device()
    model = blocks.open_model(folder, dtype=compute_dtype(settings["dtype"], device))
    attention.use(model)
    return model.to(device), blocks.open_tokenizer(folder)


def model_folder(model: str) -> Path:
    """Return the verified folder of a dense source.json or of a checkpoint's SHA256SUMS."""
    path = Path(model)
    if path.name == checkpoint.CHECKSUMS:
        checkpoint.verify(path.parent)
        return path.parent
    source = blocks.Source(path)
    for name in source.tensors:
        source.read(name)
    return source.folder


def too_long(tokens: int, config: PreTrainedConfig, *, setting: str) -> str | None:
    """Return why a model cannot read sequences of a length, or None where it can.

    Learned positions end there; rotary ones do not, but the model was never trained behind it.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or tokens <= limit:
        return None
    return f"{setting} is {tokens}, but the model has {limit} positions (max_position_embeddings): lower it"
