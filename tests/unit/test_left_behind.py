"""A read that a failed load has left behind may return when the model is trained already."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardwise as sw
from shardwise.errors import StalledReadError

LONGEST_SECONDS = 60.0


def on_meta() -> nn.Module:
    return nn.Linear(64, 64, bias=False, device="meta")


def reading() -> bool:
    return any(thread.name.startswith("shardwise-read") for thread in threading.enumerate())


def test_a_model_that_a_hanging_read_may_write_into_is_not_filled_again(tmp_path: Path) -> None:
    values = torch.randn(64, 64)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    release, preadv = threading.Event(), os.preadv

    def hanging(fd: int, parts: Any, offset: int) -> int:
        if not threading.current_thread().name.startswith("shardwise-read"):
            return preadv(fd, parts, offset)
        held = os.dup(fd)  # as the kernel holds the file while it reads
        release.wait(250)
        try:
            return preadv(held, parts, offset)
        finally:
            os.close(held)

    model = on_meta()
    with mock.patch.object(os, "preadv", hanging), pytest.raises(StalledReadError, match="has not returned"):
        sw.materialize(model, tmp_path, cpu_storage="copy", timeout=2.0)
    try:
        with pytest.raises(StalledReadError, match=r"^weight: expected memory .* reading 16,384 bytes"):
            sw.materialize(model, tmp_path, cpu_storage="copy", timeout=60)
        other = on_meta()
        sw.materialize(other, tmp_path, cpu_storage="copy", timeout=60)
        with torch.no_grad():
            other.weight.fill_(7)
    finally:
        release.set()
    deadline = time.monotonic() + LONGEST_SECONDS
    while reading() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert other.weight.eq(7).all()
    sw.materialize(model, tmp_path, cpu_storage="copy", timeout=60)  # nothing writes into it any more
    assert torch.equal(model.weight, values)
