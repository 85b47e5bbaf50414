"""Models: layers of any registered type in a Hugging Face language model."""

from newllm.models.context import ContextLM, ContextPythiaLM, ContextVectorLM
from newllm.models.continuous import ContinuousLM
from newllm.models.factory import (
    create_model,
    load_model,
    load_plugin,
    load_preset,
    meta_model,
    model_config,
    parse_model,
    preset_names,
    register_preset,
)
from newllm.models.projection import DProjLM
from newllm.models.selective import SelectiveLM
from newllm.models.transformer import TransformerLM

__all__ = [
    "ContextLM",
    "ContextPythiaLM",
    "ContextVectorLM",
    "ContinuousLM",
    "DProjLM",
    "SelectiveLM",
    "TransformerLM",
    "create_model",
    "load_model",
    "load_plugin",
    "load_preset",
    "meta_model",
    "model_config",
    "parse_model",
    "preset_names",
    "register_preset",
]
