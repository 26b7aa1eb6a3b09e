"""Own scoring of lm-eval's requests against lm-eval's own, and against plain forward passes."""

import random
from typing import Any

import pytest
import torch
from architectures import TINY, tiny_model
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aasvd.harness import Group, Request, SharedPrefixLM, batches, grouped

Texts = tuple[str, str]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    pieces = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="w0", bos_token="w1", eos_token="w2")


def requests(*, examples: int = 7, seed: int = 0) -> list[tuple[Texts, list[int], list[int]]]:
    """Return requests as lm-eval makes them: a few answers per question, some with answers of one token."""
    chance = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [chance.randrange(3, 128) for _ in range(chance.randint(low, high))]

    found: list[tuple[Texts, list[int], list[int]]] = []
    for number in range(examples):
        context = some(1, 40)
        for _ in range(chance.randint(2, 5)):
            found.append((("", ""), context, some(1, 9) if number % 2 else some(1, 1)))
        # As in winogrande: the same continuation after beginnings that part at the end.
        end = some(3, 8)
        found += [(("", ""), [*context, word], end) for word in (5, 6)]
    found.append((("", ""), [1], some(30, 30)))  # no shared beginning, a long continuation
    found.append((("", ""), some(90, 90), some(9, 9)))  # too long for the model below
    chance.shuffle(found)
    return found


def wrapper(kind: type[HFLM], model: Any, tokenizer: Any, *, batch: int = 6) -> HFLM:
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=64)


@pytest.mark.parametrize("name", TINY)
def test_scores_are_those_of_lm_eval(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, asked = tiny_model(name), requests()
    expected = wrapper(HFLM, model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    found = wrapper(SharedPrefixLM, model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # Sums of up to 30 float32 log likelihoods, from products of other shapes.
    assert [score for score, _ in found] == pytest.approx(
        [score for score, _ in expected], rel=1e-5, abs=1e-4
    )


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_scores_do_not_depend_on_the_batch(batch: int, tokenizer: PreTrainedTokenizerFast) -> None:
    model, asked = tiny_model("llama"), requests(seed=1)
    expected = wrapper(SharedPrefixLM, model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    found = wrapper(SharedPrefixLM, model, tokenizer, batch=batch)._loglikelihood_tokens(asked, True)
    assert [score for score, _ in found] == pytest.approx(
        [score for score, _ in expected], rel=1e-5, abs=1e-4
    )


def test_the_greedy_continuation_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    context = list(range(10, 22))
    ids = torch.tensor([context])
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    best = ids[0, len(context) :].tolist()
    other = [*best[:2], (best[2] + 1) % 128]
    asked: list[tuple[Texts, list[int], list[int]]] = [(("", ""), context, end) for end in (best, other)]
    (one, greedy), (two, not_greedy) = wrapper(SharedPrefixLM, model, tokenizer)._loglikelihood_tokens(
        asked, True
    )
    assert greedy and not not_greedy and one > two


def test_a_question_is_run_once_and_the_head_sees_answers_only(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    question = list(range(10, 40))
    asked: list[tuple[Texts, list[int], list[int]]] = [(("", ""), question, [n, 9]) for n in range(4)]
    shapes, heads = [], []
    model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
    wrapper(SharedPrefixLM, model, tokenizer)._loglikelihood_tokens(asked, True)
    assert shapes == [(1, 29), (4, 2)]  # the question's last token predicts the answers' first
    assert heads == [2]


def test_likelihoods_that_are_not_finite_are_counted_and_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    context = list(range(10, 22))
    asked: list[tuple[Texts, list[int], list[int]]] = [
        (("", ""), context, end) for end in ([3, 4], [7, 4], [4, 7], [5])
    ]
    # The model reads 7 in the second only: a last token is only predicted.
    with pytest.raises(ValueError, match="1 of 4 requests have a log likelihood that is not finite"):
        wrapper(SharedPrefixLM, model, tokenizer)._loglikelihood_tokens(asked, True)


def as_request(number: int, context: list[int], continuation: list[int]) -> Request:
    return Request(number, [*context, *continuation][:-1], continuation)


def test_groups_hold_every_request_once_and_share_what_they_say() -> None:
    asked = [as_request(n, c, e) for n, (_, c, e) in enumerate(requests(examples=30))]
    groups = grouped(asked, largest=6)
    assert sorted(r.number for g in groups for r in g.requests) == list(range(len(asked)))
    for shared, members in groups:
        assert len(members) <= 6
        assert len({tuple(r.tokens[:shared]) for r in members}) == 1
        assert all(shared <= r.start for r in members)
    plain = sum(len(r.tokens) for r in asked)
    assert sum(g.shared + sum(len(r.tokens) - g.shared for r in g.requests) for g in groups) < 0.7 * plain


def test_examples_that_merely_begin_alike_stay_apart() -> None:
    beginning = list(range(10, 19))
    asked = [
        as_request(4 * question + answer, [*beginning, *range(20 + question, 60 + question)], [3, answer])
        for question in range(5)
        for answer in range(4)
    ]
    assert [len(group.requests) for group in grouped(asked, largest=32)] == [4] * 5


def test_batches_are_bounded_and_lose_nothing() -> None:
    groups = [Group(0, [Request(n, [1] * 50, [1] * 50)]) for n in range(10)]
    found = list(batches(groups, size=4, vocabulary=100))
    assert [len(batch) for batch in found] == [4, 4, 2]
    # 50 positions of a vocabulary of 2^21 are 2^26.6 elements: two at a time.
    assert [len(batch) for batch in batches(groups, size=4, vocabulary=2**21)] == [2] * 5
