"""Tiny random models of many architectures, as checkpoints, and the batches that go through
them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.skeleton import StoredWeights, auto_class, build_skeleton
from quantkit.models.threads import one_thread

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
SHORT_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# What each architecture needs beside SIZES. Together they have sliding windows, experts, latent
# attention, ALiBi, learned positions, state spaces.
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": SHORT_WINDOW,
    "gemma3_text": SHORT_WINDOW,
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **SHORT_WINDOW},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "qwen3_next": {
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "gpt2": GPT2_SIZES,
    "bloom": {"n_head": 4, "n_layer": 2},
    "phi3": {},
    "cohere2": SHORT_WINDOW,
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_d_state": 16,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 16,
    },
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "cohere": {},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {},
    "qwen3_5_moe_text": {},
    "minimax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    },
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 16, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 64},
    "glm4": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 200,
        "laurel_rank": 16,
        "pad_token_id": 0,
    },
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 8,
    },
    "deepseek_v32": {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 8},
}


ARCHITECTURES["deepseek_v2"] = ARCHITECTURES["deepseek_v3"]
ARCHITECTURES["deepseek_v32"] |= ARCHITECTURES["deepseek_v3"]
ARCHITECTURES["qwen3_5_moe_text"] = ARCHITECTURES["qwen3_next"]
# ZAYA's routers read what the router of the block before found; of GLM-5's blocks some attend to
# the tokens that the block before chose.
HANDING_ON = {
    "zaya": {
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 32,
        "pad_token_id": 0,
        "layer_types": ["hybrid"] * 3,
    },
    "glm_moe_dsa": (
        ARCHITECTURES["deepseek_v32"]
        | {
            "num_hidden_layers": 3,
            "indexer_types": ["full", "shared", "shared"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    ),
}
# Zamba 2's: of three attentions two are stored.
SHARING_BLOCKS = {
    "num_hidden_layers": 5,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
    "num_mem_blocks": 2,
    "num_key_value_heads": 4,
    "mamba_d_state": 16,
    "n_mamba_heads": 4,
    "chunk_size": 16,
    "use_shared_attention_adapter": True,
    "adapter_rank": 16,
    "head_dim": 32,
}
# Encoders, which predict hidden tokens.
MASKED = {"bert": {}, "roberta": {"pad_token_id": 1}}
# Models of an encoder and a decoder, which predict a target.
TARGET = {
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 1,
        "decoder_start_token_id": 1,
    },
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "pad_token_id": 1,
        "decoder_start_token_id": 1,
    },
}
# Of models that read images too: their language model is as SIZES says.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
# Settings that a wider model has more of; the others count layers, heads and experts.
WIDTHS = {
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "d_model",
    "d_ff",
    "d_kv",
    "word_embed_proj_dim",
    "n_embd",
    "head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "mamba_d_head",
    "mamba_d_state",
    "state_size",
    "kv_lora_rank",
    "q_lora_rank",
    "max_position_embeddings",
    "n_positions",
}
MULTIMODAL = {
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 5,
    },
    "gemma3": {"text_config": SHORT_WINDOW, "vision_config": VISION, "image_token_index": 5},
}


def widened(settings: dict, times: int) -> dict:
    """The settings of a model that is `times` as wide."""

    def wider(value: int | list[int]) -> int | list[int]:
        return [each * times for each in value] if isinstance(value, list) else value * times

    return {name: wider(value) if name in WIDTHS else value for name, value in settings.items()}


def make_model(
    directory: Path, kind: str, dtype: torch.dtype = torch.bfloat16, times: int = 1, **changes
) -> nn.Module:
    """A random model of a kind that transformers knows, `times` as wide as SIZES says, saved in
    `directory` and returned.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    if kind in MULTIMODAL:
        settings = MULTIMODAL[kind] | {
            "text_config": widened(SIZES | MULTIMODAL[kind]["text_config"], times) | changes
        }
    else:
        settings = widened(SIZES | (ARCHITECTURES | MASKED | TARGET).get(kind, {}), times) | changes
    if kind == "falcon":
        settings.pop("head_dim")
    if kind in TARGET:
        settings = {
            name: value
            for name, value in settings.items()
            if name not in ("head_dim", "hidden_size", "num_hidden_layers", "num_attention_heads")
        }
    config = CONFIG_MAPPING[kind](**settings)
    if kind in MASKED or kind in TARGET:
        config.architectures = [
            f"{kind}ForMaskedLM" if kind in MASKED else f"{kind}ForConditionalGeneration"
        ]
    model = auto_class(config).from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        # Norms and biases too: what isn't loaded must show.
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(directory)
    return model


def make_batches(*shapes: tuple[int, int]) -> list[Tensor]:
    """Token ids, [windows, positions] each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, SIZES["vocab_size"], shape, generator=generator) for shape in shapes]


def open_blockwise(directory: Path, **settings) -> BlockwiseModel:
    checkpoint = Checkpoint.open(directory)
    return BlockwiseModel(
        build_skeleton(checkpoint, **settings), StoredWeights(checkpoint), str(directory)
    )


def ordinary_hidden_states(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """What the whole model's forward hands to its output head, batch by batch."""
    kind = model.config.model_type
    body = (
        model.get_decoder()
        if kind == "opt"
        else model.model
        if kind == "llama4_text"
        else model.base_model
    )
    with one_thread(), torch.inference_mode():
        return [body(input_ids=tokens, use_cache=False)[0] for tokens in batches]


def whole_model(served) -> torch.nn.Module:
    """A ServedModel with all of its blocks in memory at once."""
    for number in range(served.blocks.block_count):
        served.blocks.loader.load_block(number)
    served.blocks.load_outer(with_head=True)
    return served.blocks.model
