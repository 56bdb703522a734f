"""Random checkpoints: sizes, layout on disk, values that depend on names and seed alone."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shardwise.compare.generated import generate_checkpoint
from shardwise.compare.generated_config import PRESETS, WIDTHS, generated_config
from shardwise.compare.random_values import constant_bytes, random_bytes
from shardwise.errors import CheckpointError, ConfigurationError


def write(directory: Path, kind: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, files: int = 3):
    preset = PRESETS[f"{kind}-tiny"]
    return generate_checkpoint(
        directory, config_kind=kind, parameters=preset.parameters, dtype=dtype, seed=seed, files=files
    )


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_plain_from_pretrained_loads_it_and_finds_every_tensor(tmp_path: Path, kind: str) -> None:
    written = write(tmp_path / "model", kind)
    model, info = AutoModelForCausalLM.from_pretrained(
        written.directory, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == written.parameters
    tensors = stored(written.directory)
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    assert model(torch.arange(4)[None]).logits.isfinite().all()


def test_moe_is_stored_expert_by_expert_as_on_the_hub(tmp_path: Path) -> None:
    tensors = stored(write(tmp_path / "model", "moe").directory)
    widths = WIDTHS["moe"][-1]
    expert = "model.layers.0.mlp.experts.7."
    assert tensors[f"{expert}gate_proj.weight"].shape == (widths.intermediate, widths.hidden)
    assert tensors[f"{expert}up_proj.weight"].shape == (widths.intermediate, widths.hidden)
    assert tensors[f"{expert}down_proj.weight"].shape == (widths.hidden, widths.intermediate)
    assert not [name for name in tensors if "gate_up_proj" in name]


def test_files_index_and_config_agree(tmp_path: Path) -> None:
    written = write(tmp_path / "model", "dense", files=4)
    index = json.loads((written.directory / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in written.directory.glob("*.safetensors"))
    assert names == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert index["metadata"]["total_size"] == written.data_bytes
    for name in names:
        with safe_open(written.directory / name, framework="pt") as file:
            assert set(file.keys()) == {key for key, where in index["weight_map"].items() if where == name}
    assert len(index["weight_map"]) == written.tensors
    assert "lm_head.weight" not in index["weight_map"]  # tied
    assert json.loads((written.directory / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", "dense", files=1).directory
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_norms_are_one_and_weights_have_the_asked_spread(tmp_path: Path) -> None:
    tensors = stored(write(tmp_path / "model", "dense", dtype=torch.float32).directory)
    for name, value in tensors.items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            assert value.mean().abs() < 0.02 * 5 / math.sqrt(value.numel()), name
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name


def test_values_do_not_depend_on_the_machine() -> None:
    # Recorded once; integer arithmetic and one rounded product leave no room for another result.
    def digest(dtype: torch.dtype) -> str:
        chunks = random_bytes("w", elements=(1 << 20) + 3, seed=5, standard_deviation=0.02, dtype=dtype)
        return hashlib.sha256(b"".join(chunks)).hexdigest()[:16]

    assert digest(torch.float32) == "6e06dee1adc922e1"
    assert digest(torch.bfloat16) == "387686a3b1bcdd17"


def test_values_depend_on_name_and_seed() -> None:
    def first(name: str, seed: int) -> bytes:
        return next(random_bytes(name, elements=64, seed=seed, standard_deviation=1.0, dtype=torch.float32))

    assert first("a", 0) == first("a", 0)
    assert len({first("a", 0), first("b", 0), first("a", 1)}) == 3


@pytest.mark.parametrize("elements", [0, 1, 2, 5, (1 << 20) + 1])
def test_every_value_is_written_once(elements: int) -> None:
    chunks = random_bytes("w", elements=elements, seed=0, standard_deviation=1.0, dtype=torch.float32)
    assert sum(map(len, chunks)) == 4 * elements
    assert sum(map(len, constant_bytes(1.0, elements=elements, dtype=torch.bfloat16))) == 2 * elements


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_come_near_their_size(name: str) -> None:
    preset = PRESETS[name]
    config = generated_config(
        config_kind=preset.config_kind, parameters=preset.parameters, dtype_name="bfloat16"
    )
    widths = next(each for each in WIDTHS[preset.config_kind] if each.hidden == config["hidden_size"])
    got = widths.fixed_parameters + config["num_hidden_layers"] * widths.layer_parameters
    assert got == pytest.approx(preset.parameters, rel=0.25)


def test_the_large_moe_has_64_experts_in_12_layers() -> None:
    config = generated_config(
        config_kind="moe", parameters=PRESETS["moe-1b"].parameters, dtype_name="bfloat16"
    )
    assert (config["num_experts"], config["num_hidden_layers"]) == (64, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_kind": "rnn"}, "config_kind: expected one of dense, moe, got 'rnn'"),
        ({"parameters": -1}, "parameters: expected a positive number, got -1"),
        ({"parameters": 10}, "Ask for about that many"),
        ({"dtype": torch.int8}, "dtype: expected one of torch.bfloat16"),
        ({"files": 0}, "files: expected 1 to"),
        ({"files": 1000}, "files: expected 1 to"),
    ],
)
def test_what_is_not_possible_is_refused_and_leaves_nothing(
    tmp_path: Path, change: dict, message: str
) -> None:
    wanted = {"config_kind": "dense", "parameters": 120_000, "dtype": torch.bfloat16, "seed": 0, "files": 2}
    with pytest.raises(ConfigurationError, match=message):
        generate_checkpoint(tmp_path / "model", **{**wanted, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="expected an empty or a new directory"):
        write(tmp_path, "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
