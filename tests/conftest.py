"""Settings that hold for every test, in this process and in the ranks that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports huggingface_hub, which reads it once: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Ranks are forked or spawned after a tokenizer was used; its thread pool would warn, and warnings are errors.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch.distributed as dist
from hypothesis import settings

# The same examples on every run and machine, so that a failure in CI is one at home; no deadline, as cores are shared.
settings.register_profile("shardwise", derandomize=True, database=None, deadline=None, print_blob=True)
settings.load_profile("shardwise")


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
