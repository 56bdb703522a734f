"""Configurations of random models of about a given size, in the shape of Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from shardwise.errors import ConfigurationError

_MOST_OFF: Final = 2.0  # factor between the parameters asked for and got, beyond which it is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Sizes of a model but for its number of layers.

    Args:
        least_parameters: Size of the smallest model for which these widths are taken.
        hidden: Size of the residual stream.
        intermediate: Size inside the MLP, or inside one expert.
        heads: Number of attention heads.
        kv_heads: Number of key and value heads.
        head_dim: Size of one head.
        vocabulary: Number of tokens.
        tied: Whether the embedding is the head too.
        experts: Number of experts in a layer; 0 for a dense model.
        experts_per_token: Number of experts that each token goes through.
    """

    least_parameters: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: int
    experts_per_token: int

    @property
    def fixed_parameters(self) -> int:
        """Parameters outside the layers."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + 2 * self.head_dim
        mlp = 3 * self.hidden * self.intermediate * max(1, self.experts) + self.hidden * self.experts
        return attention + mlp + 2 * self.hidden


def _dense(
    least: int, hidden: int, intermediate: int, heads: int, kv: int, head_dim: int, vocabulary: int
) -> Widths:
    return Widths(
        least_parameters=least,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv,
        head_dim=head_dim,
        vocabulary=vocabulary,
        tied=True,
        experts=0,
        experts_per_token=0,
    )


# The largest widths first.
WIDTHS: Final[Mapping[str, tuple[Widths, ...]]] = MappingProxyType(
    {
        "dense": (
            _dense(400_000_000, 2048, 6144, 16, 8, 128, 65536),
            _dense(20_000_000, 768, 2304, 12, 4, 64, 16384),
            _dense(0, 64, 128, 4, 2, 16, 512),
        ),
        "moe": (
            Widths(
                least_parameters=20_000_000,
                hidden=1024,
                intermediate=384,
                heads=16,
                kv_heads=8,
                head_dim=64,
                vocabulary=32000,
                tied=False,
                experts=64,
                experts_per_token=8,
            ),
            Widths(
                least_parameters=0,
                hidden=64,
                intermediate=32,
                heads=4,
                kv_heads=2,
                head_dim=16,
                vocabulary=512,
                tied=False,
                experts=8,
                experts_per_token=2,
            ),
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A size that is used by name.

    Args:
        config_kind: `dense` or `moe`.
        parameters: About how many parameters.
    """

    config_kind: str
    parameters: int


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "dense-1b": Preset(config_kind="dense", parameters=1_070_000_000),
        "moe-1b": Preset(config_kind="moe", parameters=1_000_000_000),  # 64 experts, 12 layers
        "dense-small": Preset(config_kind="dense", parameters=120_000_000),
        "dense-tiny": Preset(config_kind="dense", parameters=120_000),
        "moe-tiny": Preset(config_kind="moe", parameters=200_000),
    }
)


def generated_config(*, config_kind: str, parameters: int, dtype_name: str) -> dict[str, Any]:
    """Return the `config.json` of a model of about this size, as the hub has it.

    The keys are those that transformers 4.57 and 5.x both read.

    Args:
        config_kind: `dense` (Qwen3) or `moe` (Qwen3-MoE).
        parameters: About how many parameters; the number of layers is chosen to come nearest.
        dtype_name: What the values are stored as, by torch's name.

    Raises:
        ConfigurationError: The kind is unknown, or no number of layers comes near the size.
    """
    if config_kind not in WIDTHS:
        raise ConfigurationError(f"config_kind: expected one of {', '.join(WIDTHS)}, got {config_kind!r}.")
    widths = next((each for each in WIDTHS[config_kind] if parameters >= each.least_parameters), None)
    if widths is None:
        raise ConfigurationError(f"parameters: expected a positive number, got {parameters}.")
    layers = max(1, round((parameters - widths.fixed_parameters) / widths.layer_parameters))
    got = widths.fixed_parameters + layers * widths.layer_parameters
    if not parameters / _MOST_OFF <= got <= parameters * _MOST_OFF:
        raise ConfigurationError(
            f"parameters: expected a size that a {config_kind} model can come near, got {parameters}; the nearest "
            f"is {got}. Ask for about that many."
        )
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if widths.experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if widths.experts else "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": widths.head_dim,
        "hidden_act": "silu",
        "hidden_size": widths.hidden,
        "initializer_range": 0.02,
        "intermediate_size": widths.intermediate,
        "max_position_embeddings": 4096,
        "max_window_layers": layers,
        "num_attention_heads": widths.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": widths.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": widths.tied,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": widths.vocabulary,
    }
    if widths.experts:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": widths.intermediate,
            "norm_topk_prob": True,
            "num_experts": widths.experts,
            "num_experts_per_tok": widths.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    return config
