import sys

import pytest

from aasvd import command


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--cores 1 --resources gpu=1 results/x/eval.json",
            "results/x/eval.json --cores 1 --resources gpu=1",
        ),
        ("--res gpu=1 mem=2 a b", "a b --res gpu=1 mem=2"),
        ("a --resources gpu=1 b --cores 2 c", "b a --resources gpu=1 --cores 2 c"),
        ("--resources gpu=1 -n a", "--resources gpu=1 -n a"),
        ("--resources=gpu=1 a", "--resources=gpu=1 a"),
        ("--set-resources rule:gpu=1 a=b", "--set-resources rule:gpu=1 a=b"),
        ("--config seed=1 --cores 1 a", "--config seed=1 --cores 1 a"),
        ("", ""),
    ],
)
def test_only_targets_after_resources_move(line: str, expected: str) -> None:
    assert command.targets_first(line.split()) == expected.split()


def test_snakemake_gets_the_reordered_words(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr("snakemake.cli.main", got.append)
    monkeypatch.setattr(sys, "argv", ["snakemake", "--resources", "gpu=1", "a"])
    command.main()
    assert got == [["a", "--resources", "gpu=1"]]
