"""Hugging Face's models that ours are measured against, in the matching shape, and the caches they decode with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn
    from transformers.cache_utils import Cache

Rival = Literal["gpt_neox", "gpt_neox_static", "deepseek_v3"]
NAMES: tuple[Rival, ...] = get_args(Rival)


def build_rival(name: str, max_positions: int, kv_lora_rank: int, **shape: int) -> nn.Module:
    """An untrained rival.

    Args:
        name: one of NAMES.
        max_positions: longest context.
        kv_lora_rank: numbers of the latent that deepseek_v3 caches of a token, beside its rotary key.
        shape: hidden_size, num_layers, num_heads, intermediate_size, vocab_size.
    """
    common: dict[str, Any] = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "max_position_embeddings": max_positions,
    }
    if name == "deepseek_v3":
        return _deepseek_v3(common, kv_lora_rank, shape["intermediate_size"])
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=shape["intermediate_size"], **common))


def _deepseek_v3(common: dict[str, Any], kv_lora_rank: int, intermediate_size: int) -> nn.Module:
    """DeepseekV3 without experts: heads of our size, a quarter of it more for the rotary part, as in Pythia."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    head_size = common["hidden_size"] // common["num_attention_heads"]
    # Its MLP is gated and has three matrices: two thirds of the width, up to a multiple of 64, are as many weights.
    width = -(-2 * intermediate_size // 3 // 64) * 64
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            intermediate_size=width,
            first_k_dense_replace=common["num_hidden_layers"],
            num_key_value_heads=common["num_attention_heads"],
            q_lora_rank=None,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=head_size,
            qk_rope_head_dim=max(2, head_size // 8 * 2),
            v_head_dim=head_size,
            **common,
        )
    )


def rival_cache(name: str, model: nn.Module, capacity: int) -> Cache:
    """The empty cache a rival decodes with; a static one has room for `capacity` tokens."""
    from transformers import DynamicCache, StaticCache

    if name == "gpt_neox_static":
        return StaticCache(config=model.config, max_cache_len=capacity)  # type: ignore[arg-type]
    return DynamicCache(config=model.config)  # type: ignore[arg-type]
