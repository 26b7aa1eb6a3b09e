import os
import pickle
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import aasvd
from aasvd.artifacts import (
    Activations,
    DamagedArtifactError,
    publishing,
    read_json,
    read_table,
    read_tensors,
    remake_command,
    replacing_folder,
    sidecar,
    write_json,
    write_table,
    write_tensors,
    writing_activations,
)

CPU = torch.device("cpu")
VALUE = {"perplexity": {"test": 12.5}, "run": "llama7b_r0.6", "β": [1, None, True]}
TABLE = pa.table({"tokens": pa.array([[1, 65_541], [2, 3]], pa.list_(pa.int32())), "text": ["a", "ä"]})
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def write_activations(path: Path, tensor: Tensor, batch: int) -> None:
    sequences, tokens, width = tensor.shape
    with writing_activations(path, shape=(sequences, tokens, width), dtype=tensor.dtype) as append:
        for part in tensor.split(batch):
            append(part)


# One artifact of every kind: its name, its writer, its reader.
KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "eval.json": (lambda path: write_json(path, VALUE), read_json),
    "tokens.parquet": (lambda path: write_table(path, TABLE), read_table),
    "grams.safetensors": (
        lambda path: write_tensors(path, {"gram": values(40)}),
        lambda path: read_tensors(path, device=CPU),
    ),
    "hidden.safetensors": (lambda path: write_activations(path, values(3, 4, 5), 2), Activations),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def script(source: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python on a piece of code that sees its arguments as `sys.argv[1:]`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(aasvd.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


# What is written is read


def test_json_round_trips_and_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "eval.json"
    write_json(path, VALUE)
    assert read_json(path) == VALUE
    assert path.read_text().startswith('{\n  "perplexity"') and path.read_text().endswith("}\n")


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", VALUE)
    write_json(tmp_path / "b.json", dict(reversed(VALUE.items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_number_that_json_cannot_hold_is_refused(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "eval.json", {"perplexity": bad})
    assert not list(tmp_path.iterdir())


def test_table_round_trips(tmp_path: Path) -> None:
    write_table(tmp_path / "tokens.parquet", TABLE)
    assert read_table(tmp_path / "tokens.parquet").equals(TABLE)


def test_tensors_round_trip_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {str(dtype): values(3, 4, dtype=dtype) for dtype in DTYPES}
    tensors |= {"transposed": values(3, 4).T, "view": values(4, 6)[1:3, ::2], "ids": torch.arange(5)}
    tensors |= {
        "parameter": torch.nn.Parameter(values(2, 2)),
        "strange": torch.tensor([torch.nan, torch.inf, -0.0]),
    }
    write_tensors(path, tensors)
    found = read_tensors(path, device=CPU)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.detach().contiguous().view(torch.uint8))


def test_same_content_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    write = KINDS[kind][0]
    write(tmp_path / "a" / kind)
    write(tmp_path / "b" / kind)
    for name in (kind, f"{kind}.sha256"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_artifact_can_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write_json(path, 1)
    write_json(path, 2)
    assert read_json(path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "eval.json.sha256"]


# Checksums


def test_sha256sum_checks_a_folder_without_this_package(tmp_path: Path) -> None:
    for name, (write, _) in KINDS.items():
        write(tmp_path / name)
    check = ["sha256sum", "--strict", "-c", *(f"{name}.sha256" for name in KINDS)]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 0
    flip(tmp_path / "eval.json", 3)
    failed = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and "eval.json: FAILED" in failed.stdout


def flip(path: Path, position: int) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x80
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "byte in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "gone": Path.unlink,
    "no sidecar": lambda path: sidecar(path).unlink(),
    "empty sidecar": lambda path: os.truncate(sidecar(path), 0),
    "damaged sidecar": lambda path: flip(sidecar(path), 5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_names_the_file_and_the_command_that_remakes_it(
    tmp_path: Path, kind: str, damage: str
) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "block_007" / kind
    write(path)
    read(path)
    DAMAGES[damage](path)
    with pytest.raises(DamagedArtifactError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert f"\n    snakemake --cores 1 --resources gpu=1 --force {path}" in str(caught.value)
    write(path)
    read(path)


# Half-written files


def test_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ZeroDivisionError), publishing(path) as temporary:
        temporary.write_bytes(b"half")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_error_while_remaking_keeps_the_old_artifact(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    write_activations(path, values(3, 4, 5), 3)
    with (
        pytest.raises(KeyboardInterrupt),
        writing_activations(path, shape=(3, 4, 5), dtype=torch.float32) as append,
    ):
        append(values(1, 4, 5))
        raise KeyboardInterrupt
    assert torch.equal(Activations(path).read([0, 1, 2]), values(3, 4, 5))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_takes_the_place_of_another_when_it_is_whole(tmp_path: Path, resume: bool) -> None:
    folder, temporary = tmp_path / "folder", tmp_path / ".folder.tmp"
    for content in ("old", "new"):
        with pytest.raises(KeyError), replacing_folder(folder, resume=resume) as staging:
            (staging / "half").write_text("half")
            raise KeyError
        assert temporary.exists() == resume  # a download goes on with it
        with replacing_folder(folder, resume=resume) as staging:
            assert (staging / "half").exists() == resume
            (staging / content).write_text(content)
            assert not (folder / content).exists()
        assert sorted(file.name for file in folder.iterdir()) == sorted({content, *(["half"] * resume)})
        assert not temporary.exists()


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "eval.json", VALUE)
    assert not list(tmp_path.iterdir())


def test_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    writer = script(
        """
import sys, time, torch
from pathlib import Path
from aasvd.artifacts import writing_activations
with writing_activations(Path(sys.argv[1]), shape=(100, 64, 64), dtype=torch.float32) as append:
    for _ in range(99):
        append(torch.ones(1, 64, 64))
    print("nearly done", flush=True)
    time.sleep(60)
""",
        path,
    )
    assert writer.stdout is not None
    with writer, writer.stdout:
        assert writer.stdout.readline() == "nearly done\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    with pytest.raises(DamagedArtifactError, match="is missing"):
        Activations(path)
    write_activations(path, values(3, 4, 5), 3)
    assert len(Activations(path)) == 3


def test_artifact_never_exists_without_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sidecar is in place at the moment the artifact gets its name."""
    replace, order = Path.replace, []

    def watched(source: Path, target: Path) -> Path:
        order.append((target.name, sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))))
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_json(tmp_path / "eval.json", VALUE)
    assert order == [("eval.json.sha256", []), ("eval.json", ["eval.json.sha256"])]


# Activations


@pytest.mark.parametrize(("first", "expected"), [(None, 5), (3, 3), (9, 5)])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_so_many_of_the_first_sequences(tmp_path: Path, batch: int, first: int, expected: int) -> None:
    x = torch.arange(30, dtype=torch.float32).view(5, 3, 2)
    write_tensors(tmp_path / "x", {"activations": x})
    found = list(Activations(tmp_path / "x").batches(batch, first=first))
    assert torch.equal(torch.cat(found), x[:expected])
    assert all(len(some) <= batch for some in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_writing_in_batches_equals_writing_at_once(tmp_path: Path, dtype: torch.dtype, batch: int) -> None:
    whole = values(7, 3, 5, dtype=dtype)
    write_activations(tmp_path / "batches.safetensors", whole, batch)
    write_tensors(tmp_path / "once.safetensors", {"activations": whole})
    for name in ("batches", "once"):
        path = tmp_path / f"{name}.safetensors"
        assert torch.equal(load_file(path)["activations"], whole)
        stored = Activations(path)
        assert (stored.shape, stored.dtype, len(stored)) == (whole.shape, dtype, 7)
        for order in ([0], [6, 0, 3], [2, 2], list(range(7)), torch.randperm(7).tolist(), []):
            assert torch.equal(stored.read(order), whole[order])
        for size in (1, 3, 7, 50):
            pieces = list(stored.batches(size))
            assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
            assert torch.equal(torch.cat(pieces), whole)


def test_appended_batches_may_be_views_in_another_type_with_gradients(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    batch = values(4, 2, 3, dtype=torch.float64).transpose(0, 1).requires_grad_()
    with writing_activations(path, shape=(2, 4, 3), dtype=torch.bfloat16) as append:
        append(batch)
    assert torch.equal(Activations(path).read([0, 1]), batch.detach().bfloat16())


def test_what_was_read_is_the_readers_own(tmp_path: Path) -> None:
    write_activations(tmp_path / "hidden.safetensors", values(2, 3, 4), 2)
    stored = Activations(tmp_path / "hidden.safetensors")
    stored.read([0]).zero_()
    assert torch.equal(stored.read([0]), values(2, 3, 4)[:1])


@pytest.mark.parametrize("sequences", [1, 3])
def test_wrong_number_of_sequences_is_an_error(tmp_path: Path, sequences: int) -> None:
    path = tmp_path / "hidden.safetensors"
    with (
        pytest.raises(ValueError, match=r"expected activations of shape \(2, 4, 5\)"),
        writing_activations(path, shape=(2, 4, 5), dtype=torch.float32) as append,
    ):
        append(values(sequences, 4, 5))
    assert not list(tmp_path.iterdir())


def test_file_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    write_activations(path, values(3, 4, 5), 3)
    stored = Activations(path)
    os.truncate(path, path.stat().st_size - 8)
    assert torch.equal(stored.read([1]), values(3, 4, 5)[1:2])
    with pytest.raises(DamagedArtifactError, match=r"(?s)cut short while in use.*snakemake .*--force"):
        stored.read([2])


def test_memory_does_not_grow_with_the_number_of_sequences(tmp_path: Path) -> None:
    """Two runs in one process: the peak of the second, with 20 times the sequences, is that of the first."""
    measured = script(
        """
import resource, sys, torch
from pathlib import Path
from aasvd.artifacts import Activations, writing_activations
for count in (16, 320):
    path = Path(sys.argv[1]) / f"{count}.safetensors"
    with writing_activations(path, shape=(count, 256, 256), dtype=torch.float32) as append:
        for start in range(0, count, 4):
            append(torch.full((4, 256, 256), float(start)))
    stored = Activations(path)
    assert all(batch[0, 0, 0] % 4 == 0 for batch in stored.batches(4))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
""",
        tmp_path,
    )
    assert measured.stdout is not None
    with measured, measured.stdout:
        few, many = (int(line) for line in measured.stdout)
    assert (tmp_path / "320.safetensors").stat().st_size > 80 * 2**20
    # Two batches of 1 MiB may be alive at a time, and the allocator keeps a few.
    assert many - few < 8 * 2**20


# Nothing runs code that comes from a file


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_pickled_bytes_under_any_name_are_not_run(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / kind, tmp_path / "exploded"
    with publishing(path) as temporary:
        temporary.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises((ValueError, SafetensorError)):
        KINDS[kind][1](path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("a --cores 2", ""),
        ("--configfile more.yaml --cores 2 a", " --configfile more.yaml"),
        ("--cores 2 --configfile=more.yaml a", " --configfile=more.yaml"),
        ("--configfile a.yaml b.yaml -- results/x", " --configfile a.yaml b.yaml"),
        ("-C seed=1 --quiet rules --config seed=2", " -C seed=1 --config seed=2"),
        ("a --config 'evaluation={suite: paper}' -n", " --config 'evaluation={suite: paper}'"),
    ],
)
def test_the_remaking_command_has_the_settings_of_this_run(
    line: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["snakemake", *shlex.split(line)])
    command = "snakemake --cores 1 --resources gpu=1 --force results/artifacts/x.parquet"
    assert remake_command(Path("results/artifacts/x.parquet")) == command + settings
