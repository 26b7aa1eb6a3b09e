from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aasvd.artifacts import verify
from aasvd.calibration import read_tokens, sample, token_ids, write_tokens

WORDS = [f"w{number}" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word n has id n + 2; the tokenizer puts its own <s> (id 1) in front of a text."""
    vocabulary = {"<unk>": 0, "<s>": 1} | {word: number + 2 for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def _sample(tokenizer: Any, **changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "sequences": 4, "tokens": 9, "sampling": "random", "seed": 3, "vocabulary": 202,
    }  # fmt: skip
    return sample(" ".join(WORDS), tokenizer, **arguments | changes)


def test_text_is_tokenized_whole_with_one_start_token(tokenizer: Any) -> None:
    assert token_ids("w0 w5 nonsense", tokenizer).tolist() == [1, 2, 7, 0]
    table = pa.table({"text": ["w0 w1", "", "w2"]})
    arguments: dict[str, Any] = {"sequences": 1, "tokens": 4, "seed": 0, "vocabulary": 202}
    assert sample(table, tokenizer, sampling="sequential", **arguments).tolist() == [[1, 2, 3, 4]]


def test_sequential_windows_are_the_text_in_order(tokenizer: Any) -> None:
    tokens = _sample(tokenizer, sampling="sequential")
    assert tokens.dtype == torch.int64
    assert tokens.flatten().tolist() == list(range(1, 37))


@pytest.mark.parametrize("sequences", [1, 4, 22])
def test_random_windows_are_runs_of_the_text_that_never_overlap(tokenizer: Any, sequences: int) -> None:
    tokens = _sample(tokenizer, sequences=sequences)
    assert tokens.shape == (sequences, 9)
    assert (tokens.diff(dim=1) == 1).all()  # ids follow one another in this text
    assert len(tokens.unique()) == tokens.numel()


def test_random_windows_depend_on_the_seed_alone(tokenizer: Any) -> None:
    torch.manual_seed(7)
    first = _sample(tokenizer)
    state = torch.get_rng_state()
    assert torch.equal(first, _sample(tokenizer))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, _sample(tokenizer, seed=4))


def test_random_windows_can_start_anywhere(tokenizer: Any) -> None:
    starts = {int(_sample(tokenizer, sequences=1, tokens=199, seed=seed)[0, 0]) for seed in range(40)}
    assert starts == {1, 2, 3}


def test_a_text_of_exactly_the_right_length_is_used_whole(tokenizer: Any) -> None:
    tokens = _sample(tokenizer, sequences=67, tokens=3)
    assert tokens.flatten().sort().values.tolist() == list(range(1, 202))


def test_short_text_says_what_there_is_and_what_was_asked(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"has 201 tokens, but 30 sequences of 9 need 270"):
        _sample(tokenizer, sequences=30)


def test_id_outside_the_vocabulary_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"token id 201 \('w199'\) is outside the model's vocabulary of 201"):
        _sample(tokenizer, vocabulary=201)


@pytest.mark.parametrize("changes", [{"sequences": 0}, {"tokens": 0}, {"sampling": "shuffled"}])
def test_bad_arguments_are_refused(tokenizer: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        _sample(tokenizer, **changes)


def test_tokens_survive_as_checksummed_int32(tmp_path: Path) -> None:
    # Above 65,535, where 16 bits would wrap silently.
    tokens = torch.tensor([[0, 65_541, 128_001], [7, 2**31 - 1, 3]])
    path = tmp_path / "tokens.parquet"
    write_tokens(path, tokens)
    verify(path)
    assert pq.read_schema(path).field("tokens").type == pa.list_(pa.int32())
    assert torch.equal(read_tokens(path), tokens)
    assert read_tokens(path).dtype == torch.int64


@pytest.mark.parametrize("bad", [-1, 2**31])
def test_ids_that_int32_cannot_hold_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(ValueError, match=str(bad)):
        write_tokens(tmp_path / "tokens.parquet", torch.tensor([[1, bad]]))
    assert not list(tmp_path.iterdir())
