"""A plan for a job that is not running: from headers, from a config, for any mesh; and its command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import shardwise as sw
from shardwise.checkpoint import DescribedSource
from shardwise.cli import app
from shardwise.errors import CheckpointError, ConfigurationError
from shardwise.plan import Layout, Sight, WantedTensor, rank_classes
from shardwise.plan.slices import Slices
from shardwise.planning.estimate import estimated_source
from shardwise.planning.mesh_shape import axes_of
from tests.distributed.models import causal_model, transformers_fuses_experts, write_checkpoint

runner = CliRunner()
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("plans")
    return {kind: write_checkpoint(kind, root / kind) for kind in ("qwen3_tied", "qwen3_moe", "qwen3_large")}


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (8, {"dp_shard": 8}),
        ((8,), {"dp_shard": 8}),
        ((2, 4), {"dp_replicate": 2, "dp_shard": 4}),
        ([2, 4], {"dp_replicate": 2, "dp_shard": 4}),
        ({"fsdp": 4, "dp": 2}, {"dp": 2, "fsdp": 4}),
        ({"anything": 4}, {"anything": 4}),
        ({"tp": 2, "dp_shard": 4}, {"dp_shard": 4, "tp": 2}),
        ({"fsdp": 4, "tp": 2, "dp": 3}, {"dp": 3, "fsdp": 4, "tp": 2}),
    ],
)
def test_mesh_shapes(shape: Any, axes: dict[str, int]) -> None:
    assert list(axes_of(shape).items()) == list(axes.items())


@pytest.mark.parametrize(
    "shape",
    [
        0,
        (2, 0),
        (2, 2, 2),
        (),
        {"tp": 2},
        {"tp": 2, "dp": 4},
        {"ep": 2, "dp_shard": 4},
        {"dp": 2, "dp_replicate": 2, "fsdp": 2},
        {},
        {"dp_shard": 2.0},
        True,
    ],
)
def test_mesh_shapes_that_are_refused(shape: Any) -> None:
    with pytest.raises(ConfigurationError, match="mesh_shape: expected"):
        axes_of(shape)


def test_no_process_group_and_no_values_are_needed(directories: dict[str, Path], tmp_path: Path) -> None:
    source = directories["qwen3_tied"] / "model.safetensors"
    header = int.from_bytes(source.read_bytes()[:8], "little") + 8
    (tmp_path / "config.json").write_bytes((directories["qwen3_tied"] / "config.json").read_bytes())
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(source.read_bytes()[:header])
        file.truncate(source.stat().st_size)
    with_values = sw.plan_load(str(directories["qwen3_tied"]), mesh_shape=4).to_json()
    without = sw.plan_load(str(tmp_path), mesh_shape=4).to_json()
    assert {**with_values, "model": ""} == {**without, "model": ""}
    assert not torch.distributed.is_initialized()


def test_what_many_ranks_read_and_hold(directories: dict[str, Path]) -> None:
    stored = sum(t.nbytes for t in load_file(directories["qwen3_large"] / "model.safetensors").values())
    for shape, copies in (((16,), 1), ((4, 4), 4)):
        direct = sw.plan_load(str(directories["qwen3_large"]), mesh_shape=shape, route="direct")
        assert direct.stored_bytes == stored
        assert stored * copies <= direct.storage_bytes <= 1.02 * stored * copies
        assert direct.network_bytes == 0
        assert direct.mean_read_bytes == pytest.approx(direct.storage_bytes / direct.reads, abs=1)
        striped = sw.plan_load(str(directories["qwen3_large"]), mesh_shape=shape, route="striped")
        assert striped.storage_bytes == stored
        assert striped.rank_storage_bytes <= 1.1 * stored / 16
        # Each byte goes to every rank that keeps it, but for those that read it themselves.
        assert 0.9 * (copies - 1 / 4) * stored <= striped.network_bytes <= 1.01 * copies * stored
        assert striped.mean_read_bytes > 3 * direct.mean_read_bytes


def test_a_shard_counts_its_padding_and_one_dtype(directories: dict[str, Path]) -> None:
    model = causal_model("qwen3_tied")
    plan = sw.plan_load(str(directories["qwen3_tied"]), mesh_shape=3, dtype=torch.float32)
    padded = sum(-(-p.shape[0] // 3) * math.prod(p.shape[1:]) * 4 for p in model.parameters())
    assert plan.shard_bytes == padded
    assert plan.device_peak_bytes >= padded
    on_host = sw.plan_load(
        str(directories["qwen3_tied"]), mesh_shape=3, device="cpu", cpu_storage="copy", dtype="float32"
    )
    assert on_host.device_peak_bytes == 0
    assert on_host.host_peak_bytes >= padded


def test_mapped_shards_are_no_anonymous_memory(directories: dict[str, Path]) -> None:
    copied = sw.plan_load(str(directories["qwen3_large"]), mesh_shape=4, device="cpu", cpu_storage="copy")
    mapped = sw.plan_load(str(directories["qwen3_large"]), mesh_shape=4, device="cpu")
    assert mapped.storage_bytes == pytest.approx(copied.storage_bytes, rel=0.02)  # small gaps are read along
    assert mapped.host_peak_bytes < 0.1 * copied.host_peak_bytes


# --- from a config alone ---


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("qwen3_tied", "bfloat16"),
        ("qwen3_tied", "float32"),
        ("qwen3_moe", "bfloat16"),
        ("qwen3_large", "bfloat16"),
    ],
)
def test_a_config_is_as_good_as_its_headers(
    directories: dict[str, Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_bytes((directories[kind] / "config.json").read_bytes())
    exact = sw.plan_load(str(directories[kind]), mesh_shape=4, dtype=dtype)
    assert not exact.estimated
    for subject in (str(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        estimate = sw.plan_load(subject, mesh_shape=4, dtype=dtype)
        assert estimate.estimated
        assert "an estimate from the config" in estimate.summary()
        for name in ("tensors", "stored_bytes", "storage_bytes", "network_bytes", "shard_bytes", "reads"):
            assert getattr(estimate, name) == getattr(exact, name), name


@pytest.mark.skipif(not transformers_fuses_experts(), reason="transformers 4.57 keeps tensors as stored")
def test_an_estimate_is_in_the_layout_of_checkpoints() -> None:
    names = set(estimated_source(causal_model("qwen3_moe"), name="m").tensors)
    assert "model.layers.0.mlp.experts.2.gate_proj.weight" in names
    assert not any(name.endswith("gate_up_proj") for name in names)


def test_a_conversion_without_a_way_back_is_estimated_as_the_model_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = causal_model("qwen3_moe")
    if transformers_fuses_experts():

        def fail(*_: object) -> None:
            raise ValueError("no way back")

        monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", fail)
    assert set(estimated_source(model, name="m").tensors) == set(dict(model.named_parameters()))


def test_an_estimate_has_nothing_to_read() -> None:
    source = DescribedSource("m", {})
    with pytest.raises(CheckpointError, match="m: expected a checkpoint, got a description"):
        source.read_into("f", 0, memoryview(bytearray(4)))
    assert source.mapped([]) == []


# --- ranks that stand for others ---


def wanted_of(layout: Layout, shapes: list[tuple[int, ...]]) -> list[WantedTensor]:
    return [
        WantedTensor(fqn=f"w{n}", shape=shape, dtype=torch.float32, layout=layout, pieces=(), may_map=False)
        for n, shape in enumerate(shapes)
    ]


def test_ranks_with_equal_shapes_are_a_class() -> None:
    layout = Layout(
        mesh_shape=(8,), mesh_ranks=tuple(range(8)), placements=(torch.distributed.tensor.Shard(0),)
    )
    ranks = tuple(range(8))
    sight = Sight(ranks=ranks, nodes=("",) * 8, readers=ranks)
    wanted = wanted_of(layout, [(16, 2), (5, 3), (11, 1)])
    # Rows: 2 each; 1 each of five ranks; 2 each of five, then 1, then none.
    assert rank_classes(wanted, sight, most_pieces=-1) == ((0,), (1, 2, 3, 4), (5,), (6, 7))
    assert rank_classes(wanted, sight, most_pieces=0) == tuple((rank,) for rank in range(8))


@pytest.mark.parametrize("route", ["direct", "replicate", "node", "rank0", "striped"])
@pytest.mark.parametrize("shape", [(24,), (4, 6)], ids=str)
def test_classes_cost_what_their_ranks_do(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, route: str, shape: tuple[int, ...]
) -> None:
    # Of the small one all ranks' reads have gaps that are read along, each other ones.
    for kind in ("qwen3_large",) if route in ("direct", "replicate") else ("qwen3_moe", "qwen3_large"):
        exact = sw.plan_load(str(directories[kind]), mesh_shape=shape, route=route)
        with monkeypatch.context() as patch:
            patch.setattr("shardwise.materialization.source_cost._MOST_PIECES", 0)
            plan = sw.plan_load(str(directories[kind]), mesh_shape=shape, route=route)
        assert plan.planned_ranks < exact.planned_ranks == exact.ranks
        assert "ranks were planned" in plan.summary()
        assert "ranks were planned" not in exact.summary()
        # Of direct reads, small ones with a gap are joined here and there in other ways.
        assert plan.storage_bytes == pytest.approx(exact.storage_bytes, rel=0.02)
        assert plan.network_bytes == pytest.approx(exact.network_bytes, rel=0.05)
        assert plan.shard_bytes == exact.shard_bytes


@pytest.mark.parametrize("route", ["rank0", "striped"])
def test_a_reader_that_receives_nothing_holds_what_two_rounds_send(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    def peak() -> int:
        plan = sw.plan_load(
            str(directories["qwen3_large"]),
            mesh_shape=2,
            route=route,
            device="cpu",
            cpu_storage="copy",
            staging_bytes=2**20,
        )
        return plan.host_peak_bytes

    two = peak()
    monkeypatch.setattr(Slices, "rounds_in_flight", 1)
    more = two - peak()
    assert (2**20 // 8 < more <= 2**20 // 4) if route == "rank0" else more == 0


# --- what is refused ---


def test_arguments_that_are_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = str(directories["qwen3_tied"])
    with pytest.raises(ConfigurationError, match=r"route: expected one of auto, .* got 'fast'"):
        sw.plan_load(directory, mesh_shape=2, route="fast")
    with pytest.raises(ConfigurationError, match="device: expected one of cpu, accelerator, got 'moon'"):
        sw.plan_load(directory, mesh_shape=2, device="moon")
    with pytest.raises(ConfigurationError, match="ranks_per_node: expected at least 1, got 0"):
        sw.plan_load(directory, mesh_shape=2, ranks_per_node=0)
    with pytest.raises(ConfigurationError, match=r"expected a directory, a hub id or a config .* got dict"):
        sw.plan_load({}, mesh_shape=2)
    with pytest.raises(CheckpointError, match=r"expected safetensors files or a config\.json, got neither"):
        sw.plan_load(str(tmp_path), mesh_shape=2)
    with pytest.raises(CheckpointError, match="Nothing is downloaded for a plan"):
        sw.plan_load("nobody/has-this-model-in-its-cache", mesh_shape=2)
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directories["qwen3_tied"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"expected tensors of Qwen3ForCausalLM, got none"):
        sw.plan_load(str(tmp_path), mesh_shape=2)


def test_a_config_of_another_task_is_refused_in_one_line() -> None:
    from transformers import CLIPConfig

    with pytest.raises(sw.ConfigurationError) as caught:
        sw.plan_load(CLIPConfig(), mesh_shape=2)
    assert "AutoModelForCausalLM: expected a config of a model that this class knows, got CLIPConfig" in str(
        caught.value
    )
    assert "model_cls=" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_tensors_that_the_checkpoint_lacks_are_counted(directories: dict[str, Path], tmp_path: Path) -> None:
    values = load_file(directories["qwen3_tied"] / "model.safetensors")
    values.pop("model.norm.weight")
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directories["qwen3_tied"] / "config.json").read_bytes())
    plan = sw.plan_load(str(tmp_path), mesh_shape=2)
    assert plan.initialised == 1
    assert "lacks 1 of the model's tensors" in plan.summary()


# --- the command ---


def test_the_command_says_what_a_load_costs(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = str(directories["qwen3_tied"])
    expected = sw.plan_load(directory, mesh_shape=(2, 4), route="striped")
    path = tmp_path / "plan.json"
    result = runner.invoke(
        app, ["plan", directory, "--mesh", "2x4", "--route", "striped", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["load"] == expected.to_json()
    for words in ("dp_replicate 2 x dp_shard 4", "route striped", "striped (taken)"):
        assert words in result.output
    for row in expected.rows():
        assert all(cell in expected.summary() for cell in row)


def test_the_command_takes_a_number_of_ranks(directories: dict[str, Path]) -> None:
    result = runner.invoke(app, ["plan", str(directories["qwen3_tied"]), "--ranks", "512", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "dp_shard 512 (cpu)" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --ranks or --mesh, got neither"),
        (["--ranks", "2", "--mesh", "2"], "expected --ranks or --mesh, got both"),
        (["--mesh", "2x2x2"], "--mesh: expected SHARDS or REPLICASxSHARDS, such as 2x4, got '2x2x2'"),
        (["--mesh", "-1"], "--mesh: expected"),
        (["--mesh", "0x2"], "mesh_shape: expected whole numbers from 1 on"),
        (["--ranks", "2", "--route", "fast"], "route: expected one of"),
    ],
)
def test_the_command_refuses(directories: dict[str, Path], options: list[str], message: str) -> None:
    result = runner.invoke(app, ["plan", str(directories["qwen3_tied"]), *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_ends_with_1_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", "plan", str(tmp_path), "--ranks", "2"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("shardwise: ")
    assert "Traceback" not in done.stderr
