"""`newllm models`: what there is to compare, and what can be set on each."""

from __future__ import annotations

import textwrap
from typing import Any

from newllm.experiments.rows import describe_layers
from newllm.models import TransformerLM, meta_model
from newllm.models.factory import docstring, load_plugin, load_preset, parse_model, preset_names
from newllm.models.layers import LAYER_TYPES

WIDTH = 100
SHAPE = ("type", "hidden_size", "num_heads", "intermediate_size")


def show(model: str | None, plugin: str | None) -> None:
    """Prints all models in a line each; or one of them: its layers, its size, its options and what they mean."""
    if plugin is not None:
        load_plugin(plugin)
    if model is None:
        _list()
    else:
        _explain(model)


def _list() -> None:
    named = preset_names()
    for name in [*named, *(kind for kind in sorted(LAYER_TYPES) if kind not in named)]:
        about = textwrap.wrap(load_preset(name)["about"] or "(no docstring)", WIDTH - 28)
        print(f"{name:26}  {about[0]}", *about[1:], sep=f"\n{'':28}")
    print("\nOptions of one: newllm models mla")


def _explain(model: str) -> None:
    built = meta_model(model)
    print(f"{model}: {load_preset(parse_model(model)[0])['about']}\n")
    print(f"In Pythia-70M's shape {built.num_parameters():,} parameters; layers: {describe_layers(built)}")
    if type(built) is not TransformerLM:
        own = [key for key in built.config.option_names() if key not in TransformerLM.config_class.option_names()]
        _section(f"{type(built).__name__}, the model", {key: getattr(built.config, key) for key in own}, type(built))
    for spec in {spec["type"]: spec for spec in built.config.layer_specs}.values():
        options = {key: value for key, value in spec.items() if key not in SHAPE}
        _section(f"Layer type {spec['type']}", options, LAYER_TYPES[spec["type"]])


def _section(title: str, options: dict[str, Any], cls: type) -> None:
    """A title, the options as they are set, and the docstring, whose Args explain them."""
    values = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
    print(f"\n{title}: {values}\n\n{textwrap.indent(docstring(cls), '    ')}")
