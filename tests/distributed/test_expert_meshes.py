"""Experts on one mesh and the rest on another: filled, verified, trained, and clipped over both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.layouts import mesh_of, require_same_shards
from tests.distributed.steps import local_of

pytestmark = pytest.mark.distributed

EXPERTS, HIDDEN, INNER = 8, 6, 10
TIMEOUT_SECONDS = 60.0


class _Sum(torch.autograd.Function):
    """The sum over ranks, of which each rank's own part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _SumGradients(torch.autograd.Function):
    """The same values, whose gradients are summed over the ranks that compute on them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Experts(nn.Module):
    """Stacked experts; each rank of `mesh` has some of them, and computes these on every token."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.down = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.up, self.down))
        if self.mesh is not None:
            group = self.mesh.get_group()
            x, weights = _SumGradients.apply(x, group), _SumGradients.apply(weights, group)
            first = self.mesh.get_local_rank() * up.shape[0]
            weights = weights[:, first : first + up.shape[0]]
        inner = torch.einsum("bh,ehi->bei", x, up).tanh()
        out = torch.einsum("be,bei,eih->bh", weights, inner, down)
        return out if self.mesh is None else _Sum.apply(out, self.mesh.get_group())


class Mixture(nn.Module):
    """A router and experts between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.last = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.experts(x, self.router(x).softmax(-1)))


def mixture() -> Mixture:
    torch.manual_seed(2)
    model = Mixture()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("mixture") / "mixture.safetensors"
    save_file(mixture().state_dict(), path)
    return str(path)


def _experts_over(model: Mixture, mesh: DeviceMesh) -> None:
    experts = model.experts
    experts.mesh = mesh
    for name in ("up", "down"):
        full = getattr(experts, name)
        placed = distribute_tensor(full.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(placed))


def _rest_over_all(model: Mixture, expert_mesh: DeviceMesh) -> None:
    """Shard all but the experts over all ranks, and the experts over a mesh of their own."""
    fully_shard(model.experts, mesh=expert_mesh)
    every = mesh_of(fsdp=dist.get_world_size())
    fully_shard(model.first, mesh=every)
    fully_shard(model, mesh=every)


def experts_alone(model: Mixture) -> None:
    """Whole experts on each rank, which FSDP leaves alone; the rest over all ranks."""
    _experts_over(model, mesh_of(ep=dist.get_world_size()))
    every = mesh_of(fsdp=dist.get_world_size())
    ignored = set(model.experts.parameters())
    fully_shard(model.first, mesh=every)
    fully_shard(model, mesh=every, ignored_params=ignored)


def experts_and_shards(model: Mixture) -> None:
    """Half of the experts in each of two groups, their rows sharded over the ranks that have the same ones."""
    mesh = mesh_of(efsdp=2, ep=2)
    _experts_over(model, mesh["ep"])
    _rest_over_all(model, mesh["efsdp"])


def experts_sharded_inside(model: Mixture) -> None:
    """Sharded on two axes like the one above, but on different dims, and all on one two-dimensional mesh."""
    mesh = mesh_of(efsdp=2, ep=2)
    _experts_over(model, mesh["ep"])
    fully_shard(model.experts, mesh=mesh["efsdp"], shard_placement_fn=lambda _: Shard(1))
    fully_shard(model, mesh=mesh_of(fsdp=dist.get_world_size()))


LAYOUTS: dict[str, Callable[[Mixture], None]] = {
    "ep": experts_alone,
    "ep x fsdp": experts_and_shards,
    "ep x fsdp on another dim": experts_sharded_inside,
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def on_meta(layout: str) -> Mixture:
    with torch.device("meta"):
        model = Mixture()
    LAYOUTS[layout](model)
    return model


@by_layout
def test_experts_on_a_mesh_of_their_own_on_every_route(pool: RankPool, file: str, layout: str) -> None:
    pool.run(fill_on_routes, file, layout, ranks=4)


def fill_on_routes(file: str, layout: str) -> None:
    expected = mixture()
    LAYOUTS[layout](expected)
    stored = sum(parameter.nbytes for parameter in mixture().parameters())
    for route in ("auto", "direct", "replicate", "striped", "rank0"):
        model = on_meta(layout)
        report = sw.materialize(model, file, route=route, cpu_storage="copy", timeout=TIMEOUT_SECONDS)
        require_same_shards(model, expected)
        assert stored <= report.storage_bytes <= 1.02 * stored, route  # no layout keeps copies
        assert sw.verify_shards(model, file, timeout=TIMEOUT_SECONDS).is_equal
        if dist.get_rank() == 2:
            local_of(model.experts.down).data[0, 0, 0] += 1
        (found,) = sw.verify_shards(model, file, timeout=TIMEOUT_SECONDS).mismatches
        assert (found.fqn, found.rank) == ("experts.down", 2)


# --- clipping, as docs/design.md says it ---


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def clip_over_meshes(parameters: Iterable[nn.Parameter], *, max_norm: float) -> torch.Tensor:
    """Clip gradients whose parameters are on several meshes: the norm of each mesh, and the norm of these."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group])) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


@by_layout
def test_gradients_are_clipped_over_both_meshes(pool: RankPool, file: str, layout: str) -> None:
    refused = pool.run(train_and_clip, file, layout, ranks=4)
    assert all(refused), "torch clips over several meshes now: docs/design.md need not say how"


def train_and_clip(file: str, layout: str) -> bool:
    """Clip after a backward; return whether torch's own clipping of all parameters at once is refused."""
    model, reference = on_meta(layout), mixture()
    sw.materialize(model, file, timeout=TIMEOUT_SECONDS)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(9))
    for each in (model, reference):
        each(x).square().mean().backward()
    refused = False
    try:
        nn.utils.get_total_norm([p.grad for p in model.parameters()])
    except (RuntimeError, ValueError, NotImplementedError):
        refused = True
    norm = clip_over_meshes(model.parameters(), max_norm=0.1)
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert expected > 0.1
    torch.testing.assert_close(norm, expected)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, reference)]
    for optimizer in optimizers:
        optimizer.step()
    for (name, parameter), like in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), like.grad, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(whole(parameter), like, msg=lambda m, name=name: f"{name}: {m}")
    return refused
