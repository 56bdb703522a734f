"""The experiment: ranks merged into runs, runs compared, nothing measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.compare import experiment
from shardwise.compare.experiment import Comparison, Outcome, agreement, compare, median_entry, merge_ranks
from shardwise.compare.fingerprint import differing_names, is_tie, tensor_digest, whole_digest
from shardwise.compare.model_directory import model_directory
from shardwise.compare.modes import DEFAULT_MODES, MODES, ROUTE_NAMES, modes_named
from shardwise.errors import CheckpointError, CommandError, ConfigurationError
from shardwise.plan import ROUTES
from shardwise.report.comparison import read_comparison

MIB = 1 << 20


def timeline(
    rank: int,
    *,
    started_at_seconds: float,
    seconds: list[float],
    anon_mib: list[int],
    loaded_at_seconds: float,
) -> dict[str, Any]:
    ends = [0.0, loaded_at_seconds / 4, loaded_at_seconds / 2, loaded_at_seconds]
    return {
        "rank": rank,
        "measures": "made up",
        "started_at_seconds": started_at_seconds,
        "skipped_readings": 0,
        "seconds": seconds,
        "anon_bytes": [(100 + value) * MIB for value in anon_mib],
        "file_bytes": [7 * MIB for _ in seconds],
        "shared_bytes": [0 for _ in seconds],
        "pss_bytes": [None for _ in seconds],
        "device_bytes": [None for _ in seconds],
        "phases": [
            {"name": name, "depth": 0, "start_seconds": start, "stop_seconds": stop}
            for name, start, stop in zip(experiment.LOAD_PHASES, ends, ends[1:], strict=False)
        ],
        "baseline": {
            "anon_bytes": 100 * MIB,
            "file_bytes": 3 * MIB,
            "shared_bytes": 0,
            "pss_bytes": None,
            "device_bytes": None,
        },
    }


def load_report(ranks: int) -> dict[str, Any]:
    return {
        "schema": "shardwise.load_report/1",
        "model": "m",
        "strategy": "native_fsdp",
        "route": "rank0",
        "route_reason": "it was asked for",
        "world_size": ranks,
        "seconds": 99.0,
        "phases": {"scatter": 99.0},
        "storage_bytes": 10,
        "network_bytes": 20,
        "predicted": {},
        "tensors": {"checkpoint": 2},
        "origins": {},
        "converted": [],
        "dtypes": {"stored": "bfloat16", "compute": "bfloat16", "reduce": "bfloat16", "optimizer": None},
        "ranks": [
            {
                "rank": rank,
                "node": "n",
                "host_anon_peak_bytes": 1,
                "device_peak_bytes": 0,
                "shard_bytes": 50 + rank,
                "storage_bytes": 5,
                "network_bytes": 10,
                "retried_reads": 0,
                "seconds": 99.0,
            }
            for rank in range(ranks)
        ],
    }


def rank_result(
    rank: int, *, ranks: int, line: dict[str, Any], seconds: float, node: str = "n"
) -> dict[str, Any]:
    return {
        "rank": rank,
        "node": node,
        "report": load_report(ranks),
        "timeline": line,
        "seconds": {"from_pretrained": seconds, "optimizer": 0.5, "wrap_model": 2.0 - rank},
        "peaks": {"host_anon_peak_bytes": (10 + rank) * MIB, "device_peak_bytes": 0},
        "step_timeline": {**line, "phases": []},
        "step_seconds": 3.0 + rank,
        "digests": {"w": "parameter bf16 (2,) aa", "v": "parameter tied to w"} if rank == 0 else {},
        "logits": "ll",
        "answer": "Paris.",
    }


def two_ranks(nodes: tuple[str, str] = ("n", "n")) -> dict[int, dict[str, Any]]:
    # Wall clock, in seconds:        100   101   102   103   104
    # rank 0 (starts at 100), MiB:     0    30          10
    # rank 1 (starts at 101), MiB:           0    40           5
    # together:                        0    30    70    50    15
    first = timeline(
        0, started_at_seconds=100.0, seconds=[0.0, 1.0, 3.0], anon_mib=[0, 30, 10], loaded_at_seconds=4.0
    )
    second = timeline(
        1, started_at_seconds=101.0, seconds=[0.0, 1.0, 3.0], anon_mib=[0, 40, 5], loaded_at_seconds=3.0
    )
    return {
        1: rank_result(1, ranks=2, line=second, seconds=4.0, node=nodes[1]),
        0: rank_result(0, ranks=2, line=first, seconds=1.0, node=nodes[0]),
    }


def test_node_peak_is_the_highest_sum_at_one_instant() -> None:
    node = merge_ranks("native-eager", two_ranks()).entry["node"]
    assert node == {
        "host_anon_peak_bytes": 70 * MIB,  # not 30 + 40 of two instants by luck: rank 0 still holds 30 at 102
        "host_file_peak_bytes": 8 * MIB,
        "host_pss_peak_bytes": None,
    }


def test_node_peak_does_not_add_peaks_of_different_instants() -> None:
    results = two_ranks()
    results[1]["timeline"]["started_at_seconds"] = 103.5  # its 40 MiB come when rank 0 is down to 10 MiB
    assert merge_ranks("m", results).entry["node"]["host_anon_peak_bytes"] == 50 * MIB


def test_node_peak_is_of_the_fullest_node() -> None:
    node = merge_ranks("m", two_ranks(nodes=("a", "b"))).entry["node"]
    assert node["host_anon_peak_bytes"] == 40 * MIB


def test_what_comes_after_the_load_is_not_in_the_peak() -> None:
    results = two_ranks()
    for result in results.values():
        line = result["timeline"]
        line["seconds"].append(9.0)
        for column in ("anon_bytes", "file_bytes", "shared_bytes"):
            line[column].append(900 * MIB)
        line["pss_bytes"].append(None)
        line["device_bytes"].append(None)
    assert merge_ranks("m", results).entry["node"]["host_anon_peak_bytes"] == 70 * MIB


def test_times_and_peaks_come_from_the_profiles_and_the_rest_from_the_report() -> None:
    entry = merge_ranks("native-efficient", two_ranks()).entry
    assert entry["phases"] == {"from_pretrained": 4.0, "optimizer": 0.5, "wrap_model": 2.0}
    assert entry["seconds"] == 5.5  # rank 1: 4 + 0.5 + 1
    assert entry["step_seconds"] == 4.0
    assert [rank["host_anon_peak_bytes"] for rank in entry["ranks"]] == [10 * MIB, 11 * MIB]
    assert [rank["shard_bytes"] for rank in entry["ranks"]] == [50, 51]
    assert [rank["seconds"] for rank in entry["ranks"]] == [3.5, 5.5]
    assert (entry["mode"], entry["status"], entry["answer"]) == ("native-efficient", "ok", "Paris.")
    assert [line["rank"] for line in entry["timelines"]] == [0, 1]


def outcome(mode: str, digests: dict[str, str], logits: str = "l") -> Outcome:
    return Outcome(entry={"mode": mode, "status": "ok"}, digests=digests, logits=logits)


FAILED = Outcome(entry={"mode": "x", "status": "failed", "error": "e"}, digests={}, logits="")
DIGESTS = {"a": "parameter A", "b": "parameter B", "c": "buffer C", "d": "parameter tied to a"}


def test_equal_runs_agree() -> None:
    found = agreement([outcome("one", DIGESTS), FAILED, outcome("two", dict(DIGESTS))])
    assert found == {"equal": True, "reference": "one", "parameters": 2, "buffers": 1, "differences": []}


def test_differing_tensors_are_named() -> None:
    found = agreement(
        [outcome("one", DIGESTS), outcome("two", {**DIGESTS, "b": "parameter X"}), outcome("three", {})]
    )
    assert found["equal"] is False
    assert found["differences"] == [
        {"mode": "two", "tensors": ["b"], "logits": False},
        {"mode": "three", "tensors": ["a", "b", "c", "d"], "logits": False},
    ]


def test_runs_that_only_loaded_are_not_compared() -> None:
    found = agreement([outcome("one", {}, logits=""), outcome("two", {}, logits="")])
    assert found == {"equal": None, "reference": None, "parameters": 0, "buffers": 0, "differences": []}


def test_a_lost_tie_is_a_difference() -> None:
    found = agreement([outcome("one", DIGESTS), outcome("two", {**DIGESTS, "d": "parameter A"})])
    assert found["differences"] == [{"mode": "two", "tensors": ["d"], "logits": False}]


def test_differing_logits_alone_are_a_difference() -> None:
    found = agreement([outcome("one", DIGESTS), outcome("two", DIGESTS, logits="other")])
    assert found["equal"] is False
    assert found["differences"] == [{"mode": "two", "tensors": [], "logits": True}]


@pytest.mark.parametrize("outcomes", [[], [FAILED], [FAILED, outcome("one", DIGESTS)]])
def test_fewer_than_two_runs_are_not_called_equal(outcomes: list[Outcome]) -> None:
    assert agreement(outcomes)["equal"] is None


def test_the_median_run_stands_for_the_repeats() -> None:
    entries = [{"mode": "m", "status": "ok", "seconds": seconds} for seconds in (5.0, 1.0, 2.0)]
    assert median_entry(entries) == {
        "mode": "m",
        "status": "ok",
        "seconds": 2.0,
        "repeat_seconds": [5.0, 1.0, 2.0],
    }
    assert median_entry(entries[:1]) == entries[0]
    failed = {"mode": "m", "status": "failed", "error": "e"}
    assert median_entry([entries[0], failed, entries[1]]) == failed


def test_digests_see_dtype_shape_and_every_byte() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    others = [
        tensor.to(torch.float64),
        tensor.reshape(2),
        torch.tensor([[1.0, -2.0]]),
        torch.tensor([[1.0, 2.0000002]]),
    ]
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) not in {tensor_digest(other) for other in others}
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    assert tensor_digest(torch.tensor(1.5)).startswith("float32 () ")
    assert tensor_digest(torch.empty(0, 3, dtype=torch.bfloat16)).startswith("bfloat16 (0, 3) ")
    strided = torch.arange(6.0).reshape(2, 3).T
    assert tensor_digest(strided) == tensor_digest(strided.contiguous())


def test_digests_as_a_whole() -> None:
    assert whole_digest({"a": "1", "b": "2"}) == whole_digest({"b": "2", "a": "1"})
    assert whole_digest({"a": "1"}) != whole_digest({"a": "2"})
    assert differing_names({"a": "1", "b": "2"}, {"b": "3", "c": "1"}) == ["a", "b", "c"]
    assert is_tie("parameter tied to x")
    assert not is_tie("parameter bfloat16 (2,) aa")


def tiny_directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_compare_goes_on_after_a_failed_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fake_run_ranks(worker: Any, arguments: Any, *, ranks: int, log_directory: Path, progress: Any) -> Any:
        asked.append({**arguments, "ranks": ranks})
        log_directory.mkdir(parents=True)
        if arguments["mode"] == "native-eager":
            raise CommandError("rank 1 of 2 failed first: MemoryError.")
        return two_ranks()

    monkeypatch.setattr(experiment, "run_ranks", fake_run_ranks)
    said: list[str] = []
    found = compare(
        str(tiny_directory(tmp_path)),
        ranks=2,
        modes=modes_named(()),
        dtype="float32",
        replicas=2,
        log_directory=tmp_path / "logs",
        progress=said.append,
    )
    assert [each["mode"] for each in asked] == list(DEFAULT_MODES)
    assert {(each["dtype"], each["ranks"]) for each in asked} == {("float32", 2)}
    assert [each["mode"] for each in asked if each["ask"]] == ["native-efficient"]
    assert all(each["mesh_shape"] == [2, 1] for each in asked)
    assert found.document["replicas"] == 2
    assert not any(each["load_only"] for each in asked)
    assert found.failed_modes == ("native-eager",)
    assert found.is_equal
    assert not found.is_good
    assert found.document["runs"][0]["error"] == "rank 1 of 2 failed first: MemoryError."
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["native-eager"]
    assert "native-eager: failed" in said
    # What is written is what the report reads.
    found.save(tmp_path / "out" / "report.json")
    runs = read_comparison(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert [run.error is None for run in runs] == [False, True, True, True]
    assert runs[1].node.anon_bytes == 70 * MIB
    assert found.document["environment"]["versions"]["torch"] == torch.__version__


def test_logs_of_a_good_comparison_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_run_ranks(worker: Any, arguments: Any, *, ranks: int, log_directory: Path, progress: Any) -> Any:
        log_directory.mkdir(parents=True)
        return two_ranks()

    monkeypatch.setattr(experiment, "run_ranks", fake_run_ranks)
    found = compare(
        str(tiny_directory(tmp_path)),
        ranks=2,
        modes=modes_named(["native-eager"]),
        dtype="auto",
        log_directory=tmp_path / "logs",
        progress=lambda message: None,
        repeats=3,
    )
    assert not (tmp_path / "logs").exists()
    assert found.is_good
    assert found.is_equal  # the repeats are compared too
    assert len(found.document["runs"]) == 1
    assert found.document["runs"][0]["repeat_seconds"] == [5.5, 5.5, 5.5]


def test_a_mode_that_has_failed_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def fake_run_ranks(worker: Any, arguments: Any, **options: Any) -> Any:
        started.append(arguments["mode"])
        if arguments["mode"] == "native-eager":
            raise CommandError("rank 1 of 2 failed first.")
        return two_ranks()

    monkeypatch.setattr(experiment, "run_ranks", fake_run_ranks)
    found = compare(
        str(tiny_directory(tmp_path)),
        ranks=2,
        modes=modes_named(["native-eager", "native-efficient"]),
        dtype="auto",
        log_directory=tmp_path / "logs",
        progress=lambda message: None,
        repeats=2,
    )
    assert started == ["native-eager", "native-efficient", "native-efficient"]
    assert found.failed_modes == ("native-eager",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks: expected 1 or more, got 0"),
        ({"repeats": 0}, "repeats: expected 1 or more, got 0"),
        ({"ranks": 6, "replicas": 4}, "replicas: expected a divisor of the 6 ranks, got 4"),
        ({"dtype": "int8"}, "dtype: expected one of auto, bfloat16, float32, got 'int8'"),
        ({"model": "/nowhere/at/all"}, "model: expected a directory or a hub id"),
    ],
)
def test_compare_refuses_before_it_starts_anything(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    wanted = {"model": str(tiny_directory(tmp_path)), "ranks": 2, "modes": modes_named(()), "dtype": "auto"}
    arguments = {**wanted, "log_directory": tmp_path / "logs", "progress": print, **change}
    with pytest.raises(ConfigurationError, match=message):
        compare(**arguments)
    assert not (tmp_path / "logs").exists()


def test_compare_refuses_inside_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigurationError, match=r"got rank 1 of 4 .*without torchrun or accelerate launch"):
        compare("m", ranks=2, modes=(), dtype="auto", log_directory=tmp_path, progress=print)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected config.json in it"):
        model_directory(str(tmp_path), progress=print)


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # conftest sets the hub's client offline.
    with pytest.raises(CheckpointError, match=r"nobody/nothing: there is no such directory, and the hub"):
        model_directory("nobody/nothing", progress=lambda message: None)


def test_modes_are_named_as_on_the_command_line() -> None:
    assert [(mode.strategy, mode.memory_efficient_init) for mode in modes_named(())] == [
        ("native_fsdp", False),
        ("native_fsdp", True),
        ("accelerate", False),
        ("accelerate", True),
    ]
    assert [mode.name for mode in modes_named(["accelerate-eager", "native-eager", "accelerate-eager"])] == [
        "accelerate-eager",
        "native-eager",
    ]
    with pytest.raises(ConfigurationError, match=r"expected one of native-eager, .* got 'fast'"):
        modes_named(["native-eager", "fast"])


def test_a_comparison_without_failures_or_differences_is_good() -> None:
    def made(differing: list[str], **states: str) -> Comparison:
        runs = [{"mode": mode.replace("_", "-"), "status": state} for mode, state in states.items()]
        found = {"equal": not differing, "differences": [{"mode": mode} for mode in differing]}
        return Comparison(document={"runs": runs, "agreement": found})

    assert made([], native_eager="ok", native_efficient="ok").is_good
    assert made([], native_eager="ok").is_good
    assert not made(["native-efficient"], native_eager="ok", native_efficient="ok").is_good
    assert not made([], native_eager="ok", native_efficient="failed").is_good
    assert made([], native_eager="ok", dcp_reader="failed").is_good  # another library's way
    assert made(["dcp-reader"], native_eager="ok", dcp_reader="ok").is_good


def test_each_route_has_a_mode_of_each_strategy() -> None:
    routes = [route for route in ROUTES if route != "auto"]
    assert list(ROUTE_NAMES) == [f"native-{route}" for route in routes]
    for name, strategy in (("native", "native_fsdp"), ("accelerate", "accelerate")):
        for route in routes:
            mode = MODES[f"{name}-{route}"]
            assert (mode.strategy, mode.route, mode.memory_efficient_init) == (strategy, route, True)
