"""The command that repeats a comparison, as its report names it."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import yaml

from newllm.errors import flag
from newllm.resolution import resolve
from newllm.settings import BUDGET, CONFIGS_FOLDER, ExperimentSettings


def command_line(settings: ExperimentSettings) -> str:
    """The shortest command line that repeats the comparison, from a scale or a named config; settings are resolved."""
    settings = dataclasses.replace(settings, reuse=[])  # it saves work and changes no figure
    starts = {("--scale", settings.scale): ExperimentSettings(scale=settings.scale)}
    for path in sorted(CONFIGS_FOLDER.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        starts["--config", path.stem] = ExperimentSettings(**config)
    lines = []
    for start, base in starts.items():
        flags = flags_that_differ(settings, base)
        if flags is not None:
            lines.append(shlex.join(["newllm", "compare", *start, *flags]))
    return min(lines, key=len)


def flags_that_differ(settings: ExperimentSettings, base: ExperimentSettings) -> list[str] | None:
    """Flags that make `base` the settings; None where it sets what they leave open, which no flag can undo."""
    base = resolve(base)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    differ = [name for name, value in values.items() if value != getattr(base, name)]
    if set(differ) & set(BUDGET):  # a part of a budget replaces all of the base's
        differ = [name for name in values if name in differ or name in BUDGET]
    words = []
    for name in differ:
        value = values[name]
        if value is not None:
            items = value if isinstance(value, list) else [value]
            words += [flag(name), *map(flag_value, items)]
        elif name not in BUDGET:  # the part of a budget that is named takes the place of all of the base's
            return None
    return words


def flag_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
