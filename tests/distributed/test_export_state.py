"""A saved training is exported without being loaded: on any number of ranks, adapters too, and from the command line."""

from __future__ import annotations

import ctypes
import filecmp
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from typer.testing import CliRunner

import shardwise as sw
from shardwise.cli import app
from shardwise.errors import CheckpointError, DamagedFileError, PeerError
from shardwise.materialization.agreement import Agreement, ranks_of_group
from shardwise.testing import RankPool
from shardwise.transformers_model.sealed import seal
from tests.distributed.facade import batch, facade, own, quiet_peft, with_optimizer
from tests.distributed.models import from_checkpoint
from tests.distributed.steps import Checkpoint, by_strategy

pytestmark = pytest.mark.distributed

MIB = 2**20


def content_of(directory: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def adapted(model: sw.TransformersModel) -> sw.TransformersModel:
    from peft import LoraConfig

    with quiet_peft():
        model.add_adapter_to_model(
            "default", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    return model


def trained(source: str, strategy: str, *, adapter: bool) -> sw.TransformersModel:
    model = facade(source, strategy)
    model = with_optimizer(adapted(model) if adapter else model)
    model.forward_backward(own(batch(0)))
    model.clip_grad_and_step(max_grad_norm=1.0)
    return model


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_it_gives_the_files_that_the_trained_model_gives(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, kind: str
) -> None:
    pool.run(save_and_export, strategy, checkpoint(kind), str(tmp_path), ranks=2)
    for ranks in (1, 3):
        pool.run(export_saved, strategy, checkpoint(kind), str(tmp_path), ranks=ranks)


def save_and_export(strategy: str, source: str, folder: str) -> None:
    model = trained(source, strategy, adapter=False)
    model.save(f"{folder}/state")
    model.export(f"{folder}/expected", max_shard_size="20KB")


def export_saved(strategy: str, source: str, folder: str) -> None:
    model = facade(source, strategy)
    out = f"{folder}/{dist.get_world_size()}"
    report = model.export(out, state=f"{folder}/state", max_shard_size="20KB")
    assert not model.is_wrapped
    assert content_of(out) == content_of(f"{folder}/expected")
    assert report.network_bytes == 0
    written = [of.written_bytes for of in report.ranks]
    assert max(written) <= 1.5 * sum(written) / len(written)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc for anonymous memory")
def test_one_rank_exports_a_state_that_is_larger_than_the_bound(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pool.run(save_large, checkpoint("qwen3_large"), str(tmp_path), ranks=2)
    (written,) = pool.run(export_large, checkpoint("qwen3_large"), str(tmp_path), ranks=1)
    assert written > 128 * MIB
    name = "model.safetensors"
    assert filecmp.cmp(tmp_path / "out" / name, tmp_path / "expected" / name, shallow=False)


def save_large(source: str, folder: str) -> None:
    model = facade(source, "native_fsdp")
    model.export(f"{folder}/expected")  # wraps it
    model.save(f"{folder}/state")


def export_large(source: str, folder: str) -> int:
    model = facade(source, "native_fsdp")
    ctypes.CDLL(None).malloc_trim(0)
    report = model.export(f"{folder}/out", state=f"{folder}/state")
    cast = model.export(f"{folder}/cast", state=f"{folder}/state", dtype="bfloat16")
    assert report.ranks[0].host_anon_peak_bytes <= 64 * MIB
    assert cast.ranks[0].host_anon_peak_bytes <= 64 * MIB + 64 * MIB
    return report.written_bytes


def test_adapters_alone_and_merged(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pool.run(save_and_export_adapter, checkpoint("qwen3_untied"), str(tmp_path), ranks=4)
    pool.run(export_saved_adapter, checkpoint("qwen3_untied"), str(tmp_path), ranks=2)


def save_and_export_adapter(source: str, folder: str) -> None:
    model = trained(source, "native_fsdp", adapter=True)
    model.save(f"{folder}/state")
    assert model.export(f"{folder}/alone").kind == "adapter"
    report = model.export(f"{folder}/merged", adapters="merge")
    assert report.kind == "model"
    from peft import PeftModel

    ids = batch(1)
    with quiet_peft(), torch.no_grad():
        adapter = PeftModel.from_pretrained(from_checkpoint(source, dtype=torch.float32), f"{folder}/alone")
        expected = adapter.eval()(input_ids=ids).logits
        logits = from_checkpoint(f"{folder}/merged")(input_ids=ids).logits
        sharded = model.eval().model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-5)


def export_saved_adapter(source: str, folder: str) -> None:
    model = adapted(facade(source, "native_fsdp"))
    model.export(f"{folder}/alone of state", state=f"{folder}/state")
    model.export(f"{folder}/merged of state", state=f"{folder}/state", adapters="merge")
    assert content_of(f"{folder}/alone of state") == content_of(f"{folder}/alone")
    got = load_file(f"{folder}/merged of state/model.safetensors")
    for name, value in load_file(f"{folder}/merged/model.safetensors").items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_damage_and_another_model_are_named_on_every_rank(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pool.run(save_and_export, "native_fsdp", checkpoint("qwen3_tied"), str(tmp_path), ranks=2)
    pool.run(export_another, checkpoint("gpt2"), str(tmp_path), ranks=2)
    (tmp_path / "state" / "__1_0.distcp").write_bytes(b"")
    pool.run(export_damaged, checkpoint("qwen3_tied"), str(tmp_path), ranks=2)


def export_another(source: str, folder: str) -> None:
    with pytest.raises(CheckpointError, match=r"lacks .*Build the model as in the training"):
        facade(source, "native_fsdp").export(f"{folder}/another", state=f"{folder}/state")
    assert not (Path(folder) / "another").exists()


def export_damaged(source: str, folder: str) -> None:
    with pytest.raises((DamagedFileError, PeerError), match=r"__1_0\.distcp: expected model"):
        facade(source, "native_fsdp").export(f"{folder}/damaged", state=f"{folder}/state")
    assert not (Path(folder) / "damaged").exists()


def test_a_training_that_a_resume_refuses_is_not_exported(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_tied")
    pool.run(save_and_seal, source, str(tmp_path), ranks=2)
    file = tmp_path / "state" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    pool.run(export_refused, source, str(tmp_path), ranks=2)


def save_and_seal(source: str, folder: str) -> None:
    model = trained(source, "native_fsdp", adapter=False)
    model.save(f"{folder}/state")
    agreement = Agreement(ranks_of_group(None), timeout_seconds=30.0, call="seal")
    seal(Path(folder) / "state", {}, agreement=agreement)


def export_refused(source: str, folder: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"__1_0\.distcp: its contents are not .* export one that is whole"
    ):
        facade(source, "native_fsdp").export(f"{folder}/refused", state=f"{folder}/state")
    assert not (Path(folder) / "refused").exists()


def test_the_command(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pool.run(save_and_export_adapter, checkpoint("qwen3_untied"), str(tmp_path), ranks=2)
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "state"), str(out), "--json", str(report)])
    gc.collect()  # torch's keep-alive timer fails when its own thread is the one that collects the launcher
    assert done.exit_code == 0, done.output
    got, expected = content_of(out), content_of(tmp_path / "alone")
    configs = [json.loads(of.pop("adapter_config.json")) for of in (got, expected)]
    for config in configs:
        config["target_modules"].sort()  # of a set
    assert configs[0] == configs[1]
    assert got == expected
    found: dict[str, Any] = json.loads(report.read_text())
    assert (found["schema"], found["kind"]) == ("shardwise.export_report/1", "adapter")
    assert "adapter, 8 tensors" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["alone", "merged", "out", "report.json", "state"]
