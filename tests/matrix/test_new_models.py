"""Every family of models, new from its config: what upstream starts alike from any seed is the same here, the rest as wide.

What only a constructor gives values is refused by `from_config`, by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import shardwise as sw
from shardwise.testing import RankPool
from tests.distributed.models import gathered, named_tensors, ties, transformers_fuses_experts
from tests.matrix.test_matrix import BY_NAME, _auto, available

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]

# Names of parameters that no method initialises: a constant of the constructor, a parametrization's originals.
MADE_BY_CONSTRUCTOR = {"clip": "logit_scale", "wav2vec2": "conv.parametrizations.weight.original0"}
if not transformers_fuses_experts():
    MADE_BY_CONSTRUCTOR["falcon_h1"] = "mamba.A_log"  # 4.57; from transformers 5 on `_init_weights` makes it
RANKS = 2
FEW = 200  # elements, of which the spread says little


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(RANKS, preload=("torch", "transformers", "accelerate")) as pool:
        yield pool


@pytest.mark.parametrize("name", available())
def test_a_new_model_starts_as_upstream_starts_it(two: RankPool, name: str) -> None:
    two.run(start, name, ranks=RANKS)


def start(name: str) -> None:
    """Build a family from its config and compare its values with those of models that upstream builds from two seeds."""
    warnings.simplefilter("ignore")  # what transformers says of tiny configs is not the matter here
    family = BY_NAME[name]
    strategy = sw.NativeFSDPStrategy(mixed_precision="no", fsdp_config=family.fsdp, timeout=60.0)
    if name in MADE_BY_CONSTRUCTOR:
        with pytest.raises(sw.ShardwiseError, match=MADE_BY_CONSTRUCTOR[name]):
            strategy.from_config(_auto(family), family.make_config())
        return
    model = strategy.wrap_model(strategy.from_config(_auto(family), family.make_config()))
    got = gathered(model)
    upstream = [new(name, seed) for seed in (1, 2)]
    first, second = (dict(named_tensors(each)) for each in upstream)
    assert set(got) == set(first)
    assert ties(model) == ties(upstream[0])
    for fqn, value in first.items():
        assert got[fqn].dtype == value.dtype, fqn
        if torch.equal(value, second[fqn]):
            assert torch.equal(got[fqn], value), (
                f"{fqn}: another value than upstream's, which no seed changes"
            )
        elif value.numel() > FEW:
            wide = (value.float().std().item() + second[fqn].float().std().item()) / 2
            assert got[fqn].float().std().item() == pytest.approx(wide, rel=0.3), fqn


def new(name: str, seed: int) -> nn.Module:
    """Return a family's model with the values that upstream gives it."""
    torch.manual_seed(seed)
    model: nn.Module = _auto(BY_NAME[name]).from_config(BY_NAME[name].make_config())
    return model
