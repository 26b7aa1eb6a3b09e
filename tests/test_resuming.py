"""Runs that are killed, interrupted, out of space or side by side end in the bytes of an undisturbed one."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import workflow_copy
from workflow_copy import BLOCKS, MEASURES, NO_TASKS, RUN, Copy, artifacts, finished, tensors

pytestmark = pytest.mark.slow


def wait_for(copy: Copy, pattern: str, process: "subprocess.Popen[str]", *, seconds: float = 600) -> None:
    """Wait until a file of a pattern appears while a process runs."""
    end = time.monotonic() + seconds
    while not list(copy.folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{pattern} did not appear"
        time.sleep(0.005)


def alive(process: int) -> bool:
    """Tell whether a process runs; one that only waits to be reaped does not."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def spawned(process: int) -> list[int]:
    """Return the processes that a process runs stages in."""
    children = [file.read_text().split() for file in Path(f"/proc/{process}/task").glob("*/children")]
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for some in children for child in some}
    return [child for child, command in commands.items() if "spawn_main" in command]


def test_a_killed_run_goes_on_where_it_was(finished_copy: Copy, tmp_path: Path) -> None:
    copy = workflow_copy.create(tmp_path / "killed", **NO_TASKS)
    process = copy.start("snakemake", "--cores", "1")
    wait_for(copy, "results/artifacts/compressed/tiny/*/*/block_001/refined.safetensors", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not copy.path("dvc.lock").exists()  # a failed run is never recorded
    # A job in progress may have finished one of its files and not the next: Snakemake repeats that job.
    before = {
        name: made
        for name, made in artifacts(copy).items()
        if not any(part in name for part in ("block_001", "block_002")) or "/original/" in name
    }
    assert any("block_000/propagate.json" in name for name in before)
    done = copy.snakemake()
    assert done.code == 1
    assert "--unlock" in done.text
    copy.make("--unlock")
    log = copy.make()
    again = Counter(finished(log))
    # What had not run at the kill runs now; that nothing runs twice is what the unchanged files show.
    assert not set(again) & {"fetch_model", "sample_calibration", "embed"}
    assert not again["capture_block"] and again["refine_block"] < BLOCKS
    after = artifacts(copy)
    assert {name: after[name] for name in before} == before
    assert tensors(copy) == tensors(finished_copy)
    assert copy.evaluation()["perplexity"] == finished_copy.evaluation()["perplexity"]
    assert "up to date" in copy.must("dvc", "status")
    left = [name for name in after if name.endswith((".tmp", ".partial"))]
    listed = copy.must("dvc", "list", ".", "results/artifacts/compressed", "--recursive")
    assert not [name for name in left if Path(name).name in listed]


def test_stages_side_by_side_make_the_same_bytes(finished_copy: Copy, tmp_path: Path) -> None:
    """Two stages at a time, in processes that end with Snakemake's; killed and gone on as well."""
    copy = workflow_copy.create(tmp_path / "beside", **NO_TASKS)
    both = (
        "--cores",
        "2",
        "--resources",
        "gpu=2",
        "--",
        f"results/{RUN}/eval.json",
        f"results/{RUN}_uniform/eval.json",
    )
    process = copy.start("snakemake", *both)
    wait_for(copy, "results/artifacts/compressed/tiny/*/*/block_001/refined.safetensors", process)
    workers = spawned(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)  # Snakemake alone, not its group
    process.wait()
    end = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < end, "a stage outlived Snakemake"
        time.sleep(0.05)
    copy.snakemake("--unlock")
    log = copy.must("snakemake", *both)
    assert not {"fetch_model", "embed"} & set(finished(log))
    assert tensors(finished_copy).items() <= tensors(copy).items()
    assert copy.evaluation()["perplexity"] == finished_copy.evaluation()["perplexity"]
    assert (copy.evaluation(f"{RUN}_uniform")["ratio"]["achieved"]) <= 0.6


def test_a_run_that_keeps_no_tensors_makes_the_same_checkpoint(finished_copy: Copy, tmp_path: Path) -> None:
    """Killed and gone on as well: what is deleted is what no stage needs any more."""
    lean: dict[str, Any] = {
        "calibration": {"keep_activations": False},
        "compression": {"keep_factors": False},
    }
    copy = workflow_copy.create(tmp_path / "lean", **NO_TASKS, **lean)
    target = ("--cores", "2", "--resources", "gpu=1", "--", f"results/{RUN}/eval.json")
    process = copy.start("snakemake", *target)
    wait_for(copy, "results/artifacts/compressed/tiny/*/*/block_001/solved.safetensors", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    copy.snakemake("--unlock")
    assert not {"fetch_model", "embed"} & set(finished(copy.must("snakemake", *target)))
    checkpoint = f"results/{RUN}/model/model.safetensors"
    assert copy.path(checkpoint).read_bytes() == finished_copy.path(checkpoint).read_bytes()
    assert copy.evaluation()["perplexity"] == finished_copy.evaluation()["perplexity"]
    blocks = "results/artifacts/compressed/tiny/*/*/block_*"
    assert len(list(copy.folder.glob(f"{blocks}/refine.json"))) == BLOCKS
    for name in ("solved", "refined", "shifted"):
        assert not list(copy.folder.glob(f"{blocks}/{name}.safetensors"))
    assert "Nothing to be done" in copy.must("snakemake", "--dry-run", *target)
    # Another measurement asks for none of them again.
    copy.change(evaluation={"windows": 1})
    assert set(copy.planned(target[-1])) <= MEASURES | {"publish"}


def test_nothing_is_forgotten_where_a_text_ends_just_after_a_model(tmp_path: Path) -> None:
    """A model is fetched alone; where it is not, Snakemake forgets the rest, and that is an error."""
    copy = workflow_copy.create(tmp_path / "race", **NO_TASKS)
    rules = copy.path("workflow/rules/sources.smk")
    head, fetch_text, rest = rules.read_text().partition("stages(wildcards).fetch_text(")
    body, end, rest = rest.partition("\n        )\n")
    # Its output is there when the model is, but it has not ended.
    late = (
        "        while not list(pathlib.Path(ARTIFACTS).glob('sources/models/*/*/fetch.json')):\n"
        "            time.sleep(0.1)\n"
        "        time.sleep(3)\n"
    )
    slow = f"{head}{fetch_text}{body}{end}{late}{rest}"
    beside, threads = re.subn(r"\n    threads: .*", "", slow)
    assert threads == 1
    target = ("--cores", "2", "--", f"results/{RUN}/eval.json")
    rules.write_text(beside)
    done = copy.run("snakemake", *target)
    # Whether Snakemake forgets depends on what it starts beside the model, and on the machine. Where it does,
    # that is an error; never does a run end well with nothing made.
    made = copy.path(target[-1]).exists()
    assert done.code == (0 if made else 1), done.text
    assert made or "was not made: Snakemake lost sight of it" in done.text
    shutil.rmtree(copy.path("results"))
    rules.write_text(slow)
    copy.must("snakemake", *target)
    assert copy.evaluation()["ratio"]["target"] == 0.6


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_ctrl_c_leaves_whole_files_only(finished_copy: Copy, tmp_path: Path, at_a_time: int) -> None:
    copy = workflow_copy.create(tmp_path / "interrupted", **NO_TASKS)
    process = copy.start("snakemake", "--cores", "2", "--resources", f"gpu={at_a_time}")
    wait_for(copy, "results/artifacts/original/tiny/*/block_001/.*.tmp", process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert not copy.path("dvc.lock").exists()
    expected = tensors(finished_copy)
    found = {name: made for name, made in tensors(copy).items() if not Path(name).name.startswith(".")}
    assert found
    assert found.items() <= expected.items()
    copy.snakemake("--unlock")
    copy.make("capture")
    assert tensors(copy).items() <= expected.items()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", mount], check=False)
    if made.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=False)


def test_a_full_disk_leaves_whole_files_only(finished_copy: Copy, tmp_path: Path, small_disk: Path) -> None:
    copy = workflow_copy.create(tmp_path / "full", **NO_TASKS)
    copy.path("results").mkdir()
    subprocess.run(["mount", "--bind", small_disk, copy.path("results")], check=True)
    try:
        done = copy.snakemake()
        assert done.code == 1
        assert "No space left on device" in done.text
        assert "Traceback (most recent call last)" not in done.text
        expected = tensors(finished_copy)
        assert tensors(copy).items() <= expected.items()
        assert not copy.path("dvc.lock").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
        copy.make("capture")
        assert tensors(copy).items() <= expected.items()
    finally:
        subprocess.run(["umount", copy.path("results")], check=False)
