"""From a name to a model: presets (YAML data), layer types, plugins, saved folders."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from newllm.errors import UserError, first_line, nearest
from newllm.models.config import LMConfig
from newllm.models.layers.base import LAYER_TYPES, PLUGIN_PRESETS, PRESETS_FOLDER, layer_type
from newllm.models.options import check_count
from newllm.models.transformer import ARCHITECTURES, TransformerLM
from newllm.paths import model_folder, plugin_is_run, user_path


def register_preset(name: str, layers: list[dict[str, Any]], about: str = "") -> None:
    """Makes a named mix of layer specs available to `create_model` and the command line (for plugins).

    Raises UserError for a name that a layer type, or a preset of other layers, has.
    """
    preset = {"about": about, "layers": layers}
    if PLUGIN_PRESETS.get(name) != preset and name in {*preset_names(), *LAYER_TYPES}:
        raise UserError(f"preset '{name}': a layer type or preset has that name already: choose another")
    PLUGIN_PRESETS[name] = preset


def preset_names() -> list[str]:
    """All presets: the package's YAML files and those that plugins registered."""
    return sorted({path.stem for path in PRESETS_FOLDER.glob("*.yaml")} | set(PLUGIN_PRESETS))


def load_preset(name: str) -> dict[str, Any]:
    """`about` and `layers` of a preset, and `architecture` and `options` of the model where it has them.

    The last of the layers is repeated, up to those of `last`, which then stand at the end; a model may have none.

    The name of a layer type stands for a model of such layers alone. Raises UserError for an unknown name, naming the
    nearest valid one.
    """
    if name in PLUGIN_PRESETS:
        return copy.deepcopy(PLUGIN_PRESETS[name])
    if name in preset_names():
        return yaml.safe_load((PRESETS_FOLDER / f"{name}.yaml").read_text())
    if name in LAYER_TYPES:
        return {"about": docstring(LAYER_TYPES[name]).split("\n")[0], "layers": [{"type": name}]}
    raise nearest(name, sorted({*preset_names(), *LAYER_TYPES}), "model")


def docstring(cls: type) -> str:
    """A class's own docstring, which may be empty; not that of the class it is a kind of."""
    return inspect.cleandoc(cls.__doc__ or "")


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """'gqa:num_kv_heads=4,position.type=alibi' → ('gqa', {'num_kv_heads': 4, 'position': {'type': 'alibi'}})."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"model '{text}': write options as name=value, for example {name}:window=128")
        *parents, leaf = key.split(".")
        target = options
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(
                    f"model '{text}': '{parent}' has a value already; give its parts alone, for example "
                    f"{name}:position.type=alibi,position.slope=0.1"
                )
        try:
            target[leaf] = yaml.safe_load(value)
            if isinstance(target[leaf], int) and abs(target[leaf]) >= 2**63:
                raise ValueError("no tensor holds it")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(
                f"model '{text}': the value of {key} cannot be read: '{value}'; write it as in {name}:window=128"
            ) from error
    return name, options


def model_config(
    model: str,
    *,
    hidden_size: int = 512,
    num_layers: int = 6,
    num_heads: int = 8,
    intermediate_size: int = 2048,
    vocab_size: int = 50304,
    **options: Any,
) -> LMConfig:
    """The configuration of a named model; the arguments of `create_model`."""
    name, own = parse_model(model)
    shape = {"hidden_size": hidden_size, "num_heads": num_heads, "intermediate_size": intermediate_size}
    for key, size in (shape | {"num_layers": num_layers, "vocab_size": vocab_size}).items():
        check_count(key, size)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "layer_specs"):
        if key in own:
            raise UserError(f"model '{model}': {key} is no option of a model; the shape is set for all models alike")
    options |= own
    preset = load_preset(name)
    config_class = architecture(preset.get("architecture", "transformer")).config_class
    options = preset.get("options", {}) | options
    specs, last = preset["layers"], preset.get("last", [])
    different = len(specs) + len(last)
    if different > num_layers:
        raise UserError(f"preset '{name}' has {different} different layers: num_layers must be at least that many")
    specs = specs + specs[-1:] * (num_layers - different) + last
    layer_options = {key: value for key, value in options.items() if key not in config_class.option_names()}
    accepted = {option for spec in specs for option in layer_type(spec["type"]).option_names()}
    for key in layer_options:
        if key not in accepted:
            of_model = set(config_class.option_names()) - set(LMConfig.option_names())
            raise nearest(key, sorted(accepted | of_model), "option", f"of model '{name}'")
    complete = []
    for spec in specs:
        known = layer_type(spec["type"]).option_names()
        complete.append(shape | spec | {key: value for key, value in layer_options.items() if key in known})
    model_options = {key: value for key, value in options.items() if key in config_class.option_names()}
    return config_class(vocab_size=vocab_size, hidden_size=hidden_size, layer_specs=complete, **model_options)


def create_model(model: str, **options: Any) -> TransformerLM:
    """An untrained model by preset or layer type; its default shape is Pythia-70M's.

    Args:
        model: preset or layer type, with options after a colon if you like: 'gqa:num_kv_heads=4'.
        options: hidden_size, num_layers, num_heads, intermediate_size, vocab_size; options of the layers, given to
            every layer that has them (num_kv_heads=2, position='none', window=128); fields of LMConfig.

    Raises:
        UserError (a ValueError): unknown preset, layer type or option, naming the nearest valid one; a size or number
            that no model has.
    """
    config = model_config(model, **options)
    return model_class(config)(config)  # type: ignore[call-arg]


def architecture(name: str) -> type[TransformerLM]:
    """The model class of that name. Raises UserError naming the nearest valid one."""
    if name not in ARCHITECTURES:
        raise nearest(name, list(ARCHITECTURES), "architecture")
    return ARCHITECTURES[name]


def model_class(config: LMConfig) -> type[TransformerLM]:
    """The class whose configuration this is."""
    return next(cls for cls in ARCHITECTURES.values() if cls.config_class is type(config))


def meta_model(model: str, **shape: Any) -> TransformerLM:
    """`create_model(model, **shape)` on torch's meta device: all of a model but its numbers, in no time and memory.

    Raises UserError where that would, so that a wrong model is told before anything is done.
    """
    import torch

    with torch.device("meta"):
        return create_model(model, **shape)


def load_model(folder: str | Path, **options: Any) -> TransformerLM:
    """A saved model: a run folder (with model/ inside) or a folder written by `save_pretrained`.

    Args:
        options: passed to `from_pretrained`, for example dtype=torch.bfloat16.

    Raises:
        UserError: no model there, one of another kind, or a damaged file.
    """
    path = model_folder(folder)
    try:
        kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        classes = {cls.config_class.model_type: cls for cls in ARCHITECTURES.values()}
        if kind not in classes:
            raise UserError(f"{path} holds a '{kind}' model: expected one saved by newllm")
        return classes[kind].from_pretrained(path, local_files_only=True, **options)
    except UserError as error:
        if "unknown layer type" in str(error):
            raise UserError(f"{path}: {error}; if it comes from your own file, pass --plugin FILE.py") from error
        raise
    except Exception as error:  # safetensors and transformers raise many kinds for a damaged file
        raise UserError(f"cannot load the model in {path}: {first_line(error)}") from error


def load_plugin(path: str | Path) -> list[str]:
    """Runs the user's Python file, which registers its layer types and presets.

    Returns:
        the names of the layer types the file registered.

    Raises:
        UserError: no such file, an error in it (with its line), or nothing registered.
    """
    path = user_path(str(path))
    if not path.is_file():
        raise UserError(f"plugin {path} not found: give a Python file with a class under @register_layer")
    name = f"newllm_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        plugin_is_run(path)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        kind = [] if isinstance(error, UserError) else [type(error).__name__]
        what = ": ".join([*kind, *str(error).splitlines()[:1]])
        raise UserError(f"plugin {path}{_line_in(error, path)}: {what}") from error
    found = [key for key, cls in LAYER_TYPES.items() if cls.__module__ == name]
    if not found:
        raise UserError(f"plugin {path} registers no layer: put @register_layer('name') above a subclass of Layer")
    return found


def _line_in(error: BaseException, path: Path) -> str:
    """', line N' of the plugin file in which the error arose."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines, trace = [], error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename) == path or trace.tb_frame.f_code.co_filename == str(path.resolve()):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""
