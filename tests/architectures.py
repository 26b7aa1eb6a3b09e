"""Tiny random models of every architecture that the package is tested on."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

# Width, heads and so on as the Llama-like configs name them; two key-value heads for four query heads.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**GROUPED, tie_word_embeddings=False)


def _mistral() -> PreTrainedConfig:
    """A window of 8 tokens, shorter than the sequences of the tests."""
    return MistralConfig(**GROUPED, sliding_window=8, tie_word_embeddings=False)


def _qwen2() -> PreTrainedConfig:
    """Biases on q, k and v; tied embeddings, as in the small models of the family."""
    return Qwen2Config(**GROUPED, tie_word_embeddings=True)


def _qwen3() -> PreTrainedConfig:
    """Norms on queries and keys, and heads whose width is not hidden_size / heads."""
    return Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=False)


def _gemma3() -> PreTrainedConfig:
    """Sliding and full attention in turn, with their own rotary frequencies; tied embeddings."""
    return Gemma3TextConfig(
        **{**GROUPED, "num_hidden_layers": 3},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    )


def _phi3() -> PreTrainedConfig:
    """Fused qkv_proj and gate_up_proj."""
    return Phi3Config(**GROUPED, tie_word_embeddings=False)


def _opt() -> PreTrainedConfig:
    """Biases everywhere, learned positions, tied embeddings."""
    return OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dropout=0.0,
    )


def _gpt_neox() -> PreTrainedConfig:
    """Fused query_key_value, biases, attention and feed-forward side by side."""
    return GPTNeoXConfig(**SIZES, tie_word_embeddings=False)


def _mamba() -> PreTrainedConfig:
    """No attention, and a linear whose weight the block reads without calling it."""
    return MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=8)


def _mixtral() -> PreTrainedConfig:
    """Four experts, each stored by itself and held in one parameter of all, which stays dense."""
    return MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)


TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}
# Beside transformers, for what does not concern all that is said of those.
UNUSUAL: dict[str, Callable[[], PreTrainedConfig]] = {"mamba": _mamba, "mixtral": _mixtral}


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the tiny config of an architecture."""
    return (TINY | UNUSUAL)[name]()


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model whose weights depend on nothing but the seed, in evaluation mode.

    Matrices keep the scale of what passes through them; biases are not zero and norms not one, so that a
    forgotten one shows.
    """
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise.to(dtype))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears inside the decoder blocks, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
