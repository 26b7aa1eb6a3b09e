import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from pages import cells

from aasvd import report

RESULT: dict[str, Any] = {
    "run": "mine_r0.6",
    "method": "aasvd",
    "objective": "a<b",
    "allocation": "optimal",
    "ratio": {"target": 0.6, "achieved": 0.59871},
    "parameters": {
        "dense": 1_234_567,
        "compressed": 765_432,
        "linears": {"dense": 1_000_000, "compressed": 598_710},
    },
    "perplexity": {"wikitext2": {"dense": 21.239, "compressed": 51.2, "windows": 24}},
    "accuracy": {
        "piqa": {"dense": 0.684, "compressed": 0.605, "stderr": 0.011, "stderr_dense": 0.0108, "count": 1838},
        "boolq": {"dense": 0.5, "compressed": None, "stderr": None, "stderr_dense": 0.02, "count": 100},
    },
    "average": {
        "tasks": 1,
        "of": 2,
        "acc": {"dense": 0.684, "compressed": 0.605, "drop": 0.079, "relative_drop": 0.1155},
    },
    "evaluation": {"window": 2048},
    "errors": {"accuracy boolq": {"compressed": "no <network>"}},
    "seconds": {"solve": 10.0, "refine": 32.4},
    "peak_memory_mb": 812.3,
}


CARD: dict[str, Any] = {
    "result": RESULT
    | {
        "model": "mine",
        "storage": "pivoted",
        "precision": "int8",
        "calibration": {"text": "wikitext2", "sequences": 48, "tokens": 512, "sampling": "random"},
        "refinement": {"epochs": 8, "steps": 40, "batch": 4, "optimizer": "muon", "learning_rate": 0.002},
        "post": {"epochs": 0},
        "bytes": {"dense": 2_000_000, "compressed": 700_000},
        "cache_bytes_per_token": {"ordinary": 2048, "latents": 1536, "reason": ""},
    },
    "base": {"hub": "org/name", "revision": "main"},
    "shapes": {
        "model.layers.0.q": [8, 6],
        "model.layers.0.up": [9, 6],
        "model.layers.1.q": [8, 6],
        "model.layers.1.up": [9, 6],
        "model.layers.1.gate": [2, 1],
    },
    "ranks": {"model.layers.0.q": 3, "model.layers.1.q": 3, "model.layers.0.up": 2},
    "kept": {},
    "path": "model.layers",
}


def test_model_card_says_what_it_is() -> None:
    card = report.model_card(**CARD)
    # The hub shows a model under the one that it was made from.
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: org/name\npipeline_tag: text-")
    for line in (
        "| perplexity wikitext2 (24 windows of 2048) | 21.24 | 51.20 |",
        "| bytes of weights | 2,000,000 | 700,000 |",
        "| q | 8 x 6 | 3 | 2 |",
        "| up | 9 x 6 | 2, 1 dense | 2 |",
        "| gate | 2 x 1 | dense | 1 |",
    ):
        assert line in card.splitlines()
    assert "mine (hub org/name, revision main)" in card
    said = (
        "Compressed by aasvd: objective a<b, allocation optimal, storage pivoted, precision int8; kept 0.5987"
    )
    assert said in " ".join(card.split())
    # Only a model on the hub can be named there.
    elsewhere = report.model_card(**{**CARD, "base": {"path": "/models/mine"}})
    assert elsewhere.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "mine (path /models/mine)" in elsewhere


def test_model_card_says_how_the_model_was_made() -> None:
    text = " ".join(report.model_card(**CARD).split())
    assert "Calibrated on 48 random windows of 512 tokens of wikitext2." in text
    assert "muon, rate 0.002, 8 epochs, at most 40 steps a block, 4 sequences a step." in text
    changed = {"refinement": {"epochs": 0}, "post": {"epochs": 3, "rank": 8}}
    other = " ".join(report.model_card(**{**CARD, "result": CARD["result"] | changed}).split())
    assert (
        "Blocks are as they were solved. Then all factors were updated by LoRA of rank 8: 3 epochs" in other
    )


def folded(card: str) -> list[list[str]]:
    """Return the cells of the table that a card shows when it is asked to."""
    _, _, inside = card.partition("<details>\n<summary>Of every block</summary>\n\n")
    table, end, _ = inside.partition("\n\n</details>\n")
    assert end
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_model_card_holds_the_rank_of_every_linear_of_every_block() -> None:
    assert folded(report.model_card(**CARD)) == [
        ["block", "q", "up", "gate"],
        ["---", "---", "---", "---"],
        ["0", "3", "2", "–"],
        ["1", "3", "dense", "dense"],
    ]
    # Of many blocks, in the order of their numbers and not of their names, one short line each.
    shapes = {f"h.{block}.mlp.{kind}": [4, 4] for block in sorted(map(str, range(80))) for kind in ("a", "b")}
    ranks = {f"h.{block}.mlp.a": block % 3 + 1 for block in range(80)}
    card = report.model_card(**{**CARD, "shapes": shapes, "ranks": ranks, "path": "h"})
    assert "| mlp.a | 4 x 4 | 1 to 3 | 80 |" in card and "| mlp.b | 4 x 4 | dense | 80 |" in card
    expected = [[str(block), str(block % 3 + 1), "dense"] for block in range(80)]
    assert folded(card) == [["block", "mlp.a", "mlp.b"], ["---"] * 3, *expected]


def test_model_card_says_what_a_cache_takes() -> None:
    assert "takes 2,048 bytes in the ordinary cache" in report.model_card(**CARD)
    assert "takes 1,536 and more time" in report.model_card(**CARD)
    for ordinary in (64, None):
        counts = {"ordinary": ordinary, "latents": None, "reason": "nothing to save"}
        card = report.model_card(**{**CARD, "result": CARD["result"] | {"cache_bytes_per_token": counts}})
        assert "No cache of latents: nothing to save." in card
        assert ("takes 64 bytes" in card) == (ordinary is not None)


def test_model_card_holds_nothing_that_changes_between_runs() -> None:
    slower = CARD["result"] | {"seconds": {"solve": 99.0}, "peak_memory_mb": 1.0}
    assert report.model_card(**CARD) == report.model_card(**{**CARD, "result": slower})


def test_model_card_says_what_stays_of_a_pruned_model() -> None:
    kept = {"model.layers.0.q": [0, 0], "model.layers.1.q": [4, 6], "model.layers.0.up": [5, 6]}
    card = report.model_card(**{**CARD, "ranks": {}, "kept": kept})
    for line in (
        "tags: [aasvd, pruned]",
        "## What stays",
        "| linear | shape | numbers that stay | blocks |",
        "| q | 8 x 6 | 0 to 24 | 2 |",
        "| up | 9 x 6 | 30, 1 dense | 2 |",
    ):
        assert line in card.splitlines()


EXPECTED = [
    ["perplexity wikitext2 (24 windows of 2048)", "21.24", "51.20"],
    ["accuracy piqa (1838 examples)", "68.4 ± 1.1 %", "60.5 ± 1.1 %"],
    ["accuracy boolq (100 examples)", "50.0 ± 2.0 %", "failed"],
    ["accuracy, average over 1 of 2 tasks", "68.4 %", "60.5 % (drop 7.9)"],
    ["parameters", "1,234,567", "765,432"],
    ["of these in the blocks' linears", "1,000,000", "598,710"],
]


def test_terminal_table_shows_dense_beside_compressed() -> None:
    lines = report.summary(RESULT, model="results/mine_r0.6/model").splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines[2:8]] == EXPECTED
    assert lines[0].split() == ["mine_r0.6", "dense", "compressed"]
    assert "0.5987" in lines[8] and "asked: 0.6" in lines[8] and "42 s" in lines[8] and "812 MB" in lines[8]
    assert lines[9] == "accuracy boolq failed (compressed): no <network>"
    assert lines[10].endswith("results/mine_r0.6/model")


def test_page_holds_the_same_table_and_escapes_names(tmp_path: Path) -> None:
    report.write_table(RESULT, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert cells(page) == [["", "dense", "compressed"], *EXPECTED]
    assert "a&lt;b" in page and "a<b" not in page
    assert "no &lt;network&gt;" in page


def test_module_prints_finished_runs(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(RESULT))
    command = [sys.executable, "-m", "aasvd.report", tmp_path / "eval.json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == report.summary(RESULT, model=str(tmp_path / "model")) + "\n"


def _figure(tmp_path: Path, records: list[dict[str, Any]], name: str = "figure.svg") -> str:
    report.write_distortion(iter(records), output=tmp_path / name, run="mine_r0.6")
    return (tmp_path / name).read_text()


SOLVED = {"before": {"mse": 0.5, "cosine": 0.1}}
DONE = {"after": {"mse": 0.2, "cosine": 0.05}}


def test_figure_draws_each_block_before_and_after(tmp_path: Path) -> None:
    svg = _figure(tmp_path, [{"stage": "fetch"}, SOLVED, DONE, SOLVED, DONE, SOLVED, DONE])
    drawn = ElementTree.fromstring(svg)
    for colour in (report.BLUE, report.VERMILION):
        # One marker per block in each of two panels, and one in each legend.
        markers = [
            node for node in drawn.iter() if node.tag.endswith("use") and colour.lower() in str(node.attrib)
        ]
        assert len(markers) == 2 * (3 + 1), colour


@pytest.mark.parametrize("refined", [True, False])
def test_figure_is_the_same_bytes_for_the_same_numbers(tmp_path: Path, refined: bool) -> None:
    records = [SOLVED, DONE, DONE] if refined else [DONE, DONE]
    assert _figure(tmp_path, records) == _figure(tmp_path, records, "again.svg")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.svg", "figure.svg"]
