"""The whole pipeline with real Snakemake, DVC and git, on a tiny model and without a network."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import workflow_copy
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workflow_copy import BLOCKS, ROOT, RUN, WIDTH, Copy, finished, jobs

from aasvd import params
from aasvd.artifacts import remake_command

pytestmark = pytest.mark.slow

ORIGINALS = {"fetch_model", "fetch_text", "fetch_task", "sample_calibration", "embed", "capture_block"}
COMPRESSION = {"allocate", "solve_block", "refine_block", "propagate", "assemble", "describe_compression"}
MEASURES = {"perplexity", "accuracy"}
SHORT = {"epochs": 2, "batch": 2, "learning_rate": 40.0, "beta": 10.0, "penalty": 200.0}
NO_TASKS: dict[str, Any] = {"evaluation": {"tasks": []}}  # lm-eval takes seconds to import


@pytest.fixture(scope="session")
def finished_copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """One uninterrupted run, made by a plain `snakemake` and committed; not to be changed by a test."""
    copy = workflow_copy.create(tmp_path_factory.mktemp("workflow") / "finished")
    copy.path("log").write_text(copy.make())
    workflow_copy.commit(copy, "Results")
    return copy


def artifacts(copy: Copy, pattern: str = "**/*") -> dict[str, tuple[int, int]]:
    """Return when each artifact of a pattern was written, and its file number."""
    return {
        str(file.relative_to(copy.folder)): (file.stat().st_mtime_ns, file.stat().st_ino)
        for file in sorted(copy.path("results/artifacts").glob(pattern))
        if file.is_file()
    }


def tensors(copy: Copy) -> dict[str, str]:
    """Return the digest of every tensor file, which hold no times, and of tokens."""
    return {
        str(file.relative_to(copy.folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in ("*.safetensors", "tokens.parquet")
        for file in sorted(copy.path("results").rglob(pattern))
    }


def numbers(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what a run measured, without when and with what."""
    left_out = ("seconds", "peak_memory_mb", "peak_device_memory_mb")
    kept = {name: value for name, value in evaluation.items() if name not in left_out}
    return kept | {"provenance": evaluation["provenance"]["keys"]}


def wait_for(copy: Copy, pattern: str, process: "subprocess.Popen[str]", *, seconds: float = 600) -> None:
    """Wait until a file of a pattern appears while a process runs."""
    end = time.monotonic() + seconds
    while not list(copy.folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{pattern} did not appear"
        time.sleep(0.005)


def flip(file: Path, tensor: str = "") -> None:
    """Change one byte of a file in place: one of a named tensor's, or one near the end."""
    content = bytearray(file.read_bytes())
    place = len(content) - 9
    if tensor:
        header = int.from_bytes(content[:8], "little")
        place = 8 + header + json.loads(content[8 : 8 + header])[tensor]["data_offsets"][0]
    content[place] ^= 1
    overwrite(file, bytes(content))


def overwrite(file: Path, content: bytes) -> None:
    """Write into the file itself, as a failing disk would, though DVC made it read-only or a link."""
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.write(content)
        stream.truncate()


# --- a finished run ---------------------------------------------------------------------------------------


def test_a_run_is_whole(finished_copy: Copy) -> None:
    log = finished_copy.path("log").read_text()
    ran = Counter(finished(log))
    assert ran["capture_block"] == ran["solve_block"] == ran["refine_block"] == ran["propagate"] == BLOCKS
    assert ran["perplexity"] == ran["accuracy"] == 2  # dense and compressed
    result = finished_copy.evaluation()
    assert result["ratio"]["target"] == 0.6
    assert 0.5 < result["ratio"]["achieved"] <= 0.6
    assert set(result["perplexity"]["made-up"]) >= {"dense", "compressed"}
    assert set(result["accuracy"]["piqa"]) >= {"dense", "compressed", "stderr"}
    assert {"solve", "refine", "propagate", "capture", "assemble"} <= set(result["seconds"])
    for sums in finished_copy.path("results").rglob("SHA256SUMS"):
        for line in sums.read_text().splitlines():
            expected, _, name = line.partition("  ")
            assert hashlib.sha256((sums.parent / name).read_bytes()).hexdigest() == expected, name
    assert "compressed model lies in" in log


def test_a_finished_run_has_nothing_to_do(finished_copy: Copy) -> None:
    assert "Nothing to be done" in finished_copy.make("--dry-run")
    assert "up to date" in finished_copy.must("dvc", "status")
    assert finished_copy.must("git", "status", "--porcelain") == ""


def test_git_holds_no_tensors(finished_copy: Copy) -> None:
    tracked = finished_copy.must("git", "ls-files").split()
    assert {"dvc.lock", f"results/{RUN}/eval.json", f"results/{RUN}/results.html"} <= set(tracked)
    assert not [name for name in tracked if name.startswith("results/artifacts/") or "/model/" in name]


def test_a_stage_job_costs_little(finished_copy: Copy) -> None:
    """From one job's end to the next's, less the seconds the stage itself took."""
    ends: list[tuple[float, str]] = []
    stamp = 0.0
    for line in finished_copy.path("log").read_text().splitlines():
        if re.fullmatch(r"\[\w{3} \w{3} +\d+ [\d:]{8} \d{4}\]", line):
            stamp = datetime.strptime(line[1:-1], "%a %b %d %H:%M:%S %Y").timestamp()
        elif line.startswith("Finished jobid:"):
            ends.append((stamp, line.rpartition("(Rule: ")[2].rstrip(")")))
    blocks = [when for when, rule in ends if rule in ("solve_block", "refine_block", "propagate")]
    records = [
        json.loads(file.read_text())
        for file in finished_copy.path("results/artifacts/compressed").rglob("block_*/*.json")
    ]
    assert len(records) == len(blocks) == 3 * BLOCKS
    # Times in the log are whole seconds: the mean over the chain of block jobs is all that they tell. The
    # first job's own seconds lie before the first end.
    first = min(
        json.loads(file.read_text())["seconds"] for file in _records(finished_copy, "block_000/solve.json")
    )
    overhead = (blocks[-1] - blocks[0] - sum(r["seconds"] for r in records) + first) / (len(blocks) - 1)
    sys.stdout.write(f"overhead of a stage job: {overhead:.3f} s\n")
    assert overhead < 1


def _records(copy: Copy, pattern: str) -> list[Path]:
    return list(copy.path("results/artifacts/compressed").rglob(pattern))


# --- resuming ---------------------------------------------------------------------------------------------


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


def test_ctrl_c_leaves_whole_files_only(finished_copy: Copy, tmp_path: Path) -> None:
    copy = workflow_copy.create(tmp_path / "interrupted", **NO_TASKS)
    process = copy.start("snakemake", "--cores", "1")
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


# --- changed parameters -----------------------------------------------------------------------------------


def test_only_what_a_parameter_determines_is_made_anew(another: Copy) -> None:
    first, shipped = another.evaluation(), another.path("params.yaml").read_text()
    made = artifacts(another)

    # Refinement, and in the same call another ratio: no original is touched.
    another.change(refinement={"learning_rate": 0.003})
    ran = Counter(finished(another.make("--", f"results/{RUN}/eval.json", "results/tiny_r0.5/eval.json")))
    assert set(ran) == COMPRESSION | MEASURES | {"publish"}
    assert ran["solve_block"] == 2 * BLOCKS
    assert ran["perplexity"] == 2  # the dense model's number is shared
    assert another.evaluation()["perplexity"] != first["perplexity"]
    assert another.evaluation("tiny_r0.5")["ratio"]["achieved"] < first["ratio"]["achieved"]

    # Back: everything is still there.
    another.path("params.yaml").write_text(shipped)
    ran = Counter(finished(another.make()))
    assert ran == {"publish": 1, "all": 1}
    assert numbers(another.evaluation()) == numbers(first)
    # DVC may replace a file by a link to its cache, which keeps the time.
    after = artifacts(another)
    assert {name: after[name][0] for name in made} == {name: when for name, (when, _) in made.items()}
    assert "Nothing to be done" in another.make("--dry-run")
    assert "up to date" in another.must("dvc", "status")


def test_methods_on_original_inputs_cost_no_pass(another: Copy) -> None:
    """Another ratio, and other such methods, read what the first run captured; only measuring has passes."""
    alone = (COMPRESSION - {"refine_block", "propagate"}) | MEASURES | {"publish"}
    for names in (["r0.6_svd-llm-w"], ["r0.4_svd-llm-w", "r0.6_svd"]):
        targets = [f"results/tiny_{name}/eval.json" for name in names]
        ran = Counter(finished(another.make("--", *targets)))
        assert set(ran) == alone
        assert ran["solve_block"] == BLOCKS * len(targets)
        assert ran["perplexity"] == len(targets)
    # Gradients, which the finished run made, serve other ratios.
    for name in ("r0.6_norefine", "r0.5_norefine"):
        assert set(finished(another.make("--", f"results/tiny_{name}/eval.json"))) == alone
    # Other statistics and measures are made when a method asks for them, once.
    for name, more in (
        ("r0.6_fwsvd", {"differentiate_weights"}),
        ("r0.4_fwsvd", set()),
        ("r0.6_svd-llm-v2", {"measure_block"}),
    ):
        assert set(finished(another.make("--", f"results/tiny_{name}/eval.json"))) == alone | more
    # Equal methods share everything but the folder that people look at.
    assert finished(another.make("--", "results/tiny_r0.6_drone/eval.json")) == ["publish"]
    seconds = another.evaluation("tiny_r0.6_norefine")["seconds"]
    assert {"differentiate", "differentiate head", "measure", "allocate"} <= set(seconds)


def test_trained_positions_are_made_once_for_a_ratio(another: Copy) -> None:
    """By Dobi-SVD's allocation alone; its run says what the training took, and meets the budget."""
    another.change(evaluation={"tasks": []}, compression={"dobi": SHORT})
    name = "tiny_r0.6_dobi-svd-trained"
    first = Counter(finished(another.make("--", f"results/{name}/eval.json")))
    assert set(first) == (COMPRESSION - {"refine_block"}) | {"train_positions", "perplexity", "publish"}
    assert first["train_positions"] == 1
    trained = another.find("original/tiny/*/positions/r0.6-*.json")
    described = json.loads(another.path(trained).read_text())
    assert len(described["epochs"]) == SHORT["epochs"]
    assert all(math.isfinite(number) for epoch in described["epochs"] for number in epoch.values())
    assert math.isfinite(another.evaluation(name)["perplexity"]["made-up"]["compressed"])
    # One rank of the tiny model's smallest linear is 0.2 % of all linears.
    assert 0.598 < another.evaluation(name)["ratio"]["achieved"] <= 0.6
    assert another.evaluation(name)["seconds"]["train positions"] == described["seconds"]
    assert set(another.planned(f"results/{name}_refine/eval.json")) == COMPRESSION | {"perplexity", "publish"}
    # The same bytes when it is made again, by the command that its path gives.
    before = tensors(another)
    another.path(trained.with_suffix(".safetensors")).unlink()
    assert finished(another.make("--", trained.with_suffix(".safetensors"))) == ["train_positions"]
    assert tensors(another) == before


def test_a_comparison_makes_all_its_runs(another: Copy) -> None:
    """Of methods with every kind of statistic, measure and step; the others share their pieces."""
    methods = ["asvd", "dipsvd-code", "adasvd", "saes-svd", "svd-llm"]
    another.change(evaluation={"tasks": []}, comparison={"methods": methods, "variants": ["norefine"]})
    another.make("--", "results/compare/tiny_r0.6.html")
    table = pq.read_table(another.path("results/compare/tiny_r0.6.parquet")).to_pylist()
    measured = {row["method"]: row for row in table if row["source"] == "measured"}
    assert set(measured) == {"dense", *methods}
    for method, row in measured.items():
        assert math.isfinite(row["perplexity made-up"])
        if method != "dense":
            # One rank of the tiny model's smallest linear is 0.2 % of all linears.
            assert 0.598 < row["kept_linears"] <= 0.6
    reported = [row for row in table if row["source"].startswith("reported: ")]
    assert {row["ratio"] for row in reported} == {0.6, 1.0}
    for name in ("html", "md", "tex"):
        text = another.path(f"results/compare/tiny_r0.6.{name}").read_text()
        assert "saes-svd" in text and "SAES-SVD" in text
    drawing = another.path("results/compare/tiny_r0.6.svg").read_text().partition("<svg")[2]
    assert drawing in another.path("results/compare/tiny_r0.6.html").read_text()


def test_pruning_methods_are_methods_as_all_others(another: Copy) -> None:
    """In one table, from the same originals; the search of BlockPruner is made once for all ratios."""
    methods = ["shortgpt", "blockpruner", "wanda-sp"]
    another.change(evaluation={"tasks": []}, comparison={"methods": methods, "variants": ["norefine"]})
    ran = Counter(finished(another.make("--", "results/compare/tiny_r0.6.html")))
    assert ran["order_branches"] == 1
    assert ran["measure_block"] == BLOCKS  # ShortGPT's influence of blocks
    assert ran["propagate"] == BLOCKS  # only Wanda-sp looks at what the blocks before one became
    assert not set(ran) & ORIGINALS
    table = pq.read_table(another.path("results/compare/tiny_r0.6.parquet")).to_pylist()
    rows = {row["method"]: row for row in table if row["source"] == "measured"}
    for method in methods:
        assert math.isfinite(rows[method]["perplexity made-up"])
        assert rows[method]["kept_linears"] <= 0.6
        result = another.evaluation(f"tiny_r0.6_{method}_norefine")
        assert result["storage"] == "pruned"
        assert result["bytes"]["compressed"] < result["bytes"]["dense"]
    assert rows["shortgpt"]["kept_linears"] == pytest.approx(1 / 3)
    # Less than one neuron below: three vectors in each block.
    weights = result["parameters"]["linears"]["dense"] / BLOCKS
    assert rows["wanda-sp"]["kept_linears"] > 0.6 - 3 * WIDTH / weights
    assert "order branches" in another.evaluation("tiny_r0.6_blockpruner_norefine")["seconds"]
    card = another.path("results/tiny_r0.6_shortgpt_norefine/model/README.md").read_text()
    assert "numbers that stay" in card and "tags: [aasvd, pruned]" in card
    plan = another.planned("results/tiny_r0.8_blockpruner_refine/eval.json")
    assert "refine_block" in plan and "order_branches" not in plan


def test_an_overlay_merges_deeply_and_is_not_recorded_as_params_yaml(another: Copy) -> None:
    lock, first = another.path("dvc.lock").read_text(), another.evaluation()
    another.path("more.yaml").write_text(
        "evaluation: {windows: 2}\nvariants: {quick: {refinement: {epochs: 1}}}\n"
    )
    ran = Counter(finished(another.make("--configfile", "more.yaml")))
    assert ran == {"perplexity": 2, "publish": 1, "all": 1}
    overlaid = another.evaluation()
    assert overlaid["perplexity"]["made-up"]["windows"] == 2
    assert overlaid["accuracy"] == first["accuracy"]
    locked = yaml.safe_load(another.path("dvc.lock").read_text())["stages"]
    assert locked[f"publish@{RUN}"] == yaml.safe_load(lock)["stages"][f"publish@{RUN}"]
    assert "eval.json" in another.must("dvc", "status")  # what lies there is not params.yaml's
    plan = another.planned("results/tiny_r0.6_quick/eval.json", options=["--configfile", "more.yaml"])
    assert set(plan) == COMPRESSION | (MEASURES | {"publish"})
    assert finished(another.make()) == ["publish", "all"]
    assert numbers(another.evaluation()) == numbers(first)
    assert "up to date" in another.must("dvc", "status")


# --- DVC --------------------------------------------------------------------------------------------------


def test_dvc_runs_what_changed_and_nothing_else(finished_copy: Copy, tmp_path: Path) -> None:
    copy = workflow_copy.create(tmp_path / "repro", **NO_TASKS)
    first = copy.must("dvc", "repro")
    assert _stages_run(first) == [*params.PHASES, f"publish@{RUN}"]
    assert tensors(copy) == tensors(finished_copy)
    assert _stages_run(copy.must("dvc", "repro")) == []
    assert "Nothing to be done" in copy.make("--dry-run")
    copy.change(evaluation={"windows": 3})
    changed = copy.must("dvc", "repro")
    assert _stages_run(changed) == ["evaluate", f"publish@{RUN}"]
    assert Counter(finished(changed)) == {"perplexity": 2, "evaluate": 1, "publish": 1}
    assert copy.evaluation()["perplexity"]["made-up"]["windows"] == 3
    assert "up to date" in copy.must("dvc", "status")


def _stages_run(text: str) -> list[str]:
    return re.findall(r"^Running stage '([^']+)'", text, re.MULTILINE)


def test_a_clone_with_pulled_artifacts_is_finished(finished_copy: Copy, tmp_path: Path) -> None:
    origin = finished_copy.duplicate(tmp_path / "origin")
    origin.must("dvc", "remote", "add", "--default", "local", tmp_path / "remote")
    workflow_copy.commit(origin, "Remote")
    origin.must("dvc", "push")
    clone = Copy(tmp_path / "clone")
    origin.must("git", "clone", "--quiet", origin.folder, clone.folder)
    clone.must("dvc", "pull")
    assert "Nothing to be done" in clone.make("--dry-run")
    assert _stages_run(clone.must("dvc", "repro")) == []
    assert tensors(clone) == tensors(finished_copy)
    assert clone.must("git", "status", "--porcelain") == ""
    program = (
        "import aasvd, sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        f"folder = 'results/{RUN}/model'\n"
        "model, words = M.from_pretrained(folder), T.from_pretrained(folder)\n"
        "print(words.decode(model.generate(**words('abc def', return_tensors='pt'), max_new_tokens=4)[0]))"
    )
    assert "abc def" in clone.must(sys.executable, "-c", program)


# --- damage -----------------------------------------------------------------------------------------------


def mend(copy: Copy, *targets: str | Path) -> dict[str, str]:
    """Ask for targets and run each command that an error names, literally, until they are made.

    Returns:
        For each file that was said to be damaged, the artifact that the command remakes.
    """
    named: dict[str, str] = {}
    while (done := copy.snakemake("--", *targets)).code:
        assert done.code == 1
        assert "Traceback (most recent call last)" not in done.text
        (file,) = re.findall(r"(\S+) is damaged", done.text)
        (command,) = re.findall(r"^\s+(snakemake .*)$", done.text, re.MULTILINE)
        assert file not in named, done.text
        named[file] = command.split()[-1]
        mended = copy.shell(command)
        assert mended.code == 0, mended.text
    return named


def test_damage_is_named_and_the_printed_command_mends_it(another: Copy) -> None:
    """Artifacts are damaged, and what was made from each is removed so that it is read again."""
    before, whole, made = tensors(another), another.evaluation(), artifacts(another)
    original, blocks = another.find("original/tiny/*"), another.find("compressed/tiny/*/r*")
    tokens = another.find("calibration/tiny/*/tokens.parquet")
    dense = another.find("sources/models/tiny/*/dense") / "model.safetensors"
    solved = blocks / "block_001" / "solved.safetensors"
    overwrite(another.path(tokens), another.path(tokens).read_bytes()[:-5])
    flip(another.path(solved))
    flip(another.path(dense), "model.norm.weight")
    readers = [
        original / "embedded.safetensors",
        blocks / "block_001" / "refined.safetensors",
        blocks / "model" / "SHA256SUMS",
    ]
    for reader in readers:
        another.path(reader).unlink()
    assert mend(another, f"results/{RUN}/eval.json", *readers) == {
        str(tokens): str(tokens),
        str(solved): str(solved),
        str(dense): str(dense.parent.parent / "source.json"),
    }
    assert tensors(another) == before
    assert numbers(another.evaluation()) == numbers(whole)
    after = artifacts(another)
    for name in made:  # no block is made again that nothing was wrong with
        if name.startswith((f"{original}/block_001/", f"{original}/block_002/")):
            assert after[name][0] == made[name][0], name


@pytest.mark.parametrize(
    "pattern", ["original/tiny/*/block_001/covariances", "compressed/tiny/*/r*/block_002/refined"]
)
def test_the_command_that_remakes_an_artifact_remakes_it_alone(finished_copy: Copy, pattern: str) -> None:
    command = remake_command(finished_copy.find(f"{pattern}.safetensors"))
    done = finished_copy.shell(f"{command} --dry-run --quiet host")
    assert done.code == 0, done.text
    assert jobs(done.text) == ["capture_block" if "original" in pattern else "refine_block"]


# --- errors a user meets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["results/nobody_r0.6/eval.json"], r"unknown model 'nobody'; params\.yaml has .*tiny"),
        (["results/tiny_r1.2/eval.json"], r"ratio 1\.2 must lie between 0 and 1"),
        (
            ["results/tiny_r0.6_fast/eval.json"],
            r"unknown method or variant 'fast'; params\.yaml has .*norefine",
        ),
        (["results/tiny/eval.json"], r"must have the form <model>_r<ratio>"),
        (["--configfile", "wrong.yaml"], r"calibration\.sequences: 'many' is not of type 'integer'"),
    ],
)
def test_a_mistaken_command_is_one_message(
    finished_copy: Copy, tmp_path: Path, arguments: list[str], message: str
) -> None:
    finished_copy.path("wrong.yaml").write_text("calibration: {sequences: many}\n")
    try:
        done = finished_copy.snakemake(*arguments)
    finally:
        finished_copy.path("wrong.yaml").unlink()
    assert done.code == 1
    assert len(re.findall(message, done.text)) == 1, done.text
    assert "Traceback (most recent call last)" not in done.text
    assert len(done.text.splitlines()) < 25


def test_models_and_data_that_cannot_be_used_are_one_message_each(another: Copy, tmp_path: Path) -> None:
    """All in one call that keeps going; what is finished stays."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=workflow_copy.trained_tokenizer(["a few words"]), bos_token="<s>", eos_token="</s>"
    )
    size: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    poisoned = LlamaForCausalLM(LlamaConfig(**size, **heads, num_hidden_layers=2))
    with torch.no_grad():
        poisoned.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    for name, model in {
        "poisoned": poisoned,
        "blockless": LlamaForCausalLM(LlamaConfig(**size, **heads, num_hidden_layers=0)),
        "conv": GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)),
    }.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sources = {name: {"path": str(tmp_path / name)} for name in ("poisoned", "blockless", "conv", "absent")}
    another.change(
        models={**sources, "far": {"hub": "nobody/nothing"}},
        variants={
            "long": {"calibration": {"sequences": 5000}},
            "task": {"evaluation": {"tasks": ["piqua"]}},
            "window": {"evaluation": {"window": 50000}},
        },
    )
    kept = artifacts(another)
    runs = [f"{name}_r0.6" for name in (*sources, "far")] + [
        f"tiny_r0.6_{name}" for name in ("long", "task", "window")
    ]
    done = another.snakemake("--keep-going", "--", *(f"results/{run}/eval.json" for run in runs))
    sys.stdout.write(done.text)
    assert done.code == 1
    for message in (
        r"capture block 1: the original block's output is not finite: the model's own mlp\.up_proj\.weight",
        r"fetch model: .*no decoder blocks",
        r"fetch model: .*hold no linear layer",
        r"fetch model: .*absent does not exist",
        r"fetch model: cannot fetch nobody/nothing from the Hugging Face hub .*`path:` under models",
        r"sample calibration: .*5000",
        r"fetch task piqua: 'piqua' is not an lm-eval task",
        r"perplexity made-up: .*less than one window of 50000",
    ):
        assert re.search(message, done.text), message
    assert "Traceback (most recent call last)" not in done.text
    after = artifacts(another)
    assert {name: after[name] for name in kept} == kept


# --- the shape of the workflow ----------------------------------------------------------------------------


def rules() -> Iterator[tuple[str, list[str]]]:
    """Yield every rule's name and lines."""
    for file in [ROOT / "Snakefile", *sorted((ROOT / "workflow" / "rules").glob("*.smk"))]:
        lines = file.read_text().splitlines()
        starts = [n for n, line in enumerate(lines) if re.match(r"(rule|checkpoint) \w+:", line)]
        for start in starts:
            body = [lines[start]]
            for line in lines[start + 1 :]:
                if line and not line.startswith(" "):
                    break
                body.append(line)
            yield lines[start].split()[1].rstrip(":"), "\n".join(body).rstrip().splitlines()


def test_rules_are_short_and_say_what_they_do() -> None:
    found = dict(rules())
    assert len(found) > 15
    for name, lines in found.items():
        assert len(lines) <= 30 or name in ("solve_block", "publish"), f"rule {name} has {len(lines)} lines"
        assert lines[1].strip().startswith('"""'), f"rule {name} has no docstring"
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 40
    assert len((ROOT / "workflow" / "rules" / "common.smk").read_text().splitlines()) <= 100


def test_lint_finds_nothing_serious(finished_copy: Copy) -> None:
    text = finished_copy.run("snakemake", "--lint").text
    findings = re.findall(r"^ +\* (.*)", text, re.MULTILINE)
    # Input functions stay beside the only rules that use them (style 2.3: common.smk is short).
    assert set(findings) <= {"Mixed rules and functions in same snakefile.:"}, text


def test_report_has_the_table_and_the_figure(another: Copy) -> None:
    another.make("--report", "report.html")
    page = another.path("report.html").read_text()
    for expected in ("Results", "Blocks", "distortion", "perplexity and accuracy", RUN):
        assert expected in page
    assert json.loads(json.dumps(page.count("results.html"))) > 0
