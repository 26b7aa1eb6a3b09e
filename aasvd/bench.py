"""Measure the pipeline on this machine: `make bench`, or `python -m aasvd.bench NAME ...` for some of it.

Each benchmark runs real Snakemake in a folder of its own, so that nothing is reused but fetched sources.
The work is that of the comparison with the official AA-SVD code: SmolLM2-135M, ratio 0.6, 32 sequences of
512 tokens in order. Times are worth comparing within one run only.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from aasvd import blocks, evaluate, layout, params, refine
from aasvd.device import compute_dtype

REPOSITORY = Path(__file__).parent.parent
# Nothing is fetched twice.
DOWNLOADS, SOURCES = "results/downloads", "results/artifacts/sources"
PEER = REPOSITORY.parent / "shared" / "data" / "peer"
CALIBRATION: dict[str, Any] = {"sequences": 32, "tokens": 512, "sampling": "sequential"}
BENCHMARKS: dict[str, dict[str, Any]] = {
    "default": {},
    # The same at the ranks of the official code: U and V, the same ratio for every matrix.
    "tuned": {
        "compression": {"objective": "input_aware", "allocation": "uniform", "storage": "factors"},
    },
    "paper": {
        "compression": {
            "objective": "anchored",
            "ridge": 0.0,
            "allocation": "uniform",
            "storage": "factors",
        },
        "refinement": {
            "epochs": 25,
            "steps": 0,
            "batch": 8,
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "shuffle": False,
            "loss": "mse",
        },
    },
    "norefine": {
        "compression": {
            "objective": "anchored",
            "ridge": 0.0,
            "allocation": "uniform",
            "storage": "factors",
        },
        "refinement": {"epochs": 0},
    },
}


def matrix_gflops(dtype: torch.dtype, *, size: int = 2048, repeats: int = 10) -> float:
    """Return the speed of a large square matrix product on this machine's CPU, in GFLOP/s."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def run_workflow(folder: Path, config: Mapping[str, Any], targets: list[str]) -> float:
    """Run Snakemake on targets in a folder with a configuration, and return its seconds.

    Raises:
        subprocess.CalledProcessError: If Snakemake fails.
    """
    (folder / "params.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    command = ["snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "2", *targets]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return time.perf_counter() - start


@contextlib.contextmanager
def workspace(*shared: str) -> Iterator[Path]:
    """Yield an empty folder to run the workflow in, which shares nothing but these folders."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "results" / "artifacts").mkdir(parents=True)
        for name in shared:
            (REPOSITORY / name).mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(REPOSITORY / name)
        yield folder


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all stages in a folder, in the order in which they finished."""
    files = [
        *folder.glob("results/artifacts/original/**/*.json"),
        *folder.glob("results/artifacts/compressed/**/*.json"),
    ]
    found = {file: json.loads(file.read_text()) for file in files if "/model/" not in str(file)}
    stages = {file: record for file, record in found.items() if "stage" in record}
    return [
        stages[file] | {"finished": file.stat().st_mtime}
        for file in sorted(stages, key=lambda f: f.stat().st_mtime)
    ]


def fixed_cost(repository_config: Mapping[str, Any]) -> dict[str, float]:
    """Return what a stage job costs beside its work: median seconds from job to job on a model of no size.

    Everything counts: scheduling, start, building the model without weights, reading and writing artifacts.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=12, **shape))
        model.save_pretrained(folder / "model")
        words = {f"w{index}": index for index in range(64)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
        (folder / "text.txt").write_text(" ".join(f"w{index % 64}" for index in range(4096)))
        config = params.merged(
            repository_config,
            {
                "models": {"tiny": {"path": str(folder / "model")}},
                "texts": {"words": {"path": str(folder / "text.txt")}},
                "runs": ["tiny_r0.6"],
                "calibration": {"text": "words", "sequences": 4, "tokens": 16},
                "refinement": {"epochs": 1},
                "evaluation": {"texts": ["words"], "tasks": []},
            },
        )
        run_workflow(folder, config, ["compress"])
        times = [record["finished"] for record in records(folder) if "block" in record["stage"]]
        gaps = [after - before for before, after in itertools.pairwise(times)]
    return {"median": statistics.median(gaps), "largest": max(gaps), "jobs": float(len(times))}


def forward_share(folder: Path, *, dtype: torch.dtype, window: int = 2048, repeats: int = 3) -> float:
    """Return the speed of perplexity relative to that of the model's plain forward passes, logits included.

    Both take the same window; processor time, of which other programs' load is no part, and the best of
    some repeats.
    """
    model: Any = blocks.open_model(folder, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, window), generator=generator)

    def seconds(function: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats + 1):  # the first is slower
            start = time.process_time()
            function()
            taken.append(time.process_time() - start)
        return min(taken)

    with torch.inference_mode():
        plain = seconds(lambda: model(ids, use_cache=False).logits)
    return plain / seconds(lambda: evaluate.perplexity(model, ids, progress="window"))


def benchmark(repository_config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Run one benchmark and return seconds per stage, GFLOP/s of refinement, memory and perplexity.

    Without the text of that comparison the calibration text of params.yaml is taken, and says so.
    """
    run = "smollm2-135m_r0.6"
    overrides: dict[str, Any] = {
        "runs": [run],
        "calibration": CALIBRATION,
        "evaluation": {"texts": [], "tasks": [], "windows": 24},
    }
    if PEER.is_dir():
        overrides["texts"] = {"peer": {"path": str(PEER)}}
        overrides["calibration"] = {**CALIBRATION, "text": "peer"}
        overrides["evaluation"]["texts"] = ["peer"]
    config = params.merged(params.merged(repository_config, overrides), BENCHMARKS[name])
    text = config["calibration"]["text"]
    if not PEER.is_dir():
        sys.stdout.write(f"{name}: {PEER} is no folder; calibrates on {text} and measures no perplexity\n")
    with workspace(DOWNLOADS, SOURCES) as folder:
        run_workflow(folder, config, ["fetch"])
        total = run_workflow(folder, config, ["compress"])
        found = records(folder)
        run_workflow(folder, config, [f"results/{run}/eval.json"])
        result = json.loads((folder / "results" / run / "eval.json").read_text())
    stages: dict[str, list[float]] = {}
    for record in found:
        stages.setdefault(record["stage"].split(" block", 1)[0], []).append(record["seconds"])
    sequences = refine.Recipe(**config["refinement"]).visits(CALIBRATION["sequences"])
    work = 6 * result["parameters"]["linears"]["compressed"] * sequences * CALIBRATION["tokens"]
    return {
        "text": text,
        "seconds": total,
        "stages": {
            stage: {"jobs": len(seconds), "median": statistics.median(seconds), "total": sum(seconds)}
            for stage, seconds in stages.items()
        },
        "refinement_gflops": work / sum(stages["refine"]) / 1e9 if work else None,
        "peak_memory_mb": max(record["peak_memory_mb"] for record in found),
        "perplexity": result["perplexity"],
        "ratio": result["ratio"],
    }


def dense_model(repository_config: Mapping[str, Any]) -> Path:
    """Return the folder of the dense SmolLM2-135M, fetched where it is not there yet."""
    with workspace(DOWNLOADS, SOURCES) as folder:
        source = layout.model_folder(repository_config, "smollm2-135m") / "source.json"
        run_workflow(folder, repository_config, [str(source)])
    return REPOSITORY / source.parent / "dense"


def memory(repository_config: Mapping[str, Any], dense: Path) -> dict[str, dict[str, float]]:
    """Return every stage's peak memory in MB at two numbers of sequences.

    On a model of the first two blocks: stages are called block by block, so more blocks take more time but
    no more memory, except where the whole model is measured. Gradients are taken on all sequences.
    """
    peaks: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        model = AutoModelForCausalLM.from_pretrained(dense, num_hidden_layers=2, trust_remote_code=False)
        model.save_pretrained(name)
        blocks.open_tokenizer(dense).save_pretrained(name)
        runs = [f"short_r0.6{variant}" for variant in ("", "_anchored")]
        for sequences in (32, 128):
            overrides = {
                "models": {"short": {"path": name}},
                "runs": runs,
                "calibration": {**CALIBRATION, "sequences": sequences, "text": "enwiki100", "gradients": 0},
                "refinement": {"epochs": 1, "steps": 0},
                "evaluation": {"texts": ["enwiki100"], "windows": 1, "tasks": []},
            }
            with workspace(DOWNLOADS) as folder:
                config = params.merged(repository_config, overrides)
                run_workflow(folder, config, [f"results/{run}/eval.json" for run in runs])
                for record in records(folder):
                    stage = peaks.setdefault(record["stage"], {})
                    stage[str(sequences)] = max(stage.get(str(sequences), 0), record["peak_memory_mb"])
    return peaks


def table(result: Mapping[str, Any]) -> str:
    """Return a benchmark result as text."""
    speed = result["matrix_gflops"]
    cost = result["fixed_cost"]
    lines = [
        f"large matrix product: float32 {speed['float32']:.0f}, bfloat16 {speed['bfloat16']:.0f} GFLOP/s",
        f"fixed cost of a stage job: median {cost['median']:.3f} s, largest {cost['largest']:.3f} s, "
        f"over {cost['jobs']:.0f} jobs",
    ]
    lines.append(f"perplexity: {result['perplexity_share']:.2f} of the speed of plain forward passes")
    for name, found in result["benchmarks"].items():
        lines.append(
            f"\n{name}, calibrated on {found['text']}: {found['seconds']:.0f} s in all, "
            f"peak {found['peak_memory_mb']:.0f} MB"
        )
        lines.append(f"  {'stage':<12}{'jobs':>6}{'median s':>10}{'total s':>10}")
        lines += [
            f"  {stage:<12}{row['jobs']:>6}{row['median']:>10.2f}{row['total']:>10.1f}"
            for stage, row in found["stages"].items()
        ]
        if found["refinement_gflops"]:
            lines.append(f"  refinement: {found['refinement_gflops']:.0f} GFLOP/s")
        lines += [
            f"  perplexity on {text}: dense {pair['dense']:.2f}, compressed {pair['compressed']:.2f}"
            for text, pair in found["perplexity"].items()
        ]
    lines.append("\npeak memory (MB) at 32 and 128 sequences:")
    lines += [
        f"  {stage:<20}{row.get('32', 0):>8.0f}{row.get('128', 0):>8.0f}"
        for stage, row in result["memory"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmarks named on the command line (default: all), print and save them."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    config = params.load(REPOSITORY / "params.yaml")
    dense = dense_model(config)
    result = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "matrix_gflops": {
            "float32": matrix_gflops(torch.float32),
            "bfloat16": matrix_gflops(torch.bfloat16),
        },
        "fixed_cost": fixed_cost(config),
        "perplexity_share": forward_share(dense, dtype=compute_dtype("auto", torch.device("cpu"))),
        "benchmarks": {name: benchmark(config, name) for name in names},
        "memory": memory(config, dense),
    }
    output = REPOSITORY / "results" / "bench.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(result) + f"\nsaved in {output.relative_to(REPOSITORY)}\n")


if __name__ == "__main__":
    main()
