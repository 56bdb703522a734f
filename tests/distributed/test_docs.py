"""The documentation's Python blocks and the examples, run as they stand on ranks of the pool."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import VOCABULARY
from tests.distributed.training import write_model
from tests.documents import PAGES, REPOSITORY, blocks, page

pytestmark = pytest.mark.distributed

Checkpoint = Callable[[str], str]
MOST_CHANGED_LINES = 5
# Of these the blocks show other projects' objects, or are whole scripts that are run below.
NOT_RUN = {"design", "faults"}
RUN_BY_RECIPES = {"native.py", "accelerate_strategy.py"}  # in `test_recipes.py`


class MyModel(nn.Module):
    """What a page's `MyModel` is here: two layers, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.register_buffer("angles", torch.empty(4), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.angles.copy_(torch.arange(4.0))


def stored_name(name: str) -> str:
    return name


def parallelize(model: Any, *_: Any) -> Any:
    """Stand in for torchtitan's `parallelize_fn`."""
    for layer in model.children():
        fully_shard(layer)
    return fully_shard(model)


def apply_fsdp2(model: Any, *_: Any) -> None:
    """Stand in for verl's: layers are units, and a tied embedding stays with the head."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def names_of_pages() -> dict[str, Any]:
    """Return what the pages take for granted: imports, a batch, and other projects' objects."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    return {
        "torch": torch,
        "dist": dist,
        "sw": sw,
        "fully_shard": fully_shard,
        "AutoConfig": AutoConfig,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "tokens": tokens,
        "batches": [{"input_ids": tokens, "labels": tokens}] * 2,
        "MyModel": MyModel,
        "model_cls": lambda _: MyModel(),
        "model_args": SimpleNamespace(),
        "parallel_dims": SimpleNamespace(),
        "job_config": SimpleNamespace(),
        "parallelize_fn": parallelize,
        "stored_name": stored_name,
        "given_buffers": {"angles": torch.arange(4.0)},
        "apply_fsdp2": apply_fsdp2,
        "fsdp_kwargs": {},
        "engine_config": SimpleNamespace(),
    }


@contextlib.contextmanager
def as_a_user(folder: Path) -> Iterator[None]:
    """Go to a folder, say nothing, and ignore what others warn of."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)


def run_blocks(name: str, directory: str, folder: str) -> int:
    """Run the blocks of a page in one namespace, in their order; return how many."""
    names, number = names_of_pages(), 0
    with as_a_user(Path(folder)):
        for number, block in enumerate(python_blocks(name), start=1):
            code = block.replace('"path-or-hub-id"', repr(directory))
            exec(compile(code, f"docs/{name}.md, Python block {number}", "exec"), names)
    return number


def python_blocks(name: str) -> list[str]:
    found = [block for block in blocks(page(name, "en")) if block.language == "python"]
    return [block.code for block in found if not block.title.endswith(".py")]  # a whole script is run as one


@pytest.mark.parametrize("name", [n for n in PAGES if n not in NOT_RUN and python_blocks(n)])
def test_the_blocks_of_a_page_run(name: str, pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(3)
    (tmp_path / "my-checkpoint").mkdir()
    save_file(dict(MyModel().named_parameters()), tmp_path / "my-checkpoint" / "model.safetensors")
    assert set(pool.run(run_blocks, name, checkpoint("qwen3_tied"), str(tmp_path), ranks=2)) == {
        len(python_blocks(name))
    }


# --- from fully_shard to materialize ---


def applied(script: str, diff: str) -> str:
    """Return a script with a diff applied: its lines, one after the other, from where the first of them is."""
    lines = diff.splitlines()
    old = [line[1:] for line in lines if line[:1] != "+"]
    new = [line[1:] for line in lines if line[:1] != "-"]
    before, found, after = f"\n{script}".partition("\n" + "\n".join(old) + "\n")
    assert found, "the diff does not fit the script"
    return f"{before}\n" + "\n".join(new) + f"\n{after}"


def run_script(code: str, directory: str) -> float:
    """Run a script as one rank's process would, and return its loss."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with (
        mock.patch.object(sys, "argv", ["script.py", directory]),
        mock.patch.object(dist, "init_process_group"),  # the pool has made it,
        mock.patch.object(dist, "destroy_process_group"),  # and ends it
    ):
        exec(compile(code, "script.py", "exec"), names)
    return float(names["loss"])


def test_five_lines_make_a_fully_shard_script_read_its_own_part(
    pool: RankPool, checkpoint: Checkpoint
) -> None:
    found = blocks(page("index", "en"))
    (script,) = (block.code for block in found if block.title == "before.py")
    (diff,) = (block.code for block in found if block.language == "diff")
    for sign in "+-":
        assert sum(line.startswith(sign) for line in diff.splitlines()) <= MOST_CHANGED_LINES
    changed = applied(script, diff)
    assert "sw.materialize(" in changed
    assert "from_pretrained(sys.argv[1], dtype" not in changed
    losses = [pool.run(run_script, code, checkpoint("qwen3_tied"), ranks=2) for code in (script, changed)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]  # each rank has its own tokens


# --- examples ---


def run_example(name: str, arguments: list[str]) -> str:
    """Run an example as one rank's process would, and return what it prints."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, *arguments]),
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        contextlib.redirect_stdout(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        runpy.run_path(str(REPOSITORY / "examples" / name), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("transformers_model.py", 2, "after 2 steps"),
        ("materialize.py", 2, "8 tensors compared, equal"),
        ("hsdp.py", 4, "loss "),
        ("lora.py", 2, "adapter, 8 tensors"),
        ("trainer.py", 2, ""),
        ("sft.py", 2, ""),
    ],
)
def test_an_example_runs(
    name: str, ranks: int, says: str, pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    needed = {"lora.py": "peft", "sft.py": "trl"}.get(name)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    if name == "materialize.py":
        first = str(tmp_path)
    elif name == "sft.py":
        first = str(write_model(tmp_path / "model"))  # with a tokenizer
    else:
        first = checkpoint("qwen3_tied")
    printed = pool.run(run_example, name, [first, str(tmp_path / "out")], ranks=ranks)
    assert says in printed[0], printed


def test_every_example_is_run_and_described() -> None:
    marks = {mark.name: mark.args for mark in test_an_example_runs.pytestmark}  # type: ignore[attr-defined]
    run = {name for name, *_ in marks["parametrize"][1]} | RUN_BY_RECIPES
    assert run == {path.name for path in (REPOSITORY / "examples").glob("*.py")}
    for language in ("en", "zh"):
        assert run == {path for path in run if f"`examples/{path}`" in page("index", language)}
