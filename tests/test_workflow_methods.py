"""Methods as compositions, with real Snakemake on a tiny model: what each makes, shares and reports."""

import json
import math
from collections import Counter

import pyarrow.parquet as pq
import pytest
from workflow_copy import BLOCKS, COMPRESSION, ORIGINALS, WIDTH, Copy, finished, tensors

pytestmark = pytest.mark.slow

SHORT = {"epochs": 2, "batch": 2, "learning_rate": 40.0, "beta": 10.0, "penalty": 200.0}


def test_methods_on_original_inputs_cost_no_pass(another: Copy) -> None:
    """Another ratio, and other such methods, read what the first run captured; only measuring has passes."""
    another.change(evaluation={"tasks": []})
    alone = (COMPRESSION - {"refine_block", "propagate"}) | {"perplexity", "publish"}
    # Gradients, which the finished run made for its default objective, serve other ratios.
    names = ["r0.6_svd-llm-w", "r0.4_svd-llm-w", "r0.6_svd", "r0.6_norefine", "r0.5_norefine"]
    ran = Counter(finished(another.make("--", *(f"results/tiny_{name}/eval.json" for name in names))))
    assert set(ran) == alone
    assert ran["solve_block"] == BLOCKS * len(names)
    assert ran["perplexity"] == len(names)
    # Other statistics and measures are made when a method asks for them, once.
    names = ["r0.6_fwsvd", "r0.4_fwsvd", "r0.6_svd-llm-v2"]
    ran = Counter(finished(another.make("--", *(f"results/tiny_{name}/eval.json" for name in names))))
    assert set(ran) == alone | {"differentiate_weights", "measure_block"}
    assert ran["differentiate_weights"] == ran["measure_block"] == BLOCKS
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
    ran = finished(another.make("--", "results/compare/tiny_r0.6.html"))
    # One run after the other: who stops a comparison early has whole rows.
    ends = [place for place, rule in enumerate(ran) if rule == "publish"]
    solved = [ran[:end].count("solve_block") for end in ends]
    assert solved == [BLOCKS * (number + 1) for number in range(len(methods))]
    table = pq.read_table(another.path("results/compare/tiny_r0.6.parquet")).to_pylist()
    measured = {row["method"]: row for row in table if row["source"] == "measured"}
    assert set(measured) == {"dense", *methods}
    for method, row in measured.items():
        assert math.isfinite(row["perplexity made-up"])
        if method != "dense":
            # One rank of the tiny model's smallest linear is 0.2 % of all linears.
            assert 0.598 < row["kept_linears"] <= 0.6
    # What ASVD costs is what its stages say, the dense model's conversion and evaluation left out.
    keys = another.evaluation("tiny_r0.6_asvd_norefine")["provenance"]["keys"]
    made = [
        json.loads(file.read_text())
        for pattern in (
            f"original/tiny/{keys['calibration']}/embed.json",
            f"original/tiny/{keys['calibration']}/block_*/capture.json",
            f"compressed/tiny/{keys['calibration']}/{keys['compression']}/**/*.json",
        )
        for file in another.folder.glob(f"results/artifacts/{pattern}")
    ]
    stages = [record for record in made if "peak_memory_mb" in record]
    assert len(stages) == 1 + BLOCKS + 1 + BLOCKS + 1  # embed, capture, allocate, solve, assemble
    for name in ("peak_memory_mb", "added_memory_mb", "peak_device_memory_mb"):
        assert measured["asvd"][name] == max(record[name] for record in stages)
    assert measured["asvd"]["seconds"] == pytest.approx(sum(record["seconds"] for record in stages))
    reported = [row for row in table if row["source"].startswith("reported: ")]
    assert {row["ratio"] for row in reported} == {0.6, 1.0}
    for name in ("html", "md", "tex"):
        text = another.path(f"results/compare/tiny_r0.6.{name}").read_text()
        assert "saes-svd" in text and "SAES-SVD" in text
    # Another table by its name: ten rules of allocation at the same objective and budget.
    plan = Counter(another.planned("results/compare/allocations/tiny_r0.6.html"))
    assert (plan["compare"], plan["publish"], plan["allocate"]) == (1, 10, 10)
    drawing = another.path("results/compare/tiny_r0.6.svg").read_text().partition("<svg")[2]
    assert drawing in another.path("results/compare/tiny_r0.6.html").read_text()

    # Made anew where a method goes, or what others report changes, and not else.
    page = "results/compare/tiny_r0.6.html"
    assert another.planned(page) == []
    another.change(comparison={"methods": methods[1:]})
    assert finished(another.make("--", page)) == ["compare"]
    assert "asvd" not in {
        row["method"] for row in pq.read_table(another.path(page).with_suffix(".parquet")).to_pylist()
    }
    assert another.planned(page) == []
    reported = another.path("workflow/published.json")
    reported.write_text(reported.read_text().replace("20061", "20062"))
    assert another.planned(page) == ["compare"]


def test_pruning_methods_are_methods_as_all_others(another: Copy) -> None:
    """In one table, from the same originals; the search of BlockPruner is made once for all ratios."""
    methods = ["shortgpt", "blockpruner", "wanda-sp"]
    another.change(evaluation={"tasks": []}, comparison={"methods": methods, "variants": ["", "optimal"]})
    ran = Counter(finished(another.make("--", "results/compare/tiny_r0.6.html")))
    assert ran["order_branches"] == 1
    assert ran["measure_block"] == BLOCKS  # ShortGPT's influence of blocks
    assert ran["propagate"] == BLOCKS  # only Wanda-sp looks at what the blocks before one became
    assert not set(ran) & ORIGINALS
    table = pq.read_table(another.path("results/compare/tiny_r0.6.parquet")).to_pylist()
    rows = {row["method"]: row for row in table if row["source"] == "measured"}
    page = another.path("results/compare/tiny_r0.6.html").read_text()
    for method in methods:
        assert f"Left out: {method} optimal: compression.objective" in page
        assert math.isfinite(rows[method]["perplexity made-up"])
        assert rows[method]["kept_linears"] <= 0.6
        result = another.evaluation(f"tiny_r0.6_{method}")
        assert result["storage"] == "pruned"
        assert result["bytes"]["compressed"] < result["bytes"]["dense"]
        cache = result["cache_bytes_per_token"]
        assert cache["ordinary"] > 0 and cache["latents"] is None and "no rank is below" in cache["reason"]
    assert rows["shortgpt"]["kept_linears"] == pytest.approx(1 / 3)
    # Less than one neuron below: three vectors in each block.
    weights = result["parameters"]["linears"]["dense"] / BLOCKS
    assert rows["wanda-sp"]["kept_linears"] > 0.6 - 3 * WIDTH / weights
    assert "order branches" in another.evaluation("tiny_r0.6_blockpruner")["seconds"]
    card = another.path("results/tiny_r0.6_shortgpt/model/README.md").read_text()
    assert "numbers that stay" in card and "tags: [aasvd, pruned]" in card
    plan = another.planned("results/tiny_r0.8_blockpruner_refine/eval.json")
    assert "refine_block" in plan and "order_branches" not in plan
