"""Models and activations on disk, as the stages of the pipeline find them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from aasvd.artifacts import Activations, write_json, write_tensors
from aasvd.blocks import Skeleton, Source, embed, forward_arguments, groups, load_block, skeleton

CPU = torch.device("cpu")
WIDTH = 32  # of every tiny model
TOKENS = 20  # longer than the sliding windows of the tiny models


class Stored(NamedTuple):
    """A tiny model in memory and on disk."""

    model: PreTrainedModel
    record: Path
    source: Source
    parts: Skeleton

    def arguments(self, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        return forward_arguments(self.parts, tokens=TOKENS, device=CPU, dtype=dtype)

    def block(self, index: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        return load_block(self.source, self.parts, index, device=CPU, dtype=dtype)

    def groups(self, index: int = 0) -> list[list[str]]:
        return groups(self.parts, index, arguments=self.arguments()[index], width=WIDTH, tokens=TOKENS)

    def hidden(self, sequences: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what reaches the first block for random tokens."""
        return next(embed(self.source, self.parts, [random_tokens(sequences)], dtype=dtype))


def random_tokens(sequences: int) -> Tensor:
    return torch.randint(3, 128, (sequences, TOKENS), generator=torch.Generator().manual_seed(1))


def describe(folder: Path) -> Path:
    """Write the source.json of a model folder beside it."""
    tensors = {
        name: {"file": file.name, "sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    record = folder.parent / "source.json"
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.json")}
    write_json(record, {"folder": str(folder.absolute()), "tensors": tensors, "files": files})
    return record


def store(model: PreTrainedModel, folder: Path) -> Stored:
    model.save_pretrained(folder / "dense")
    record = describe(folder / "dense")
    return Stored(model, record, Source(record), skeleton(folder / "dense"))


def activations(path: Path, values: Tensor) -> Activations:
    """Write activations in one piece, not through the writer under test, and open them."""
    write_tensors(path, {"activations": values})
    return Activations(path)


def assert_updated(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, rank: int, least: float
) -> None:
    """Check that all factors of a model's state changed by a matrix of a rank, and that nothing else did."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        if name.endswith((".u", ".v")):
            singular = torch.linalg.svdvals(change)
            assert singular[0] > least
            # The rest is the float32 rounding of the factors themselves.
            assert singular[rank] < 1e-5 * torch.linalg.svdvals(tensor)[0]
        else:
            assert not change.any(), name
