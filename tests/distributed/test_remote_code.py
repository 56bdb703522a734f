"""Code that a checkpoint carries runs only where the user says so."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import check_equal, from_checkpoint
from tests.distributed.steps import Checkpoint, load, make_strategy

pytestmark = pytest.mark.distributed

MODELING = """
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM

(Path({marker!r}) / "ran").touch()

class OwnConfig(Qwen3Config):
    model_type = "own_kind"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
    own_code = True
"""


READING = """
    def __init__(self, config):
        super().__init__(config)
        self.scale = self.model.norm.weight.sum().item()
"""


@pytest.fixture
def carrier(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint of a kind that only its own code knows; the code leaves a file behind when it runs."""
    directory = tmp_path / "carrier"
    shutil.copytree(checkpoint("qwen3_untied"), directory)
    (directory / "modeling_own.py").write_text(MODELING.format(marker=str(tmp_path)))
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "source"])
def test_no_code_runs_unless_asked_for(pool: RankPool, carrier: Path, defer: bool) -> None:
    errors = pool.run_to_errors(load_carrier, str(carrier), defer, None, ranks=2)
    assert any(isinstance(error, ValueError) for error in errors)
    for error in errors:
        assert isinstance(error, (ValueError, sw.PeerError)), error
        assert "trust_remote_code=True" in str(error)
    assert not (carrier.parent / "ran").exists()


@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "source"])
def test_code_that_is_trusted_runs(
    pool: RankPool, carrier: Path, checkpoint: Checkpoint, defer: bool
) -> None:
    pool.run(load_carrier, str(carrier), defer, checkpoint("qwen3_untied"), ranks=2)
    assert (carrier.parent / "ran").exists()


def test_a_known_kind_loads_by_its_own_class_without_the_code(
    pool: RankPool, carrier: Path, checkpoint: Checkpoint
) -> None:
    config = json.loads((carrier / "config.json").read_text())
    (carrier / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    pool.run(load_known, str(carrier), checkpoint("qwen3_untied"), ranks=2)
    assert not (carrier.parent / "ran").exists()


def load_carrier(directory: str, defer: bool, original: str | None) -> None:
    with own_modules(directory):
        strategy = make_strategy("native_fsdp")
        trust = {"trust_remote_code": True} if original is not None else {}
        model: Any = load(strategy, directory, defer=defer, **trust)
        strategy.wrap_model(model)
        if original is not None:
            exported_with_its_code(model, Path(directory).parent / f"exported-{defer}")
    assert model.own_code
    check_equal(model, from_checkpoint(str(original)))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, from_checkpoint(str(original))(input_ids=ids).logits)


def exported_with_its_code(model: Any, out: Path) -> None:
    """Write a model whose class is the checkpoint's own, and load it again by that class; all ranks call it together."""
    import transformers

    sw.export_checkpoint(model, out)
    assert (out / "modeling_own.py").is_file()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=True)
    assert loaded.own_code
    check_equal(model, loaded)


@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "source"])
def test_a_constructor_that_reads_values_is_named_with_the_remedy(
    pool: RankPool, carrier: Path, checkpoint: Checkpoint, defer: bool
) -> None:
    """The remedy works: the model is built with values, sharded, and filled."""
    code = carrier / "modeling_own.py"
    code.write_text(f"{code.read_text()}{READING}")
    errors = pool.run_to_errors(load_carrier, str(carrier), defer, checkpoint("qwen3_untied"), ranks=2)
    for error in errors:
        assert isinstance(error, (sw.ConfigurationError, sw.PeerError)), error
        assert "got a constructor that reads values: " in str(error)
        assert "a whole copy in each rank's host memory" in str(error)
    pool.run(build_and_fill, str(carrier), checkpoint("qwen3_untied"), ranks=2)


def build_and_fill(directory: str, original: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with own_modules(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    fully_shard(model)
    sw.materialize(model, directory)
    check_equal(model, from_checkpoint(original))


@contextmanager
def own_modules(directory: str) -> Iterator[None]:
    """Let transformers copy a checkpoint's code to a folder of this test and rank, and ask nobody.

    It does not lock the folder: of two ranks one may run what the other has written half of.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.HF_MODULES_CACHE, builtins.input
    dynamic_module_utils.HF_MODULES_CACHE = str(Path(directory).parent / f"modules-{dist.get_rank()}")
    builtins.input = lambda *_: "y"
    try:
        yield
    finally:
        dynamic_module_utils.HF_MODULES_CACHE, builtins.input = before


def load_known(directory: str, original: str) -> None:
    strategy = make_strategy("native_fsdp")
    check_equal(strategy.wrap_model(load(strategy, directory, defer=True)), from_checkpoint(original))
