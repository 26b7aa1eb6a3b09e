"""What identifies each artifact: a short hash of everything that it was made from; imports nothing heavy.

A key is made of the parameters, the identity of the sources and the format version of the artifact.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aasvd.params import Config, Run, choose, effective, trains_positions

# Raised when a stage's output would change for the same parameters; part of every key below it.
VERSIONS = {
    "model": 3,
    "text": 1,
    "task": 1,
    "calibration": 8,
    "compression": 11,
    "evaluation": 4,
    "positions": 2,
    "post": 4,
}

# Settings that change how a result is computed, but not which result it is.
_NOT_IN_KEYS = {
    "calibration": {"batch", "keep_activations"},
    # What a method is called; what it does is in the other keys, so equal methods share their artifacts.
    "compression": {"ratio", "method", "keep_factors"},
}
# Digests of sources: weights, and files larger than this, are sampled.
_WEIGHTS, _WHOLE_BYTES = (".safetensors", ".gguf"), 1 << 30
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


def key_of(ingredients: object) -> str:
    """Return the short hash under which artifacts made from these ingredients are kept."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def _section(settings: Config, name: str) -> dict[str, Any]:
    return {key: value for key, value in settings[name].items() if key not in _NOT_IN_KEYS.get(name, ())}


def model_ingredients(config: Config, model: str) -> dict[str, Any]:
    """Return what identifies a dense model: its source and, for a local folder, its content."""
    source = choose(model, config["models"], "model")
    return {"version": VERSIONS["model"], "source": dict(source), "content": _content(source)}


def text_ingredients(config: Config, text: str) -> dict[str, Any]:
    """Return what identifies a text."""
    source = choose(text, config["texts"], "text")
    local = config["data_dir"] if "hub" in source else ""
    content = _content({"path": str(Path(local) / text)} if local else source)
    return {"version": VERSIONS["text"], "source": dict(source), "data_dir": local, "content": content}


def task_ingredients(config: Config, task: str) -> dict[str, Any]:
    """Return what identifies the rows of a zero-shot task."""
    local = Path(config["data_dir"]).expanduser() / f"{task}.jsonl" if config["data_dir"] else None
    content = _content({"path": str(local)}) if local is not None and local.exists() else None
    return {"version": VERSIONS["task"], "task": task, "content": content}


def _content(source: Config) -> str | None:
    """Return a digest of local files: of all bytes, or of bytes sampled all over weights and huge files.

    Reading 140 GB whenever a workflow starts would be too slow; any fine-tuning changes sampled weights.
    """
    if "path" not in source:
        return None
    path = Path(source["path"]).expanduser()
    files = sorted(_visible_files(path)) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    states = [file.stat() for file in files]
    names = [str(file.relative_to(path)) if path.is_dir() else "" for file in files]
    return _digest(path, tuple((n, s.st_size, s.st_mtime_ns) for n, s in zip(names, states, strict=True)))


def _visible_files(folder: Path) -> Iterable[Path]:
    """Yield the files below a folder without hidden ones: .git and .cache change while the model does not."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield file


@functools.cache
def _digest(path: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Return the digest of a file, or of the named files below a folder; keys ask for it many times over."""
    summary = hashlib.sha256()
    for name, size, _ in files:
        summary.update(f"{name}:{size}\n".encode())
        file = path / name if name else path
        whole = file.suffix not in _WEIGHTS and size <= _WHOLE_BYTES
        step = _SAMPLE_BYTES if whole else max(_SAMPLE_BYTES, size // _SAMPLES)
        with file.open("rb") as stream:
            for start in range(0, size, step):
                stream.seek(start)
                summary.update(stream.read(_SAMPLE_BYTES))
    return summary.hexdigest()


def calibration_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return what identifies the original side: tokens, activations and covariances."""
    return {
        "version": VERSIONS["calibration"],
        "model": model_ingredients(config, run.model),
        "text": text_ingredients(config, run.settings["calibration"]["text"]),
        "calibration": _section(run.settings, "calibration"),
        "seed": run.settings["seed"],
    }


def compression_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return what identifies the compressed blocks."""
    # What nothing reads makes no difference.
    acting = effective(run.settings)
    compression = _section(acting, "compression")
    if compression["allocation"] == "file":
        compression["ranks_content"] = _content({"path": compression["ranks_file"]})
    if trains_positions(run):
        compression["positions"] = key_of(positions_ingredients(config, run))
    post = acting["post"]
    return {
        "version": VERSIONS["compression"],
        "calibration": key_of(calibration_ingredients(config, run)),
        "ratio": run.ratio,
        "compression": compression,
        "refinement": acting["refinement"],
        "post": {"version": VERSIONS["post"], **post} if post["epochs"] else post,
        "seed": run.settings["seed"],
    }


def positions_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return what identifies trained truncation positions: other methods' settings make no difference."""
    compression = run.settings["compression"]
    return {
        "version": VERSIONS["positions"],
        "calibration": key_of(calibration_ingredients(config, run)),
        "ratio": run.ratio,
        "storage": compression["storage"],
        "dobi": compression["dobi"],
    }


def evaluation_ingredients(config: Config, run: Run) -> dict[str, Any]:
    """Return, for every text and task of a run, what identifies its measurement."""
    settings = run.settings["evaluation"]
    common = {"evaluation": VERSIONS["evaluation"], "dtype": run.settings["calibration"]["dtype"]}
    window = {"window": settings["window"], "windows": settings["windows"]}
    texts = {
        f"perplexity_{text}": {**text_ingredients(config, text), **common, **window}
        for text in settings["texts"]
    }
    tasks = {
        f"accuracy_{task}": {**task_ingredients(config, task), **common, "limit": settings["limit"]}
        for task in settings["tasks"]
    }
    return texts | tasks
