"""Turn text into windows of token ids: the calibration sample, and the ids that evaluation cuts too."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from aasvd.artifacts import read_table, write_table
from aasvd.sources import document_text


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """Tokenize a whole text once, with whatever special tokens the tokenizer itself adds at its ends.

    Args:
        text: The whole text.
        tokenizer: A transformers tokenizer.

    Returns:
        The ids, int64, shape (tokens of the text,).
    """
    # verbose=False: the text is longer than the model's window on purpose, and is cut afterwards.
    ids = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def sample(
    text: pa.Table | str,
    tokenizer: Any,
    *,
    sequences: int,
    tokens: int,
    sampling: Literal["random", "sequential"],
    seed: int,
    vocabulary: int,
) -> Tensor:
    """Cut windows of token ids out of a text that was tokenized whole.

    `sequential` takes the first windows, in order. `random` takes windows at random places that never
    overlap, in random order: an activation that is counted twice weighs twice in a covariance and adds
    nothing to it, and both samplings then need the same length of text.

    Args:
        text: A text, or a table of its documents (joined as `document_text` does).
        tokenizer: A transformers tokenizer.
        sequences: Number of windows.
        tokens: Length of a window.
        sampling: "random" or "sequential".
        seed: Seed of the generator that places and orders random windows.
        vocabulary: Number of rows of the model's embedding; every id must be below it.

    Returns:
        The windows, int64, shape (sequences, tokens).

    Raises:
        ValueError: If the text is too short, an id is outside the vocabulary, or an argument is out of range.
    """
    if sequences < 1 or tokens < 1:
        raise ValueError(f"sequences {sequences} and tokens {tokens}: expected both to be at least 1")
    ids = token_ids(document_text(text) if isinstance(text, pa.Table) else text, tokenizer)
    check_vocabulary(ids, tokenizer, vocabulary=vocabulary)
    spare = len(ids) - sequences * tokens
    if spare < 0:
        raise ValueError(
            f"the calibration text has {len(ids):,} tokens, but {sequences} sequences of {tokens} need "
            f"{sequences * tokens:,}: lower calibration.sequences or calibration.tokens, or use a longer text"
        )
    starts = torch.arange(sequences) * tokens
    if sampling == "random":
        generator = torch.Generator().manual_seed(seed)
        # Windows side by side, with the spare tokens shared out at random between them.
        starts += torch.randint(spare + 1, (sequences,), generator=generator).sort().values
        starts = starts[torch.randperm(sequences, generator=generator)]
    elif sampling != "sequential":
        raise ValueError(f"sampling {sampling!r}: expected 'random' or 'sequential'")
    return ids[starts[:, None] + torch.arange(tokens)]


def check_vocabulary(ids: Tensor, tokenizer: Any, *, vocabulary: int) -> None:
    """Check that every id has a row in the model's embedding.

    Raises:
        ValueError: If one has none; the message names the largest such id and its token.
    """
    if ids.numel() and (largest := int(ids.max())) >= vocabulary:
        raise ValueError(
            f"token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is outside the model's "
            f"vocabulary of {vocabulary}: tokenizer and model do not belong together"
        )


def write_tokens(path: Path, tokens: Tensor) -> None:
    """Write windows of ids as a Parquet artifact: a row per sequence, a column `tokens` of int32 lists."""
    # Not through numpy's silent narrowing: an id that int32 cannot hold is an error.
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**31:
        raise ValueError(f"token ids from {int(tokens.min())} to {int(tokens.max())} do not fit into int32")
    flat = pa.array(tokens.cpu().to(torch.int32).contiguous().numpy().reshape(-1))
    offsets = pa.array(np.arange(len(tokens) + 1, dtype=np.int32) * tokens.shape[1])
    write_table(path, pa.table({"tokens": pa.ListArray.from_arrays(offsets, flat)}))


def read_tokens(path: Path) -> Tensor:
    """Verify and read windows of ids, int64, shape (sequences, tokens)."""
    column = read_table(path)["tokens"].combine_chunks()
    flat = torch.from_numpy(column.flatten().to_numpy().astype(np.int64))
    return flat.view(len(column), -1)
