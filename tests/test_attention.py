"""Attention on CPUs against its formula in float64."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import GROUPED, tiny_model
from stored import random_tokens
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from workflow_copy import trained_tokenizer

from aasvd.attention import NAME, attention
from aasvd.blocks import skeleton
from aasvd.stages.loading import load_model

SHAPES = [(2, 6, 2, 300, 16), (3, 4, 4, 128, 24), (1, 9, 3, 1, 64), (1, 8, 1, 513, 80)]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query, key, value and the gradient of the output."""
    sequences, heads, shared, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(sequences, count, tokens, width, generator=generator).mul(2).to(dtype)
        for count in (heads, shared, shared, heads)
    )


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(q kᵀ scale) v with a causal mask, (sequences, tokens, heads, width), in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double(), value.double()
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_inference_in_bfloat16_is_nearly_as_accurate_as_torchs(
    shape: tuple[int, ...], scaling: float | None
) -> None:
    """Scores that were rounded to bfloat16 would make several times its error."""
    query, key, value, _ = random_inputs(shape, torch.bfloat16)
    wanted = formula(query, key, value, scaling or shape[-1] ** -0.5)
    with torch.inference_mode():
        found, _ = attention(nn.Identity(), query, key, value, None, scaling=scaling)
        torchs = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    assert found.dtype == torch.bfloat16 and found.is_contiguous()
    assert error(found, wanted) < 1.5 * error(torchs.transpose(1, 2), wanted) + 1e-9


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_outputs_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    *inputs, upstream = random_inputs(shape, dtype)
    scale = 0.2
    for tensor in inputs:
        tensor.requires_grad_()
    found, _ = attention(nn.Identity(), *inputs, None, scaling=scale)
    found.backward(upstream.transpose(1, 2))  # type: ignore[no-untyped-call]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = formula(*doubles, scale)
    wanted.backward(upstream.transpose(1, 2).double())  # type: ignore[no-untyped-call]
    assert error(found.detach(), wanted.detach()) < tolerance
    for tensor, double in zip(inputs, doubles, strict=True):
        assert tensor.grad is not None and double.grad is not None
        # The first token's query and key decide nothing: both gradients are zero there.
        assert float((tensor.grad.double() - double.grad).norm()) < tolerance * float(
            double.grad.norm() + upstream.norm()
        )


def test_float32_products_of_others_keep_their_digits() -> None:
    """Attention lets exact products take bfloat16 units; those of anything else never do."""
    query, key, value, _ = random_inputs((1, 4, 4, 64, 16), torch.float32)
    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1))
    wanted = a.double() @ b.double()
    before = error(a @ b, wanted)
    with torch.inference_mode():
        attention(nn.Identity(), *(x.bfloat16() for x in (query, key, value)), None)
        found, _ = attention(nn.Identity(), query, key, value, None)
    assert error(a @ b, wanted) == before < 1e-6
    assert error(found, formula(query, key, value, 16**-0.5)) < 1e-6


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(**GROUPED, head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)


def _gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(**GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1)


@pytest.mark.parametrize("make", [_gemma2, _gpt_oss])
def test_models_that_cap_scores_or_have_sinks_keep_their_own_attention(
    make: Callable[[], PreTrainedConfig], tmp_path: Path
) -> None:
    """Measured whole or block by block: torch's kernel would refuse the one and forget the other's sinks."""
    model = AutoModelForCausalLM.from_config(make()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer(["some text"])).save_pretrained(tmp_path)
    ids = random_tokens(1)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        loaded, _ = load_model(tmp_path, {"dtype": "float32"})
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
    assert model.config._attn_implementation == "eager"
    assert skeleton(tmp_path).model.config._attn_implementation == "eager"


def test_others_attend_by_it_whatever_their_folder_asks_for(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer(["some text"])).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for asked in ({}, {"attn_implementation": "flash_attention_2"}):
        file.write_text(json.dumps(json.loads(file.read_text()) | asked))
        assert skeleton(tmp_path).model.config._attn_implementation == NAME
        assert load_model(tmp_path, {"dtype": "float32"})[0].config._attn_implementation == NAME
