"""The whole pipeline with real Snakemake, DVC and git, on a tiny model and without a network."""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import workflow_copy
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workflow_copy import (
    BLOCKS,
    COMPRESSION,
    MEASURES,
    NO_TASKS,
    ROOT,
    RUN,
    Copy,
    artifacts,
    finished,
    jobs,
    tensors,
)

from aasvd import layout
from aasvd.artifacts import remake_command

pytestmark = pytest.mark.slow


def numbers(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what a run measured, without when and with what."""
    left_out = ("seconds", "peak_memory_mb", "added_memory_mb", "peak_device_memory_mb")
    kept = {name: value for name, value in evaluation.items() if name not in left_out}
    return kept | {"provenance": evaluation["provenance"]["keys"]}


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


def test_a_run_is_made_anew_from_another_model(another: Copy) -> None:
    """The run is there already, so that nothing but its model's key tells that it is another's."""
    before = another.evaluation()["provenance"]["keys"]
    tiny = another.params()["models"]["tiny"]
    another.change(models={"tiny": {**tiny, "dtype": "bfloat16"}}, evaluation={"tasks": []})
    ran = Counter(finished(another.make()))
    assert ran["fetch_model"] == ran["publish"] == 1 and ran["solve_block"] == BLOCKS
    after = another.evaluation()["provenance"]["keys"]
    assert all(before[name] != after[name] for name in ("model", "calibration", "compression"))
    assert "Nothing to be done" in another.make("--dry-run")
    assert "up to date" in another.must("dvc", "status")


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
    assert _stages_run(first) == [*layout.PHASES, f"publish@{RUN}"]
    assert tensors(copy) == tensors(finished_copy)
    assert _stages_run(copy.must("dvc", "repro")) == []
    assert "Nothing to be done" in copy.make("--dry-run")
    copy.change(evaluation={"windows": 3})
    changed = copy.must("dvc", "repro")
    assert _stages_run(changed) == ["evaluate", f"publish@{RUN}"]
    assert Counter(finished(changed)) == {"perplexity": 2, "evaluate": 1, "publish": 1}
    assert copy.evaluation()["perplexity"]["made-up"]["windows"] == 3
    assert "up to date" in copy.must("dvc", "status")
    # Back: every artifact is there already, but what people look at has to follow.
    copy.change(evaluation={"windows": 6})
    changed = copy.must("dvc", "repro")
    assert _stages_run(changed) == ["evaluate", f"publish@{RUN}"]
    assert finished(changed) == ["publish"]
    assert copy.evaluation()["perplexity"]["made-up"]["windows"] == 6
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
        (["results/tiny_r0.6"], r"no rule makes results/tiny_r0\.6: ask for results/tiny_r0\.6/eval\.json"),
        (["results/tiny_r0.6/evals.json"], r"no rule makes .*: ask for results/tiny_r0\.6/eval\.json"),
        (
            ["results/compare/tiny_r0.8-abc.html"],
            r"'tiny_r0\.8-abc' must have the form \[<table>/\]<model>_r<r",
        ),
        (["results/compare/tiny_r0.8.pdf"], r"\.pdf must have the form .*\.html \(or \.md, \.tex, \.parquet"),
        (["results/paper/mian/tiny_r0.8.html"], r"has no 'mian'; there are main, pruning, .*, layers"),
        (["results/paper/depth/tiny_r0.8.html"], r"must have the form .*/<model>_r<ratio>\.png \(or \.svg\)"),
        (["results/paper/main/tiny_r0.8-1.html"], r"ratio 1 must lie between 0 and 1"),
        (["--configfile", "wrong.yaml"], r"calibration\.sequences: 'many' is not of type 'integer'"),
        (
            ["--config", "evaluation={suite: paper", "results/tiny_r0.6/eval.json"],
            r"evaluation: '\{suite: paper' is not of type 'object'; there are suite, texts,",
        ),
        (
            ["--configfile", "params.yaml", "results/nobody_r0.6/eval.json"],
            r"unknown model 'nobody'; params\.yaml has .*tiny",
        ),
        (["--config", "data_dir=/nothere"], r"data_dir: '/nothere' is no folder"),
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


@pytest.mark.parametrize(
    "artifact",
    [
        "sources/models/tiny/0000000000/source.json",
        "sources/texts/made-up/0000000000/test.parquet",
        "sources/tasks/piqa/0000000000/rows.parquet",
        "evaluation/tiny/dense/0000000000/{}",
    ],
)
def test_nothing_is_kept_under_a_key_that_it_was_not_made_from(finished_copy: Copy, artifact: str) -> None:
    measurement = finished_copy.find("evaluation/tiny/dense/*/perplexity_*.json").name
    done = finished_copy.snakemake("--dry-run", f"results/artifacts/{artifact.format(measurement)}")
    assert done.code == 1, done.text
    assert re.search(r"lies in results/\S+/0000000000, its key is .* made with other parameters", done.text)


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
    # A text that is too short fails alone; a mistyped task has no result.
    assert another.evaluation("tiny_r0.6_window")["errors"]
    assert not another.path("results/tiny_r0.6_task/eval.json").exists()
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


def test_a_cluster_job_is_given_its_gpu_once() -> None:
    """SLURM's plugin refuses a job with both `gpu` and `gres`."""
    on_gpu = {name for name, lines in rules() if "        gpu=1," in lines}
    assert {"capture_block", "solve_block", "refine_block", "perplexity", "memory"} <= on_gpu
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "profile.yaml").read_text())
    everywhere = profile["default-resources"]
    own = profile.get("set-resources", {})
    assert not [name for name in on_gpu if "gres" in {**everywhere, **own.get(name, {})}]


def test_lint_finds_nothing_serious(finished_copy: Copy) -> None:
    text = finished_copy.run("snakemake", "--lint").text
    findings = re.findall(r"^ +\* (.*)", text, re.MULTILINE)
    # Input functions stay beside the only rules that use them (style 2.3: common.smk is short).
    assert set(findings) <= {"Mixed rules and functions in same snakefile.:"}, text


def test_report_has_the_table_and_the_figure(another: Copy) -> None:
    # Of finished runs: one that is listed and was never made leaves the others in it.
    another.change(runs=[RUN, f"{RUN}_norefine"])
    another.make("--report", "report.html")
    page = another.path("report.html").read_text()
    for expected in ("Results", "Blocks", "distortion", "perplexity and accuracy", RUN):
        assert expected in page
    assert json.loads(json.dumps(page.count("results.html"))) > 0
