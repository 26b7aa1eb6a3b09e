"""The safetensors files of a checkpoint: headers read without tensors, files written tensor by tensor."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' names of the types, in the order in which its serializer sorts them, last type first.
TYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


class StoredTensor(NamedTuple):
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights from; others may lie beside them.

    Raises:
        ValueError: If one of them is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
    files = [folder / name for name in names or ["model.safetensors"]]
    for path in files:
        if not path.exists():
            raise ValueError(f"{folder} has no {path.name}")
    return files


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Read the headers of safetensors files, and none of their tensors.

    Raises:
        ValueError: If a file is cut short or is not a safetensors file, or two files hold the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in tensors:
                        raise ValueError(f"{path} and {tensors[name].file} both hold the tensor {name}")
                    part = file.get_slice(name)
                    tensors[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> None:
    """Write one file as the safetensors library does, which wants all its tensors in memory at once.

    Args:
        path: File to write.
        tensors: Tensors on the meta device, for their types and shapes.
        tensor: Returns the contiguous host tensor of a name.
    """
    order = list(TYPE_NAMES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": TYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            stream.write(tensor(name).reshape(-1).view(torch.uint8).numpy().data)
