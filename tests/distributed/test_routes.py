"""Every route on real ranks: equal values, who reads how much, and ranks that do not see the files."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardwise as sw
from shardwise.checkpoint import SafetensorsSource
from shardwise.errors import ChangedFileError, ConfigurationError, PeerError, RankError, RankMismatchError
from shardwise.materialization.data_plane import DataPlane
from shardwise.strategies import base
from shardwise.testing import RankPool
from tests.distributed.models import from_checkpoint, transformers_fuses_experts, write_checkpoint

TIMEOUT_SECONDS = 120
KINDS = ("qwen3_tied", "qwen3_moe")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small checkpoint of each kind."""
    root = tmp_path_factory.mktemp("routes")
    return {kind: write_checkpoint(kind, root / kind) for kind in (*KINDS, "qwen3_large")}


@contextmanager
def on_node(number: int) -> Iterator[None]:
    """Make this rank one of another launcher agent."""
    before = os.environ.get("GROUP_RANK")
    os.environ["GROUP_RANK"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["GROUP_RANK"]
        else:
            os.environ["GROUP_RANK"] = before


def mesh_of(shape: tuple[int, ...]) -> Any:
    names = ("dp_replicate", "dp_shard") if len(shape) == 2 else ("dp_shard",)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def require_equal(model: nn.Module, directory: str, *, dtype: torch.dtype | None = None) -> None:
    expected = from_checkpoint(directory).state_dict()
    got = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in got.items():
        if name not in expected:
            continue
        wanted = expected[name] if dtype is None else expected[name].to(dtype)
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(full.detach(), wanted), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["direct", "replicate", "node", "rank0", "striped"])
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_a_strategy_on_every_route(
    pool: RankPool, checkpoints: dict[str, Path], kind: str, route: str, shape: tuple[int, ...]
) -> None:
    ranks = shape[0] if len(shape) == 1 else 4
    reports = pool.run(load_on_route, str(checkpoints[kind]), route, shape, None, ranks=ranks)
    stored = sum(path.stat().st_size for path in checkpoints[kind].glob("*.safetensors"))
    for report in reports:
        assert report["route"] == route
        assert report["route_reason"] == "it was asked for"
        for what in ("storage_bytes", "network_bytes"):
            assert report["predicted"][what] == report[what]
    if route in ("rank0", "node", "striped") or (route == "replicate" and len(shape) == 2):
        assert reports[0]["storage_bytes"] <= 1.02 * stored
    if route in ("rank0", "node"):
        assert [of_rank["storage_bytes"] > 0 for of_rank in reports[0]["ranks"]] == [True] + [False] * (
            ranks - 1
        )


def load_on_route(
    directory: str, route: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    strategy = sw.NativeFSDPStrategy(
        mesh_of(shape), mixed_precision="no", route=route, cpu_storage="copy", timeout=TIMEOUT_SECONDS
    )
    with torch.device(
        "meta"
    ):  # a default device, as an accelerator often is: host memory must be asked for by name
        model = strategy.load_pretrained(AutoModelForCausalLM, directory, dtype=dtype or "auto")
        model = strategy.wrap_model(model)
    require_equal(model, directory, dtype=dtype)
    assert strategy.last_report is not None
    return strategy.last_report.to_json()


@pytest.mark.parametrize(("route", "most"), [("rank0", [2, 1]), ("striped", [1, 1])])
def test_a_reader_that_receives_nothing_packs_while_it_sends(
    pool: RankPool, checkpoints: dict[str, Path], route: str, most: list[int]
) -> None:
    assert pool.run(most_in_flight, str(checkpoints["qwen3_large"]), route, ranks=2) == most


def most_in_flight(directory: str, route: str) -> int:
    """Return how many rounds this rank had begun and not ended, at most."""
    from transformers import AutoModelForCausalLM

    begun: set[dist.Work] = set()
    counts: list[int] = []
    start, wait = DataPlane.all_to_all, DataPlane.wait

    def counted_start(*args: Any, **options: Any) -> dist.Work:
        work = start(*args, **options)
        begun.add(work)
        counts.append(len(begun))
        return work

    def counted_wait(plane: DataPlane, work: dist.Work, *, what: str) -> None:
        wait(plane, work, what=what)
        begun.discard(work)

    with (
        mock.patch.object(DataPlane, "all_to_all", counted_start),
        mock.patch.object(DataPlane, "wait", counted_wait),
        mock.patch.object(base, "default_staging_bytes", return_value=2**20),
    ):
        strategy = sw.NativeFSDPStrategy(mixed_precision="no", route=route, timeout=TIMEOUT_SECONDS)
        model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, directory))
    require_equal(model, directory)
    assert not begun
    return max(counts)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_replicas_read_storage_once(
    pool: RankPool, checkpoints: dict[str, Path], dtype: torch.dtype | None
) -> None:
    directory = checkpoints["qwen3_large"]
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    for route in ("auto", "direct"):
        report = pool.run(load_on_route, str(directory), route, (2, 2), dtype, ranks=4)[0]
        if route == "direct":
            assert report["storage_bytes"] > 1.9 * stored
            continue
        assert report["route"] == "replicate"
        assert "each alone would request 2.00 times" in report["route_reason"]
        assert report["storage_bytes"] <= 1.02 * stored
        # Each rank gets from its replica the half of its shard that it has not read.
        assert abs(report["network_bytes"] - stored) < 0.05 * stored


def test_replicas_on_one_node_map_the_same_pages(pool: RankPool, checkpoints: dict[str, Path]) -> None:
    directory = str(checkpoints["qwen3_large"])
    one, two = (pool.run(load_mapped, directory, nodes, ranks=4)[0] for nodes in (1, 2))
    assert one["route"] == "direct"
    assert two["route"] == "replicate"


def load_mapped(directory: str, nodes: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    with on_node(dist.get_rank() * nodes // 4):
        strategy = sw.NativeFSDPStrategy(mesh_of((2, 2)), mixed_precision="no", timeout=TIMEOUT_SECONDS)
        model = strategy.wrap_model(strategy.load_pretrained(AutoModelForCausalLM, directory))
        require_equal(model, directory)
        assert strategy.last_report is not None
        stored = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
        assert strategy.last_report.storage_bytes <= 1.02 * stored
        return strategy.last_report.to_json()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for mapped files in /proc")
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_a_rank_that_reads_for_all_maps_its_own_shards(
    pool: RankPool, checkpoints: dict[str, Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    directory = str(checkpoints["qwen3_tied"])
    stored = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    by_rank = pool.run(load_and_look, directory, shape, str(tmp_path), ranks=math.prod(shape))
    for rank, cases in enumerate(by_rank):
        assert set(cases) == {"auto", "copy", "cast", "refused"}
        for name, (are_mapped, report) in cases.items():
            assert are_mapped == ({"all whole shards"} if (rank, name) == (0, "auto") else set()), (
                rank,
                name,
            )
            assert report["storage_bytes"] <= 1.02 * stored
            for what in ("storage_bytes", "network_bytes"):
                assert report["predicted"][what] == report[what]


def load_and_look(
    directory: str, shape: tuple[int, ...], folder: str
) -> dict[str, tuple[set[str], dict[str, Any]]]:
    """Load as files that can be mapped, must be copied, are cast, and cannot be mapped after all; return what is mapped, and the report."""
    from transformers import AutoModelForCausalLM

    found: dict[str, tuple[set[str], dict[str, Any]]] = {}
    for name in ("auto", "copy", "cast", "refused"):
        strategy = sw.NativeFSDPStrategy(
            mesh_of(shape),
            mixed_precision="no",
            route="rank0",
            cpu_storage="copy" if name == "copy" else "auto",
            timeout=TIMEOUT_SECONDS,
        )
        dtype = torch.float32 if name == "cast" else "auto"
        refused = mock.patch.object(SafetensorsSource, "mapped", lambda _, runs: [None] * len(runs))
        with refused if name == "refused" else nullcontext():
            model = strategy.wrap_model(
                strategy.load_pretrained(AutoModelForCausalLM, directory, dtype=dtype)
            )
        require_equal(model, directory, dtype=dtype if name == "cast" else None)
        assert sw.verify_shards(model, directory).is_equal
        assert strategy.last_report is not None
        found[name] = (mapped_shards(model), strategy.last_report.to_json())
        if name == "auto":
            sw.export_checkpoint(model, f"{folder}/exported")
            require_equal(model, f"{folder}/exported")
    return found


def mapped_shards(model: nn.Module) -> set[str]:
    """Return fqns of the shards that are pages of a checkpoint, or in a word that all are that need no padding."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.endswith(".safetensors"):
            files.append(range(*(int(address, 16) for address in addresses.split("-"))))
    shards = {name: parameter.to_local() for name, parameter in model.named_parameters()}  # type: ignore[operator]
    mapped = {name for name, shard in shards.items() if any(shard.data_ptr() in pages for pages in files)}
    return {"all whole shards"} if mapped == {name for name, s in shards.items() if s.numel()} else mapped


def test_a_flipped_bit_in_a_replica_is_found(pool: RankPool, checkpoints: dict[str, Path]) -> None:
    errors = pool.run_to_errors(load_with_a_flipped_bit, str(checkpoints["qwen3_tied"]), ranks=4)
    found = [error for error in errors if isinstance(error, RankMismatchError)]
    assert found
    assert "expected the same shards as its replicas" in str(found[0])
    assert "model.layers.1.mlp.up_proj.weight" in str(found[0])
    assert all(isinstance(error, RankError) for error in errors)


def load_with_a_flipped_bit(directory: str) -> None:
    from shardwise.materialization import load

    original = load.require_equal_replicas

    def after_a_flip(fqns: Any, targets: Any, **rest: Any) -> None:
        if dist.get_rank() == 3:
            shard = targets["model.layers.1.mlp.up_proj.weight"].view(torch.int16).view(-1)
            shard[3] ^= 16
        original(fqns, targets, **rest)

    load.require_equal_replicas = after_a_flip
    try:
        load_on_route(directory, "replicate", (2, 2), None)
    finally:
        load.require_equal_replicas = original


# --- ranks that do not see the files ---


@pytest.fixture
def two_nodes(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    """A checkpoint on the private file systems of two nodes."""
    for node in (0, 1):
        shutil.copytree(checkpoints["qwen3_moe"], tmp_path / f"node{node}" / "model")
    return tmp_path


def test_two_nodes_with_private_files_that_one_rank_each_sees(pool: RankPool, two_nodes: Path) -> None:
    reports = pool.run(load_with_sight, str(two_nodes), {0: "node0", 3: "node1"}, ranks=4)
    assert {report["route"] for report in reports} == {"node"}
    assert "no access from ranks 1, 2, but from another rank of their node" in reports[0]["route_reason"]
    requested = [of_rank["storage_bytes"] for of_rank in reports[0]["ranks"]]
    assert requested[1:3] == [0, 0]
    assert min(requested[0], requested[3]) > 0


@pytest.mark.parametrize("reader", [0, 2])
def test_files_that_one_rank_alone_sees(pool: RankPool, two_nodes: Path, reader: int) -> None:
    reports = pool.run(load_with_sight, str(two_nodes), {reader: "node0"}, ranks=4)
    assert {report["route"] for report in reports} == {"rank0"}
    assert f"rank {reader} reads for all" in reports[0]["route_reason"]
    assert [r["rank"] for r in reports[0]["ranks"] if r["storage_bytes"] > 0] == [reader]


def load_with_sight(root: str, place_of: dict[int, str]) -> dict[str, Any]:
    """Load through a strategy; a rank that has no place is given a path that is not there."""
    from transformers import AutoModelForCausalLM

    rank = dist.get_rank()
    directory = str(Path(root) / place_of.get(rank, "nowhere") / "model")
    with on_node(rank // 2):
        strategy = sw.NativeFSDPStrategy(mixed_precision="no", timeout=TIMEOUT_SECONDS)
        model = strategy.load_pretrained(AutoModelForCausalLM, directory)
        model = strategy.wrap_model(model)
    require_equal(model, str(Path(root) / "node0" / "model"))
    assert model.generation_config is not None
    assert strategy.last_report is not None
    return strategy.last_report.to_json()


def test_a_path_that_no_rank_sees(pool: RankPool, tmp_path: Path) -> None:
    errors = pool.run_to_errors(load_with_sight, str(tmp_path), {}, ranks=4)
    assert all("got a path that does not exist" in str(error) for error in errors)


@pytest.mark.parametrize("route", ["direct", "node"])
def test_a_route_that_sight_forbids(pool: RankPool, two_nodes: Path, route: str) -> None:
    errors = pool.run_to_errors(fill_where_rank_0_sees, str(two_nodes), route, ranks=4)
    assert all(isinstance(error, (ConfigurationError, PeerError)) for error in errors)
    assert all("route=" in str(error) and "Use route='auto'" in str(error) for error in errors)


def fill_where_rank_0_sees(root: str, route: str) -> None:
    directory = str(Path(root) / ("node0" if dist.get_rank() == 0 else "nowhere") / "model")
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(Path(root) / "node1" / "model"))
        )
    fully_shard(model)
    with on_node(dist.get_rank() // 2):
        sw.materialize(model, directory, route=route, timeout=TIMEOUT_SECONDS)


def test_nodes_that_see_different_files(pool: RankPool, two_nodes: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = two_nodes / "node1" / "model" / "model.safetensors"
    values = load_file(path)
    name = sorted(values)[0]
    save_file(values | {name: values[name].float()}, path)
    errors = pool.run_to_errors(load_with_sight, str(two_nodes), {0: "node0", 3: "node1"}, ranks=4)
    assert isinstance(errors[3], ChangedFileError)
    assert all("Every rank must see the same files" in str(error) for error in errors)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers for it
def test_an_adapter_that_one_rank_alone_sees(
    pool: RankPool, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    peft = pytest.importorskip("peft")
    base = from_checkpoint(str(checkpoints["qwen3_tied"]))
    torch.manual_seed(5)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    pool.run(load_base_and_adapter, str(checkpoints["qwen3_tied"]), str(tmp_path / "adapter"), ranks=2)


def load_base_and_adapter(base: str, adapter: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    is_first = dist.get_rank() == 0
    strategy = sw.NativeFSDPStrategy(mixed_precision="no", timeout=TIMEOUT_SECONDS)
    model = strategy.load_pretrained(AutoModelForCausalLM, base, dtype=torch.float32)
    model = strategy.load_adapter(model, adapter if is_first else "/nowhere/adapter")
    model = strategy.wrap_model(model)
    expected = load_file(Path(adapter) / "adapter_model.safetensors")
    got = {name: p.full_tensor() for name, p in model.named_parameters() if "lora_" in name}
    assert len(got) == len(expected) > 0
    for name, value in expected.items():
        assert torch.equal(got[name.replace(".weight", ".default.weight")], value), name
    assert strategy.last_report is not None
    assert strategy.last_report.route == "direct + node"


# --- conversions of whole tensors, and a state dict that needs them ---


@pytest.mark.skipif(not transformers_fuses_experts(), reason="transformers 4.57 declares no conversions")
@pytest.mark.parametrize("route", ["rank0", "node", "striped"])
def test_conversions_of_whole_tensors_on_a_route(
    pool: RankPool, checkpoints: dict[str, Path], route: str
) -> None:
    converted = pool.run(load_with_whole_conversions, str(checkpoints["qwen3_moe"]), route, ranks=4)
    assert converted[0] > 0


def load_with_whole_conversions(directory: str, route: str) -> int:
    from shardwise.conversion import recipes
    from shardwise.conversion.tracing import NotTraceableError

    original = recipes._traced

    def refusing(group: Any, stored: Any) -> Any:
        raise NotTraceableError("as if it were arithmetic")

    recipes._traced = refusing
    try:
        with on_node(dist.get_rank() // 2):
            report = load_on_route(directory, route, (4,), None)
    finally:
        recipes._traced = original
    return len(report["converted"])
