"""Memory of a model at work: an estimate before anything is compressed, and a measurement of a checkpoint.

`python -m aasvd.memory FOLDER CONTEXT [NUMBER]` loads a checkpoint in a process of its own, on the
accelerator of that number where there are several, reads CONTEXT tokens into a key-value cache, generates one
more, and prints the bytes as JSON.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aasvd import blocks, layout, params
from aasvd.artifacts import read_json
from aasvd.device import compute_device, process_memory
from aasvd.evaluate import MeasurementError

# Of what is estimated and of what is measured: a budget is about memory, whatever type a machine is fast in.
_DTYPE = torch.bfloat16
_BYTES = _DTYPE.itemsize
_SMALLEST = 0.05  # ratios below this are not worth making


class Estimate(NamedTuple):
    """Bytes at batch 1: weights of the linears that are compressed, other weights, and what a pass needs.

    Attributes:
        linears: Of the dense linears.
        rest: Of all other parameters.
        cache: Keys and values of the whole context.
        activations: The largest tensors that a pass over the whole context holds at a time, and logits.
    """

    linears: int
    rest: int
    cache: int
    activations: int

    def total(self, ratio: float) -> float:
        """Return the bytes at a retained-parameter ratio."""
        return self.linears * ratio + self.rest + self.cache + self.activations

    def ratio(self, budget: float) -> float | None:
        """Return the largest ratio, in hundredths, that fits a budget in bytes.

        Returns:
            At most 1, the dense model; None where even a twentieth does not fit.
        """
        share = (budget - self.rest - self.cache - self.activations) / self.linears
        ratio = min(1.0, math.floor(100 * share) / 100)
        return ratio if ratio >= _SMALLEST else None


def estimate(folder: Path, *, linears: int, parameters: int, context: int) -> Estimate:
    """Estimate a model's memory in bfloat16 from its configuration.

    Args:
        folder: Model folder.
        linears: Parameters of the linears that compression replaces.
        parameters: Parameters in all.
        context: Tokens.
    """
    config = blocks.open_config(folder).get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * config.hidden_size)
    # Around the MLP: the residual stream, its norm, and gate, up and their product; around attention:
    # the same two, queries, keys, values and the output. One of the two exists at a time.
    mlp = 2 * config.hidden_size + 3 * inner
    attention = 2 * config.hidden_size + (2 * heads + 2 * shared) * width
    return Estimate(
        linears=_BYTES * linears,
        rest=_BYTES * (parameters - linears),
        cache=_BYTES * 2 * config.num_hidden_layers * shared * width * context,
        activations=_BYTES * context * max(mlp, attention) + 4 * config.vocab_size,
    )


def plan(
    config: params.Config,
    *,
    model: str,
    source: Path,
    outline: Path,
    budgets: Sequence[float],
    context: int,
) -> list[dict[str, Any]]:
    """Choose a run for every memory budget.

    Args:
        config: The whole configuration.
        model: Name in the registry.
        source: The fetched model's source.json.
        outline: Its outline.json.
        budgets: Bytes.
        context: Tokens that have to fit, at batch 1.

    Returns:
        Per budget: `budget`, `ratio` (1 where the dense model fits, None where nothing does), `run` (None
        where nothing fits), `measured` (the file of its measured memory) and the parts of the estimate. Where
        the dense model fits, the run only lends its dense side.
    """
    dense = blocks.Source(source)
    linears = sum(rows * columns for rows, columns in read_json(outline)["linears"].values())
    # Old files also hold masks, which are no weights.
    floats = [tensor for tensor in dense.tensors.values() if tensor["dtype"].startswith(("F", "BF"))]
    parameters = sum(math.prod(tensor["shape"]) for tensor in floats)
    needs = estimate(dense.folder, linears=linears, parameters=parameters, context=context)
    fitting = [needs.ratio(size) for size in budgets]
    compressed = [ratio for ratio in fitting if ratio is not None and ratio < 1]
    entries = []
    for size, ratio in zip(budgets, fitting, strict=True):
        entry: dict[str, Any] = {
            "budget": size,
            "ratio": ratio,
            "run": None,
            "measured": None,
            **needs._asdict(),
        }
        if ratio is not None:
            made = max(compressed, default=0.6) if ratio == 1 else ratio
            entry["run"] = f"{model}_r{made:g}"
            paths = layout.Paths(config, params.parse_run(config, entry["run"]))
            subject = paths.dense_evaluation if ratio == 1 else paths.evaluation
            entry["measured"] = str(subject / layout.unkeyed_measurement(f"memory_bfloat16_{context}"))
        entries.append(entry)
    return entries


def measure(folder: Path, *, context: int) -> dict[str, Any]:
    """Measure a checkpoint's memory in bfloat16, in a process of its own.

    Args:
        folder: Model folder, dense or compressed.
        context: Tokens.

    Returns:
        `weights`, `cache`, and `peak` beyond what the process needs without a model, in bytes; `device`.

    Raises:
        MeasurementError: If the process fails, as it does where memory does not suffice.
    """
    number = str(compute_device().index or 0)
    command = [sys.executable, "-m", "aasvd.memory", str(folder), str(context), number]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        # A killed process says nothing of it: its last line is a progress bar or a warning.
        killed = f"killed by signal {-done.returncode}, as where memory does not suffice"
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        reason = killed if done.returncode < 0 else last
        raise MeasurementError(f"{folder} does not run with {context} tokens: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.inference_mode()
def _run(folder: str, context: int) -> dict[str, Any]:
    device = compute_device()
    before = _used(device)
    model = blocks.open_model(Path(folder), dtype=_DTYPE).to(device).eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(context, device=device)[None] % vocabulary
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    token = output.logits[:, -1:].argmax(-1)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return {
        "weights": sum(kept.values()),
        "cache": sum(tensor.numel() * tensor.element_size() for tensor in cached),
        "peak": _peak(device) - before,
        "device": str(device),
        "dtype": str(_DTYPE).removeprefix("torch."),
    }


def _used(device: torch.device) -> int:
    return _process("VmRSS") if device.type == "cpu" else torch.accelerator.memory_allocated()


def _peak(device: torch.device) -> int:
    return _process("VmHWM") if device.type == "cpu" else torch.accelerator.max_memory_allocated()


def _process(key: str) -> int:
    size = process_memory(key)
    if size is None:
        raise ValueError("memory on a CPU is measured on Linux only")
    return size


if __name__ == "__main__":
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int((*sys.argv, "0")[3]))
    sys.stdout.write(json.dumps(_run(sys.argv[1], int(sys.argv[2]))) + "\n")
