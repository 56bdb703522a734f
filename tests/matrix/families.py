"""Model families that the matrix test builds small: one line each.

A family is a config class of transformers, the auto class that loads it, and what it needs to be tiny. What the installed
transformers does not have is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CAUSAL, SEQ2SEQ, MASKED, BASE, VISION, IMAGE_TEXT, AUDIO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForCTC",
)

VOCABULARY = 97  # prime: no number of ranks divides it
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEAD: Mapping[str, Any] = {"head_dim": 8}
VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
MOE: Mapping[str, Any] = {"moe_intermediate_size": 16, "num_experts": 5, "num_experts_per_tok": 2}
MLA: Mapping[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
MAMBA: Mapping[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
TIED: Mapping[str, Any] = {"tie_word_embeddings": True}
UNTIED: Mapping[str, Any] = {"tie_word_embeddings": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of model, made small.

    Args:
        name: Of the family, and of the tests.
        config: Name of its config class.
        auto: Name of the auto class that loads it.
        options: Of the config.
        text: Options of the config's `text_config`, if it has one.
        vision: Options of its `vision_config`, if it has one.
        fsdp: Options of the strategy that the family needs.
        dtype: In which it is loaded.
    """

    name: str
    config: str
    auto: str
    options: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] | None = None
    fsdp: Mapping[str, Any] | None = None
    dtype: str = "auto"

    def is_available(self) -> bool:
        """Return whether the installed transformers has the family."""
        import transformers

        return hasattr(transformers, self.config)

    def make_config(self) -> Any:
        """Return the config."""
        import transformers

        cls = getattr(transformers, self.config)
        options = dict(self.options)
        if self.text is not None:
            options["text_config"] = dict(self.text)
        if self.vision is not None:
            options["vision_config"] = dict(self.vision)
        return cls(**options)


def _causal(name: str, config: str, *options: Mapping[str, Any], dtype: str = "auto", **more: Any) -> Family:
    merged = {key: value for of in (TEXT, *options, more) for key, value in of.items()}
    return Family(name=name, config=config, auto=CAUSAL, options=merged, dtype=dtype)


FAMILIES: tuple[Family, ...] = (
    # dense, tied and not
    _causal("llama", "LlamaConfig", UNTIED),
    _causal("llama_tied", "LlamaConfig", TIED),
    _causal(
        "llama_yarn", "LlamaConfig", rope_scaling={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    ),
    _causal(
        "llama_dynamic",
        "LlamaConfig",
        rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
    _causal("mistral", "MistralConfig", HEAD),
    _causal("qwen2", "Qwen2Config"),
    _causal("qwen3", "Qwen3Config", HEAD, TIED),
    _causal("gemma2", "Gemma2Config", HEAD),
    _causal("gemma3_text", "Gemma3TextConfig", HEAD),
    _causal("olmo2", "Olmo2Config"),
    _causal("cohere2", "Cohere2Config"),
    _causal("granite", "GraniteConfig"),
    _causal("stablelm", "StableLmConfig"),
    _causal("starcoder2", "Starcoder2Config"),
    _causal("glm4", "Glm4Config", HEAD),
    _causal("smollm3", "SmolLM3Config"),
    # fused projections, transposed Conv1D
    _causal("phi3", "Phi3Config"),
    _causal("gpt_neox", "GPTNeoXConfig"),
    _causal("falcon", "FalconConfig", new_decoder_architecture=True, num_kv_heads=2),
    _causal("bloom", "BloomConfig", n_layer=2, n_head=4),
    _causal("mpt", "MptConfig", d_model=32, n_heads=4, n_layers=2),
    _causal("gpt2", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    _causal("gptj", "GPTJConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    _causal("opt", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32),
    # experts, one by one and stacked in the checkpoint
    _causal("mixtral", "MixtralConfig", num_local_experts=4),
    _causal("qwen2_moe", "Qwen2MoeConfig", MOE, shared_expert_intermediate_size=24),
    _causal("qwen3_moe", "Qwen3MoeConfig", MOE, HEAD),
    _causal("olmoe", "OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    _causal("gpt_oss", "GptOssConfig", HEAD, num_local_experts=4, num_experts_per_tok=2),
    _causal("granitemoe", "GraniteMoeConfig", num_local_experts=4),
    _causal("phimoe", "PhimoeConfig", num_local_experts=4),
    _causal(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_layer_start_index=1,
    ),
    _causal("glm4_moe", "Glm4MoeConfig", {**MLA, "num_key_value_heads": 2}, HEAD),
    _causal("minimax", "MiniMaxConfig", HEAD, num_local_experts=4, block_size=8),
    _causal("jetmoe", "JetMoeConfig", num_local_experts=4, kv_channels=8),
    _causal(
        "dbrx",
        "DbrxConfig",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    # latent attention
    _causal("deepseek_v2", "DeepseekV2Config", MLA),
    _causal("deepseek_v3", "DeepseekV3Config", MLA),
    # state space and hybrids
    # transformers 4.57 makes two parameters of a mixer in float32, and FSDP2 gathers a module in one dtype
    _causal("mamba", "MambaConfig", state_size=8, time_step_rank=4, dtype="float32"),
    _causal("mamba2", "Mamba2Config", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    _causal(
        "jamba",
        "JambaConfig",
        MAMBA,
        num_experts=3,
        num_experts_per_tok=1,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=0,
        expert_layer_period=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    _causal("bamba", "BambaConfig", MAMBA, attn_layer_indices=[1]),
    _causal("falcon_h1", "FalconH1Config", MAMBA, HEAD, mamba_d_ssm=64),
    _causal(
        "qwen3_next",
        "Qwen3NextConfig",
        MOE,
        HEAD,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    # encoder-decoder
    Family(
        name="t5",
        config="T5Config",
        auto=SEQ2SEQ,
        options={
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    Family(
        name="bart",
        config="BartConfig",
        auto=SEQ2SEQ,
        options={
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    # BERT-like
    Family(name="bert", config="BertConfig", auto=MASKED, options=dict(TEXT)),
    Family(name="roberta", config="RobertaConfig", auto=MASKED, options=dict(TEXT)),
    Family(name="albert", config="AlbertConfig", auto=MASKED, options={**TEXT, "embedding_size": 16}),
    Family(
        name="deberta_v2",
        config="DebertaV2Config",
        auto=MASKED,
        options={**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    Family(
        name="modernbert",
        config="ModernBertConfig",
        auto=MASKED,
        options={**TEXT, "cls_token_id": 0, "sep_token_id": 1, "reference_compile": False},
    ),
    # vision, and vision with language
    Family(name="vit", config="ViTConfig", auto=VISION, options=dict(VIT)),
    Family(name="dinov2", config="Dinov2Config", auto=VISION, options=dict(VIT)),
    Family(
        name="clip",
        config="CLIPConfig",
        auto=BASE,
        options={"projection_dim": 16},
        text={**TEXT, "projection_dim": 16},
        vision={**VIT, "projection_dim": 16},
        fsdp={"ignored_params": ["logit_scale"]},  # a trainable scalar, which FSDP2 cannot shard
    ),
    Family(
        name="llava",
        config="LlavaConfig",
        auto=IMAGE_TEXT,
        options={"image_token_id": 3, "image_token_index": 3},
        text={**TEXT, "model_type": "llama"},
        vision={**VIT, "model_type": "clip_vision_model", "projection_dim": 16},
    ),
    Family(
        name="qwen2_vl",
        config="Qwen2VLConfig",
        auto=IMAGE_TEXT,
        options={
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
        text={
            **TEXT,
            "rope_scaling": {
                "type": "mrope",
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e4,
            },
        },
        vision={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
    ),
    Family(
        name="qwen3_vl_moe",
        config="Qwen3VLMoeConfig",
        auto=IMAGE_TEXT,
        options={
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
        text={
            **TEXT,
            **MOE,
            **HEAD,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
    Family(
        name="paligemma",
        config="PaliGemmaConfig",
        auto=IMAGE_TEXT,
        options={"image_token_index": 3, "projection_dim": 32},
        text={**TEXT, **HEAD, "model_type": "gemma"},
        vision={**VIT, "model_type": "siglip_vision_model", "vision_use_head": False},
    ),
    Family(
        name="gemma3",
        config="Gemma3Config",
        auto=IMAGE_TEXT,
        options={"image_token_index": 3, "mm_tokens_per_image": 4},
        text={**TEXT, **HEAD},
        vision={**VIT, "vision_use_head": False},
    ),
    Family(
        name="mllama",
        config="MllamaConfig",
        auto=IMAGE_TEXT,
        options={"image_token_index": 3},
        text={
            **TEXT,
            "cross_attention_layers": [1],
            "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 64,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
    # audio: weight norm under its old names
    Family(
        name="wav2vec2",
        config="Wav2Vec2Config",
        auto=AUDIO,
        options={
            **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
            "conv_dim": [8, 8],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
)
