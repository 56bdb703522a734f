"""The facade's training state: it goes on from there, on the same or another number of ranks, or is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.facade import (
    batch,
    close,
    facade,
    own,
    quiet_peft,
    train,
    with_optimizer,
)
from tests.distributed.steps import (
    Checkpoint,
    by_strategy,
    local_of,
)

pytestmark = pytest.mark.distributed


@by_strategy
def test_a_saved_training_goes_on_on_any_number_of_ranks(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    expected = pool.run(save_halfway, directory, str(saved), strategy, ranks=2)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    for ranks in (1, 2, 4):
        for losses in pool.run(go_on, directory, str(saved), strategy, ranks=ranks):
            close(losses, expected)


def save_halfway(directory: str, saved: str, name: str) -> list[float]:
    model = with_optimizer(facade(directory, name))
    train(model, range(2))
    model.forward(own(batch(0)))  # the head stays gathered
    model.save(saved)
    torch.rand(3)
    return train(model, range(2, 5))


def go_on(directory: str, saved: str, name: str) -> list[float]:
    mesh = None
    if dist.get_world_size() == 4:  # the other strategy, and two replicas of two shards
        name = "native_fsdp" if name == "accelerate" else "accelerate"
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = with_optimizer(facade(directory, name, device_mesh=mesh))
    model.load(saved)
    assert model.is_wrapped
    assert model.global_step == 2
    return train(model, range(2, 5))


def test_random_numbers_go_on(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = pool.run(save_random, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2)
    assert expected[0] != expected[1]
    assert pool.run(load_random, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2) == expected


def draw() -> list[float]:
    import random

    import numpy as np

    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def save_random(directory: str, saved: str) -> list[float]:
    import random

    import numpy as np

    model = facade(directory, "native_fsdp")  # without an optimizer
    model.forward_only(own(batch(0)))
    seed = 5 + dist.get_rank()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    draw()  # keeps a Gaussian in reserve
    model.save(saved)
    return draw()


def load_random(directory: str, saved: str) -> list[float]:
    model = facade(directory, "native_fsdp")
    model.load(saved)
    return draw()


@by_strategy
def test_what_is_not_the_saved_training_is_refused(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    pool.run(save_halfway, directory, str(saved), strategy, ranks=2)
    pool.run(load_wrongly, directory, checkpoint("qwen3_untied"), str(saved), strategy, ranks=2)


def load_wrongly(directory: str, another: str, saved: str, name: str) -> None:
    model = facade(directory, name)
    with pytest.raises(sw.CheckpointError, match="the optimizer that it was saved with, AdamW, got None"):
        model.load(saved)
    model.set_optimizer("SGD", lr=0.1)
    with pytest.raises(sw.CheckpointError, match="saved with, AdamW, got SGD"):
        model.load(saved)
    with pytest.raises(sw.CheckpointError, match=r"written, got none with training\.pt"):
        model.load(directory)
    trained = with_optimizer(facade(directory, name))
    train(trained, range(1))
    with pytest.raises(sw.ShardwiseError, match="expected a directory that is empty or not there"):
        trained.save(saved)  # on the first rank a CheckpointError, elsewhere its echo
    other = with_optimizer(facade(another, "native_fsdp"))
    with pytest.raises(sw.CheckpointError, match="the optimizer's groups that it was saved with"):
        other.load(saved)


@by_strategy
def test_a_refused_load_changes_nothing(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str
) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    pool.run(save_halfway, directory, str(saved), strategy, ranks=2)
    pool.run(refuse_halfway, directory, str(saved), strategy, ranks=2)


def refuse_halfway(directory: str, saved: str, name: str) -> None:
    model = with_optimizer(facade(directory, name, dtype=torch.bfloat16))
    train(model, range(1))
    before = optimizer_values(model)
    with pytest.raises(sw.CheckpointError, match=r"expected .* of torch.bfloat16 from the model, got"):
        model.load(saved)
    assert optimizer_values(model) == before
    same = with_optimizer(facade(directory, name))
    train(same, range(1))
    before = optimizer_values(same)
    with pytest.raises(sw.ShardwiseError):  # one rank sees no directory, or another one
        same.load(saved if dist.get_rank() == 0 else saved + " elsewhere")
    assert optimizer_values(same) == before
    assert same.global_step == 1
    train(same, range(1, 2))


def optimizer_values(model: sw.TransformersModel) -> list[list[float]]:
    """Return this rank's part of what the optimizer keeps."""
    optimizer = model._torch_optimizer
    assert optimizer is not None
    kept = [value for of in optimizer.state.values() for value in of.values()]
    return [local_of(value).flatten().tolist() for value in kept]


def test_a_parameter_may_have_had_no_gradient(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pool.run(go_on_without_a_layer, checkpoint("qwen3_untied"), str(tmp_path / "saved"), ranks=2)


def go_on_without_a_layer(directory: str, saved: str) -> None:
    def shortened() -> sw.TransformersModel:
        model = with_optimizer(facade(directory, "native_fsdp"))
        model.model.config.num_hidden_layers = 1  # the forward leaves out the second
        return model

    model = shortened()
    train(model, range(2))
    kept = len(optimizer_values(model))
    model.save(saved)
    expected = train(model, range(2, 4))
    again = shortened()
    train(again, range(1))
    again.model.config.num_hidden_layers = 2
    train(again, range(1))  # has more than the save
    again.model.config.num_hidden_layers = 1
    again.load(saved)
    assert len(optimizer_values(again)) == kept
    close(train(again, range(2, 4)), expected)


def test_options_of_the_optimizer_are_those_of_the_save(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pool.run(load_options, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2)


def load_options(directory: str, saved: str) -> None:
    one, other = (facade(directory, "native_fsdp") for _ in range(2))
    one.set_optimizer("AdamW", lr=0.01, amsgrad=True)
    train(one, range(2))
    one.save(saved)
    other.set_optimizer("AdamW", lr=0.5)
    other.load(saved)
    close(train(other, range(2, 4)), train(one, range(2, 4)))


def test_a_damaged_file_is_named(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory, saved = checkpoint("qwen3_tied"), tmp_path / "saved"
    pool.run(save_halfway, directory, str(saved), "native_fsdp", ranks=2)
    file = next(saved.glob("__1_*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    pool.run(load_damaged, directory, str(saved), ranks=2)


def load_damaged(directory: str, saved: str) -> None:
    model = with_optimizer(facade(directory, "native_fsdp"))
    with pytest.raises(sw.DamagedFileError, match="could not be read, and the model now holds parts of it"):
        model.load(saved)


def test_a_save_that_ranks_write_to_several_places_is_refused(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for error in pool.run_to_errors(save_apart, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2):
        assert "expected the files of all ranks, got none of the name __1_0.distcp" in str(error)
    assert not (tmp_path / "saved0").exists()  # nothing that looks like a whole state


def save_apart(directory: str, saved: str) -> None:
    model = facade(directory, "native_fsdp")
    model.forward_only(own(batch(0)))
    model.save(f"{saved}{dist.get_rank()}")


def test_a_save_that_fails_leaves_nothing_and_can_be_made_again(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pool.run(save_badly_then_well, checkpoint("qwen3_tied"), str(tmp_path / "saved"), ranks=2)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def save_badly_then_well(directory: str, saved: str) -> None:
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = facade(directory, "native_fsdp")
    model.forward_only(own(batch(0)))
    groups = len(dist.distributed_c10d._world.pg_map)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", no_space)
        for save in (lambda: model.save_async(saved).finish(), lambda: model.save(saved)):
            with pytest.raises(
                (sw.DamagedFileError, sw.PeerError),
                match=r"MiB are free\): rank 1: .*No space left on device",
            ):
                save()
            assert not list(Path(saved).parent.iterdir()) or dist.get_rank() == 1
    assert len(dist.distributed_c10d._world.pg_map) == groups
    model.save_async(saved).finish()
    assert len(dist.distributed_c10d._world.pg_map) == groups


def test_an_adapter_s_training_goes_on(pool: RankPool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    directory, saved = checkpoint("qwen3_tied"), str(tmp_path / "saved")
    expected = pool.run(save_adapter_halfway, directory, saved, ranks=2)[0]
    close(pool.run(go_on_with_adapter, directory, saved, ranks=1)[0], expected)


def with_adapter(directory: str) -> sw.TransformersModel:
    """Return a model with an adapter beside a tied embedding, and a trainable copy of a norm."""
    from peft import LoraConfig

    model = facade(directory, "accelerate")
    config = LoraConfig(target_modules=["q_proj"], r=3, modules_to_save=["norm"])
    with quiet_peft():
        model.add_adapter_to_model("mine", config)
    return with_optimizer(model)


def save_adapter_halfway(directory: str, saved: str) -> list[float]:
    torch.manual_seed(1)
    model = with_adapter(directory)
    train(model, range(2))
    model.save(saved)
    return train(model, range(2, 5))


def go_on_with_adapter(directory: str, saved: str) -> list[float]:
    torch.manual_seed(2)  # what it starts from does not count
    model = with_adapter(directory)
    model.load(saved)
    return train(model, range(2, 5))


@by_strategy
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe", "gpt2"])
def test_a_resumed_training_reads_nothing_of_the_base(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path, strategy: str, kind: str
) -> None:
    directory, saved = checkpoint(kind), str(tmp_path / "saved")
    expected = pool.run(save_halfway, directory, saved, strategy, ranks=2)[0]
    for losses in pool.run(
        go_on_without_the_base, directory, saved, strategy, ranks=4 if kind == "gpt2" else 2
    ):
        close(losses, expected)


def go_on_without_the_base(directory: str, saved: str, name: str) -> list[float]:
    model = with_optimizer(facade(directory, name, cpu_storage="copy"))
    with pytest.raises(sw.ShardwiseError, match="written, got none with training"):
        model.load(directory)
    with pytest.raises(sw.CallOrderError, match="forward: expected a model with values"):
        model.forward(own(batch(0)))
    with pytest.raises(sw.CallOrderError, match="save: expected a model with values"):
        model.save(saved + "-2")
    model.load(saved)
    report = model.last_report
    assert report is not None
    assert report.storage_bytes == 0
    assert report.route_reason == "the values come from the state of a training"
    return train(model, range(2, 5))


def test_copies_that_ranks_do_not_keep_equal_are_those_of_one_rank(
    pool: RankPool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """torch's planner takes each of the ranks with the least to write: one was one rank's, the next another's."""
    pool.run(save_own_copies, checkpoint("qwen3_untied"), str(tmp_path / "saved"), ranks=2)


def save_own_copies(directory: str, saved: str) -> None:
    ignored = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    model = facade(directory, "native_fsdp", fsdp_config={"ignored_params": ignored})
    model.forward(own(batch(0)))
    own_copies = [dict(model.model.named_parameters())[fqn] for fqn in ignored]
    with torch.no_grad():
        for parameter in own_copies:
            parameter.fill_(dist.get_rank())
    model.save(saved)
    model.load(saved)
    assert [parameter[0].item() for parameter in own_copies] == [0.0, 0.0]
