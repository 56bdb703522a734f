"""Which modules become FSDP2 units."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper

from shardwise.errors import ConfigurationError
from shardwise.materialization import entries_of
from shardwise.strategies.fsdp_config import FSDPConfig
from shardwise.strategies.wrapping import apply_checkpointing, plan_units
from tests.unit.models import Layer, Layered, tiny


def units_of(model: nn.Module, **options: Any) -> list[tuple[str, ...]]:
    return [unit.fqns for unit in plan_units(model, entries_of(model), FSDPConfig.from_dict(options))]


def gathered(model: nn.Module, **options: Any) -> list[tuple[str, ...]]:
    return [
        unit.fqns
        for unit in plan_units(model, entries_of(model), FSDPConfig.from_dict(options))
        if unit.keep_gathered
    ]


def test_a_tied_decoder_has_its_embedding_and_head_in_one_unit() -> None:
    model = tiny("qwen3")
    tied = ("model.embed_tokens", "lm_head")
    assert units_of(model) == [("model.layers.0",), ("model.layers.1",), tied]
    assert gathered(model) == [tied]


def test_an_untied_decoder_has_them_apart() -> None:
    model = tiny("qwen3", tied=False)
    assert units_of(model)[2:] == [("model.embed_tokens",), ("lm_head",)]
    assert gathered(model) == [("lm_head",)]


def test_gpt2_leaves_position_embedding_and_last_norm_to_the_root() -> None:
    assert units_of(tiny("gpt2")) == [
        ("transformer.h.0",),
        ("transformer.h.1",),
        ("transformer.wte", "lm_head"),
    ]


def test_t5_keeps_all_places_of_its_shared_embedding_together() -> None:
    model = tiny("t5")
    (shared,) = [entry for entry in entries_of(model) if len(entry.slots) > 1]
    units = units_of(model)
    assert set(units[:4]) == {(f"{half}.block.{i}",) for half in ("encoder", "decoder") for i in (0, 1)}
    # On transformers 4.57 one module has several of the names.
    assert {id(model.get_submodule(fqn)) for fqn in units[4]} == {id(slot.module) for slot in shared.slots}
    assert len(units) == 5


def test_a_plain_module_has_the_entries_of_its_lists_as_units() -> None:
    assert units_of(Layered()) == [("layers.0",), ("layers.1",)]
    assert gathered(Layered()) == []


def test_a_list_of_lists_has_its_innermost_entries_as_units() -> None:
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList([Layer(), Layer()]) for _ in range(2))
    assert units_of(model) == [("stages.0.0",), ("stages.0.1",), ("stages.1.0",), ("stages.1.1",)]


def test_a_list_inside_of_a_layer_makes_no_units() -> None:
    model = Layered(layers=1)
    model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert units_of(model) == [("layers.0",)]


def test_entries_without_parameters_make_no_units() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    assert units_of(model) == [("layers.0",)]


def test_named_layers_that_do_not_occur_fall_back_to_lists() -> None:
    model = Layered()
    model._no_split_modules = ["VisionLayer"]
    assert units_of(model) == [("layers.0",), ("layers.1",)]


@pytest.mark.parametrize("classes", ["Layer", Layer, ["Layer"], (Layer,)], ids=str)
def test_wrap_classes_takes_names_and_types(classes: Any) -> None:
    assert units_of(Layered(), wrap_classes=classes) == [("layers.0",), ("layers.1",)]


def test_a_type_covers_its_subclasses_and_a_name_does_not() -> None:
    class Special(Layer):
        pass

    model = Layered()
    model.layers.append(Special())
    assert len(units_of(model, wrap_classes=[Layer])) == 3
    assert len(units_of(model, wrap_classes=["Layer"])) == 2


def test_wrap_classes_wins_over_what_the_model_says() -> None:
    units = units_of(tiny("qwen3"), wrap_classes=["Qwen3MLP"])
    assert units[:2] == [("model.layers.0.mlp",), ("model.layers.1.mlp",)]


def test_inner_units_come_before_outer_ones() -> None:
    units = units_of(Layered(layers=1), wrap_classes=[Layer, nn.LayerNorm])
    assert units == [("layers.0.norm",), ("layers.0",)]


def test_missing_wrap_classes_are_named_with_those_that_occur() -> None:
    with pytest.raises(ConfigurationError) as caught:
        units_of(Layered(), wrap_classes=["Layer", "Qwen3DecoderLayer", nn.Conv2d])
    assert str(caught.value) == (
        "fsdp_config['wrap_classes']: expected classes of modules in Layered, got Qwen3DecoderLayer, Conv2d, of which "
        "there is none. Classes that occur: Layer, LayerNorm, Linear."
    )


def test_a_function_chooses_modules() -> None:
    units = units_of(tiny("qwen3"), auto_wrap_policy=lambda module: type(module).__name__ == "Qwen3Attention")
    assert units == [("model.layers.0.self_attn",), ("model.layers.1.self_attn",)]


def test_a_function_is_never_asked_about_the_root_or_containers() -> None:
    asked: list[nn.Module] = []
    model = Layered()
    units_of(model, auto_wrap_policy=lambda module: asked.append(module) is not None)
    assert model not in asked
    assert model.layers not in asked
    assert model.layers[0] in asked


def test_none_leaves_everything_to_the_root() -> None:
    assert units_of(tiny("qwen3"), auto_wrap_policy="none") == []


def test_a_tie_across_layers_joins_them() -> None:
    model = Layered(layers=3)
    model.layers[2].mix.weight = model.layers[0].mix.weight
    assert units_of(model) == [("layers.1",), ("layers.0", "layers.2")]


def test_ties_that_chain_join_everything_they_touch() -> None:
    model = Layered(layers=3)
    model.layers[1].mix.weight = model.layers[0].mix.weight
    model.layers[2].norm.weight = model.layers[1].norm.weight
    assert units_of(model) == [("layers.0", "layers.1", "layers.2")]


def test_a_tie_between_a_layer_and_the_root_takes_the_roots_module_along() -> None:
    model = Layered()
    model.after.weight = model.layers[1].mix.weight
    assert units_of(model) == [("layers.0",), ("layers.1", "after")]


def test_a_tie_inside_of_the_root_needs_no_unit() -> None:
    model = Layered()
    model.after.weight = model.before.weight
    assert units_of(model) == [("layers.0",), ("layers.1",)]


def test_a_tie_between_nested_units_leaves_the_outer_one() -> None:
    model = Layered()
    model.layers[0].outer = model.layers[0].mix.weight
    before = units_of(Layered(), wrap_classes=[Layer, nn.Linear])
    assert ("layers.0.mix",) in before
    assert set(units_of(model, wrap_classes=[Layer, nn.Linear])) == set(before) - {("layers.0.mix",)}


def test_a_layer_tied_to_the_root_module_itself_goes_to_the_root() -> None:
    model = Layered()
    model.shared = model.layers[0].mix.weight
    assert units_of(model) == [("layers.1",)]


def test_planning_leaves_the_model_as_it_is() -> None:
    model = tiny("qwen3")
    before = [(name, id(module)) for name, module in model.named_modules()]
    plan_units(model, entries_of(model), FSDPConfig(activation_checkpointing=True))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def checkpointed(model: nn.Module) -> list[str]:
    return [fqn for fqn, module in model.named_modules() if isinstance(module, CheckpointWrapper)]


def test_checkpointing_goes_inside_of_the_units() -> None:
    model = tiny("qwen3")
    config = FSDPConfig(activation_checkpointing=True)
    before = plan_units(model, entries_of(model), config)
    apply_checkpointing(model, config)
    assert checkpointed(model) == ["model.layers.0", "model.layers.1"]
    # The units keep their names, so that fully_shard takes the wrapper with its layer inside.
    assert plan_units(model, entries_of(model), config) == before


def test_checkpointing_leaves_names_and_ties_as_they_were() -> None:
    model = tiny("qwen3")
    before = [[slot.fqn for slot in entry.slots] for entry in entries_of(model)]
    apply_checkpointing(model, FSDPConfig(activation_checkpointing=True))
    assert [[slot.fqn for slot in entry.slots] for entry in entries_of(model)] == before


def test_a_layer_that_is_checkpointed_already_is_not_wrapped_again() -> None:
    model = Layered()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    config = FSDPConfig(activation_checkpointing=True)
    apply_checkpointing(model, config)
    apply_checkpointing(model, config)
    assert checkpointed(model) == ["layers.0", "layers.1"]


def test_checkpointing_is_off_by_default() -> None:
    model = Layered()
    apply_checkpointing(model, FSDPConfig())
    assert checkpointed(model) == []


def test_checkpointed_layers_are_found_by_type_and_name() -> None:
    model = Layered()
    apply_checkpointing(model, FSDPConfig(activation_checkpointing=True))
    expected = [("layers.0",), ("layers.1",)]
    assert units_of(model, wrap_classes=[Layer]) == expected
    assert units_of(model, wrap_classes=["Layer"]) == expected
    assert units_of(model, auto_wrap_policy=lambda module: isinstance(module, Layer)) == expected


def test_a_model_without_embeddings_is_no_obstacle() -> None:
    class Vision(Layered):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

        def get_output_embeddings(self) -> None:
            return None

    assert units_of(Vision()) == [("layers.0",), ("layers.1",)]


def test_an_embedding_that_is_a_layer_already_is_no_second_unit() -> None:
    class Model(Layered):
        def get_input_embeddings(self) -> nn.Module:
            return self.layers[0]

        def get_output_embeddings(self) -> nn.Module:
            return self.after

    assert units_of(Model()) == [("layers.0",), ("layers.1",), ("after",)]
