import copy
import gc
from collections.abc import Callable

import pytest
import torch
from architectures import GROUPED, tiny_config, tiny_model
from test_checkpoint import factor, pack
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    GlmConfig,
    Olmo2Config,
    OlmoConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from aasvd.formats import FORMATS, replace_linears
from aasvd.fusion import fuse
from aasvd.latents import LatentCache, cache_bytes_per_token, plan

# Of a width of 16 (32 with heads of 16).
RANK = 5


# Olmo 2's norm is one of all heads' keys; Phi rotates half of each head, StableLM a quarter.
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "phi": lambda: PhiConfig(**GROUPED, rope_parameters=rope(0.5)),
    "stablelm": lambda: StableLmConfig(**GROUPED, rope_parameters=rope(0.25)),
    "cohere": lambda: CohereConfig(**GROUPED, use_qk_norm=True),
    "glm": lambda: GlmConfig(**GROUPED, head_dim=8, rope_parameters=rope(0.5)),
}


def rope(part: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}


def other_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of an architecture that only this cache cares about, with norms that are not one."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    return model.eval()


def low_rank(name: str, rank: int = RANK, storage: str = "factors", **changes: object) -> PreTrainedModel:
    """Return a tiny model with every linear of its blocks factored; `changes` are to its config."""
    model = other_model(OTHERS[name]()) if name in OTHERS else tiny_model(name)
    if changes:
        config = tiny_config(name)
        for key, value in changes.items():
            setattr(config, key, value)
        state = model.state_dict()
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(state)
    return low_rank_of(model, rank, storage)


def low_rank_of(model: PreTrainedModel, rank: int = RANK, storage: str = "factors") -> PreTrainedModel:
    """Return a model with every linear of its blocks factored."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    ranks = dict.fromkeys(names, rank)
    state = pack(factor(model, ranks), ranks, storage, torch.float32)
    replace_linears(model, ranks, storage=storage)
    model.load_state_dict(state, strict=False)
    return model


MODELS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {},
    "opt": {},
    **{name: {} for name in OTHERS},
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return low_rank(request.param, **MODELS[request.param])


def prompts(sequences: int, tokens: int = 20) -> dict[str, torch.Tensor]:
    """Return prompts; the second is padded on its left."""
    ids = torch.randint(3, 128, (sequences, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, cache: DynamicCache, sequences: int, new: int, **arguments: object):
    return model.generate(
        **prompts(sequences), past_key_values=cache, min_new_tokens=new, max_new_tokens=new, **arguments
    )


def assert_same_tokens(model: PreTrainedModel, sequences: int, new: int) -> None:
    expected = generate(model, DynamicCache(config=model.config), sequences, new)
    assert torch.equal(generate(model, LatentCache(model), sequences, new), expected)
    assert expected.shape == (sequences, 20 + new)
    if model.config.model_type not in ("opt", "phi", "stablelm", "cohere"):  # which say one token for ever
        assert len(set(expected[0, 20:].tolist())) > 1


def test_greedy_tokens_are_those_of_the_ordinary_cache(model: PreTrainedModel) -> None:
    # OPT's positions are a table of 128.
    lengths = {"gemma3_text": 64, "opt": 64, **dict.fromkeys(OTHERS, 24)}
    assert_same_tokens(model, 2, lengths.get(model.config.model_type, 256))


def test_greedy_tokens_of_one_sequence() -> None:
    assert_same_tokens(low_rank("qwen3"), 1, 256)


@pytest.mark.parametrize(("storage", "sequences"), [*((storage, 1) for storage in FORMATS), ("pivoted", 2)])
def test_greedy_tokens_of_every_format(storage: str, sequences: int) -> None:
    """One sequence is one token at a time, for which formats have other products than for many."""
    assert_same_tokens(low_rank("llama", storage=storage), sequences, 256)


def test_bytes_are_as_counted(model: PreTrainedModel) -> None:
    counts = cache_bytes_per_token(model)
    assert counts["latents"] < counts["ordinary"]
    cache, ordinary = LatentCache(model), DynamicCache(config=model.config)
    ids = prompts(1, tokens=7)["input_ids"]  # within the sliding window of 8
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=ordinary)
    assert cache.bytes_in_use() == 7 * counts["latents"]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in ordinary.layers)
    assert held == 7 * counts["ordinary"]


def test_bytes_of_a_llama() -> None:
    # Two layers, each five latents for keys and five for values, not 16 each; 8 cosines and 8 sines.
    assert cache_bytes_per_token(low_rank("llama")) == {
        "ordinary": 2 * (16 + 16) * 4,
        "latents": (2 * (5 + 5) + 16) * 4,
    }


def test_logits_are_those_of_the_ordinary_cache_in_chunks(model: PreTrainedModel) -> None:
    cache, ordinary = LatentCache(model), DynamicCache(config=model.config)
    ids = prompts(2)["input_ids"]
    with torch.no_grad():
        for chunk in ids.split([9, 1, 1, 6, 3], dim=1):
            found = model(chunk, past_key_values=cache).logits
            expected = model(chunk, past_key_values=ordinary).logits
            # The same sums in another order, through two layers.
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sequences", [1, 2])
def test_beam_search(sequences: int) -> None:
    model = low_rank("llama")
    arguments = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, DynamicCache(config=model.config), sequences, 16, **arguments)
    assert torch.equal(generate(model, LatentCache(model), sequences, 16, **arguments), expected)


def test_prefill_by_hand_then_generate() -> None:
    """Without a mask a model gives all sequences the same positions, with one each its own."""
    model = low_rank("llama")
    ids = prompts(2)["input_ids"]
    found = []
    for cache in (DynamicCache(config=model.config), LatentCache(model)):
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        mask = torch.ones_like(ids)
        found.append(model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=32))
    assert torch.equal(*found)
    assert found[0].shape[1] > 30


def test_prompts_that_continue_a_common_one() -> None:
    model = low_rank("qwen3")
    ids = prompts(1)["input_ids"]
    continued = torch.cat([ids.repeat(4, 1), prompts(4)["input_ids"][:, :3]], dim=1)
    mask = torch.ones_like(continued)
    mask[1, 20] = 0
    found = []
    for cache in (DynamicCache(config=model.config), LatentCache(model)):
        with torch.no_grad():
            model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(4)
        found.append(model.generate(continued, attention_mask=mask, past_key_values=cache, max_new_tokens=32))
    assert torch.equal(*found)
    assert len(set(map(tuple, found[0][:, 23:].tolist()))) == 4


def test_assisted_generation_crops() -> None:
    model, assistant = low_rank("llama"), tiny_model("llama", seed=3)
    expected = generate(model, DynamicCache(config=model.config), 1, 32)
    assert torch.equal(generate(model, LatentCache(model), 1, 32, assistant_model=assistant), expected)


def test_reset_copy_and_several_caches_of_one_model() -> None:
    model = low_rank("qwen3")
    ids = prompts(2)["input_ids"]
    with torch.no_grad():
        first, second = LatentCache(model), LatentCache(model)
        model(ids[:, :8], past_key_values=first)
        model(ids[:, 3:9], past_key_values=second)
        copied = copy.deepcopy(first)
        assert copied.layers[0]._attention is model.model.layers[0].self_attn
        logits = [model(ids[:, 8:9], past_key_values=cache).logits for cache in (first, copied)]
        assert torch.equal(*logits)
        assert (first.get_seq_length(), second.get_seq_length()) == (9, 6)
        second.reset()
        assert second.bytes_in_use() == 0
        model(ids[:, :8], past_key_values=second)
        assert torch.equal(model(ids[:, 8:9], past_key_values=second).logits, logits[0])


def test_fused_linears() -> None:
    model = low_rank("llama")
    expected = generate(model, DynamicCache(config=model.config), 2, 64)
    fuse(model)
    assert torch.equal(generate(model, LatentCache(model), 2, 64), expected)


def test_hooks_go_with_the_cache() -> None:
    model = low_rank("llama")
    attention = model.model.layers[0].self_attn
    cache = LatentCache(model)
    assert attention._forward_pre_hooks and attention.k_proj._forward_pre_hooks
    del cache
    gc.collect()
    assert not attention._forward_pre_hooks and not attention.k_proj._forward_pre_hooks


def test_layers_decide_for_themselves() -> None:
    reasons = [decision.reason for decision in plan(low_rank("gemma3"))]
    assert reasons == ["sliding window", "", "sliding window"]
    model = low_rank("llama")
    full = tiny_model("llama").model.layers[1].self_attn
    model.model.layers[1].self_attn.k_proj = full.k_proj
    decisions = plan(model)
    assert [(d.keys, d.values, d.width, d.saves) for d in decisions] == [(5, 5, 16, True), (16, 5, 16, True)]
    expected = generate(model, DynamicCache(config=model.config), 2, 64)
    assert torch.equal(generate(model, LatentCache(model), 2, 64), expected)


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("mistral", RANK, "saves nothing for MistralForCausalLM: sliding window"),
        ("llama", 16, "saves nothing for LlamaForCausalLM: no rank is below the width"),
        # 4 * 15 latents and 16 cosines and sines are more than 4 * 16.
        ("llama", 15, "takes 304 bytes per token, the ordinary one 256"),
        ("phi3", RANK, "Phi3ForCausalLM has 0 attention modules with k_proj and v_proj for 2 layers"),
        ("gpt_neox", RANK, "GPTNeoXForCausalLM has 0 attention modules"),
    ],
)
def test_where_it_does_not_apply(name: str, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentCache(low_rank(name, rank))


def test_attention_that_is_not_known() -> None:
    model = low_rank("llama")
    cache = LatentCache(model)
    # An attention module that scales its keys, as some do.
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _m, _i, output: 2 * output)
    with pytest.raises(ValueError, match="LlamaAttention makes its keys or values in a way that"):
        model(prompts(1)["input_ids"], past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, 2])
def test_attention_without_rotary_embedding_in_a_model_that_has_one(tokens: int) -> None:
    """A lone first token is not rotated, so the check waits for the next."""
    config = SmolLM3Config(**GROUPED, no_rope_layers=[1, 0])
    model = low_rank_of(other_model(config))
    with pytest.raises(ValueError, match="SmolLM3Attention makes its keys or values in a way that"):
        model.generate(
            prompts(1, tokens)["input_ids"],
            past_key_values=LatentCache(model),
            max_new_tokens=3,
            do_sample=False,
        )


class OwnAttention(LlamaAttention):
    """Of a module that has no rotary embedding to redo what the inherited code does."""


class OddNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_attention_without_its_own_rotary_embedding() -> None:
    model = low_rank("llama")
    model.model.layers[0].self_attn.__class__ = OwnAttention
    with pytest.raises(ValueError, match="OwnAttention makes its keys or values in a way that"):
        model(prompts(1)["input_ids"], past_key_values=LatentCache(model))


def test_norm_of_neither_a_head_nor_all() -> None:
    model = low_rank("qwen3")
    model.model.layers[1].self_attn.k_norm = OddNorm()
    with pytest.raises(ValueError, match="Qwen3Attention makes its keys or values in a way that"):
        model(prompts(1)["input_ids"], past_key_values=LatentCache(model))


@pytest.mark.parametrize("embeddings", [torch.ones(1, 20, 8), (torch.ones(3, 1, 20, 8),) * 2])
def test_rotary_embeddings_of_another_form(embeddings: object) -> None:
    """One complex tensor as in Llama 4, or several kinds of positions as in models of images."""
    model = low_rank("llama")
    layer = LatentCache(model).layers[0]
    layer._embeddings = embeddings
    with pytest.raises(ValueError, match="LlamaAttention makes its keys or values in a way that"):
        layer.update(torch.ones(1, 2, 20, 8), torch.ones(1, 2, 20, 8))


def test_clipped_keys_are_refused() -> None:
    config = OlmoConfig(**GROUPED, clip_qkv=3.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="saves nothing for OlmoForCausalLM: clipped keys and values"):
        LatentCache(model)


def test_cache_of_another_model() -> None:
    cache = LatentCache(low_rank("llama"))
    with pytest.raises(ValueError, match="is not of the model that this LatentCache was made for"):
        low_rank("llama")(prompts(1)["input_ids"], past_key_values=cache)
