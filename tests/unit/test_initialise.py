"""Parameters that no checkpoint holds: what initialises them, and that nothing else of the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import shardwise as sw
from shardwise.materialization import entries_of, refuse_uninitialisable, take_values


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build()


@pytest.fixture
def poisoned_allocator() -> Iterator[None]:
    """Make torch fill new memory with NaN, the largest integer, or True."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


class Recursive(nn.Module):
    """Initialises its children along with itself, and a module beside the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.empty(8))
        self.beside: list[nn.Module] = []

    def reset_parameters(self) -> None:
        for module in (self.inner, self.norm, *self.beside):
            module.reset_parameters()
        nn.init.ones_(self.scale)


@pytest.mark.usefixtures("poisoned_allocator")
def test_an_initialisation_that_reaches_children_leaves_loaded_ones_alone(tmp_path: Path) -> None:
    stored = {"net.inner.weight": torch.full((8, 8), 5.0), "net.inner.bias": torch.full((8,), 6.0)}
    stored |= {"net.norm.weight": torch.full((8,), 7.0), "net.norm.bias": torch.full((8,), 8.0)}
    stored |= {"net.norm.running_mean": torch.full((8,), 9.0), "net.norm.running_var": torch.full((8,), 2.0)}
    stored |= {"net.norm.num_batches_tracked": torch.tensor(3), "other.weight": torch.full((4, 8), 4.0)}
    save_file(stored, tmp_path / "model.safetensors")

    def build() -> nn.Module:
        return nn.ModuleDict({"net": Recursive(), "other": nn.Linear(8, 4, bias=False)})

    for model in (on_meta(build), on_meta(build).to_empty(device="cpu"), build()):
        model["net"].beside = [model["other"]]
        report = sw.materialize(model, tmp_path, missing=["net.scale"], cpu_storage="copy")
        for name, value in model.state_dict().items():
            assert torch.equal(value, stored.get(name, torch.ones(8))), name
            assert report.origins[name] == ("checkpoint" if name in stored else "initialised")


def test_a_composite_transformers_model(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**part, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    gone = "vision_model.embeddings.class_embedding"
    stored = {name: torch.full_like(value, 5.0) for name, value in load_file(file).items() if name != gone}
    save_file(stored, file, metadata={"format": "pt"})
    model = CLIPModel(config)
    take_values(entries_of(model), keep=False)  # transformers 4.57 cannot make its buffers again
    report = sw.materialize(model, tmp_path, missing=[gone])
    for name, parameter in model.named_parameters():
        if name == gone:
            assert parameter.isfinite().all()
            assert report.origins[name] == "initialised"
        else:
            assert parameter.eq(5).all(), name
            assert report.origins[name] == "checkpoint"


def test_the_modules_around_may_scale_a_weight_as_in_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=8, n_head=2, vocab_size=64, n_positions=16)
    model = on_meta(lambda: GPT2LMHeadModel(config))
    report = sw.materialize(model, None, buffers=lambda _, like: torch.zeros(like.shape))
    block = model.transformer.h[3]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.1)
    assert report.tensors["initialised"] == len(list(model.parameters()))
    assert report.origins["lm_head.weight"] == "tied"


# transformers 4.57 scripts ModernBERT's loss on import
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_tied_embedding_starts_as_an_embedding_and_not_as_the_head() -> None:
    """ModernBERT's head has a smaller spread, and is tied after both are initialised."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        cls_token_id=0,
        sep_token_id=1,
        reference_compile=False,
        attn_implementation="eager",
    )
    model = on_meta(lambda: ModernBertForMaskedLM(config))
    model.tie_weights()
    report = sw.materialize(model, None, buffers=lambda _, like: torch.zeros(like.shape))
    assert report.origins["decoder.weight"] == "tied"
    expected = ModernBertForMaskedLM(config).get_input_embeddings().weight.std().item()
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(expected, rel=0.1)


def test_a_container_leaves_its_parameters_to_its_owner() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.empty(3)) for _ in range(2)])

        def reset_parameters(self) -> None:
            for scale in self.scales:
                nn.init.constant_(scale, 2.0)

    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Owner()))
    sw.materialize(model, None)
    assert all(scale.eq(2).all() for scale in model[1].scales)


class NeedsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3))
        self.b = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.b.copy_(self.a)


class OtherNumbers(nn.Module):
    """Draws from random numbers that nobody seeds alike on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        import random

        nn.init.constant_(self.a, random.random())


def test_what_cannot_be_initialised_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(sw.ModelError, match=r"NeedsValues.*expected its own code to make b.*defer=False"):
        sw.materialize(on_meta(NeedsValues), tmp_path, missing=["b"])
    with pytest.raises(sw.CheckpointError, match=r"got none for a.*torch's random numbers"):
        sw.materialize(on_meta(OtherNumbers), None)


class Constant(nn.Module):
    """Its constructor alone says where it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(2.5))


class Truncated(nn.Module):
    """On meta torch's function does nothing, so that only a run on values shows that it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        self.a.data = nn.init.trunc_normal_(self.a.data)


def test_what_no_rule_writes_is_found_before_anything_is_made() -> None:
    model = on_meta(lambda: nn.ModuleList([Constant(), Truncated(), NeedsValues(), OtherNumbers()]))
    absent = [fqn for fqn, _ in model.named_parameters() if not fqn.startswith(("2.", "3."))]
    before = torch.default_generator.get_state()
    with pytest.raises(sw.CheckpointError, match=r"got none for 0\.scale"):
        refuse_uninitialisable(model, absent)
    assert torch.equal(torch.default_generator.get_state(), before)
    assert all(parameter.is_meta for parameter in model.parameters())
    refuse_uninitialisable(model, ["0.inner.weight", "1.a"])


def test_random_numbers_of_the_process_go_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded.append(seed))
    before = torch.default_generator.get_state()
    sw.materialize(on_meta(lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout())), None)
    assert torch.equal(torch.default_generator.get_state(), before)
    assert seeded == []


class Drawn(nn.Module):
    """Draws into a new tensor, on no device in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.a.copy_(torch.randn(3))


def test_the_default_device_does_not_matter() -> None:
    model, again = on_meta(Drawn), on_meta(Drawn)
    with torch.device("meta"):
        sw.materialize(model, None, device="cpu")
    sw.materialize(again, None)
    assert torch.equal(model.a, again.a)
    assert model.a.std() > 0


# --- dtype ---


def test_one_dtype_counts_for_what_is_read_and_what_is_initialised(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(4, 4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3))

    for dtype, expected in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
        ("auto", torch.bfloat16),
        (None, torch.float32),
    ):
        model = on_meta(net)
        report = sw.materialize(model, tmp_path, missing="init", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {expected}, dtype
        assert report.dtypes["stored"] == str(expected).removeprefix("torch.")
        assert 0 < model[1].weight.std() < 1
    model = on_meta(net)
    sw.materialize(model, None, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- origins ---


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.register_buffer("inverse", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.zeros(1))

    def reset_buffers(self) -> None:
        self.inverse.copy_(torch.arange(4.0))
        self.count.zero_()


def test_origins_say_what_happened(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    cases = {
        "recomputed": on_meta(WithBuffers),
        "kept": on_meta(WithBuffers).to_empty(device="cpu"),
    }
    for origin, model in cases.items():
        report = sw.materialize(model, tmp_path, missing=["count"])
        assert report.origins == {"w": "checkpoint", "inverse": origin, "count": origin}
        assert report.tensors == {"checkpoint": 1, origin: 2}
    report = sw.materialize(cases["kept"], tmp_path, missing="init", buffers={"count": torch.ones(1)})
    assert report.origins == {"w": "checkpoint", "inverse": "kept", "count": "recomputed"}
    assert report.converted == ()


def test_running_statistics_begin_anew_with_their_norm() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    report = sw.materialize(model, None)
    expected = nn.BatchNorm1d(4)
    for (name, buffer), (_, other) in zip(model[1].named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other)
        assert report.origins[f"1.{name}"] == "recomputed"
    assert model[1].weight.eq(1).all()
    assert model[1].bias.eq(0).all()


# --- a module under two names ---


@pytest.mark.parametrize("kept", ["out", "emb"])
def test_a_shared_module_is_stored_under_either_name(tmp_path: Path, kept: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4)
            self.emb = self.out

    save_file(
        {f"{kept}.weight": torch.full((4, 4), 3.0), f"{kept}.bias": torch.ones(4)}, tmp_path / "a.safetensors"
    )
    model = on_meta(Shared)
    report = sw.materialize(model, tmp_path / "a.safetensors")
    assert model.emb is model.out
    assert model.out.weight.eq(3).all()
    assert report.origins["emb.weight"] == "tied"
    assert sw.verify_shards(model, tmp_path / "a.safetensors").is_equal
    save_model(Shared(), str(tmp_path / "b.safetensors"))
    sw.materialize(on_meta(Shared), tmp_path / "b.safetensors")


def test_a_call_within_the_context_that_builds_on_meta() -> None:
    """It ended in an error about a device module of the name meta."""
    with torch.device("meta"):
        model = nn.Linear(3, 4)
        sw.materialize(model, {"weight": torch.ones(4, 3, device="cpu"), "bias": torch.ones(4, device="cpu")})
    assert all(parameter.device.type == "cpu" and parameter.eq(1).all() for parameter in model.parameters())
