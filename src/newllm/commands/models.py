"""`newllm models`: what there is to compare, and what can be set on each."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from newllm.experiments.rows import describe_layers
from newllm.models import TransformerLM, meta_model
from newllm.models.config import LMConfig
from newllm.models.factory import docstring, load_plugin, load_preset, parse_model, preset_names
from newllm.models.layers import LAYER_TYPES

WIDTH = 100
OF_EVERY_MODEL = ("tie_word_embeddings", "layer_norm_eps", "initializer_range", "embedding_std", "cache_precision")
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
    print(f"In Pythia-70M's shape {built.num_parameters():,} parameters; layers: {describe_layers(built) or 'none'}")
    config = type(built.config)
    own = [key for key in built.config.option_names() if key not in LMConfig.option_names()]
    if type(built) is not TransformerLM:
        text = docstring(type(built)) + "".join(_arguments(config, own))
        _section(f"{type(built).__name__}, the model", {key: getattr(built.config, key) for key in own}, text)
    for spec in {spec["type"]: spec for spec in built.config.layer_specs}.values():
        options = {key: value for key, value in spec.items() if key not in SHAPE}
        _section(f"Layer type {spec['type']}", options, docstring(LAYER_TYPES[spec["type"]]))
    options = {key: getattr(built.config, key) for key in OF_EVERY_MODEL}
    _section("Every model", options, "".join(_arguments(LMConfig, list(options))).lstrip())


def _section(title: str, options: dict[str, Any], text: str) -> None:
    """A title, the options as they are set, and what a docstring says of them."""
    values = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
    print(f"\n{title}: {values}\n\n{textwrap.indent(text, '    ')}")


def _arguments(cls: type, names: list[str]) -> list[str]:
    """The lines that a docstring's Args have on these names, with their heading."""
    section = re.search(r"^Args:\n((?: +\S.*\n?)+)", docstring(cls), re.M)
    entries = re.split(r"^(?= {4}\w)", section[1], flags=re.M) if section else []
    chosen = [entry for entry in entries if {*entry.partition(":")[0].replace(",", " ").split()} & {*names}]
    return ["\n\nArgs:\n", *chosen] if chosen else []
