import math
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aasvd import evaluate
from aasvd.artifacts import DamagedArtifactError, write_table
from aasvd.sources import SourceError

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# What each family has that the others do not, as far as the way from hidden states to logits goes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "gemma2": {"final_logit_softcapping": 0.02, "head_dim": 8},  # so low that it bends random logits
    "gemma3_text": {"head_dim": 8},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.1},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48, "do_layer_norm_before": False},
}
LINES = [
    "to open the jar turn the lid to the left",
    "to close the door push it with the hand",
    "the cat sat on the mat and looked at the door",
    "fill the jar with water and put the lid on it",
]


def _model(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Larger than the usual start, so that logits differ enough for a wrong head to show.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>")


def _ids(windows: int = 3, window: int = 17) -> torch.Tensor:
    return torch.randint(3, 300, (windows, window), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_exp_of_the_mean_loss_over_every_target(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = _model(family), _ids()
    with torch.no_grad():
        log_probabilities = model.eval()(ids, use_cache=False).logits.double().log_softmax(-1)
    expected = -torch.stack(
        [log_probabilities[w, p, ids[w, p + 1]] for w in range(3) for p in range(16)]
    ).mean()
    # Five positions at a time: chunks that do not divide a window.
    monkeypatch.setattr(evaluate, "_CHUNK_ELEMENTS", 5 * 300)
    found = evaluate.perplexity(model, ids, progress="test")
    # Float32 logits summed in another order: a few hundred eps of their size.
    assert found["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert (found["windows"], found["tokens"]) == (3, 48)


def test_decoder_runs_once_a_window_and_head_sees_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    calls, sizes = [], []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    monkeypatch.setattr(evaluate, "_CHUNK_ELEMENTS", 5 * 300)
    evaluate.perplexity(model, _ids(), progress="test")
    assert len(calls) == 3
    assert sizes == [5, 5, 5, 1] * 3


def test_model_without_a_decoder_of_its_own_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _model(), _ids()
    expected = evaluate.perplexity(model, ids, progress="test")["nll"]
    monkeypatch.setattr(evaluate, "_CHUNK_ELEMENTS", 5 * 300)
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    assert evaluate.perplexity(model, ids, progress="test")["nll"] == pytest.approx(expected, rel=1e-6)


def test_bf16_model_gets_a_float32_loss() -> None:
    model, ids = _model().to(torch.bfloat16), _ids()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = evaluate.perplexity(model, ids, progress="test")["nll"]
    # Head products of bf16 in other shapes may differ by an ulp of a logit; a bf16 loss would be off by 2⁻⁸.
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_losses_are_counted_and_leave_the_model_as_it_was(poison: float) -> None:
    model, ids = _model().train(), _ids()
    ids[ids == 250] = 249
    ids[1:, 4] = 250
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = poison
    with pytest.raises(evaluate.NonFiniteLossError, match=r"2 of 3 windows .* first window 1"):
        evaluate.perplexity(model, ids, progress="test")
    assert model.training
    assert "forward" not in vars(model.model)
    assert model(_ids()).logits.requires_grad


def test_a_wrapped_forward_of_the_decoder_is_put_back() -> None:
    model = _model()
    original = model.model.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.model.forward = wrapped
    evaluate.perplexity(model, _ids(), progress="test")
    assert model.model.forward is wrapped


def test_a_loss_without_perplexity_is_an_error() -> None:
    model = _model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    with pytest.raises(evaluate.NonFiniteLossError, match="no perplexity that large"):
        evaluate.perplexity(model, _ids(), progress="test")


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (7,)])
def test_windows_without_targets_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        evaluate.perplexity(_model(), torch.zeros(shape, dtype=torch.int64), progress="test")


def test_windows_follow_one_another_and_the_tail_is_dropped(tokenizer: Any) -> None:
    text = "\n\n".join(LINES)
    ids = tokenizer(text).input_ids
    assert len(ids) % 8
    found = evaluate.windows(text, tokenizer, window=8, windows=0)
    assert found.flatten().tolist() == ids[: len(ids) // 8 * 8]
    assert evaluate.windows(text, tokenizer, window=8, windows=2).flatten().tolist() == ids[:16]
    assert len(evaluate.windows(text, tokenizer, window=8, windows=1000)) == len(found)


def test_text_shorter_than_a_window_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="less than one window of 512"):
        evaluate.windows(LINES[0], tokenizer, window=512, windows=0)
    with pytest.raises(ValueError, match="expected at least 2"):
        evaluate.windows(LINES[0], tokenizer, window=1, windows=0)


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    rows = [
        {"goal": "open the jar", "sol1": "turn the lid to the left", "sol2": "push the door", "label": 0},
        {"goal": "close the door", "sol1": "fill it with water", "sol2": "push it", "label": 1},
        {"goal": "fill the jar", "sol1": "put water in", "sol2": "sit on the mat and look", "label": 0},
        {"goal": "look at the cat", "sol1": "open the lid", "sol2": "turn to the mat", "label": 1},
        {"goal": "sit", "sol1": "on the mat", "sol2": "in the water", "label": 0},
    ]
    path = tmp_path / "piqa.parquet"
    write_table(path, pa.Table.from_pylist(rows))
    return path


def _no_network(*_: Any) -> None:
    raise AssertionError("the network was asked")


def test_accuracy_is_that_of_the_likelier_answer_and_needs_no_network(
    piqa: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    model = _model(max_position_embeddings=128)
    hits, normalized = [], []
    for row in pa.parquet.read_table(piqa).to_pylist():
        prompt = tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
        scores = []
        for answer in (row["sol1"], row["sol2"]):
            ids = torch.tensor(tokenizer(f"Question: {row['goal']}\nAnswer: {answer}").input_ids)
            with torch.no_grad():
                steps = model.eval()(ids[None]).logits[0, :-1].log_softmax(-1)
            scores.append(float(steps[range(len(ids) - 1), ids[1:]][len(prompt) - 1 :].sum()))
        lengths = [len(row["sol1"]), len(row["sol2"])]
        hits.append((scores[1] > scores[0]) == row["label"])
        normalized.append((scores[1] / lengths[1] > scores[0] / lengths[0]) == row["label"])
    settings: dict[str, Any] = {"task": "piqa", "rows": piqa, "limit": 0, "batch_size": 2}
    found = evaluate.accuracy(model, tokenizer, **settings)
    mean = sum(hits) / 5
    assert found["acc"] == pytest.approx(mean)
    assert found["acc_norm"] == pytest.approx(sum(normalized) / 5)
    assert found["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 4))
    assert found["count"] == 5
    assert found["task_version"] == 1.0
    assert tokenizer.pad_token is None  # the caller's tokenizer is left as it was
    assert evaluate.accuracy(model, tokenizer, **settings) == found
    assert evaluate.accuracy(model, tokenizer, **settings | {"limit": 2})["count"] == 2


def test_accuracy_refuses_what_it_cannot_measure(piqa: Path, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"task": "piqa", "rows": piqa, "limit": 0, "batch_size": 2}
    with pytest.raises(ValueError, match="expected at least 0"):
        evaluate.accuracy(_model(), tokenizer, **settings | {"batch_size": 0})
    with pytest.raises(SourceError, match="not an lm-eval task"):
        evaluate.accuracy(_model(), tokenizer, **settings | {"task": "piqua"})
    piqa.write_bytes(piqa.read_bytes()[:-1])
    with pytest.raises(DamagedArtifactError, match=r"piqa\.parquet"):
        evaluate.accuracy(_model(), tokenizer, **settings)


def _rows(folder: Path, *rows: dict[str, Any]) -> Path:
    write_table(folder / "rows.parquet", pa.Table.from_pylist(list(rows)))
    return folder / "rows.parquet"


QUESTION = {"goal": "open the jar", "sol1": "turn the lid", "sol2": "push the door"}
COPA = {"premise": None, "question": "cause", "choice1": "a", "choice2": "b", "label": 0}
GENERATED = {"question": "how many jars", "answer": "#### 3"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("piqa", {"instruction": "open", "answer": "lid"}, "UndefinedError: 'goal' is undefined"),
        ("copa", COPA, "AttributeError: 'NoneType' object has no attribute 'strip'"),
        ("piqa", QUESTION, "reads column label, but its rows have goal, sol1, sol2"),
        ("piqa", QUESTION | {"label": -1}, "none of the choices in 2 of 2 rows, first -1 in row 0"),
        ("piqa", QUESTION | {"label": None}, "none of the choices in 2 of 2 rows, first None in row 0"),
        ("gsm8k", GENERATED, "measures exact_match, not accuracy"),
    ],
)
def test_rows_that_a_task_would_misread_and_metrics_it_lacks_fail_it_alone(
    task: str, row: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = _model(max_position_embeddings=128)
    model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    rows = _rows(tmp_path, row, row, row | {"label": 0})
    with pytest.raises(evaluate.MeasurementError, match=message):
        evaluate.accuracy(model, tokenizer, task=task, rows=rows, limit=2, batch_size=2)


def test_a_broken_model_has_no_accuracy(piqa: Path, tokenizer: Any) -> None:
    model = _model(max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(evaluate.MeasurementError, match="10 of 10 requests have a log likelihood that is"):
        evaluate.accuracy(model, tokenizer, task="piqa", rows=piqa, limit=0, batch_size=2)


def test_one_row_has_no_standard_error(piqa: Path, tokenizer: Any) -> None:
    model = _model(max_position_embeddings=128)
    found = evaluate.accuracy(model, tokenizer, task="piqa", rows=piqa, limit=1, batch_size=2)
    assert found["acc"] in (0.0, 1.0) and found["count"] == 1
    assert found["stderr"] is None and found["acc_norm_stderr"] is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(1, True), (2, False), (-1, False), (None, False), ("b", True), ("label", False), ([-1, 0], True)],
)
def test_an_answer_is_an_index_or_a_choice_or_several(answer: Any, expected: bool) -> None:
    assert evaluate._is_choice(answer, ["a", "b"]) == expected


def test_accuracy_under_another_filter_is_named() -> None:
    results = {"results": {"made_up": {"alias": "made_up", "acc,strict": 0.3, "acc_stderr,strict": 0.1}}}
    with pytest.raises(ValueError, match="gave acc,strict, not acc,none"):
        evaluate._accuracy_record(results, task="made_up")
