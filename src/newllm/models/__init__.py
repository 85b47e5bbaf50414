"""Models: layers of any registered type in a Hugging Face language model."""

from newllm.models.factory import (
    check_model_spec,
    create_model,
    load_model,
    load_plugin,
    load_preset,
    model_config,
    parse_model,
    preset_names,
    register_preset,
)
from newllm.models.transformer import TransformerLM

__all__ = [
    "TransformerLM",
    "check_model_spec",
    "create_model",
    "load_model",
    "load_plugin",
    "load_preset",
    "model_config",
    "parse_model",
    "preset_names",
    "register_preset",
]
