"""Settings that hold for every test, in this process and in the ranks that it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# What makes rich and typer, some of it when they are imported, write to a pipe as to a terminal, or to one of another size.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("PY_COLORS", None)
os.environ.pop("GITHUB_ACTIONS", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ.pop("TTY_INTERACTIVE", None)
os.environ.pop("TERMINAL_WIDTH", None)
os.environ.pop("COLUMNS", None)
os.environ.pop("TERM", None)  # a dumb one is 80 columns wide, whatever a test says
# Before anything imports huggingface_hub, which reads it once: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Ranks are forked or spawned after a tokenizer was used; its thread pool would warn, and warnings are errors.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch.distributed as dist
from hypothesis import settings

from shardwise.testing import RankPool
from tests.distributed.models import write_checkpoint

# The same examples on every run and machine, so that a failure in CI is one at home; no deadline, as cores are shared.
settings.register_profile("shardwise", derandomize=True, database=None, deadline=None, print_blob=True)
settings.load_profile("shardwise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first and short ones last, so that no worker of a parallel run is left with a long one while others are idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name == "unit"))


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Fail the test that leaves a process group behind, rather than the one that meets it."""
    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before:
        dist.destroy_process_group()
        pytest.fail(
            "this test left a process group initialised; call torch.distributed.destroy_process_group() in it, "
            "or run its body in the rank pool of shardwise.testing"
        )


# What most ranks import sooner or later, once for all of them.
PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "accelerate",
    "shardwise.transformers_model",
    "tests.distributed.models",
)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """The processes in which every distributed and regression test of one run has its ranks."""
    with RankPool(4, preload=PRELOAD) as started:
        yield started


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a kind of tiny model to the directory of its checkpoint, written once."""
    written: dict[str, str] = {}

    def directory_of(kind: str) -> str:
        if kind not in written:
            written[kind] = str(write_checkpoint(kind, tmp_path_factory.mktemp(kind)))
        return written[kind]

    return directory_of
