"""A copy of the workflow with a tiny model, text and task of its own: real Snakemake and DVC, no network."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

ROOT = Path(__file__).parent.parent
WORKFLOW = ("Snakefile", "dvc.yaml", "params.yaml", "profiles", "workflow", ".dvcignore", ".gitignore")
BLOCKS, WIDTH, HIDDEN = 3, 32, 48
RUN = "tiny_r0.6"
# Rules of a run, by phase.
ORIGINALS = {"fetch_model", "fetch_text", "fetch_task", "sample_calibration", "embed", "capture_block"}
COMPRESSION = {"allocate", "solve_block", "refine_block", "propagate", "assemble", "describe_compression"}
MEASURES = {"perplexity", "accuracy"}
SETTINGS: dict[str, Any] = {
    "data_dir": "inputs",
    "model": "tiny",
    "runs": [RUN],
    "models": {"tiny": {"path": "inputs/tiny.gguf", "dtype": "float32"}},
    "texts": {"made-up": {"path": "inputs/text"}},
    "calibration": {"text": "made-up", "sequences": 6, "tokens": 32, "dtype": "float32", "batch": 4},
    "refinement": {"epochs": 2, "steps": 0, "batch": 2},
    "evaluation": {"texts": ["made-up"], "window": 32, "windows": 6, "tasks": ["piqa"], "limit": 4},
}
NO_TASKS: dict[str, Any] = {"evaluation": {"tasks": []}}  # lm-eval takes seconds to import


class Done(NamedTuple):
    """What a finished command left: its exit code, and everything it printed."""

    code: int
    text: str


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes merged into their sections, one level deep."""
    return {
        **settings,
        **{
            key: {**settings[key], **value} if isinstance(value, Mapping) else value
            for key, value in changes.items()
        },
    }


def _interruptible() -> None:
    """Take Ctrl-C, also where the tests themselves were started in the background and ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Copy:
    """A copy of the workflow in a folder of its own, which is a git repository under DVC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str | Path) -> Path:
        return self.folder / name

    def params(self) -> dict[str, Any]:
        """Return params.yaml as it stands."""
        found = yaml.safe_load(self.path("params.yaml").read_text())
        assert isinstance(found, dict)
        return found

    def change(self, **changes: Any) -> None:
        """Merge changes into params.yaml."""
        self.path("params.yaml").write_text(yaml.safe_dump(merged(self.params(), changes), sort_keys=False))

    def start(self, *command: str | Path, **environment: str) -> "subprocess.Popen[str]":
        """Start a command as a terminal would: in a process group of its own."""
        return subprocess.Popen(
            [_executable(str(command[0])), *map(str, command[1:])],
            cwd=self.folder,
            env={**clean_environment(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_interruptible,
        )

    def run(self, *command: str | Path, **environment: str) -> Done:
        """Run a command to its end."""
        process = self.start(*command, **environment)
        try:
            text, _ = process.communicate(timeout=900)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Done(process.returncode, text)

    def shell(self, line: str) -> Done:
        """Run a command exactly as printed."""
        return self.run("bash", "-c", line)

    def snakemake(self, *arguments: str | Path, **environment: str) -> Done:
        return self.run("snakemake", "--cores", "1", *arguments, **environment)

    def must(self, *command: str | Path, **environment: str) -> str:
        """Run a command that has to succeed, and return what it printed."""
        done = self.run(*command, **environment)
        assert done.code == 0, done.text
        return done.text

    def make(self, *arguments: str | Path) -> str:
        """Run Snakemake, which has to succeed."""
        return self.must("snakemake", "--cores", "1", *arguments)

    def planned(self, *targets: str, options: Sequence[str] = ()) -> list[str]:
        """Return the names of the rules that Snakemake would run now, one per job, as far as it knows yet."""
        return jobs(self.make(*options, "--dry-run", "--quiet", "host", "--", *targets))

    def find(self, pattern: str) -> Path:
        """Return the one artifact of a pattern, relative to the repository."""
        (found,) = self.folder.glob(f"results/artifacts/{pattern}")
        return found.relative_to(self.folder)

    def evaluation(self, run: str = RUN) -> dict[str, Any]:
        """Return a run's published numbers."""
        found = json.loads(self.path(f"results/{run}/eval.json").read_text())
        assert isinstance(found, dict)
        return found

    def duplicate(self, folder: Path) -> "Copy":
        """Copy everything, finished artifacts and DVC's cache with them."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Copy(folder)


def jobs(text: str) -> list[str]:
    """Return the rules of the jobs that a log of Snakemake lists, in the order of the log."""
    heads = ("rule ", "localrule ", "checkpoint ", "localcheckpoint ")
    return [
        line.split()[1].rstrip(":")
        for line in text.splitlines()
        if line.startswith(heads) and line.endswith(":")
    ]


def finished(text: str) -> list[str]:
    """Return the rules of the jobs that finished, in order."""
    return [
        line.rpartition("(Rule: ")[2].rstrip(")")
        for line in text.splitlines()
        if line.startswith("Finished jobid:")
    ]


def _executable(name: str) -> str:
    """Return a command of the environment that runs the tests."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def clean_environment() -> dict[str, str]:
    """Return an environment in which the hub is never asked and one thread computes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "SNAKEMAKE_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }


def create(folder: Path, **changes: Any) -> Copy:
    """Make a fresh copy with nothing computed yet, and with changes of its own in params.yaml."""
    folder.mkdir(parents=True)
    for name in WORKFLOW:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copyfile(ROOT / ".dvc" / name, folder / ".dvc" / name)
    copy = Copy(folder)
    write_inputs(folder / "inputs")
    copy.change(**SETTINGS)
    copy.change(**changes)
    copy.must("git", "init", "--quiet", "--initial-branch", "main")
    for key, value in {"user.name": "A Tester", "user.email": "tester@example.org"}.items():
        copy.must("git", "config", key, value)
    commit(copy, "Start")
    return copy


def commit(copy: Copy, message: str) -> None:
    """Commit all that git does not ignore."""
    copy.must("git", "add", "--all")
    copy.must("git", "commit", "--quiet", "--message", message)


def write_inputs(folder: Path) -> None:
    """Write a text with two splits, a few rows of piqa, and a tiny Llama with a tokenizer as a GGUF file."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(200)]
    lines = [" ".join(chance.choices(words, k=12)) for _ in range(120)]
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "train.txt").write_text("\n".join(lines[:80]))
    (folder / "text" / "test.txt").write_text("\n".join(lines[80:]))
    rows = [
        {"goal": line, "sol1": line[:9], "sol2": line[9:20], "label": number % 2}
        for number, line in enumerate(lines[:6])
    ]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_gguf(folder / "tiny.gguf", lines)


def write_gguf(path: Path, lines: Sequence[str]) -> None:
    """Write a random Llama with a byte-level tokenizer trained on the lines."""
    tokenizer = trained_tokenizer(lines)
    pieces = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(pieces["vocab"], key=pieces["vocab"].get)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in pieces["merges"]])
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    put = _tensors_into(writer)
    put("token_embd.weight", len(tokens), WIDTH)
    put("output_norm.weight", WIDTH)
    put("output.weight", len(tokens), WIDTH)
    for block in range(BLOCKS):
        for name, rows, columns in [
            ("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH // 2, WIDTH), ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_gate", HIDDEN, WIDTH), ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ]:  # fmt: skip
            put(f"blk.{block}.{name}.weight", rows, columns)
        put(f"blk.{block}.attn_norm.weight", WIDTH)
        put(f"blk.{block}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors_into(writer: GGUFWriter) -> Callable[..., None]:
    generator = torch.Generator().manual_seed(0)

    def put(name: str, *shape: int) -> None:
        noise: Tensor = torch.randn(shape, generator=generator)
        writer.add_tensor(name, (noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.1 * noise).numpy())

    return put


def trained_tokenizer(lines: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of 300 pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def tensors(copy: Copy) -> dict[str, str]:
    """Return the digest of every tensor file, which hold no times, and of tokens."""
    return {
        str(file.relative_to(copy.folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in ("*.safetensors", "tokens.parquet")
        for file in sorted(copy.path("results").rglob(pattern))
    }


def artifacts(copy: Copy, pattern: str = "**/*") -> dict[str, tuple[int, int]]:
    """Return when each artifact of a pattern was written, and its file number."""
    return {
        str(file.relative_to(copy.folder)): (file.stat().st_mtime_ns, file.stat().st_ino)
        for file in sorted(copy.path("results/artifacts").glob(pattern))
        if file.is_file()
    }
