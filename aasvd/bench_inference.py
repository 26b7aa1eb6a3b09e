"""Measure inference, dense against compressed: `make bench-inference`, or `python -m aasvd.bench_inference`.

Models are built from a configuration with random weights and factors of the ranks that a run at each ratio
gives; speed does not depend on the values. Every repetition measures all of them in turn, so that whatever
else the machine does hits all alike; the medians of one run are compared, never of two.

"Linears alone" is the roofline: the linears of the blocks called one after the other on inputs of the same
shapes, in the same repetition. What they gain over the dense ones is all that a forward pass can gain. "Its
products" are the same with nothing around: the bare matrix products of each linear's stored matrices. Linears
that share their first product with others (`aasvd.fusion`) can be below them.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from aasvd.artifacts import replacing
from aasvd.device import compute_device, process_memory, release_memory, reset_peak_memory
from aasvd.formats import FORMATS, replace_linears
from aasvd.fusion import fuse
from aasvd.lowrank import CompressedLinear, product
from aasvd.provenance import versions
from aasvd.rank import uniform_rank

RATIOS = (0.8, 0.6, 0.4)
DENSE = "dense"
_WITH_A_BAR = "pivoted 0.6"
# Seconds after which a model is not measured again at a shape: long passes vary less.
_ENOUGH = 2.0
# Tokens that linears alone are timed on, at least: a few are over too soon for a clock.
_TIMED_TOKENS = 64
_LLAMA7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}


def smollm2() -> PreTrainedConfig:
    """Return the configuration of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )


def llama7b_block() -> PreTrainedConfig:
    """Return the configuration of one block of LLaMA-7B, with next to no vocabulary around it."""
    return LlamaConfig(**_LLAMA7B, vocab_size=64, num_hidden_layers=1)


def tiny() -> PreTrainedConfig:
    """Return a configuration of no size, to see whether everything runs."""
    return LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )


class Shape(NamedTuple):
    """What one table measures of a model.

    Attributes:
        batch: Sequences.
        tokens: Length of the prompts.
        new: Tokens generated after them; 0 leaves decoding out.
    """

    batch: int
    tokens: int
    new: int


class Setting(NamedTuple):
    """One model in one float type, dense and in every format and ratio, at several shapes."""

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    shapes: tuple[Shape, ...]


def build(config: PreTrainedConfig, *, ratio: float | None, storage: str, dtype: torch.dtype) -> Any:
    """Return a model with random weights on the host, dense (ratio None) or compressed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    if ratio is not None:
        ranks = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                rank = uniform_rank(
                    module.out_features, module.in_features, parameter_ratio=ratio, storage=storage
                )
                if rank is not None:
                    ranks[name] = rank
        replace_linears(model, ranks, storage=storage)
    generator = torch.Generator().manual_seed(0)
    # Speed does not depend on the values, so a few are enough; their number shares no factor with any width.
    noise = torch.randn(2**20 + 7, generator=generator).to(dtype)
    with torch.device("cpu"):
        state = {
            name: noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].view(parameter.shape)
            * parameter.shape[-1] ** -0.5
            if parameter.ndim > 1
            else torch.ones(parameter.shape, dtype=dtype)
            for name, parameter in model.named_parameters()
        }
        rotary = type(model.model.rotary_emb)(config)
        state |= {name: _codes(name, buffer, generator) for name, buffer in _stored_buffers(model).items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.model.rotary_emb = rotary
    model.tie_weights()
    return model.eval()


def _stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of compressed linears by name."""
    return {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
        for key, buffer in module.named_buffers()
    }


def _codes(name: str, buffer: Tensor, generator: torch.Generator) -> Tensor:
    """Return random contents for a buffer of a compressed linear, of the kind that packing gives."""
    leaf = name.rpartition(".")[2]
    if leaf == "order":
        return torch.randperm(len(buffer), generator=generator).to(buffer.dtype)
    if buffer.dtype == torch.int8:
        return torch.randint(-127, 128, buffer.shape, generator=generator, dtype=torch.int8)
    # Bits of float16: scales, and slots, which hold either such numbers or any bytes.
    values = (
        torch.full(buffer.shape, 1e-3) if leaf == "scales" else torch.rand(buffer.shape, generator=generator)
    )
    return values.half().view(torch.int16)


def linears(model: Any) -> list[nn.Linear | CompressedLinear]:
    """Return the linears inside a model's blocks, dense or low-rank."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear | CompressedLinear) and m is not head]


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights in memory, shared memory counted once."""
    tensors = [*model.parameters(), *_stored_buffers(model).values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def prefill(model: Any, prompt: Tensor) -> tuple[float, Any]:
    """Return the seconds of a pass over prompts (batch, tokens) as `generate` makes it, and its cache."""
    start = _now(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    return _now(prompt.device) - start, output.past_key_values


def decode(model: Any, cache: Any, prompt: Tensor, new: int) -> float:
    """Return the seconds of generating tokens one by one after prompts."""
    token = prompt[:, -1:]
    start = _now(prompt.device)
    for _ in range(new):
        output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    return _now(prompt.device) - start


def linears_alone(model: Any, tokens: int) -> Callable[[torch.device], float]:
    """Return a function that times a model's linears alone, on inputs of their own.

    It calls those of at most two blocks and counts them for all, which are alike.
    """
    timed, times = _of_two_blocks(model)
    return _timing([(module, module.in_features) for module in timed], times, tokens, like=model)


def products_alone(model: Any, tokens: int) -> Callable[[torch.device], float] | None:
    """Return the same for bare products with the linears' matrices; None where codes are stored."""
    timed, times = _of_two_blocks(model)
    weights = [[p for p in module.parameters() if p.ndim == 2] for module in timed]
    if not all(weights):
        return None
    calls = [(functools.partial(product, weight=w), w.shape[1]) for some in weights for w in some]
    return _timing(calls, times, tokens, like=model)


def _of_two_blocks(model: Any) -> tuple[list[nn.Linear | CompressedLinear], float]:
    """Return the linears of at most two blocks, and how many times as many there are in all."""
    modules = linears(model)
    blocks = model.config.num_hidden_layers
    timed = modules[: len(modules) * min(2, blocks) // blocks]
    return timed, len(modules) / len(timed)


def _timing(
    calls: Sequence[tuple[Callable[[Tensor], Tensor], int]], times: float, tokens: int, *, like: nn.Module
) -> Callable[[torch.device], float]:
    """Return a function that times calls on tokens of the given widths, and multiplies the seconds."""
    weight = next(like.parameters())
    repeats = max(1, _TIMED_TOKENS // tokens)
    inputs = {
        width: torch.randn(1, tokens, width, device=weight.device, dtype=weight.dtype)
        for width in {width for _, width in calls}
    }

    def seconds(device: torch.device) -> float:
        start = _now(device)
        for _ in range(repeats):
            for call, width in calls:
                call(inputs[width])
        return (_now(device) - start) * times / repeats

    return seconds


def variants_of(
    setting: Setting, *, formats: Sequence[str], device: torch.device, compiled: bool
) -> dict[str, Any]:
    """Return the dense model and one of each format and ratio, by the names that the tables give them."""
    built = {DENSE: build(setting.config, ratio=None, storage="factors", dtype=setting.dtype).to(device)}
    for storage in formats:
        for ratio in RATIOS:
            model = build(setting.config, ratio=ratio, storage=storage, dtype=setting.dtype).to(device)
            fuse(model)
            built[f"{storage} {ratio}"] = model
    if compiled:
        built |= {f"{name} compiled": torch.compile(model, dynamic=True) for name, model in built.items()}
    return built


def measure(
    variants: Mapping[str, Any], shape: Shape, *, vocabulary: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Measure models in turn at one shape, and return a row for each.

    The dense model and the one that a bar is about are measured `repeats` times; others that often, or
    until they have taken `_ENOUGH` seconds.
    """
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(vocabulary, (shape.batch, shape.tokens), generator=generator).to(device)
    tokens = shape.batch * shape.tokens
    times: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    peaks = dict.fromkeys(variants, 0.0)
    resident = {name: resident_bytes(model) for name, model in variants.items()}
    for name, model in variants.items():
        # Weights are fetched and kernels chosen at the first calls; compilers want the real length.
        warm = prompt if name.endswith("compiled") else prompt[:, :64]
        decode(model, prefill(model, warm)[1], warm, 1)
    for _ in range(repeats):
        for name, model in variants.items():
            taken = sum(sum(seconds) for seconds in times[name].values())
            if taken > _ENOUGH and name not in (DENSE, _WITH_A_BAR):
                continue
            found = {}
            with _peak(device) as peak:
                found["prefill"], cache = prefill(model, prompt)
                if shape.new:
                    found["decode"] = decode(model, cache, prompt, shape.new)
                del cache
            peaks[name] = max(peaks[name], resident[name] + peak())
            if not name.endswith("compiled"):
                for key, count in (("", tokens), *((("step ", shape.batch),) if shape.new else ())):
                    found[f"{key}linears"] = linears_alone(model, count)(device)
                    if bare := products_alone(model, count):
                        found[f"{key}products"] = bare(device)
            for key, seconds in found.items():
                times[name].setdefault(key, []).append(seconds)
    rows = [_row(name, times[name], shape, resident=resident[name], peak=peaks[name]) for name in variants]
    dense = rows[0]
    for row in rows:
        row["ratios"] = {
            key: row[key] / dense[key]
            for key in (*_SPEEDS, "resident_bytes", "peak_bytes")
            if key in row and dense.get(key)
        }
    return rows


def _row(
    name: str, times: dict[str, list[float]], shape: Shape, *, resident: int, peak: float
) -> dict[str, Any]:
    """Return what a table says of one model."""
    tokens = shape.batch * shape.tokens
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    row: dict[str, Any] = {
        "variant": name,
        "seconds": times,
        "resident_bytes": resident,
        "peak_bytes": peak,
        "prefill_tokens_per_second": tokens / middle["prefill"],
    }
    if "linears" in middle:
        row["linears_tokens_per_second"] = tokens / middle["linears"]
        # Of the time of a prefill; the rest is attention, norms, activations and Python.
        row["linears_share"] = middle["linears"] / middle["prefill"]
        row["linears_milliseconds"] = {key: 1000 * middle[key] for key in _ROOFLINE if key in middle}
    if shape.new:
        row["decode_tokens_per_second"] = shape.batch * shape.new / middle["decode"]
    return row


# The linears alone and their bare products: of a prefill, and of one step of decoding.
_ROOFLINE = {
    "linears": "prefill",
    "products": "its products",
    "step linears": "decode step",
    "step products": "its products",
}
_SPEEDS = ("prefill_tokens_per_second", "linears_tokens_per_second", "decode_tokens_per_second")


def title(setting: Setting, shape: Shape) -> str:
    """Return what a table is about."""
    dtype = str(setting.dtype).removeprefix("torch.")
    return f"{setting.name}, {dtype}, batch {shape.batch} x {shape.tokens} tokens"


def table(heading: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of one shape as text; a number in brackets is the ratio to dense."""
    heads = ("prefill tok/s", "linears alone", "decode tok/s", "weights MB", "peak MB")
    keys = (*_SPEEDS, "resident_bytes", "peak_bytes")
    lines = [f"\n{heading}"]
    lines.append(f"  {'':<24}" + "".join(f"{head:>20}" for head in heads) + f"{'in linears':>12}")
    for row in rows:
        cells = []
        for key in keys:
            if key not in row or not math.isfinite(row[key]):
                cells.append(f"{'':>20}")
                continue
            value = row[key] / 2**20 if key.endswith("bytes") else row[key]
            ratio = f"({row['ratios'][key]:.2f})" if key in row["ratios"] else ""
            cells.append(f"{f'{value:,.1f} {ratio:>6}':>20}")
        share = f"{row['linears_share']:>12.0%}" if "linears_share" in row else ""
        lines.append(f"  {row['variant']:<24}" + "".join(cells) + share)
    return "\n".join(lines)


def roofline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the linears' own milliseconds as text, beside those of the bare products of their shapes."""
    lines = [f"  {'linears alone, ms':<24}" + "".join(f"{head:>20}" for head in _ROOFLINE.values())]
    for row in rows:
        if times := row.get("linears_milliseconds"):
            cells = [f"{times[key]:,.2f}" if key in times else "" for key in _ROOFLINE]
            lines.append(f"  {row['variant']:<24}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def bars(name: str, shape: Shape, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is asked of the default format at 0.6 for one table: the value found, and the bar."""
    found = {row["variant"]: row["ratios"] for row in rows}.get(_WITH_A_BAR, {})
    return [
        {"bar": f"{words} {sign} {bar}", "found": found[key], "met": _COMPARE[sign](found[key], bar)}
        for key, words, sign, bar in _BARS.get((name, shape.batch), ())
        if key in found
    ]


_COMPARE = {">=": operator.ge, "<=": operator.le}


def limits(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how many times faster than dense a prefill can be by its linears alone.

    The rest (attention, norms, activations, Python) takes what it takes in the dense model.

    Returns:
        `multiplications`: if the linears took 0.6 of the dense ones' time, as their multiplications would;
        `free`: if they took none.
    """
    share = min(rows[0]["linears_share"], 1.0)
    return {
        "multiplications": 1 / (1 - share * (1 - 0.6)),
        "free": 1 / (1 - share) if share < 1 else math.inf,
    }


# By model and batch: the key of a ratio to dense, what it is, and its bar (issue 3, section 3).
_BARS = {
    ("SmolLM2-135M", 1): (("decode_tokens_per_second", "decode, times dense", ">=", 1.0),),
    ("SmolLM2-135M", 8): (
        ("prefill_tokens_per_second", "prefill, times dense", ">=", 1.3),
        ("resident_bytes", "weights, of dense", "<=", 0.7),
    ),
    ("LLaMA-7B block", 1): (("prefill_tokens_per_second", "prefill, times dense", ">=", 1.5),),
}


def settings(*, config: PreTrainedConfig | None, quick: bool) -> list[Setting]:
    """Return what a run measures: SmolLM2 (or `config`) at batch 1 and 8, and a block of LLaMA-7B."""
    if quick:
        return [Setting("tiny", tiny(), torch.float32, (Shape(2, 16, 4),))]
    name, model = ("SmolLM2-135M", smollm2()) if config is None else (config.model_type, config)
    return [
        setting
        for dtype in (torch.float32, torch.bfloat16)
        for setting in (
            Setting(name, model, dtype, (Shape(1, 512, 16), Shape(8, 512, 8))),
            Setting("LLaMA-7B block", llama7b_block(), dtype, (Shape(1, 512, 0),)),
        )
    ]


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns by how many bytes memory in use grew at most; NaN where unknown."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield lambda: float(torch.accelerator.max_memory_allocated(device) - before)
    elif reset_peak_memory():
        # The weights of all models are resident: what a call adds is its own. Memory that was freed and is
        # still the process's would hide what is taken again.
        release_memory()
        before = process_memory("VmRSS") or 0
        yield lambda: float((process_memory("VmHWM") or 0) - before)
    else:
        yield lambda: math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every setting, print its table, and save all as JSON."""
    parser = argparse.ArgumentParser(prog="python -m aasvd.bench_inference", description=__doc__)
    parser.add_argument("--config", type=Path, help="folder with the config.json of another model")
    parser.add_argument("--output", type=Path, default=Path("results/bench_inference.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--only", default="", help="settings whose name contains this: 'bfloat16, batch 1'")
    parser.add_argument("--quick", action="store_true", help="a model of no size, to see that it runs")
    options = parser.parse_args(arguments)
    config = (
        None
        if options.config is None
        else AutoConfig.from_pretrained(options.config, trust_remote_code=False)
    )
    everything = settings(config=config, quick=options.quick)
    titles = [title(setting, shape) for setting in everything for shape in setting.shapes]
    if not any(options.only in name for name in titles):
        parser.error(f"--only {options.only!r} is in no setting's name; there are {'; '.join(titles)}")
    device = compute_device()
    result: dict[str, Any] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": [],
    }
    for setting in everything:
        shapes = [shape for shape in setting.shapes if options.only in title(setting, shape)]
        if not shapes:
            continue
        with torch.no_grad():
            variants = variants_of(setting, formats=options.formats, device=device, compiled=options.compile)
            for shape in shapes:
                vocabulary = setting.config.vocab_size
                rows = measure(variants, shape, vocabulary=vocabulary, device=device, repeats=options.repeats)
                asked = bars(setting.name, shape, rows)
                sys.stdout.write(f"{table(title(setting, shape), rows)}\n{roofline(rows)}\n")
                for bar in asked:
                    verdict = "met" if bar["met"] else "MISSED"
                    sys.stdout.write(f"  {_WITH_A_BAR}: {bar['bar']}: {bar['found']:.2f}, {verdict}\n")
                limit = limits(rows)
                sys.stdout.write(
                    f"  roofline of prefill: {limit['multiplications']:.2f} times dense if the linears took "
                    f"0.6 of their time, {limit['free']:.2f} if they took none\n"
                )
                sys.stdout.flush()
                result["settings"].append(
                    {
                        "model": setting.name,
                        "dtype": str(setting.dtype).removeprefix("torch."),
                        **shape._asdict(),
                        "bars": asked,
                        "limits": {key: value for key, value in limit.items() if math.isfinite(value)},
                        "rows": [{k: v for k, v in row.items() if v == v} for row in rows],
                    }
                )
        del variants
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.output) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"\nnumbers in brackets: ratio to dense; saved in {options.output}\n")


if __name__ == "__main__":
    main()
