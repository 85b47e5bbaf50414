"""Models by folder or by name, as the commands take them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.commands.flags import check_config, read_yaml
from newllm.errors import UserError
from newllm.paths import model_folder, user_path
from newllm.resolution import resolve
from newllm.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from newllm.models import TransformerLM


def open_model(settings: RunSettings) -> tuple[TransformerLM, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder; or an untrained model by name, which is said on standard error."""
    folder = user_path(settings.model)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give a run folder, a model folder, or the name of a preset")
    if folder.name != settings.model and not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    import transformers

    from newllm.data import prepare
    from newllm.data.hub import load_tokenizer
    from newllm.devices import prepare_process, resolve_device
    from newllm.models import load_model, load_plugin, meta_model
    from newllm.training import new_model

    device = resolve_device(settings.device)
    prepare_process(settings.threads)
    if folder.is_dir():
        plugin = plugin_of(folder, settings.plugin)
        if plugin is not None:
            load_plugin(plugin)
        model = load_model(folder)
        tokenizer = load_tokenizer(str(model_folder(folder)))
    else:
        if settings.plugin is not None:
            load_plugin(settings.plugin)
        meta_model(settings.model)
        settings = resolve(settings)
        data = prepare(settings)
        transformers.set_seed(settings.seed)
        model, tokenizer = new_model(settings, data), data.tokenizer
        print(
            f"newllm: note: '{settings.model}' is untrained, so this text is noise; `newllm train` trains one",
            file=sys.stderr,
        )
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def need_folder(folder: Path) -> None:
    """Raises UserError where there is none."""
    if not folder.is_dir():
        what = " is a file:" if folder.exists() else ": no such folder;"
        raise UserError(f"{folder}{what} give the folder of a trained model")


def run_config(folder: Path | str) -> dict[str, Any]:
    """The settings in config.yaml of a run folder, checked; {} for a model folder."""
    path = user_path(str(folder)) / "config.yaml"
    if not path.is_file():
        return {}
    values = read_yaml(path)
    if "environment" in values:
        raise UserError(f"{folder} is a run of newllm vintix, which newllm vintix evaluate measures")
    return check_config(values, RunSettings, f"{path}: ")


def plugin_of(folder: Path | str, given: str | None) -> str | None:
    """The Python file with the layers of a saved model: the one given, else the one its run was trained with."""
    trained_with = run_config(folder).get("plugin")
    plugin = given or trained_with
    if plugin is not None and plugin == trained_with and not user_path(plugin).is_file():
        raise UserError(
            f"plugin {plugin} not found, by which {folder} was trained: say where it is now with --plugin FILE.py"
        )
    return plugin
