"""Every family of models, on every number of ranks: the load equals the one in a single process, and the export what was read, byte for byte.

Run by `make matrix`, on both generations of transformers.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import check_equal
from tests.matrix.families import AUDIO, BASE, FAMILIES, IMAGE_TEXT, SEQ2SEQ, VISION, VOCABULARY, Family

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]

RANKS = (1, 2, 3, 7)  # more than experts and heads
EXPORTED_BY = (3, 7)  # fewer would cost time and show nothing that tests/distributed/test_export.py does not
BY_NAME = {family.name: family for family in FAMILIES}
IMAGE_TOKEN = 3
FEW = ("llama_tied", "gpt2", "qwen3_moe", "deepseek_v3", "t5", "bert", "clip", "gemma3")  # in more dtypes


def available() -> list[str]:
    """Return the families that the installed transformers has."""
    return [family.name for family in FAMILIES if family.is_available()]


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(max(RANKS), preload=("torch", "transformers", "accelerate")) as pool:
        yield pool


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    written: dict[str, str] = {}

    def write(name: str) -> str:
        if name not in written:
            written[name] = str(write_family(BY_NAME[name], tmp_path_factory.mktemp(name)))
        return written[name]

    return write


def test_the_table_holds_at_least_thirty_families() -> None:
    assert len(available()) >= 50
    assert len(set(BY_NAME)) == len(FAMILIES)


@pytest.mark.parametrize("name", available())
def test_load_equals_the_single_process_load(seven: RankPool, directory_of: Any, name: str) -> None:
    directory = directory_of(name)
    for ranks in RANKS:
        seven.run(compare, name, directory, ranks=ranks)


@pytest.mark.parametrize("variant", ["float16", "several dtypes, none in the config"])
@pytest.mark.parametrize("name", FEW)
def test_load_in_another_dtype(
    seven: RankPool, directory_of: Any, tmp_path: Path, name: str, variant: str
) -> None:
    if name not in available():
        pytest.skip("not in this transformers")
    directory = directory_of(name)
    dtype = "float16"
    if variant != "float16":
        directory, dtype = str(mixed(Path(directory), tmp_path / name)), "auto"
    seven.run(compare, name, directory, dtype, False, ranks=3)


def mixed(directory: Path, to: Path) -> Path:
    """Copy a checkpoint, every third tensor of it in another dtype, and no dtype in the config."""
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(_without_dtype(config)))
    for file in to.glob("*.safetensors"):
        stored = load_file(file)
        for name in sorted(stored)[::3]:
            if stored[name].is_floating_point():
                stored[name] = stored[name].to(torch.float16)
        for name in sorted(stored)[2::3]:
            if stored[name].is_floating_point():
                stored[name] = stored[name].to(torch.float32)
        save_file(stored, file, metadata={"format": "pt"})
    return to


def _without_dtype(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {k: _without_dtype(v) for k, v in config.items() if k not in ("dtype", "torch_dtype")}


def write_family(family: Family, directory: Path) -> Path:
    """Save a random bf16 model of a family."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _auto(family).from_config(family.make_config()).to(torch.bfloat16)
        stored = model.state_dict()
        for parameter in model.parameters():  # norms are all ones otherwise, which hides permutations
            nn.init.normal_(parameter.data, std=0.05)
        for fqn, buffer in model.named_buffers():
            if fqn in stored and buffer.is_floating_point():  # zeros hide that a router's bias is not read
                nn.init.normal_(buffer, std=0.05)
        model.save_pretrained(directory, max_shard_size="100KB")  # layers in several files
    return directory


def compare(name: str, directory: str, dtype: str = "", with_outputs: bool = True) -> None:
    """Load a family on this rank's job and compare everything with the load in this process alone."""
    warnings.simplefilter("ignore")  # what transformers says of tiny configs is not the matter here
    family = BY_NAME[name]
    strategy = sw.NativeFSDPStrategy(mixed_precision="no", fsdp_config=family.fsdp, timeout=60.0)
    dtype = dtype or family.dtype
    model = strategy.wrap_model(strategy.load_pretrained(_auto(family), directory, dtype=dtype))
    expected = _auto(family).from_pretrained(directory, dtype=dtype)
    _train_what_the_class_trains(expected, family)
    check_equal(model, expected)
    verified = sw.verify_shards(
        model, directory
    )  # which looks names up under the class that fully_shard made
    assert verified.is_equal
    assert "checkpoint" not in {strategy.last_report.origins[fqn] for fqn in verified.absent}
    if not with_outputs:
        return
    batch = batch_of(family, expected)
    with torch.no_grad():
        got, wanted = _first_output(model(**batch)), _first_output(expected(**batch))
    assert wanted.isfinite().all()
    assert torch.equal(got, wanted), f"{name}: outputs differ by {(got - wanted).abs().max()}"
    if dist.get_world_size() in EXPORTED_BY:
        check_export(model, Path(directory))


def check_export(model: nn.Module, directory: Path) -> None:
    """Write the model as it was loaded, and compare every tensor with what was read; all ranks call it together."""
    out = directory.parent / f"{directory.name}-{dist.get_world_size()}-ranks"
    report = sw.export_checkpoint(model, out, timeout=60.0)
    assert report.whole == ()
    if dist.get_rank() == 0:
        stored, written = stored_in(directory), stored_in(out)
        assert written.keys() == stored.keys(), f"{written.keys() ^ stored.keys()} on one side only"
        for tensor, value in written.items():
            # A class may keep a part in float32 whatever the checkpoint has.
            assert value.dtype in (stored[tensor].dtype, torch.float32), tensor
            assert torch.equal(value, stored[tensor].to(value.dtype)), tensor
        shutil.rmtree(out)


def stored_in(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a directory's safetensors files."""
    return {
        name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()
    }


def _train_what_the_class_trains(model: nn.Module, family: Family) -> None:
    """Give each parameter the flag of its constructor: from transformers 5 on, `from_pretrained` makes all trainable."""
    with torch.device("meta"):
        built = _auto(family).from_config(family.make_config())
    flags = {fqn: parameter.requires_grad for fqn, parameter in built.named_parameters()}
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(flags[fqn])


def batch_of(family: Family, model: Any) -> dict[str, Any]:
    """Return a small batch for a family, the same on all ranks."""
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(10, VOCABULARY, (2, 12), generator=random)
    pixels = torch.randn(2, 3, 16, 16, generator=random).to(model.dtype)
    if family.auto == VISION:
        return {"pixel_values": pixels}
    if family.auto == BASE:
        return {"input_ids": ids, "pixel_values": pixels}
    if family.auto == SEQ2SEQ:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if family.auto == AUDIO:
        return {"input_values": torch.randn(1, 400, generator=random).to(model.dtype)}
    if family.auto == IMAGE_TEXT:
        return {"input_ids": ids}
    return {"input_ids": ids}


def _auto(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.auto)


def _first_output(output: Any) -> torch.Tensor:
    found: torch.Tensor = next(value for value in output.values() if isinstance(value, torch.Tensor))
    return found
