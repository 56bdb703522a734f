"""Tokenised training data: rows of one length in two flat files, which every rank maps and none holds.

Documents follow each other, each ended by the tokenizer's end token, and are cut into rows; what is left over at the end of the
file makes no row. A conversation goes through the tokenizer's chat template, which ends it itself. Beside each token stands
whether it is to be predicted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from shardwise.errors import ConfigurationError, DataError
from shardwise.training.loss import IGNORED
from shardwise.training.records import Record, read_records

_FORMAT: Final = 1
_TOKENS, _TARGETS, _META = "tokens.bin", "targets.bin", "meta.json"
_TOKEN_TYPE: Final = np.dtype("<u4")
_CHUNK_BYTES: Final = 1 << 20
# With which a chat template marks what the assistant says; see `return_assistant_tokens_mask` of transformers.
_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What tokenised data holds.

    Args:
        rows: Of `block_size` tokens each.
        block_size: Tokens of a row.
        documents: Texts and conversations.
        left_over: Tokens at the end that make no row.
        largest: Highest token id.
        loss_on: `all` or `assistant`: which tokens of conversations are predicted.
        digest: Of tokens and targets.
    """

    rows: int
    block_size: int
    documents: int
    left_over: int
    largest: int
    loss_on: str
    digest: str


class TokenRows:
    """Rows of tokens, mapped from files.

    Args:
        directory: As `tokenise` left it.
    """

    def __init__(self, directory: Path) -> None:
        try:
            meta = json.loads((directory / _META).read_text(encoding="utf-8"))
            self.summary = DataSummary(**meta["summary"])
            shape = (self.summary.rows, self.summary.block_size)
            self._tokens = np.memmap(directory / _TOKENS, dtype=_TOKEN_TYPE, mode="r", shape=shape)
            self._targets = np.memmap(directory / _TARGETS, dtype=np.bool_, mode="r", shape=shape)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{directory}: expected tokenised data, on a file system that all ranks share: {error}"
            ) from error

    def batch(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and labels of some rows, `[rows, tokens]` each, as int64."""
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64))
        targets = torch.from_numpy(np.array(self._targets[rows]))
        return tokens, torch.where(targets, tokens, IGNORED)

    @property
    def predict_any(self) -> bool:
        """Whether a token of any row is predicted."""
        return bool(self._targets[:, 1:].any())

    def predicted(self, rows: list[int]) -> int:
        """Return how many tokens of some rows are predicted; the first of a row is not."""
        return int(self._targets[rows, 1:].sum())


def tokenise(
    path: Path, directory: Path, tokenizer: Any, *, block_size: int, loss_on: str, step: Callable[[], None]
) -> Path:
    """Tokenise a file, unless that was done before with the same tokenizer and options.

    Args:
        path: As `read_records` takes it.
        directory: Where tokenised data is kept; made where it is missing.
        tokenizer: Of transformers.
        block_size: Tokens of a row.
        loss_on: `auto`, `all` or `assistant`, for conversations.
        step: Called from time to time.

    Returns:
        The directory inside `directory` that holds the rows.

    Raises:
        DataError: The file, or a line of it, cannot be used; or it makes no row, or none with a token to predict.
        ConfigurationError: `assistant` is wanted of a template that does not mark what the assistant says.
    """
    key = _key_of(path, tokenizer, block_size=block_size, loss_on=loss_on, step=step)
    final = directory / key
    if final.is_dir():
        with suppress(DataError):
            TokenRows(final)
            return final
        shutil.rmtree(final)
    unfinished = directory / f".{key}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    summary = _write(path, unfinished, tokenizer, block_size=block_size, loss_on=loss_on, step=step)
    if not summary.rows:
        raise DataError(
            f"{path}: expected at least one row of {block_size} tokens, got {summary.left_over} tokens in all. Use more text or a "
            "shorter --block-size."
        )
    if not TokenRows(unfinished).predict_any:
        raise DataError(
            f"{path}: expected tokens to predict, got none: the template marks nothing in these conversations as said by the assistant. "
            "Look at the roles, or use --loss-on all."
        )
    os.replace(unfinished, final)
    return final


def _write(
    path: Path, directory: Path, tokenizer: Any, *, block_size: int, loss_on: str, step: Callable[[], None]
) -> DataSummary:
    encode = _Encoder(tokenizer, loss_on=loss_on)
    digest = hashlib.sha256(f"{block_size}".encode())
    count = documents = largest = 0
    with (directory / _TOKENS).open("wb") as tokens, (directory / _TARGETS).open("wb") as targets:
        for record in read_records(path):
            ids, mask = encode(record)
            ids_bytes, mask_bytes = ids.astype(_TOKEN_TYPE).tobytes(), mask.tobytes()
            tokens.write(ids_bytes)
            targets.write(mask_bytes)
            digest.update(ids_bytes)
            digest.update(mask_bytes)
            count += len(ids)
            documents += record.ends
            largest = max(largest, int(ids.max(initial=0)))
            step()
        rows, left_over = divmod(count, block_size)
        tokens.truncate(rows * block_size * _TOKEN_TYPE.itemsize)
        targets.truncate(rows * block_size)
    summary = DataSummary(
        rows=rows,
        block_size=block_size,
        documents=documents,
        left_over=left_over,
        largest=largest,
        loss_on=encode.loss_on,
        digest=digest.hexdigest(),
    )
    (directory / _META).write_text(
        json.dumps({"summary": asdict(summary)}, indent=2) + "\n", encoding="utf-8"
    )
    return summary


class _Encoder:
    """From a record to its tokens, and to whether each is predicted."""

    def __init__(self, tokenizer: Any, *, loss_on: str) -> None:
        self._tokenizer = tokenizer
        self._end: int | None = tokenizer.eos_token_id
        self._loss_on = loss_on
        self._marks: bool | None = None

    @property
    def loss_on(self) -> str:
        """Which tokens of conversations were predicted."""
        return "assistant" if self._marks else "all"

    def __call__(self, record: Record) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if record.messages is not None:
            return self._conversation(record)
        # Not verbose: it warns of texts that are longer than the model's context, which rows are not.
        made = self._tokenizer(record.text, add_special_tokens=record.starts, verbose=False)["input_ids"]
        if record.ends and self._end is not None and (not made or made[-1] != self._end):
            made = [*made, self._end]
        ids = np.asarray(made, dtype=np.int64)
        return ids, np.ones(len(ids), dtype=np.bool_)

    def _conversation(self, record: Record) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if self._marks is None:
            self._marks = self._are_marked(record.where)
        try:
            made = self._tokenizer.apply_chat_template(
                record.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=self._marks
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise DataError(
                f"{record.where}: expected a conversation that the tokenizer's chat template takes: {type(error).__name__}: {error}"
            ) from error
        ids = np.asarray(made["input_ids"], dtype=np.int64)
        if not self._marks:
            return ids, np.ones(len(ids), dtype=np.bool_)
        return ids, np.asarray(made["assistant_masks"], dtype=np.bool_)

    def _are_marked(self, where: str) -> bool:
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(
                f"{where}: expected a text, or a tokenizer with a chat template, got messages for a tokenizer without one. Use a "
                "model with a template (an instruct model), or write the conversations out as text."
            )
        marked = _GENERATION.search(self._tokenizer.get_chat_template()) is not None
        if self._loss_on == "assistant" and not marked:
            raise ConfigurationError(
                "loss_on: expected a chat template that marks what the assistant says ({% generation %}), got one that does not. "
                "Use --loss-on all."
            )
        return marked and self._loss_on != "all"


def _key_of(path: Path, tokenizer: Any, *, block_size: int, loss_on: str, step: Callable[[], None]) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {block_size} {loss_on} {path.suffix.lower()} ".encode())
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                step()
    except OSError as error:
        raise DataError(f"{path}: expected a file of training data: {error}") from error
    for name, text in _files_of(tokenizer):
        digest.update(f" {name} ".encode())
        digest.update(text)
    return digest.hexdigest()[:16]


def _files_of(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                yield path.name, path.read_bytes()
