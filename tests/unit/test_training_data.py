"""Training data: documents, rows that are mapped, and their order."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigurationError, DataError
from shardwise.training import records
from shardwise.training.loss import IGNORED, summed_loss
from shardwise.training.order import DataOrder, part_of
from shardwise.training.records import read_records
from shardwise.training.tokens import TokenRows, tokenise
from tests.distributed.training import MARKING, byte_tokenizer

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
TALK = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}]}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def rows_of(path: Path, folder: Path, *, template: str | None = None, **options: Any) -> TokenRows:
    tokenizer = byte_tokenizer(template=template)
    given = {"block_size": 4, "loss_on": "auto", "step": lambda: None, **options}
    return TokenRows(tokenise(path, folder / "data", tokenizer, **given))


def text_of(data: TokenRows) -> str:
    tokens, _ = data.batch(list(range(data.summary.rows)))
    return str(byte_tokenizer().decode(tokens.flatten()))


def test_documents_follow_each_other_in_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"text": "abc"}, "", {"text": "defgh"}, {"text": "i"})
    data = rows_of(path, tmp_path)
    assert text_of(data) == "abc<end>defgh<end>i<end>"
    assert (data.summary.documents, data.summary.rows, data.summary.left_over) == (3, 3, 0)
    tokens, labels = data.batch([1, 0])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, labels)
    assert data.predicted([0, 2]) == 6  # the first token of a row is predicted by nobody


def test_what_is_left_over_makes_no_row(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("abcdefgh\nij")
    data = rows_of(path, tmp_path)
    assert text_of(data) == "abcdefgh\nij<end>"
    assert rows_of(path, tmp_path, block_size=5).summary.left_over == 2
    with pytest.raises(DataError, match="at least one row of 13 tokens, got 12 tokens in all"):
        rows_of(path, tmp_path, block_size=13)


def test_a_long_text_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.txt"
    path.write_text("ab\ncd\nef\ngh\n")
    monkeypatch.setattr(records, "_MOST_CHARACTERS", 5)
    parts = list(read_records(path))
    assert [(p.text, p.where, p.starts, p.ends) for p in parts] == [
        ("ab\ncd\n", f"{path}:1", True, False),
        ("ef\ngh\n", f"{path}:3", False, True),
    ]
    assert text_of(rows_of(path, tmp_path, block_size=13)) == "ab\ncd\nef\ngh\n<end>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "expected a JSON object"),
        (b"[1]", 'expected {"text"'),
        (b'{"text": 1}', 'expected {"text"'),
        (b'{"text": "a", "messages": []}', 'expected {"text"'),
        (b'{"messages": []}', 'expected {"text"'),
        (b'{"messages": [{"content": "a"}]}', 'expected {"text"'),
        (b'{"messages": [{"role": "user"}]}', 'expected {"text"'),
        (b'{"text": "\xff"}', "expected UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: expected a file of training data"):
        rows_of(tmp_path / "none.txt", tmp_path)


def test_assistant_tokens_are_predicted_where_the_template_marks_them(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", TALK)
    data = rows_of(path, tmp_path, template=MARKING, block_size=24)
    assert data.summary.loss_on == "assistant"
    tokens, labels = data.batch([0])
    predicted = tokens[labels != IGNORED]
    assert byte_tokenizer().decode(tokens[0]) == "<user>ab|<assistant>xyz|"
    assert byte_tokenizer().decode(predicted) == "xyz|"
    assert data.predicted([0]) == 4
    assert rows_of(path, tmp_path, template=MARKING, loss_on="all").summary.loss_on == "all"
    assert rows_of(path, tmp_path, template=PLAIN).summary.loss_on == "all"
    with pytest.raises(ConfigurationError, match=r"marks what the assistant says .* Use --loss-on all"):
        rows_of(path, tmp_path, template=PLAIN, loss_on="assistant")


def test_conversations_without_a_token_to_predict_are_refused(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "ab" * 20}]
    path = written(tmp_path / "d.jsonl", {"messages": asked})
    with pytest.raises(DataError, match=r"d\.jsonl: expected tokens to predict, got none: .* --loss-on all"):
        rows_of(path, tmp_path, template=MARKING)
    assert rows_of(path, tmp_path, template=MARKING, loss_on="all").predict_any
    called = [*asked, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert len(list(read_records(written(path, {"messages": called})))) == 1


def test_a_conversation_that_cannot_be_written_out_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", TALK)
    with pytest.raises(DataError, match=r"d\.jsonl:1: expected a text, or a tokenizer with a chat template"):
        rows_of(path, tmp_path)
    with pytest.raises(DataError, match=r"d\.jsonl:1: expected a conversation .* no system"):
        rows_of(path, tmp_path, template="{{ raise_exception('no system') }}")


def test_a_file_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "d.jsonl", {"text": "abcdefgh"})
    first = rows_of(path, tmp_path)
    monkeypatch.setattr("shardwise.training.tokens.read_records", lambda path: pytest.fail("read again"))
    assert rows_of(path, tmp_path).summary == first.summary
    monkeypatch.undo()
    (kept,) = (tmp_path / "data").iterdir()
    (kept / "tokens.bin").write_bytes(b"cut short")
    assert text_of(rows_of(path, tmp_path)) == "abcdefgh"
    written(path, {"text": "other and longer"})
    assert rows_of(path, tmp_path).summary.digest != first.summary.digest


@given(
    rows=st.integers(1, 60),
    parts=st.integers(1, 3),
    seed=st.integers(0, 5),
    start=st.integers(0, 40),
)
def test_the_order_is_a_function_of_seed_step_and_batch_alone(
    rows: int, parts: int, seed: int, start: int
) -> None:
    batch = 4 * parts
    if rows < batch:
        with pytest.raises(DataError, match="at least one step's rows"):
            DataOrder(rows=rows, batch_size=batch, seed=seed)
        return
    order = DataOrder(rows=rows, batch_size=batch, seed=seed)
    steps = list(islice(order.from_step(0), start + 3))
    assert (
        list(islice(DataOrder(rows=rows, batch_size=batch, seed=seed).from_step(start), 3)) == steps[start:]
    )
    for ranks in (1, 2, 4):
        dealt = [
            [row for rank in range(ranks) for row in part_of(step, rank=rank, ranks=ranks)] for step in steps
        ]
        assert dealt == steps
    epoch = [row for step in steps[: order.steps_of_epoch] for row in step]
    assert len(set(epoch)) == len(epoch)
    assert set(epoch) <= set(range(rows))


def test_epochs_and_seeds_differ_in_order() -> None:
    order = DataOrder(rows=64, batch_size=64, seed=1)
    first, second = islice(order.from_step(0), 2)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert next(DataOrder(rows=64, batch_size=64, seed=2).from_step(0)) != first


def test_the_loss_is_the_sum_of_what_transformers_takes_the_mean_of() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, dtype=torch.bfloat16), torch.randint(0, 7, (2, 5))
    labels[0, :3] = IGNORED
    mean = ForCausalLMLoss(logits, labels, vocab_size=7)
    assert summed_loss(logits, labels).item() == pytest.approx(mean.item() * 6, rel=1e-6)
    labels.fill_(IGNORED)
    assert summed_loss(logits, labels).item() == 0
