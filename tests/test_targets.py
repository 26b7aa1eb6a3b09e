import re
from pathlib import Path

import pytest
from shipped import ROOT, Config

from aasvd import targets

WILDCARDS = {
    "run": "llama7b_r0.6_norefine",
    "model": "llama7b",
    "names": "llama7b",
    "ratio": "0.6",
    "ratios": "0.8-0.6",
    "gigabytes": "10-8.5",
    "context": "2048",
    "comparison": "allocations/llama7b_r0.8-0.6",
}


def outputs(file: str) -> set[str]:
    """Return what the rules of a file make under results/, as their outputs are written there."""
    text = (ROOT / "workflow" / "rules" / file).read_text()
    return {
        name
        for section in re.findall(r"^    output:\n(.*?)^    \w", text, re.MULTILINE | re.DOTALL)
        for name in re.findall(r'[^f]"(results/[^"]+)"', section)
    }


def test_everything_that_a_rule_makes_can_be_asked_for(config: Config) -> None:
    found = [name for file in ("results.smk", "paper.smk", "compare.smk") for name in outputs(file)]
    assert len(found) > 20
    words = [
        name.format(**WILDCARDS, table=table)
        for name in found
        for table in (targets.TABLES if "{table}" in name else [""])
    ]
    targets.check(config, words)
    # And nothing is in the table that no rule makes.
    kinds = {Path(word).parts[2] for word in words if word.startswith("results/paper/")}
    assert kinds == set(targets.PAPER)
    assert {word.partition("/llama7b_r0.6_norefine/")[2] for word in words} - {""} == set(targets.PUBLISHED)
    for kind, form in {**targets.PAPER, "compare": targets.COMPARED}.items():
        made = {Path(word).suffix[1:] for word in words if f"/{kind}/" in word}
        assert made == set(form.endings), kind


@pytest.mark.parametrize(
    "words",
    [
        "--cores 2 --config seed=1 all compress -n",
        "results results/runs.parquet results/bench.json results/smollm2-135m_r0.6.txt",
        "results/artifacts results/artifacts/nothing/at/all results/downloads/x.whl",
        "./results/llama7b_r0.6/eval.json results/default/eval.json results/default/model/",
        "results/paper/models/llama7b+llama3-1b_r0.8.html results/paper/layers/default.png",
        "results/paper/budget/llama7b_.5GB_1.md elsewhere/paper/none.html",
    ],
)
def test_what_is_right_or_no_target_passes(config: Config, words: str) -> None:
    targets.check(config, words.split())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("compare", r"compare/ must have the form results/compare/\[<table>/\]<model>_r<ratio>\[-<ratio>"),
        ("compare/llama7b_r0.6", r"_r0\.6 must have the form .*\.html \(or \.md, \.tex, \.parquet, \.json, "),
        ("compare/llama7b_r0.6.pdf", r"\.pdf must have the form .*\.html \(or \.md"),
        ("compare/llama7b_r0.8-abc.html", r"'llama7b_r0\.8-abc' must have the form \[<table>/\]<model>_r<r"),
        ("compare/llama7b_r0.8-.html", r"'llama7b_r0\.8-' must have the form"),
        ("compare/llama7b.html", r"'llama7b' must have the form"),
        ("compare/a/b/llama7b_r0.8.html", r"'a/b/llama7b_r0\.8' must have the form"),
        ("compare/ranks/llama7b_r0.8.html", r"unknown comparison 'ranks'; params\.yaml has allocations, "),
        ("compare/nobody_r0.8.html", r"unknown model 'nobody'; params\.yaml has"),
        ("compare/llama7b_r0.8-1.5.html", r"ratio 1\.5 must lie between 0 and 1"),
        ("paper", r"results/paper/ has no ''; there are main, pruning, breakdown, models, ablation, budget"),
        ("paper/mian/llama7b_r0.8.html", r"results/paper/ has no 'mian'; there are main, .*, layers"),
        ("paper/main", r"paper/main/ must have the form results/paper/main/<model>_r<ratio>\[-<ratio>"),
        ("paper/main/llama7b_r0.8.png", r"must have the form .*\]\.html \(or \.md, \.tex\)$"),
        ("paper/main/llama7b_0.8.html", r"must have the form results/paper/main/<model>_r<ratio>"),
        ("paper/main/llama7b_r0.8-.html", r"must have the form results/paper/main/<model>_r<ratio>"),
        ("paper/main/llama7b_r0.8_svd.html", r"must have the form results/paper/main/<model>_r<ratio>"),
        ("paper/main/llama7b+llama3-1b_r0.8.html", r"must have the form results/paper/main/<model>_r<ratio>"),
        ("paper/main/llama7b_r0.8-1.0.html", r"ratio 1\.0 must lie between 0 and 1"),
        ("paper/main/nobody_r0.8.html", r"unknown model 'nobody'"),
        ("paper/models/llama7b+nobody_r0.8.html", r"unknown model 'nobody'"),
        ("paper/models/llama7b_r0.8.1.html", r"ratio 0\.8\.1 must lie between 0 and 1"),
        ("paper/budget/llama7b_10.html", r"form results/paper/budget/<model>_<GB>\[-<GB>\.\.\.\]GB_<tokens>"),
        ("paper/budget/nobody_10GB_2048.html", r"unknown model 'nobody'"),
        ("paper/budget/llama7b_1.2.3GB_2048.html", r"must have the form"),
        ("paper/depth/llama7b_r0.6.html", r"must have the form .*/<model>_r<ratio>\.png \(or \.svg\)"),
        ("paper/depth/llama7b_r0.8-0.6.png", r"must have the form .*/<model>_r<ratio>\.png \(or \.svg\)"),
        ("paper/calibration/llama7b_r0.png", r"ratio 0 must lie between 0 and 1"),
        ("paper/layers/llama7b.png", r"run 'llama7b' must have the form <model>_r<ratio>"),
        ("paper/layers/llama7b_r0.6_none.png", r"unknown method or variant 'none'"),
        ("llama7b_r0.6", r"no rule makes results/llama7b_r0\.6: ask for results/llama7b_r0\.6/eval\.json"),
        ("llama7b_r0.6/", r"no rule makes results/llama7b_r0\.6/: ask for results/llama7b_r0\.6/eval\.json"),
        ("default", r"no rule makes results/default: ask for results/default/eval\.json"),
        ("llama7b", r"run 'llama7b' must have the form <model>_r<ratio>"),
        ("nobody_r0.6", r"unknown model 'nobody'"),
        ("nobody_r0.6/eval.json", r"unknown model 'nobody'"),
        ("llama7b_r0.6/evals.json", r"no rule makes .*s\.json: ask for results/llama7b_r0\.6/eval\.json"),
        ("llama7b_r0.6/model/config.json", r"no rule makes .*: ask for results/llama7b_r0\.6/eval\.json"),
        ("llama7b/eval.json", r"run 'llama7b' must have the form <model>_r<ratio>"),
    ],
)  # fmt: skip
def test_a_mistaken_target_is_one_line(config: Config, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        targets.check(config, ["--cores", "1", f"results/{word}"])
    assert "\n" not in str(raised.value)
