"""Synthetic documents of comparisons, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
BASE_BYTES = 300 * MIB
MODES = ("native-eager", "native-efficient", "accelerate-eager", "accelerate-efficient")
PHASES = ("from_pretrained", "optimizer", "wrap_model")
ERROR = "CheckpointError: model-00002-of-00004.safetensors: expected 512 bytes, got 12 at $x_i$. Download it again."


def timeline(rank: int, peak_mib: int, device_mib: int) -> dict[str, Any]:
    count = 60
    anon = [BASE_BYTES + peak_mib * MIB * min(i, 30) // 30 for i in range(count)]
    # The step alone goes higher; no peak of the load may show it.
    anon[-5:] = [BASE_BYTES + 10 * peak_mib * MIB] * 5
    return {
        "rank": rank,
        "measures": "host: RssAnon of /proc/self/status",
        "started_at_seconds": 1000.0 + 0.1 * rank,
        "seconds": [0.05 * i for i in range(count)],
        "anon_bytes": anon,
        "file_bytes": [BASE_BYTES + 40 * MIB * (i > 10) for i in range(count)],
        "shared_bytes": [0] * count,
        "pss_bytes": [BASE_BYTES + 7 * MIB * (i > 10) if i % 20 == 0 else None for i in range(count)],
        "device_bytes": [device_mib * MIB * min(i, 30) // 30 for i in range(count)],
        "phases": [
            {"name": "from_pretrained", "depth": 0, "start_seconds": 0.0, "stop_seconds": 1.0},
            {"name": "from_pretrained", "depth": 1, "start_seconds": 0.1, "stop_seconds": 0.9},
            {"name": "optimizer", "depth": 0, "start_seconds": 1.0, "stop_seconds": 1.01},
            {"name": "wrap_model", "depth": 0, "start_seconds": 1.01, "stop_seconds": 2.0},
            {"name": "step", "depth": 0, "start_seconds": 2.2, "stop_seconds": 2.9},
        ],
        "baseline": {
            "anon_bytes": BASE_BYTES,
            "file_bytes": BASE_BYTES,
            "shared_bytes": 0,
            "pss_bytes": BASE_BYTES,
            "device_bytes": 0,
        },
    }


def run(mode: str, *, ranks: int, peak_mib: int, device_mib: int) -> dict[str, Any]:
    return {
        "mode": mode,
        "status": "ok",
        "schema": "shardwise.load_report/1",
        "model": "org/model",
        "strategy": mode.split("-")[0],
        "route": "rank0",
        "route_reason": "it was asked for",
        "world_size": ranks,
        "seconds": 4.0,
        "phases": {"from_pretrained": 2.25, "optimizer": 0.01, "wrap_model": 1.75},
        "storage_bytes": 0,
        "network_bytes": 0,
        "predicted": {},
        "tensors": {"checkpoint": 3},
        "origins": {},
        "converted": [],
        "dtypes": {"stored": "float32", "compute": "float32", "reduce": "float32", "optimizer": None},
        "ranks": [
            {
                "rank": rank,
                "node": "host",
                "host_anon_peak_bytes": (peak_mib + rank) * MIB,
                "device_peak_bytes": device_mib * MIB,
                "shard_bytes": 131 * MIB,
                "storage_bytes": 0,
                "network_bytes": 0,
                "retried_reads": 0,
                "seconds": 4.0,
            }
            for rank in range(ranks)
        ],
        "step_seconds": 1.125,
        "node": {
            "host_anon_peak_bytes": 1234 * MIB,
            "host_file_peak_bytes": 160 * MIB,
            "host_pss_peak_bytes": None,
        },
        "timelines": [timeline(rank, peak_mib + rank, device_mib) for rank in range(ranks)],
        "answer": None,
        "fingerprint": "0",
    }


def comparison(*, ranks: int = 2, device_mib: int = 0, failed: tuple[str, ...] = ()) -> dict[str, Any]:
    runs = [
        {"mode": mode, "status": "failed", "error": ERROR}
        if mode in failed
        else run(mode, ranks=ranks, peak_mib=500, device_mib=device_mib)
        for mode in MODES
    ]
    return {"schema": "shardwise.compare/1", "model": "/models/SmolLM2", "environment": {}, "runs": runs}


def with_steps(document: dict[str, Any]) -> dict[str, Any]:
    """Add a training step that needs far more than the load, sampled 100 s later over another baseline."""
    for entry in document["runs"]:
        if entry["status"] == "ok":
            entry["step_timelines"] = [
                {
                    **timeline(line["rank"], 2000, 0),
                    "started_at_seconds": line["started_at_seconds"] + 100.0,
                    "baseline": dict.fromkeys(line["baseline"], 0),
                    "phases": [{"name": "step", "depth": 0, "start_seconds": 0.0, "stop_seconds": 2.95}],
                }
                for line in entry["timelines"]
            ]
    return document


def with_origins(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Add tensors by name, and what a plan had said."""
    for entry in document["runs"]:
        if entry["status"] == "ok":
            more = {f"model.layers.{layer}.mlp.weight": "checkpoint" for layer in range(20)}
            entry["origins"] = {**dict.fromkeys(names, "initialised"), **more}
            entry["tensors"] = {"checkpoint": len(more), "initialised": len(names)}
            entry["converted"] = ["model.layers.3.mlp.weight"]
            entry["predicted"] = {
                "storage_bytes": 0,
                "network_bytes": 7 * MIB,
                "host_anon_peak_bytes": 490 * MIB,
            }
    return document
