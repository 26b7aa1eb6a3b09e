"""Causal attention on CPUs: two to three times as fast as torch's in bfloat16, and nearly as accurate.

torch's fused CPU kernel works a row at a time and, but for AMX, without the processor's bfloat16 units; its
backward pass recomputes the probabilities. Here everything is a batched matrix product or one fused
pass over scores that fit the processor's cache, and training, whose sequences are short, keeps the
probabilities.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "aasvd"

# Queries of one step: small enough to skip most of the upper triangle, large enough for full speed.
_QUERIES = 128
# Scores of one step, in float32: with more, memory is asked from the system anew at every step.
_SCORES = 2**20
# Above this length training is left to torch's kernel, which keeps no probabilities.
_LONGEST = 4096


# Takes the place of attention for a while: (module, query, key, value) → output.
StandIn = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
_stand_in: ContextVar[StandIn | None] = ContextVar("stand_in", default=None)


@contextlib.contextmanager
def replaced(stand_in: StandIn) -> Iterator[None]:
    """Call a function in the place of attention, with the tensors that `attention` gets."""
    token = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(token)


def use(model: PreTrainedModel) -> None:
    """Let a model attend by `attention`, where it would by torch's kernel.

    Where transformers chooses eager code instead, the model does more than that kernel can: it caps its
    scores (Gemma 2) or lets attention go to sinks (gpt-oss).
    """
    if model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' own SDPA function does, by `CausalAttention` where that applies and is faster.

    Args:
        module: The attention module that calls.
        query: (sequences, heads, tokens, width).
        key: (sequences, key heads, tokens, width).
        value: Like `key`.
        attention_mask: None for plain causal attention; anything else is left to transformers.
        dropout: Left to transformers where it is not 0.
        scaling: Factor of the scores; 1 / √width by default.
        is_causal: Left to transformers where it is False.
        arguments: Passed on.

    Returns:
        The outputs, (sequences, tokens, heads, width), and no probabilities.
    """
    if stand_in := _stand_in.get():
        return stand_in(module, query, key, value), None
    if not any(value.stride()) and not value[0, 0, 0, 0]:
        # As `capture.without` leaves it: no passes for zeros.
        sequences, heads, tokens, _ = query.shape
        return value[:1, :1, :1, :1].expand(sequences, tokens, heads, value.shape[3]), None
    trains = torch.is_grad_enabled() and query.requires_grad
    plain = attention_mask is None and dropout == 0 and is_causal is not False
    causal = is_causal or getattr(module, "is_causal", True)
    fits = query.shape[2] == key.shape[2] and value.shape[3] == key.shape[3]
    # Softcapping and the like arrive as further arguments; position ids do not concern attention itself.
    known = set(arguments) <= {"position_ids", "sliding_window", "use_cache", "cache_position"}
    # With AMX, torch's own forward pass in bfloat16 is as fast.
    slow = query.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
    faster = query.shape[2] <= _LONGEST if trains else slow
    if query.device.type == "cpu" and plain and causal and fits and known and faster:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if trains:
            output: Tensor = CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        else:
            output, _ = _attend(query, key, value, scale, keep=False)
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **arguments,
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return softmax(q kᵀ scale) v with a causal mask, shaped like `query`, and the probabilities.

    The latter of each step, (sequences x key heads, heads per key head x queries, keys), if they are kept.
    """
    sequences, heads, tokens, width = query.shape
    shared, group = sequences * key.shape[1], heads // key.shape[1]
    # Heads that share a key stand below each other, so that no key or value is repeated.
    q = query.reshape(shared, group, tokens, width).float()
    k, v = key.reshape(shared, tokens, width).float(), value.reshape(shared, tokens, width)
    output = v.new_empty(shared, group, tokens, width)
    future = torch.full((_QUERIES, _QUERIES), -math.inf).triu_(1)
    kept = []
    with _exact_products(query.dtype):
        for start in range(0, tokens, _QUERIES):
            stop = min(start + _QUERIES, tokens)
            rows = stop - start
            probabilities = v.new_empty(shared, group * rows, stop) if keep else None
            at_a_time = max(1, _SCORES // (group * rows * stop))
            for first in range(0, shared, at_a_time):
                some = slice(first, first + at_a_time)
                queries = q[some, :, start:stop].flatten(1, 2)
                # Scores in float32: rounded to 8 bits they would be the largest error by far.
                scores = torch.baddbmm(
                    queries.new_empty(()), queries, k[some, :stop].transpose(1, 2), beta=0, alpha=scale
                )
                scores.view(-1, group, rows, stop)[..., start:].add_(future[:rows, :rows])
                shares = torch.softmax(scores, dim=-1, out=scores)
                shares = shares.to(v.dtype) if probabilities is None else probabilities[some].copy_(shares)
                output[some, :, start:stop] = torch.bmm(shares, v[some, :stop]).view(-1, group, rows, width)
            if probabilities is not None:
                kept.append(probabilities)
    return output.view(query.shape), kept


@contextlib.contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of numbers that are bfloat16 use the units for those: not a digit is lost."""
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class CausalAttention(torch.autograd.Function):
    """softmax(q kᵀ scale) v with a causal mask; heads may share keys and values in groups."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the outputs, shaped like `query`; see `attention` for the shapes."""
        output, kept = _attend(query, key, value, scale, keep=True)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        sequences, heads, tokens, width = query.shape
        shared, group = sequences * key.shape[1], heads // key.shape[1]
        q = query.reshape(shared, group, tokens, width)
        k, v = key.reshape(shared, tokens, width), value.reshape(shared, tokens, width)
        gradient = gradients[0].reshape(q.shape)
        d_query = torch.empty_like(q)
        # Keys collect from every later step: in float32, as one product over all queries would.
        d_key, d_value = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        start = 0
        for probabilities in kept:
            stop = probabilities.shape[2]
            rows = gradient[:, :, start:stop].reshape(shared, -1, width)
            queries = q[:, :, start:stop].reshape(shared, -1, width)
            d_probabilities = torch.bmm(rows, v[:, :stop].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            d_query[:, :, start:stop] = torch.bmm(d_scores, k[:, :stop]).view(shared, -1, stop - start, width)
            d_key[:, :stop] += torch.bmm(d_scores.transpose(1, 2), queries)
            d_value[:, :stop] += torch.bmm(probabilities.transpose(1, 2), rows)
            start = stop
        d_query, d_key = d_query * ctx.scale, d_key * ctx.scale
        return (
            d_query.view(query.shape),
            d_key.to(k.dtype).view(key.shape),
            d_value.to(v.dtype).view(key.shape),
            None,
        )
