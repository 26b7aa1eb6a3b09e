"""The paper's targets, failures of single measurements, and DVC: real Snakemake on a tiny model."""

import json
import math
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import workflow_copy
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from workflow_copy import BLOCKS, RUN, Copy, finished

from aasvd.artifacts import write_table

pytestmark = pytest.mark.slow

FORMATS = ("html", "md", "tex")


@pytest.fixture(scope="module")
def finished_copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A finished and committed run of the name `default`, with a few variants in params.yaml."""
    copy = workflow_copy.create(tmp_path_factory.mktemp("paper") / "finished", runs=["default"])
    settings = copy.params()
    settings["comparison"]["variants"] = ["norefine"]
    settings["comparisons"] = {}
    settings["variants"] = {
        "norefine": {"refinement": {"epochs": 0}},
        "few": {"calibration": {"sequences": 4}},
        "more": {"calibration": {"sequences": 6}},
        "other": {"seed": 1},
    }
    copy.path("params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    copy.path("log").write_text(copy.make())
    workflow_copy.commit(copy, "Results")
    return copy


# --- watching a run ---------------------------------------------------------------------------------------


def test_a_finished_block_is_one_line_and_the_status_file_says_finished(finished_copy: Copy) -> None:
    lines = re.findall(r"block \d of \d: relative errors.*", finished_copy.path("log").read_text())
    assert len(lines) == BLOCKS
    for number, line in enumerate(lines, start=1):
        numbers = r"[\d.e-]+"
        # Snakemake writes to the other stream at any time, even before this line has ended.
        assert re.match(
            rf"block {number} of {BLOCKS}: relative errors (\w+_proj (\d\.\d+|dense)[ ;] ?){{7}}"
            rf"distortion mse {numbers} → {numbers}, cosine {numbers} → {numbers} "
            rf"\(solved: 6 sequences\); {numbers} s, \d+ MB; "
            rf"about {numbers} min left for the other blocks",
            line,
        ), line
    status = json.loads(finished_copy.path("results/default/progress.json").read_text())
    assert status["state"] == "finished"
    assert [file.parent.name for file in finished_copy.path("results").glob("*/progress.json")] == ["default"]
    assert finished_copy.must("git", "status", "--porcelain") == ""


def test_a_running_stage_can_be_watched(finished_copy: Copy, tmp_path: Path) -> None:
    copy = workflow_copy.create(tmp_path / "watched", evaluation={"tasks": []}, refinement={"epochs": 400})
    process = copy.start("snakemake", "--cores", "1")
    status: dict[str, Any] = {}
    while process.poll() is None and not {"loss", "stage_seconds_left"} <= set(status):
        file = copy.path(f"results/{RUN}/progress.json")
        status = json.loads(file.read_text()) if file.exists() else {}
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert status["stage"].startswith("refine block")
    assert status["blocks"] == BLOCKS and 1 <= status["block"] <= BLOCKS
    assert 0 < status["done"] <= status["of"]


# --- what is measured -------------------------------------------------------------------------------------


def test_dense_perplexity_is_that_of_a_plain_computation(finished_copy: Copy) -> None:
    """The text tokenized whole, windows in order, transformers' own loss."""
    folder = finished_copy.path(finished_copy.find("sources/models/tiny/*/dense"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = finished_copy.path("inputs/text/test.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        losses = [
            float(model(ids[:, start : start + 32], labels=ids[:, start : start + 32]).loss)
            for start in range(0, 6 * 32, 32)
        ]
    expected = math.exp(sum(losses) / len(losses))
    found = finished_copy.evaluation("default")["perplexity"]["made-up"]
    assert found["windows"] == 6
    assert found["dense"] == pytest.approx(expected, rel=1e-4)


# --- failures ---------------------------------------------------------------------------------------------


def test_a_failed_task_fails_alone_and_is_tried_again(another: Copy) -> None:
    before = another.evaluation("default")
    another.change(evaluation={"tasks": ["piqa", "openbookqa"]})
    text = another.make()  # its rows are on the hub, which is switched off
    assert "openbookqa" in text and "tries it again" in text
    result = another.evaluation("default")
    assert set(result["errors"]) == {"accuracy openbookqa"}
    assert "openbookqa" in result["errors"]["accuracy openbookqa"]["dense"]
    assert result["accuracy"]["openbookqa"]["compressed"] is None
    for kind in ("perplexity", "accuracy"):
        assert {name: result[kind][name] for name in before[kind]} == before[kind]
    assert result["average"]["tasks"] == 1 and result["average"]["of"] == 2
    assert "failed" in another.path("results/default/results.html").read_text()

    # The next run tries again what failed, and nothing else; what DVC knows is not called finished.
    again = Counter(finished(another.make()))
    assert again == {"fetch_task": 1, "accuracy": 2, "publish": 1, "all": 1}
    assert "evaluate" in another.must("dvc", "status")

    # As if the hub were there: the rows arrive.
    rows = another.find("sources/tasks/openbookqa/*/rows.parquet")
    choices = {"text": ["abc", "de", "f", "g"], "label": ["A", "B", "C", "D"]}
    row = {"id": "1", "question_stem": "abc def", "choices": choices, "answerKey": "A"}
    write_table(another.path(rows), pa.Table.from_pylist([row] * 3))
    another.path(f"{rows}.error").unlink()
    ran = Counter(finished(another.make()))
    assert ran == {"accuracy": 2, "publish": 1, "all": 1}
    result = another.evaluation("default")
    assert result["errors"] == {}
    assert result["accuracy"]["openbookqa"]["count"] == 3
    assert "Nothing to be done" in another.make("--dry-run")
    assert "up to date" in another.must("dvc", "status")


# --- tables and figures -----------------------------------------------------------------------------------


def test_every_table_and_figure_is_a_target(another: Copy) -> None:
    tables = [f"{name}/tiny_r0.6" for name in ("main", "pruning", "breakdown", "ablation", "models")]
    drawings = ["depth/tiny_r0.6", "calibration/tiny_r0.6", f"layers/{RUN}_norefine"]
    size = 0.0004  # GB: less than the tiny model and its Python objects
    targets = [
        *(f"results/paper/{table}.html" for table in [*tables, f"budget/tiny_{size:g}-0.0000001-1GB_32"]),
        *(f"results/paper/{drawing}.png" for drawing in drawings),
    ]
    text = another.make("--", *targets)
    ran = Counter(finished(text))
    assert ran["paper_table"] == len(tables)
    # Of the run that has a figure of its own; methods whose blocks nothing went through follow below.
    assert ran["layer_errors"] == BLOCKS
    assert ran["paper_budget"] == ran["figure_depth"] == ran["figure_calibration"] == 1
    for table in tables:
        for ending in FORMATS:
            assert another.path(f"results/paper/{table}.{ending}").stat().st_size > 200, table
    for drawing in drawings:
        assert another.path(f"results/paper/{drawing}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in another.path(f"results/paper/{drawing}.svg").read_text()

    # Tables and figures, which come after a run or between two of its stages, leave no run unfinished.
    for file in another.path("results").glob("*/progress.json"):
        assert json.loads(file.read_text())["state"] == "finished", file

    runs = pq.read_table(another.path("results/runs.parquet")).to_pylist()
    names = {"default", RUN, *(f"{RUN}_{variant}" for variant in ("norefine", "few", "more"))}
    assert {row["run"] for row in runs} >= names
    assert len({(row["run"], row["metric"]) for row in runs}) == len(runs)

    main = another.path("results/paper/main/tiny_r0.6.md").read_text()
    expected = another.evaluation(RUN)
    line = next(line for line in main.splitlines() if line.startswith("| aasvd |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == f"{expected['perplexity']['made-up']['compressed']:.2f}"
    assert cells[-2] == f"{100 * expected['average']['acc']['compressed']:.1f}"
    assert main.count("\n| aasvd |") == 1  # `default` is the same run under another name
    assert "made-up 6" in main and "piqa 4" in main  # windows and examples
    ablation = another.path("results/paper/ablation/tiny_r0.6.md").read_text()
    assert "| norefine | loss_aware | optimal | no |" in ablation
    assert "| default | loss_aware | optimal | yes |" in ablation and "| few |" not in ablation
    pruned = another.path("results/paper/pruning/tiny_r0.6.md").read_text()
    assert all(f"\n| {method} |" in pruned for method in ("aasvd", "wanda-sp", "shortgpt"))
    budget = another.path(f"results/paper/budget/tiny_{size:g}-0.0000001-1GB_32.md").read_text()
    assert "| 1e-07 | does not fit |" in budget and "| 1 | dense |" in budget and " yes |" in budget

    # What was written before the last run was published is written anew, and nothing else is done.
    # Of the finished runs, those through whose blocks nothing went are measured for the figure over depth.
    drawn = Counter(finished(another.make("--", *targets)))
    assert set(drawn) <= {
        *(
            "paper_table",
            "paper_budget",
            "figure_depth",
            "figure_calibration",
            "propagate",
            "layer_errors",
            "all",
        ),
    }
    assert (
        drawn["layer_errors"] == BLOCKS and drawn["propagate"] <= BLOCKS
    )  # ShortGPT's; the others have theirs
    legend = another.path("results/paper/depth/tiny_r0.6.svg").read_text()
    for label in ("aasvd (norefine)", "shortgpt"):
        assert legend.count(f"<!-- {label} -->") == 2, label  # in the legend and beside its perplexity
    assert "Nothing to be done" in another.make("--dry-run", "--", *targets)
    # A figure of one run is drawn anew where that run was published since.
    published = another.path(f"results/{RUN}_norefine/eval.json")
    published.write_text(published.read_text() + "\n")  # with the same bytes Snakemake takes it for the same
    assert another.planned(f"results/paper/{drawings[-1]}.png") == ["figure_layers"]
    another.make("--report", "report.html", "--", *targets)
    page = another.path("report.html").read_text()
    for expected_text in ("Paper", "table: main", "figure: distortion over depth", "table: memory budgets"):
        assert expected_text in page, expected_text


# --- DVC ---------------------------------------------------------------------------------------------------


def test_dvc_compares_two_committed_experiments(another: Copy) -> None:
    first = another.evaluation("default")
    text = another.must("dvc", "exp", "run", "-S", "compression.ratio=0.5")
    assert "Ran experiment" in text
    assert another.params()["compression"]["ratio"] == 0.5
    second = another.evaluation("default")
    assert second["ratio"]["target"] == 0.5
    assert second["parameters"]["compressed"] < first["parameters"]["compressed"]
    workflow_copy.commit(another, "Half")
    # Snakemake agrees that this is what params.yaml asks for.
    assert "Nothing to be done" in another.make("--dry-run")

    metrics = json.loads(another.must("dvc", "metrics", "diff", "HEAD~1", "--json"))
    changed = metrics["results/default/eval.json"]
    assert changed["ratio.target"] == {"old": 0.6, "new": 0.5, "diff": pytest.approx(-0.1)}
    difference = second["perplexity"]["made-up"]["compressed"] - first["perplexity"]["made-up"]["compressed"]
    assert changed["perplexity.made-up.compressed"]["diff"] == pytest.approx(difference)
    shown = another.must("dvc", "metrics", "show")
    assert "results/default/eval.json" in shown and "perplexity.made-up.compressed" in shown
    parameters = json.loads(another.must("dvc", "params", "diff", "HEAD~1", "--json"))
    assert parameters["params.yaml"] == {
        "compression.ratio": {"old": 0.6, "new": 0.5, "diff": pytest.approx(-0.1)}
    }
    for command in (["show"], ["diff", "HEAD~1"]):
        another.must("dvc", "plots", *command, "--out", "plots")
        page = another.path("plots/index.html").read_text()
        assert "blocks_json" in page and "cosine" in page
        assert list(another.path("plots").rglob("*.svg")), "the distortion figure"
