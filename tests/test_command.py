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
        ("-n --config a={b:c} results/x/eval.json", "results/x/eval.json -n --config a={b:c}"),
        ("-C a=1 b=2 compress --cores 1", "compress -C a=1 b=2 --cores 1"),
        ("--config=a=1 b", "--config=a=1 b"),
        ("--configfile more.yaml results/x/eval.json -n", "results/x/eval.json --configfile more.yaml -n"),
        (
            "--configfiles a.yaml b results/c.yaml results/x",
            "results/x --configfiles a.yaml b results/c.yaml",
        ),
        ("--configfile a.yaml -- results/x", "--configfile a.yaml -- results/x"),
        ("--config a=1 --configfile b.yaml results/x", "results/x --config a=1 --configfile b.yaml"),
        ("", ""),
    ],
)
def test_only_targets_after_greedy_options_move(line: str, expected: str) -> None:
    assert command.targets_first(line.split()) == expected.split()


def test_snakemake_gets_the_reordered_words(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr("snakemake.cli.main", got.append)
    monkeypatch.setattr(sys, "argv", ["snakemake", "--resources", "gpu=1", "a"])
    command.main()
    assert got == [["a", "--resources", "gpu=1"]]
