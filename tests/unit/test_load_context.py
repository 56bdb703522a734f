"""Contexts around a plain `from_pretrained`: the environment, and ranks that stay empty."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import shardwise as sw
from shardwise.errors import ConfigurationError
from shardwise.strategies.load_context import unchanged_environment
from shardwise.strategies.pretrained import plain_load_context

FLAGS = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
by_enabled = pytest.mark.parametrize("enabled", [True, False])


def flags() -> list[str | None]:
    return [os.environ.get(flag) for flag in FLAGS]


def set_flags(monkeypatch: pytest.MonkeyPatch, values: list[str | None]) -> None:
    for flag, value in zip(FLAGS, values, strict=True):
        if value is None:
            monkeypatch.delenv(flag, raising=False)
        else:
            monkeypatch.setenv(flag, value)


@pytest.fixture(autouse=True)
def _unset() -> Iterator[None]:
    """Begin without the flags and `LOCAL_RANK`, and undo what a test sets past `monkeypatch`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*FLAGS, "LOCAL_RANK"):
            patch.setenv(name, "")  # noted as ours even where it was not set, so that the end removes it
            del os.environ[name]
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a checkpoint of a tiny model."""
    config = transformers.Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    path: Path = tmp_path_factory.mktemp("tiny")
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


class Recording(transformers.Qwen3ForCausalLM):
    """Says what the flags were while it was built."""

    seen: list[list[str | None]] = []  # noqa: RUF012 - emptied by each test that reads it

    def __init__(self, config: transformers.Qwen3Config) -> None:
        super().__init__(config)
        self.seen.append(flags())


def load(directory: str) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return model


def on_meta(model: nn.Module) -> set[bool]:
    return {parameter.is_meta for parameter in model.parameters()}


# --- the environment flags ---


@by_enabled
def test_the_flags_are_set_during_from_pretrained(directory: str, enabled: bool) -> None:
    Recording.seen.clear()
    with sw.fsdp_pretrained_load_context(enabled):
        Recording.from_pretrained(directory)
    assert Recording.seen == [["true", "true"] if enabled else [None, None]]


@by_enabled
@pytest.mark.parametrize(
    "before", [[None, None], ["", ""], ["false", "1"], ["true", None], [None, ""]], ids=str
)
def test_earlier_values_come_back(
    monkeypatch: pytest.MonkeyPatch, before: list[str | None], enabled: bool
) -> None:
    set_flags(monkeypatch, before)
    with sw.fsdp_pretrained_load_context(enabled):
        assert flags() == (["true", "true"] if enabled else before)
    assert flags() == before


def test_earlier_values_come_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    set_flags(monkeypatch, ["", None])
    with pytest.raises(OSError, match="disk"), sw.fsdp_pretrained_load_context(True):
        raise OSError("disk")
    assert flags() == ["", None]


def test_what_the_body_did_to_the_flags_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_flags(monkeypatch, ["false", None])
    with sw.fsdp_pretrained_load_context(True):
        del os.environ[FLAGS[0]]
        os.environ[FLAGS[1]] = "other"
    assert flags() == ["false", None]


def test_contexts_nest() -> None:
    with sw.fsdp_pretrained_load_context(True):
        with sw.fsdp_pretrained_load_context(True):
            assert flags() == ["true", "true"]
        assert flags() == ["true", "true"]
        with sw.fsdp_pretrained_load_context(False):
            assert flags() == ["true", "true"]
    assert flags() == [None, None]


def test_the_disabled_context_touches_nothing_even_on_exit() -> None:
    with sw.fsdp_pretrained_load_context(False):
        os.environ[FLAGS[0]] = "by the body"
    assert flags() == ["by the body", None]


def test_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDWISE_TEST", raising=False)
    with sw.fsdp_pretrained_load_context(True):
        monkeypatch.setenv("SHARDWISE_TEST", "kept")
    assert os.environ["SHARDWISE_TEST"] == "kept"


def test_unchanged_environment_undoes_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CHANGED", "before")
    monkeypatch.setenv("SHARDWISE_DELETED", "")
    before = dict(os.environ)

    @unchanged_environment()
    def change_and_fail() -> None:
        os.environ["SHARDWISE_CHANGED"] = "after"
        os.environ["SHARDWISE_ADDED"] = "new"
        del os.environ["SHARDWISE_DELETED"]
        raise ValueError("body")

    with pytest.raises(ValueError, match="body"):
        change_and_fail()
    assert dict(os.environ) == before


# --- which rank loads ---


@pytest.fixture
def original() -> Iterator[object]:
    """Hold what `from_pretrained` is; fail the test that leaves another one."""
    before = transformers.PreTrainedModel.__dict__["from_pretrained"]
    yield before
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is before


@pytest.mark.usefixtures("original")
def test_a_rank_that_is_not_the_source_stays_empty(directory: str) -> None:
    with plain_load_context(source_rank=0, rank=1):
        assert flags() == ["true", "true"]
        assert on_meta(load(directory)) == {True}
    assert flags() == [None, None]
    assert on_meta(load(directory)) == {False}


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize(
    ("local_rank", "expected"), [("0", ["true", "true"]), ("3", [None, None]), (None, [None, None])]
)
def test_the_source_loads_whatever_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, directory: str, local_rank: str | None, expected: list[str | None]
) -> None:
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with plain_load_context(source_rank=0, rank=0):
        # transformers 4.57 takes the flags as an order to stay empty where LOCAL_RANK is not 0.
        assert flags() == expected
        model = load(directory)
    assert on_meta(model) == {False}
    reference = load(directory)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_device_map_is_refused_on_every_rank(directory: str, rank: int) -> None:
    with plain_load_context(source_rank=0, rank=rank), pytest.raises(ConfigurationError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    assert str(caught.value) == (
        "pretrained_load_context: device_map='cpu' places the model itself; the strategy does that. Leave device_map "
        "out inside the context."
    )


@pytest.mark.usefixtures("original")
def test_a_second_context_is_refused_and_the_first_goes_on(directory: str) -> None:
    with plain_load_context(source_rank=0, rank=1):
        with (
            pytest.raises(ConfigurationError, match="one is open already in this process"),
            plain_load_context(source_rank=0, rank=1),
        ):
            pytest.fail("the second context was entered")
        assert flags() == ["true", "true"]
        assert on_meta(load(directory)) == {True}
    with plain_load_context(source_rank=0, rank=1):
        pass


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize("rank", [0, 1])
def test_everything_comes_back_after_an_exception(rank: int) -> None:
    with pytest.raises(OSError, match="disk"), plain_load_context(source_rank=0, rank=rank):
        raise OSError("disk")
    assert flags() == [None, None]
    with plain_load_context(source_rank=0, rank=rank):
        pass


@pytest.mark.usefixtures("original")
def test_loading_info_is_passed_through(directory: str) -> None:
    with plain_load_context(source_rank=0, rank=1):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert on_meta(model) == {True}
    assert "missing_keys" in info
