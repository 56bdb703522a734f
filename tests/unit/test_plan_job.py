"""A job's plan: its ways, its training, its verdict; a model on the hub by its headers; and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard
from typer.testing import CliRunner

import shardwise as sw
from shardwise.cli import app
from shardwise.compare.modes import MODES
from shardwise.errors import CheckpointError, ConfigurationError, UnsupportedFormatError
from shardwise.materialization import cost_of_source, entries_of
from shardwise.materialization.source_plan import plan_sources
from shardwise.planning import JobPlan, plan_job, predicted_for
from shardwise.planning.outlook import load_plan_of, outlook_of
from shardwise.planning.planner import setting_of
from shardwise.planning.subject import subject_of
from shardwise.planning.tensor_parallel import tensor_placements
from tests.distributed.models import causal_model, transformers_fuses_experts, write_checkpoint

runner = CliRunner()
PLAIN = ["every rank loads", "rank 0 broadcasts", "Accelerate, stock"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("qwen3_large", tmp_path_factory.mktemp("jobs") / "model"))


@pytest.fixture(scope="module")
def plan(directory: str) -> JobPlan:
    return plan_job(
        directory,
        mesh_shape=(2, 4),
        ranks_per_node=4,
        read_bytes_per_second=1e9,
        link_bytes_per_second=1e10,
        device_bytes=1 << 20,
    )


def test_every_route_and_every_plain_way_is_there(plan: JobPlan, directory: str) -> None:
    assert [way.name for way in plan.ways] == ["direct", "replicate", "node", "rank0", "striped", *PLAIN]
    assert [way.name for way in plan.ways if way.chosen] == [plan.load.route] == ["replicate"]
    for way in plan.ways[:5]:
        alone = sw.plan_load(directory, mesh_shape=(2, 4), ranks_per_node=4, route=way.name)
        for name in ("storage_bytes", "rank_storage_bytes", "network_bytes", "host_peak_bytes", "reads"):
            assert way.to_json()[name] == getattr(alone, name), (way.name, name)
        assert way.cost.node_host_peak_bytes <= 4 * way.cost.host_peak_bytes
        assert way.cost.node_storage_bytes <= way.cost.storage_bytes <= 2 * way.cost.node_storage_bytes
        assert way.rank_files == 1  # the model has one file
    one_node = plan_job(directory, mesh_shape=8)
    assert [way.name for way in one_node.ways] == ["direct", "rank0", "striped", *PLAIN]
    one_rank = plan_job(directory, mesh_shape=1)
    assert [way.name for way in one_rank.ways] == ["direct", *PLAIN]
    few = plan_job(directory, mesh_shape=8, routes=["striped"])
    assert [way.name for way in few.ways] == ["direct", "striped", *PLAIN]


def test_seconds_count_the_busiest_node_and_rank(plan: JobPlan) -> None:
    rank0, replicate = plan.way("rank0"), plan.way("replicate")
    assert rank0 is not None
    assert replicate is not None
    # Rank 0 hands everything to everybody over one link.
    assert rank0.cost.rank_network_bytes == pytest.approx(rank0.cost.network_bytes, rel=0.01)
    assert rank0.seconds == max(rank0.cost.node_storage_bytes / 1e9, rank0.cost.rank_network_bytes / 1e10)
    assert replicate.cost.rank_network_bytes == pytest.approx(replicate.cost.network_bytes / 8, rel=0.1)
    assert replicate.seconds == replicate.cost.node_storage_bytes / 1e9  # of a node with half of the ranks
    assert plan_job(plan.load.model, mesh_shape=2).ways[0].seconds is None


def test_a_node_reads_no_more_than_the_checkpoint(directory: str) -> None:
    direct = plan_job(directory, mesh_shape=(4, 2), read_bytes_per_second=1e9, routes=["direct"]).way(
        "direct"
    )
    assert direct is not None
    assert direct.seconds is not None
    assert direct.cost.storage_bytes > 3.9 * direct.seconds * 1e9  # the page cache has it the other times


def test_training_is_of_shards_with_padding(plan: JobPlan, directory: str) -> None:
    shards = plan.load.shard_bytes
    assert sum(plan.training.parameters.values()) == sum(plan.training.gradients.values()) == shards
    assert dict(plan.training.optimizer_states) == {"bfloat16": 2 * shards}
    assert plan.training.device_bytes >= 5 * shards
    model = causal_model("qwen3_large")
    largest = max(p.numel() for p in model.parameters()) * 2  # the embedding, in bf16
    assert plan.training.gathered_bytes >= 2 * largest
    stock = plan.way("Accelerate, stock")
    assert stock is not None
    assert dict(stock.training.parameters) == {"float32": 2 * shards}
    half = plan_job(directory, mesh_shape=(2, 4), optimizer="none", mixed_precision="no")
    assert half.training.device_bytes == shards + half.training.gathered_bytes
    stock = half.way("Accelerate, stock")
    assert stock is not None
    assert dict(stock.training.parameters) == {"bfloat16": shards}


def test_offload_moves_shards_and_training_to_the_host(directory: str) -> None:
    kept, offloaded = (plan_job(directory, mesh_shape=4, offload=offload) for offload in (False, True))
    assert offloaded.load.device_peak_bytes < 0.2 * kept.load.device_peak_bytes
    assert offloaded.load.host_peak_bytes >= kept.load.shard_bytes
    # On the way to a device reads are longer, and cover some more of the small gaps.
    assert offloaded.load.storage_bytes == pytest.approx(kept.load.storage_bytes, rel=1e-3)
    assert offloaded.training.device_bytes == kept.training.gathered_bytes
    assert offloaded.training.host_bytes >= 4 * kept.load.shard_bytes


def test_the_verdict_tries_what_would_help(directory: str) -> None:
    fits_with_8 = plan_job(directory, mesh_shape=8).training.device_bytes
    plan = plan_job(directory, mesh_shape=(2, 4), device_bytes=fits_with_8)
    assert plan.verdict is not None
    assert not plan.verdict.fits
    assert "; with --replicas 1: " in plan.verdict.text
    assert "--offload" not in plan.verdict.text
    tight = plan_job(directory, mesh_shape=4, device_bytes=1)
    assert tight.verdict is not None
    assert "with --offload: " in tight.verdict.text
    assert "with --ranks 8 --nodes 1: " in tight.verdict.text
    assert tight.verdict.text.count("(still too much)") == 2
    roomy = plan_job(directory, mesh_shape=4, host_bytes=1 << 40, device_bytes=1 << 40)
    assert roomy.verdict is not None
    assert roomy.verdict.fits
    assert all(way.fits for way in roomy.ways)
    assert all(way.fits is None for way in plan_job(directory, mesh_shape=4).ways)


def test_what_lacks_on_the_host_is_not_moved_there(directory: str) -> None:
    one_node = plan_job(directory, mesh_shape=4, host_bytes=1)
    assert one_node.verdict is not None
    assert "--offload" not in one_node.verdict.text
    assert "with --ranks 8 --nodes 2: " in one_node.verdict.text
    on_shards = plan_job(directory, mesh_shape=4, device="cpu")
    fewer = plan_job(directory, mesh_shape=8, device="cpu", ranks_per_node=4)
    assert fewer.training.host_bytes < on_shards.training.host_bytes
    enough = 4 * fewer.training.host_bytes
    helped = plan_job(directory, mesh_shape=4, device="cpu", host_bytes=enough)
    assert helped.verdict is not None
    assert not helped.verdict.fits
    assert "still too much" not in helped.verdict.text


def test_a_node_needs_what_all_its_ranks_do(directory: str) -> None:
    plan = plan_job(directory, mesh_shape=4, device="cpu", cpu_storage="copy", host_bytes=1)
    assert plan.verdict is not None
    need = max(plan.load.node_host_peak_bytes, 4 * plan.training.host_bytes)
    assert f"does not fit: {need / 2**30:.2g} of " in plan.verdict.text
    assert plan.training.device_bytes == plan.load.device_peak_bytes == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of adamw"),
        ({"mixed_precision": "fp8"}, r"mixed_precision: expected 'bf16', 'fp16' or 'no', got 'fp8'"),
        ({"mixed_precision": "bf8"}, "mixed_precision: expected one of"),
        ({"route": "fast"}, "route: expected one of"),
        ({"device": "cpu", "offload": True}, "offload: expected accelerator ranks"),
        ({"device": "cpu", "device_bytes": 1}, "expected accelerator ranks for a limit on device memory"),
        (
            {"measure_read": True, "read_bytes_per_second": 1.0},
            "expected a read rate, or that it be measured",
        ),
        ({"read_bytes_per_second": 0.0}, "read_bytes_per_second: expected a number above 0"),
    ],
)
def test_arguments_that_are_refused(directory: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_job(directory, mesh_shape=4, **arguments)


def test_the_read_rate_is_measured_where_there_are_files(directory: str, tmp_path: Path) -> None:
    assert plan_job(directory, mesh_shape=2, measure_read=True).ways[0].seconds is not None
    shutil.copy(Path(directory) / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="expected files of the checkpoint on this machine"):
        plan_job(str(tmp_path), mesh_shape=2, measure_read=True)


# --- files ---


@pytest.fixture(scope="module")
def in_files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint in several files."""
    directory = tmp_path_factory.mktemp("files") / "model"
    causal_model("qwen3_large").to(torch.bfloat16).save_pretrained(directory, max_shard_size="34MB")
    return str(directory)


@pytest.mark.parametrize("route", ["direct", "replicate", "node", "rank0", "striped"])
def test_files_are_those_that_each_rank_reads_from(in_files: str, route: str) -> None:
    setting = setting_of(
        (2, 2), device="cpu", ranks_per_node=2, staging_bytes=None, cpu_storage="copy", offload=False
    )
    subject = subject_of(in_files, dtype="auto", model_cls=None, revision=None)
    outlook = outlook_of(subject, setting)
    files = {stored.file for stored in outlook.wanted.source.tensors.values()}
    assert len(files) == 3
    costs = cost_of_source(
        outlook.wanted, outlook.sight, route=route, staging_bytes=setting.staging_bytes, on_host=True
    )
    counts = []
    for rank in range(4):
        (plan,) = plan_sources(
            [outlook.wanted],
            sights=[outlook.sight],
            route=route,
            rank=rank,
            device=torch.device("cpu"),
            on_host=True,
            staging_bytes=setting.staging_bytes,
            cpu_storage="copy",
        )
        read = {each.file for each in plan.direct.reads}
        read |= {extent.file for exchange in plan.exchanges for extent in exchange.extents()}
        counts.append(len(read))
    assert costs.cost.opened.sum(axis=1).tolist() == counts
    assert load_plan_of(outlook, route=route).rank_files == max(counts)


# --- modes ---


def test_every_mode_has_a_prediction(directory: str) -> None:
    for ranks in (1, 4):
        plan = plan_job(directory, mesh_shape=ranks, device="cpu", mixed_precision="no")
        stored = plan.load.stored_bytes
        for mode in (name for name, each in MODES.items() if each.strategy != "peer"):
            predicted = predicted_for(plan, mode)
            eager = not MODES[mode].memory_efficient_init
            assert predicted.storage_bytes == 0 if eager else predicted.storage_bytes >= stored
            assert predicted.device_peak_bytes == 0
    with pytest.raises(ConfigurationError, match="mode 'dcp-reader': expected a mode of shardwise"):
        predicted_for(plan, "dcp-reader")
    with pytest.raises(ConfigurationError, match="mode: expected one of native-eager"):
        predicted_for(plan, "native-lazy")
    few = plan_job(directory, mesh_shape=4, device="cpu", routes=["striped"])
    with pytest.raises(ConfigurationError, match="expected a plan that has 'rank0', got direct, striped"):
        predicted_for(few, "native-rank0")


# --- tensor parallelism ---


def test_tensor_parallelism_cuts_what_the_plan_of_the_model_names(directory: str) -> None:
    model: Any = causal_model("qwen3_large")
    assert model._tp_plan
    plan = plan_job(directory, mesh_shape={"dp_shard": 2, "tp": 2})
    # transformers 4.57 leaves embedding and head out of the plan of a model that is built.
    cut = (
        "_proj.weight",
        *(("lm_head.weight", "embed_tokens.weight") if transformers_fuses_experts() else ()),
    )
    shards = 0
    for name, parameter in model.named_parameters():
        # Over both axes, one after the other on rows or each on a dim of its own.
        over = 4 if name.endswith(cut) else 2
        shards += math.prod(parameter.shape) // over * 2
    assert plan.load.shard_bytes == shards
    assert "Accelerate, stock" not in [way.name for way in plan.ways]
    whole = plan_job(directory, mesh_shape=2)
    assert (
        plan.training.gathered_bytes
        < (0.6 if transformers_fuses_experts() else 1) * whole.training.gathered_bytes + 1
    )
    assert plan.load.storage_bytes == pytest.approx(plan.load.stored_bytes, rel=0.02)


def test_rows_and_columns_are_cut_as_the_styles_say() -> None:
    class Planned(torch.nn.Module):
        _tp_plan: ClassVar = {
            "layers.*.up": "colwise",
            "layers.*.down": "rowwise",
            "layers.*.stack": "packed_colwise",
            "layers.*.last": "packed_rowwise",
            "embed": "embedding_rowwise",
            "columns": "embedding_colwise",
            "layers.*.norm": "replicated_with_grad_allreduce",
        }

        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.Module()
            layer.up, layer.down = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)
            layer.norm = torch.nn.LayerNorm(2)
            layer.stack = torch.nn.Parameter(torch.zeros(3, 4, 2))
            layer.last = torch.nn.Parameter(torch.zeros(3, 2, 4))
            self.layers = torch.nn.ModuleList([layer])
            self.embed, self.columns = torch.nn.Embedding(4, 2), torch.nn.Embedding(4, 2)

    model = Planned()
    assert tensor_placements(model, entries_of(model)) == {
        "layers.0.up.weight": Shard(0),
        "layers.0.up.bias": Shard(0),
        "layers.0.down.weight": Shard(1),
        "layers.0.stack": _StridedShard(1, split_factor=2),
        "layers.0.last": _StridedShard(2, split_factor=2),
        "embed.weight": Shard(0),
        "columns.weight": Shard(1),
    }


def test_a_model_without_a_plan_cannot_be_cut(tmp_path: Path) -> None:
    directory = write_checkpoint("gpt2", tmp_path / "gpt2")
    if getattr(causal_model("gpt2"), "_tp_plan", None):
        pytest.skip("transformers 5 has a plan for GPT-2's head and embedding")
    with pytest.raises(ConfigurationError, match="tp: expected a model for which transformers has a plan"):
        sw.plan_load(str(directory), mesh_shape={"dp_shard": 2, "tp": 2})


# --- a model on the hub ---


class FakeHub:
    """Has one model, of which it tells headers and config."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.asked: list[tuple[str, str | None]] = []
        self.dtype: str | None = None
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("shardwise.checkpoint.hub_headers.hf_hub_download", self.download)
        monkeypatch.setattr("shardwise.checkpoint.hub_headers.get_safetensors_metadata", self.metadata)

    def download(self, repo_id: str, name: str, *, revision: str | None, local_dir: Path) -> None:
        if repo_id != "owner/model":
            raise OSError("404: no such model.\nmore")
        shutil.copy(self.directory / name, local_dir)

    def metadata(self, repo_id: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        self.asked.append((repo_id, revision))
        files = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            start = path.read_bytes()
            header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
            header.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(
                    dtype=self.dtype or of["dtype"],  # type: ignore[arg-type]
                    shape=of["shape"],
                    data_offsets=tuple(of["data_offsets"]),
                )
                for name, of in header.items()
            }
            files[path.name] = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return SafetensorsRepoMetadata(
            metadata=None, sharded=len(files) > 1, weight_map={}, files_metadata=files
        )


def test_headers_of_the_hub_plan_as_the_files_do(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(Path(directory), monkeypatch)
    here = sw.plan_load(directory, mesh_shape=(2, 4))
    there = sw.plan_load("owner/model", mesh_shape=(2, 4), revision="v1")
    assert dataclasses.replace(there, model=directory) == here
    assert not there.estimated
    assert hub.asked == [("owner/model", "v1")]


def test_what_the_hub_does_not_have_is_an_error_in_one_line(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(Path(directory), monkeypatch)
    with pytest.raises(CheckpointError, match=r"got neither: 404: no such model\. Check the name") as caught:
        sw.plan_load("owner/other", mesh_shape=2)
    assert "\n" not in str(caught.value)
    hub.dtype = "F4"
    with pytest.raises(
        UnsupportedFormatError, match=r"in model\.safetensors: expected one of the dtypes .* got 'F4'"
    ):
        sw.plan_load("owner/model", mesh_shape=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        sw.plan_load("owner/model", mesh_shape=2)


# --- the command ---


def run(directory: str, *options: str) -> Any:
    return runner.invoke(app, ["plan", directory, *options])


def test_the_command_prints_plain_lines_in_a_pipe(directory: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    options = ("--ranks", "8", "--replicas", "2", "--nodes", "2", "--read-gbps", "2", "--link-gbps", "50")
    result = run(directory, *options, "--device-ram", "80", "--json", str(path))
    assert result.exit_code == 0, result.output
    expected = plan_job(
        directory,
        mesh_shape=(2, 4),
        ranks_per_node=4,
        read_bytes_per_second=2e9,
        link_bytes_per_second=50e9,
        device_bytes=80 << 30,
    )
    assert json.loads(path.read_text()) == json.loads(json.dumps(expected.to_json()))
    lines = result.output.splitlines()
    for way in expected.ways:
        assert sum(line.startswith(way.name) for line in lines) >= 1, way.name
    assert any(line.startswith("replicate (taken)") for line in lines)
    for words in (
        "dp_replicate 2 x dp_shard 4",
        "2 nodes of 4 ranks",
        "Activations are not counted",
        "Not predicted: transformers' DistributedConfig",
        "seconds",
    ):
        assert words in result.output, words
    assert lines[-1].startswith("replicate fits: ")
    assert result.output.isascii()  # no lines are drawn


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("--read-gbps", "--link-gbps"), ("--link-gbps", "--read-gbps or --measure-read")],
)
def test_seconds_that_are_not_known_name_the_option(directory: str, given: str, wanted: str) -> None:
    result = run(directory, "--ranks", "8", "--replicas", "2", given, "2")
    assert result.output.splitlines()[-1] == f"Seconds of ways with - are known with {wanted} too."
    both = run(directory, "--ranks", "8", "--replicas", "2", "--read-gbps", "2", "--link-gbps", "2")
    assert "are known with" not in both.output


def test_the_status_says_that_it_does_not_fit(directory: str) -> None:
    result = run(directory, "--ranks", "4", "--device-ram", "0.01")
    assert result.exit_code == 3
    last = result.output.splitlines()[-1]
    assert last.startswith("direct does not fit: ")
    assert "with --offload: " in last
    assert "3 if --host-ram or --device-ram is given" in " ".join(
        runner.invoke(app, ["plan", "--help"]).output.split()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ranks", "8", "--replicas", "3"],
            "expected --ranks to be a multiple of --replicas x --tp (3 x 1), got 8",
        ),
        (["--ranks", "2", "--replicas", "2", "--tp", "2"], "multiple of --replicas x --tp (2 x 2), got 2"),
        (["--mesh", "2x4", "--replicas", "2"], "expected --replicas or --mesh, got both"),
        (["--ranks", "8", "--nodes", "3"], "--nodes: expected a number that divides the 8 ranks, got 3"),
        (
            ["--ranks", "8", "--nodes", "2", "--ranks-per-node", "4"],
            "expected --nodes or --ranks-per-node, got both",
        ),
        (["--ranks", "8", "--optimizer", "lion"], "optimizer: expected one of"),
        (["--ranks", "8", "--read-gbps", "0"], "--read-gbps: expected a number above 0, got 0"),
        (["--ranks", "8", "--link-gbps", "nan"], "--link-gbps: expected a number above 0, got nan"),
        (
            ["--ranks", "8", "--read-gbps", "2", "--measure-read"],
            "expected --read-gbps or --measure-read, got both",
        ),
        (["--ranks", "8", "--host-ram", "inf"], "--host-ram: expected a finite number, got inf"),
    ],
)
def test_options_that_are_refused(directory: str, options: list[str], message: str) -> None:
    result = run(directory, *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("width", "of_ways"), [(80, 3), (60, 4)])
def test_a_narrow_terminal_gets_tables_of_its_width(
    directory: str, width: int, of_ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from shardwise.cli import plan_display

    class Terminal(Console):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, force_terminal=True, color_system=None, width=width)

    monkeypatch.setattr(plan_display, "Console", Terminal)
    result = run(
        directory,
        "--ranks",
        "8",
        "--replicas",
        "2",
        "--read-gbps",
        "2",
        "--link-gbps",
        "1",
        "--host-ram",
        "9",
    )
    assert result.exit_code == 0, result.output
    tables = result.output.split("stored tensors, ")[0].splitlines()[1:-1]
    assert max(map(len, tables)) <= width
    assert "…" not in result.output
    assert sum(line.split()[:2] == ["at", "load"] for line in tables) == of_ways


def test_every_value_of_a_plan_is_of_one_file(directory: str) -> None:
    assert sum(t.nbytes for t in load_file(Path(directory) / "model.safetensors").values()) == (
        plan_job(directory, mesh_shape=2, dtype=torch.float32).load.stored_bytes
    )
