"""Read and write the pipeline's artifacts: whole, checksummed, and only as safetensors, Parquet or JSON.

Every artifact `x` has a sidecar `x.sha256` in the format of `sha256sum`, so that
`cd FOLDER && sha256sum -c *.sha256` checks a folder without this package. An artifact is written
under a temporary name, flushed and renamed: a killed or failed writer never leaves half a file under
a final name. The sidecar is renamed first, so an artifact without its sidecar does not exist.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from aasvd.layout import failure_file

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


# Snakemake's options for other settings than those of params.yaml; words up to the next option are theirs.
_SETTINGS = ("--configfile", "--configfiles", "--config", "-C")


class DamagedArtifactError(ValueError):
    """An artifact is missing, cut short or altered; the message names it and the command that remakes it."""


def remake_command(path: Path) -> str:
    """Return the command that makes one artifact again, with the settings that this process was given."""
    make = ["snakemake", "--cores", "1", "--resources", "gpu=1", "--force", str(path)]
    return shlex.join([*make, *_given_settings(sys.argv[1:])])


def _given_settings(words: Sequence[str]) -> list[str]:
    """Return the words of a command line that lay other settings over params.yaml."""
    given: list[str] = []
    belongs = False
    for word in words:
        option, attached, _ = word.partition("=")
        if option in _SETTINGS or (belongs and not word.startswith("-")):
            given.append(word)
        if word.startswith("-"):
            # A value after a "=" is the only one.
            belongs = option in _SETTINGS and not attached
    return given


def sidecar(path: Path) -> Path:
    """Return the path of an artifact's checksum file."""
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(path: Path) -> None:
    """Compare an artifact with its checksum.

    Raises:
        DamagedArtifactError: If the file or its sidecar is missing, or the bytes differ.
    """
    remedy = f"remake it with\n    {remake_command(path)}"
    if not path.exists():
        raise DamagedArtifactError(f"{path} is missing; {remedy}")
    if not sidecar(path).exists():
        raise DamagedArtifactError(f"{path} has no checksum file {sidecar(path).name}; {remedy}")
    # A damaged sidecar need not be text.
    expected = sidecar(path).read_text(errors="replace").split(" ", 1)[0]
    found = digest(path)
    if found != expected:
        raise DamagedArtifactError(
            f"{path} is damaged: its sha256 is {found[:12]}... but {expected[:12]}... was recorded; {remedy}"
        )


@contextlib.contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name when the block ends without an error.

    Args:
        path: The file; one that is there is replaced.
        flush: Whether it has to outlive a crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place when the block ends without an error.

    Args:
        folder: The folder; one that is there is replaced.
        resume: Whether what a killed or failed writer left in the temporary folder is gone on with.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name, so that the next writer finds what a killed one left.
    temporary = folder.with_name(f".{folder.name}.tmp")
    if not resume:
        shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        if not resume:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes the artifact `path`, with its checksum, when the block ends."""
    with replacing(path) as temporary:
        yield temporary
        with replacing(sidecar(path)) as checksum:
            checksum.write_text(f"{digest(temporary)}  {path.name}\n")


def write_json(path: Path, value: object) -> None:
    """Write a JSON artifact with sorted keys; NaN is refused since JSON has none."""
    with publishing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def mark_failure(path: Path, error: str | None) -> None:
    """Leave beside an artifact why it holds no result, or remove what an earlier try left there."""
    file = failure_file(path)
    if error is None:
        file.unlink(missing_ok=True)
    else:
        with replacing(file) as temporary:
            temporary.write_text(error + "\n")


def read_json(path: Path) -> Any:
    """Verify and read a JSON artifact."""
    verify(path)
    return json.loads(path.read_text())


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet artifact."""
    with publishing(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: Path) -> pa.Table:
    """Verify and read a Parquet artifact."""
    verify(path)
    return pq.read_table(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors artifact; tensors may live on any device and need not be contiguous."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with publishing(path) as temporary:
        temporary.write_bytes(save(on_host))


def read_tensors(path: Path, *, device: torch.device) -> dict[str, Tensor]:
    """Verify and read all tensors of a safetensors artifact."""
    verify(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous host tensor's memory without copying it."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


@contextlib.contextmanager
def writing_activations(
    path: Path, *, shape: tuple[int, int, int], dtype: torch.dtype
) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that appends the next sequences, (batch, tokens, width), to a safetensors artifact.

    The safetensors library writes only whole tensors; the header of a single tensor of known shape is
    small enough to write here, which keeps memory at one batch whatever the number of sequences.

    Raises:
        ValueError: If another number of sequences was appended than `shape` says.
    """
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": (0, size)}
    header = json.dumps({"activations": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with publishing(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)

        def append(batch: Tensor) -> None:
            stream.write(_bytes_of(batch.detach().to("cpu", dtype).contiguous()))

        yield append
        if stream.tell() != 8 + len(header) + size:
            raise ValueError(f"{path}: expected activations of shape {shape}, another number was appended")


class Activations:
    """Activations (sequences, tokens, width) on disk, read a few sequences at a time.

    Read through the file rather than a memory map, whose touched pages would count as resident memory
    and grow with the number of sequences.
    """

    def __init__(self, path: Path) -> None:
        """Verify the file and read its header."""
        verify(path)
        self._path = path
        with safe_open(path, framework="pt") as file:
            header = file.get_slice("activations")
            sequences, tokens, width = header.get_shape()
            names = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
            self.dtype = names[header.get_dtype()]
        self.shape: tuple[int, int, int] = (sequences, tokens, width)
        self._row_bytes = tokens * width * self.dtype.itemsize
        self._offset = path.stat().st_size - sequences * self._row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, sequences: list[int]) -> Tensor:
        """Return the named sequences, shape (len(sequences), tokens, width), in the stored type."""
        batch = torch.empty((len(sequences), *self.shape[1:]), dtype=self.dtype)
        with self._path.open("rb", buffering=0) as stream:
            for row, sequence in zip(batch, sequences, strict=True):
                stream.seek(self._offset + sequence * self._row_bytes)
                if stream.readinto(_bytes_of(row)) != self._row_bytes:
                    raise DamagedArtifactError(
                        f"{self._path} was cut short while in use; remake it with\n"
                        f"    {remake_command(self._path)}"
                    )
        return batch

    def batches(self, size: int, *, first: int | None = None) -> Iterator[Tensor]:
        """Yield all sequences, or so many of the first, in order, `size` at a time."""
        count = len(self) if first is None else min(first, len(self))
        for start in range(0, count, size):
            yield self.read(list(range(start, min(start + size, count))))
