"""Merge a compressed checkpoint into an ordinary dense one: `python -m aasvd.export FOLDER OUTPUT`.

For tools that know nothing of factors: u v is multiplied out, in float32, and rounded to the checkpoint's
type. The result computes the same within that rounding, and saves neither memory nor time: it is as large as
the model before compression.

No GGUF is written here. transformers reads GGUF but does not write it, and the gguf package writes single
tensors but knows no model; llama.cpp's own converter does it from the merged folder (docs/inference.md).
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from aasvd.artifacts import replacing_folder
from aasvd.checkpoint import METHOD, TOKENIZER_FILES
from aasvd.lowrank import CompressedLinear
from aasvd.pruned import PrunedLinear

_logger = logging.getLogger(__name__)


def merge(folder: Path, output: Path) -> None:
    """Write the dense model that a compressed checkpoint stands for; it saves no memory over the original.

    Args:
        folder: A compressed checkpoint.
        output: Folder to make; it must not exist, or be empty.

    Raises:
        ValueError: If `folder` is not a compressed checkpoint, `output` is in use, or a merged weight is not
            finite in the checkpoint's type.
    """
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(f"{folder} has no config.json: expected the folder of a compressed checkpoint")
    quantization = json.loads(config.read_text()).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} is not compressed by aasvd: its config.json has no such quantization_config"
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty: remove it first")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear | PrunedLinear)
    ]
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _dense(name, layer, model.dtype))
    # What save_pretrained and a later from_pretrained would take the model for compressed by.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with replacing_folder(output) as staging:
        model.save_pretrained(staging)
        for name in TOKENIZER_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, staging / name)
    _logger.info("merged %d linears of %s", len(layers), folder)


def _dense(name: str, layer: CompressedLinear | PrunedLinear, dtype: torch.dtype) -> nn.Linear:
    """Return the linear that a layer stands for, in a float type."""
    with torch.no_grad():
        weight = layer.dense().to(dtype)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the merged weight is not finite in {dtype}")
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return linear


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m aasvd.export", description=__doc__)
    parser.add_argument("folder", type=Path, help="compressed checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    options = parser.parse_args(arguments)
    try:
        merge(options.folder, options.output)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{options.output}: dense, as large as the model before compression\n")


if __name__ == "__main__":
    main()
