"""Whether the metadata of histories, which anybody can edit, are such as `collect` writes them."""

from __future__ import annotations

from typing import Any, get_type_hints

import numpy as np

from newllm.errors import UserError, first_line, flag
from newllm.resolution import fits
from newllm.vintix.environments import SPLITS, TaskFamily, from_spec
from newllm.vintix.settings import CollectSettings

READ = (
    *("name", "family", "observation_dim", "action_dim", "action_low", "action_high"),
    *("observation_mean", "observation_std", "reward_scale", "tasks", "collect"),
)
"""What training and evaluation need."""
RETURNS = ("random", "demonstrator", "blind")
"""Of each task, the mean returns by which play is normalised and compared."""

LARGEST = 1e38
"""Beyond it float32, which every number becomes, has nothing but infinity."""


def flaw(metadata: dict[str, Any], histories: bool) -> str | None:
    """What is wrong with the metadata of a family, and of its list of histories, in words; None where nothing is."""
    try:
        _check(metadata)
        if histories:
            _check_histories(metadata.get("histories"), metadata["family"]["counts"]["train"])
    except _FlawError as found:
        return str(found)
    return None


def read_family(metadata: dict[str, Any], where: object, advice: str) -> TaskFamily:
    """The tasks that sound metadata tell of, after a step in the first of them.

    Raises:
        UserError: options of which no environment can be made, or one with other tasks or spaces than the metadata say;
            it names the file `where` and ends with the advice. A missing package.
    """
    try:
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            family = from_spec(metadata["family"])
            _play_a_step(family)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{where}: broken: no environment can be made of family.options ({reason}); {advice}") from None
    told = [task["parameters"] for split in SPLITS for task in metadata["tasks"][split]]
    if told != [dict(zip(family.parameter_names, row, strict=True)) for row in family.parameters.tolist()]:
        raise UserError(f"{where}: broken: the tasks are not those that family.options and task_seed give; {advice}")
    spaces = (family.observation_size, family.action_size, family.action_low.tolist(), family.action_high.tolist())
    if spaces != tuple(metadata[key] for key in ("observation_dim", "action_dim", "action_low", "action_high")):
        what = f"observations and actions are not those of the family {family.name}"
        raise UserError(f"{where}: broken: {what}; {advice}")
    return family


def _play_a_step(family: TaskFamily) -> None:
    first = family.task_ids("train")[:1]
    env = family.make(first, 0)
    observation, _ = env.reset(seed=0)
    env.step(family.demonstrator(first)(observation).astype(np.float32))
    env.close()


class _FlawError(Exception):
    """What is wrong with a value."""


def _check(metadata: dict[str, Any]) -> None:
    if missing := [key for key in READ if key not in metadata]:
        raise _FlawError(f"it lacks {', '.join(missing)}")
    for key in ("observation_dim", "action_dim"):
        _whole(metadata[key], key, 1)
    for size, keys in (
        ("observation_dim", ("observation_mean", "observation_std")),
        ("action_dim", ("action_low", "action_high")),
    ):
        for key in keys:
            _numbers(metadata[key], metadata[size], key)
    std, scale = metadata["observation_std"], metadata["reward_scale"]
    _need(min(std) > 0, "observation_std", std, "numbers greater than 0")
    _number(scale, "reward_scale")
    _need(scale > 0, "reward_scale", scale, "greater than 0")
    _check_family(metadata["family"], metadata["name"])
    _mapping(metadata["tasks"], SPLITS, "tasks")
    for split, count in metadata["family"]["counts"].items():
        tasks = metadata["tasks"][split]
        fits = isinstance(tasks, list) and len(tasks) == count
        _need(fits, f"tasks.{split}", tasks, f"a list of {count} tasks, as family.counts says")
        for index, task in enumerate(tasks):
            _check_task(task, f"tasks.{split}[{index}]")
    _check_collect(metadata["collect"])


def _check_family(family: Any, name: Any) -> None:
    _mapping(family, ("name", "options", "counts", "task_seed"), "family", alone=True)
    _need(isinstance(name, str) and name.isidentifier(), "name", name, "the name of a family of tasks")
    _need(family["name"] == name, "family.name", family["name"], f"{name!r}, as name is")
    _whole(family["task_seed"], "family.task_seed", 0)
    _mapping(family["counts"], SPLITS, "family.counts", alone=True)
    for split in SPLITS:
        _whole(family["counts"][split], f"family.counts.{split}", 1)
    _mapping(family["options"], ("kind", "episode_length"), "family.options")
    kind = family["options"]["kind"]
    _need(isinstance(kind, str) and kind.isidentifier(), "family.options.kind", kind, "a kind of environment")
    _whole(family["options"]["episode_length"], "family.options.episode_length", 1)


def _check_task(task: Any, where: str) -> None:
    _mapping(task, (*RETURNS, "parameters"), where)
    for key in RETURNS:
        _number(task[key], f"{where}.{key}")
    if task["random"] == task["demonstrator"]:
        raise _FlawError(f"{where}: random and demonstrator play return the same, by which no score can be told")


def _check_collect(collect: Any) -> None:
    settings = get_type_hints(CollectSettings)
    _mapping(collect, tuple(settings), "collect", alone=True)
    for key, hint in settings.items():
        _need(fits(collect[key], hint), f"collect.{key}", collect[key], f"a value of {flag(key)}")
    try:
        CollectSettings(**collect).check_collect()
    except UserError as error:
        raise _FlawError(f"collect: {error}") from None


def _check_histories(histories: Any, tasks: int) -> None:
    _need(isinstance(histories, list) and len(histories) > 0, "histories", histories, "a list of histories")
    for index, entry in enumerate(histories):
        where = f"histories[{index}]"
        _mapping(entry, ("file", "task", "steps"), where)
        _need(isinstance(entry["file"], str) and entry["file"] != "", f"{where}.file", entry["file"], "a file name")
        _whole(entry["steps"], f"{where}.steps", 1)
        _whole(entry["task"], f"{where}.task", 0)
        _need(entry["task"] < tasks, f"{where}.task", entry["task"], f"one of the {tasks} training tasks, from 0")


def _mapping(value: Any, keys: tuple[str, ...], where: str, alone: bool = False) -> None:
    _need(isinstance(value, dict), where, value, f"an object with {', '.join(keys)}")
    if missing := [key for key in keys if key not in value]:
        raise _FlawError(f"{where} lacks {', '.join(missing)}")
    if alone and (others := [key for key in value if key not in keys]):
        raise _FlawError(f"{where} has {', '.join(others)}, which is unknown")


def _numbers(value: Any, count: int, where: str) -> None:
    _need(isinstance(value, list) and len(value) == count, where, value, f"a list of {count} numbers")
    for index, item in enumerate(value):
        _number(item, f"{where}[{index}]")


def _number(value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _need(number and abs(value) < LARGEST, where, value, "a finite number")


def _whole(value: Any, where: str, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _need(whole and least <= value < 2**31, where, value, f"a whole number of at least {least}")


def _need(holds: bool, where: str, value: Any, valid: str) -> None:
    if not holds:
        given = repr(value)
        raise _FlawError(f"{where} is {given if len(given) <= 60 else given[:60] + '…'}, not {valid}")
