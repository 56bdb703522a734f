"""Adapters of PEFT on a model whose values are still in its checkpoint: what PEFT makes in one process, on every rank."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import (
    check_equal,
    from_checkpoint,
    gathered,
    named_tensors,
    transformers_fuses_experts,
)
from tests.distributed.steps import (
    Checkpoint,
    backward,
    by_strategy,
    check_gradients,
    every_rank,
    language_loss,
    load,
    make_strategy,
    own_rows,
    token_batch,
)

pytest.importorskip("peft")
pytestmark = pytest.mark.distributed

ATTENTION = ["q_proj", "v_proj"]
NAMES = ("default", "second")
Options = Mapping[str, Any]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Ignore what PEFT says of adapters that are as they should be, and what it itself does not heed."""
    with warnings.catch_warnings():
        for message in (
            "`is_gradient_checkpointing` is deprecated",  # transformers 5.23 has the property under a new name
            "`lora_bias=True` was passed but",
            "Model has `tie_word_embeddings=True` and a tied layer",
            "Setting `save_embedding_layers` to `True`",
            "lora with eva initialization used",
            "Adapter 'default': 4 LoRA tensor",  # takes biases for shards
            "`init_lora_weights` is 'corda' but `corda_config` is not specified",
        ):
            warnings.filterwarnings("ignore", message)
        yield


def adapted(model: nn.Module, adapters: Sequence[Options], *, strategy: Any = None) -> Any:
    """Add new adapters named `default` and `second`, through PEFT or a strategy, and activate them all."""
    from peft import LoraConfig, get_peft_model

    names = NAMES[: len(adapters)]
    made: Any = model
    with quiet_peft():
        for name, options in zip(names, adapters, strict=True):
            config = LoraConfig(**{"r": 4, **options})
            if strategy is not None:
                made = strategy.add_adapter(made, config, adapter_name=name)
            elif name == NAMES[0]:
                made = get_peft_model(made, config)
            else:
                made.add_adapter(name, config)
    if len(names) > 1:
        made.base_model.set_adapter(list(names))
    return made


# --- new adapters ---

NEW: dict[str, tuple[str, Sequence[Options]]] = {
    "plain": ("qwen3_untied", [{"target_modules": ATTENTION}]),
    "gaussian on a tied model": (
        "qwen3_tied",
        [{"target_modules": [*ATTENTION, "embed_tokens"], "init_lora_weights": "gaussian"}],
    ),
    "rank-stabilised": (
        "qwen3_untied",
        [{"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 32}],
    ),
    "modules_to_save": (
        "qwen3_untied",
        [{"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}],
    ),
    "two": (
        "qwen3_untied",
        [{"target_modules": ATTENTION}, {"target_modules": ["o_proj", "q_proj"], "r": 3, "lora_alpha": 2}],
    ),
    "a bias": ("qwen3_untied", [{"target_modules": ATTENTION, "lora_bias": True}]),
    "experts": (
        "qwen3_moe",
        [{"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}],
    ),
}


@pytest.mark.parametrize(
    ("strategy", "put_by"), [("native_fsdp", "get_peft_model"), ("accelerate", "add_adapter")]
)
@pytest.mark.parametrize("kind", NEW)
def test_new_adapters_start_and_train_as_in_one_process(
    pool: RankPool, checkpoint: Checkpoint, strategy: str, put_by: str, kind: str
) -> None:
    model, adapters = NEW[kind]
    skip_unless_fused(kind)
    pool.run(train_new_adapters, strategy, put_by, checkpoint(model), adapters, ranks=2)


def skip_unless_fused(kind: str) -> None:
    if kind == "experts" and not transformers_fuses_experts():
        pytest.skip("transformers 4 keeps experts as modules of their own: there is no parameter to target")


def train_new_adapters(name: str, put_by: str, directory: str, adapters: Sequence[Options]) -> None:
    torch.manual_seed(dist.get_rank())  # PEFT draws while it builds; nothing of that may last
    strategy = make_strategy(name)
    base = load(strategy, directory, dtype=torch.float32, defer=True)
    model: Any = adapted(base, adapters, strategy=strategy if put_by == "add_adapter" else None)
    with_values = {fqn for fqn, parameter in model.named_parameters() if not parameter.is_meta}
    if put_by == "add_adapter":
        assert not with_values
    else:  # PEFT moves only a layer's first adapter to meta: of another one the first rank's values count
        assert all(".second." in fqn for fqn in with_values)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model, optimizer = strategy.wrap_model(model, optimizer)
    reference = adapted(from_checkpoint(directory, dtype=torch.float32), adapters)

    whole = gathered(model)
    starts = dict(reference.named_parameters())
    check_starts({fqn: whole[fqn] for fqn in starts if "lora_" in fqn}, starts, adapters)
    with torch.no_grad():
        for fqn, parameter in starts.items():
            if "lora_" in fqn:
                parameter.copy_(whole[fqn])
    check_equal(model, reference)  # the base, trainable copies, flags and ties

    origins = strategy.last_report.origins
    for fqn in starts:
        expected = "checkpoint" if "lora_" not in fqn else "kept" if fqn in with_values else "initialised"
        assert origins[fqn] == expected, fqn
    trained = {fqn for fqn, parameter in starts.items() if parameter.requires_grad}
    assert all("lora_" in fqn or "modules_to_save" in fqn for fqn in trained)

    reference_optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):  # B is zero at first, so that A has no gradient before the second step
        wanted = language_loss(reference, token_batch())
        wanted.backward()
        loss = language_loss(model, own_rows(token_batch()))
        backward(strategy, loss)
        check_gradients(model, reference)
        assert sum(every_rank(loss.item())) / 2 == pytest.approx(wanted.item(), rel=1e-5)
        for each in (optimizer, reference_optimizer):
            each.step()
            each.zero_grad()
    after = sum(every_rank(language_loss(model, own_rows(token_batch())).item())) / 2
    assert after == pytest.approx(language_loss(reference, token_batch()).item(), rel=1e-5)
    assert after < wanted.item()


def check_starts(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], adapters: Sequence[Options]
) -> None:
    """Fail unless new adapters are zero where PEFT's are, and else spread as PEFT's are."""
    assert found
    for fqn, value in found.items():
        assert all(other == digest_of(value) for other in every_rank(digest_of(value))), fqn
        assert value.dtype == expected[fqn].dtype
        assert value.eq(0).all() == expected[fqn].eq(0).all(), fqn
        if value.eq(0).all():
            continue
        if adapters[0].get("init_lora_weights") == "gaussian" or "lora_embedding" in fqn:
            deviation = 1.0 if "lora_embedding" in fqn else 1 / adapters[0].get("r", 4)
            assert value.std().item() == pytest.approx(deviation, rel=0.25), fqn
        else:  # kaiming_uniform_ with a = sqrt(5): uniform within 1 / sqrt(columns)
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < value.abs().max().item() <= bound, fqn
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.25), fqn
        assert value.mean().abs().item() < 0.35 * value.std().item(), fqn
    random = [digest_of(value) for value in found.values() if not value.eq(0).all()]
    assert len(set(random)) == len(random)  # no two layers or adapters start alike


def digest_of(tensor: torch.Tensor) -> str:
    import hashlib

    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# --- dtypes ---


@by_strategy
@pytest.mark.parametrize("autocast", [True, False], ids=["float32", "as the base"])
@pytest.mark.parametrize("saved", [False, True], ids=["new", "saved"])
def test_adapters_beside_a_16_bit_base(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, autocast: bool, saved: bool
) -> None:
    directory = checkpoint("qwen3_untied")
    adapter = save_adapter(directory, tmp_path, [{"target_modules": ATTENTION}]) if saved else None
    pool.run(step_in_dtype, strategy, directory, adapter, autocast, ranks=2)


def step_in_dtype(name: str, directory: str, adapter: str | None, autocast: bool) -> None:
    from peft import LoraConfig

    strategy = make_strategy(name)
    model: Any = load(strategy, directory, defer=True)
    with quiet_peft():
        if adapter is None:
            model = strategy.add_adapter(
                model, LoraConfig(r=4, target_modules=ATTENTION), autocast_adapter_dtype=autocast
            )
        else:
            model = strategy.load_adapter(model, adapter, autocast_adapter_dtype=autocast)
    model, optimizer = strategy.wrap_model(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trained = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    backward(strategy, language_loss(model, own_rows(token_batch())))
    optimizer.step()


def test_two_dtypes_among_what_a_layer_trains_are_refused_with_the_remedy(
    pool: RankPool, checkpoint: Checkpoint
) -> None:
    errors = pool.run_to_errors(wrap_mixed, checkpoint("qwen3_untied"), True, ranks=2)
    for error in errors:
        assert isinstance(error, sw.UnsupportedParameterError), error
        assert "q_norm.modules_to_save.default.weight" in str(error)
        assert "autocast_adapter_dtype=False" in str(error)
    assert pool.run_to_errors(wrap_mixed, checkpoint("qwen3_untied"), False, ranks=2) == [None, None]


def wrap_mixed(directory: str, autocast: bool) -> None:
    from peft import LoraConfig

    strategy = make_strategy("native_fsdp")
    config = LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["q_norm"])
    with quiet_peft():
        model = strategy.add_adapter(
            load(strategy, directory, defer=True), config, autocast_adapter_dtype=autocast
        )
    strategy.wrap_model(model)


# --- saved adapters ---

SAVED: dict[str, tuple[str, Sequence[Options]]] = {
    **{kind: NEW[kind] for kind in ("plain", "rank-stabilised", "two", "a bias", "experts")},
    "modules_to_save": ("qwen3_untied", [{"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}]),
    "embeddings": ("qwen3_untied", [{"target_modules": [*ATTENTION, "embed_tokens"]}]),
    "embeddings of a tied model": ("qwen3_tied", [{"target_modules": [*ATTENTION, "embed_tokens"]}]),
    "magnitudes": ("qwen3_untied", [{"target_modules": ATTENTION, "use_dora": True}]),
    "conv1d": ("gpt2", [{"target_modules": ["c_attn"], "fan_in_fan_out": True}]),
}


def save_adapter(directory: str, folder: Path, adapters: Sequence[Options]) -> str:
    """Save adapters of random values, and what PEFT saves along of the base, which is changed too."""
    torch.manual_seed(2)
    model = adapted(from_checkpoint(directory), adapters)
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if "lora_" in fqn or "modules_to_save" in fqn or "embed_tokens" in fqn:
                parameter.normal_(std=0.3)
    with quiet_peft():
        model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


@pytest.mark.parametrize(
    ("strategy", "defer"), [("native_fsdp", True), ("accelerate", False)], ids=["deferred", "source"]
)
@pytest.mark.parametrize("kind", SAVED)
def test_saved_adapters_equal_those_of_from_pretrained(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, defer: bool, kind: str
) -> None:
    model, adapters = SAVED[kind]
    skip_unless_fused(kind)
    adapter = save_adapter(checkpoint(model), tmp_path, adapters)
    pool.run(load_saved, strategy, checkpoint(model), adapter, len(adapters), defer, ranks=2)


def load_saved(name: str, directory: str, adapter: str, count: int, defer: bool) -> None:
    from peft import PeftModel

    folders = [adapter, f"{adapter}/second"][:count]
    for is_trainable in (True, False):
        strategy = make_strategy(name)
        model: Any = load(strategy, directory, defer=defer)
        expected: Any = from_checkpoint(directory)
        with quiet_peft():
            for adapter_name, folder in zip(NAMES[:count], folders, strict=True):
                model = strategy.load_adapter(
                    model, folder, adapter_name=adapter_name, is_trainable=is_trainable
                )
                if adapter_name == NAMES[0]:
                    expected = PeftModel.from_pretrained(expected, folder, is_trainable=is_trainable)
                else:
                    expected.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        flags, wanted = (
            {fqn: parameter.requires_grad for fqn, parameter in each.named_parameters()}
            for each in (model, expected)
        )
        assert flags == wanted
        if count > 1:
            for each in (model, expected):
                each.set_adapter(NAMES[1])
        assert type(model) is type(expected)
        assert model.active_adapters == expected.active_adapters
        for adapter_name, config in expected.peft_config.items():
            found = model.peft_config[adapter_name].to_dict()
            assert {**found, "base_model_name_or_path": ""} == {
                **config.to_dict(),
                "base_model_name_or_path": "",
            }
        strategy.wrap_model(model)
        check_equal(model, expected)
        origins = strategy.last_report.origins
        assert {origin for fqn, origin in origins.items() if "lora_" in fqn} == {"checkpoint"}
        ids = own_rows(token_batch())
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=ids).logits, expected.eval()(input_ids=ids).logits)


def test_a_directory_that_is_no_adapters_is_refused_by_name(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = checkpoint("qwen3_untied")
    other = save_adapter(
        checkpoint("gpt2"), tmp_path, [{"target_modules": ["c_attn"], "fan_in_fan_out": True}]
    )
    for folder, error, message in (
        (directory, sw.CheckpointError, "expected adapter_config.json"),
        (other, (sw.ShardwiseError, ValueError), "c_attn"),
    ):
        for found in pool.run_to_errors(load_only, directory, folder, ranks=2):
            assert isinstance(found, error), found
            assert message in str(found)


def load_only(directory: str, adapter: str) -> None:
    strategy = make_strategy("native_fsdp")
    with quiet_peft():
        strategy.load_adapter(load(strategy, directory, defer=True), adapter)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_does_not_drop_an_adapter_that_it_loads_into_a_deferred_model(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    directory = checkpoint("qwen3_untied")
    adapter = save_adapter(directory, tmp_path, [{"target_modules": ATTENTION}])
    for error in pool.run_to_errors(load_by_peft, directory, adapter, low_cpu_mem_usage, ranks=2):
        assert isinstance(error, sw.LeftOnMetaError), error
        assert "q_proj.lora_A.default.weight" in str(error)
        assert "strategy.load_adapter" in str(error)


def load_by_peft(directory: str, adapter: str, low_cpu_mem_usage: bool) -> None:
    from peft import PeftModel

    strategy = make_strategy("native_fsdp")
    with quiet_peft():
        model = PeftModel.from_pretrained(
            load(strategy, directory, defer=True), adapter, low_cpu_mem_usage=low_cpu_mem_usage
        )
    strategy.wrap_model(model)


# --- starts from the base's values ---

FROM_VALUES: dict[str, Options] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "eva": {"init_lora_weights": "eva"},
    "loftq": {"init_lora_weights": "loftq"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "DoRA": {"use_dora": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("start", [start for start in FROM_VALUES if start != "trainable_token_indices"])
def test_starts_from_values_are_refused_by_name_on_a_deferred_model(
    pool: RankPool, checkpoint: Checkpoint, start: str
) -> None:
    for error in pool.run_to_errors(start_deferred, checkpoint("qwen3_untied"), FROM_VALUES[start], ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert start in str(error)
        assert "load_pretrained(defer=False)" in str(error)


def test_a_config_that_peft_refuses_is_named(pool: RankPool, checkpoint: Checkpoint) -> None:
    options = {"target_modules": {"nope"}}
    for error in pool.run_to_errors(start_deferred, checkpoint("qwen3_untied"), options, ranks=2):
        with pytest.raises(
            sw.ConfigurationError, match=r"adapter 'default': expected .*Target modules .*nope"
        ):
            raise error or AssertionError


def start_deferred(directory: str, options: Options) -> None:
    from peft import LoraConfig

    strategy = make_strategy("native_fsdp")
    config = LoraConfig(r=4, target_modules=ATTENTION)
    for option, value in options.items():  # the constructor wants scipy for LoftQ
        setattr(config, option, value)
    strategy.add_adapter(load(strategy, directory, defer=True), config)


@pytest.mark.parametrize("start", [start for start in FROM_VALUES if start not in ("lora_ga", "loftq")])
def test_starts_from_values_that_the_first_rank_has(
    pool: RankPool, checkpoint: Checkpoint, start: str
) -> None:
    pool.run(start_on_source, "native_fsdp", checkpoint("qwen3_untied"), FROM_VALUES[start], ranks=2)


def start_on_source(name: str, directory: str, options: Options) -> None:
    strategy = make_strategy(name)
    base = load(strategy, directory, dtype=torch.float32)
    model = started(base, options, strategy=strategy)
    expected = started(from_checkpoint(directory, dtype=torch.float32), options)
    assert model.peft_config["default"].init_lora_weights == options.get("init_lora_weights", True)
    strategy.wrap_model(model)
    check_equal(model, expected)
    language_loss(expected, token_batch()).backward()
    backward(strategy, language_loss(model, own_rows(token_batch())))
    check_gradients(model, expected)


def started(base: Any, options: Options, *, strategy: Any = None) -> Any:
    if options.get("init_lora_weights") == "corda" and not next(base.parameters()).is_meta:
        for fqn, module in base.named_modules():  # what peft's preprocess_corda leaves there, of data
            if fqn.endswith(tuple(ATTENTION)):
                left, values, right = torch.linalg.svd(module.weight.detach(), full_matrices=False)
                module.eigens = SimpleNamespace(
                    U_WC=left[:, :4].clone(), S_WC=values[:4].clone(), V_WC=right[:4].T.clone()
                )
    torch.manual_seed(3)
    return adapted(base, [{"target_modules": ATTENTION, **options}], strategy=strategy)


def test_a_saved_adapter_of_a_changed_base_is_refused_by_name_on_a_deferred_model(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = checkpoint("qwen3_untied")
    adapter = save_adapter(directory, tmp_path, [{"target_modules": ATTENTION}])
    config_file = Path(adapter) / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "init_lora_weights": "olora"}))
    for error in pool.run_to_errors(load_only, directory, adapter, ranks=2):
        assert isinstance(error, sw.ConfigurationError), error
        assert "init_lora_weights='olora'" in str(error)
        assert "load_pretrained(defer=False)" in str(error)
    pool.run(load_saved, "native_fsdp", directory, adapter, 1, False, ranks=2)


# --- rows of single tokens ---


@pytest.mark.parametrize("kind", ["qwen3_untied", "qwen3_tied"])
def test_rows_of_single_tokens_start_as_those_of_the_embedding(
    pool: RankPool, checkpoint: Checkpoint, kind: str
) -> None:
    pool.run(train_single_tokens, checkpoint(kind), kind, ranks=3)


def train_single_tokens(directory: str, kind: str) -> None:
    rows = {"trainable_token_indices": {"embed_tokens": [5, 1, 96]}}
    if kind == "qwen3_untied":
        rows["trainable_token_indices"]["lm_head"] = [2, 3]
    adapters = [{"target_modules": ATTENTION, **rows}]
    strategy = make_strategy("native_fsdp")
    with quiet_peft():
        torch.manual_seed(3)
        expected = adapted(from_checkpoint(directory), adapters)
        model = adapted(load(strategy, directory, defer=True), adapters)
    strategy.wrap_model(model)
    found = gathered(model)
    rows_of = {fqn: tensor for fqn, tensor in named_tensors(expected) if "trainable_tokens" in fqn}
    assert any("_delta" in fqn for fqn in rows_of)
    assert any("_original" in fqn for fqn in rows_of)
    for fqn, tensor in rows_of.items():
        assert found[fqn].dtype == tensor.dtype
        assert torch.equal(found[fqn], tensor), fqn
    backward(strategy, language_loss(model, own_rows(token_batch())))
    gradients = [p.grad for fqn, p in model.named_parameters() if "trainable_tokens_delta" in fqn]
    assert all(gradient is not None and gradient.full_tensor().any() for gradient in gradients)


def test_rows_of_new_tokens_are_refused_by_name(pool: RankPool, checkpoint: Checkpoint) -> None:
    for error in pool.run_to_errors(train_new_tokens, checkpoint("qwen3_untied"), ranks=2):
        assert "trainable_tokens_delta" in str(error)
        assert "load_pretrained(defer=False)" in str(error)


def train_new_tokens(directory: str) -> None:
    strategy = make_strategy("native_fsdp")
    base: Any = load(strategy, directory, defer=True)
    rows = base.config.vocab_size
    base.resize_token_embeddings(rows + 2, mean_resizing=False)
    with quiet_peft():
        model = adapted(base, [{"target_modules": ATTENTION, "trainable_token_indices": [1, rows + 1]}])
    strategy.wrap_model(model)
