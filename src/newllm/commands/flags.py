"""Command line flags and YAML keys, made from the settings dataclasses; jsonargparse checks their types.

Values are taken from flags, then from the config file, then from the defaults of the dataclass. Every complaint is a
UserError of one line that names what was given and what would be valid.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from newllm.errors import UserError, flag, nearest
from newllm.paths import user_path
from newllm.resolution import SCALES_FOLDER, check_values, load_scale, scale_names
from newllm.settings import BUDGET, CONFIGS_FOLDER, CommonSettings, ExperimentSettings, RunSettings

METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
LONGEST_VALUE = 60  # characters of a wrong value that a complaint repeats
IN_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class ConfigPrinted(Exception):
    """A command has done what --print_config asks for, and is not to begin."""


class Parser(jsonargparse.ArgumentParser):
    """The parser of one command: settings as flags, an optional config file, one-line errors."""

    def __init__(
        self,
        command: str,
        about: str = "",
        examples: str = "",
        usage: str = "[--FLAG VALUE …]",
        configs: Path | None = None,
    ) -> None:
        # A command with other configs than those of `compare` is not about the language models that the presets name.
        presets = f"presets: {', '.join(preset_files())}\n\n" if configs in (None, CONFIGS_FOLDER) else ""
        super().__init__(
            prog=f"newllm {command}",
            usage=f"newllm {command} {usage}",
            description=about,
            epilog=f"{presets}examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            exit_on_error=False,
            print_config=None,
            allow_abbrev=False,
        )
        self.configs = configs  # where named configs are, if there are any
        self.settings_class: type | None = None
        self.names: list[str] = []
        self.where = ""  # the config file that complaints are about, while one is read

    def add_settings(self, cls: type, only: tuple[type | str, ...] = ()) -> None:
        """A flag for every field of the dataclass, or for the fields of some of its bases and for single fields.

        Flags are grouped by the base that declares them, the class's own group first; single fields come last.
        """
        self.settings_class = cls
        single: list[dataclasses.Field] = []
        for base, title in groups(cls).items():
            if not only or base in only:
                self._add_group(title, (inspect.getdoc(base) or "").split("\n")[0], own_fields(base))
            else:
                single += [f for f in own_fields(base) if f.name in only]
        if single:
            self._add_group("other", None, single)
        group = self.add_argument_group("config")
        group.add_argument("--config", metavar="NAME|FILE", help=config_help(self.configs))
        group.add_argument(
            "--print_config", action="store_true", help="Print all settings as YAML for --config, and stop."
        )

    def _add_group(self, title: str, about: str | None, chosen: list[dataclasses.Field]) -> None:
        assert self.settings_class is not None
        hints, docs = get_type_hints(self.settings_class), field_docs(self.settings_class)
        scaled = {key for name in scale_names() for key in load_scale(name)}
        group = self.add_argument_group(title, about)
        for f in chosen:
            if f.name in self.names:  # a subclass declares it anew, with a default of its own
                continue
            hint, default = hints[f.name], default_of(f)
            several = get_origin(hint) is list
            group.add_argument(
                flag(f.name),
                type=get_args(hint)[0] if several else hint,
                nargs="*" if several else None,
                default=default,
                metavar=metavar(hint),
                help=f"{docs[f.name]} {default_in_words(default, f.name in scaled)}".replace("%", "%%").rstrip(),
            )
            self.names.append(f.name)

    def parse(self, argv: list[str], values: dict[str, Any] | None = None) -> jsonargparse.Namespace:
        """The flags, over the config file's values, over the given values, over the defaults."""
        namespace = self.parse_args(argv)
        values = dict(values or {})
        if self.settings_class is not None and namespace.config is not None:
            config = read_config(namespace.config, self.settings_class, self.configs)
            experiment = issubclass(self.settings_class, CommonSettings)
            if experiment and any(namespace.get(key) is not None for key in BUDGET):
                config = {key: value for key, value in config.items() if key not in BUDGET}
            values |= config
        if values:
            self.set_defaults({key: value for key, value in values.items() if key in self.names})
            namespace = self.parse_args(argv)
        for name in self.names:
            refuse_unusable(namespace[name], flag(name))
        return namespace

    def settings(
        self, namespace: jsonargparse.Namespace, base: Any = None, complete: Callable[[Any], Any] | None = None
    ) -> Any:
        """The settings object of a parsed command line; fields without a flag are taken from `base`.

        `complete` fills in what the command line leaves open. With --print_config the result is printed, and the
        command ends here: ConfigPrinted.
        """
        assert self.settings_class is not None
        given = {} if base is None else {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        settings = self.settings_class(**(given | {name: namespace[name] for name in self.names}))
        if isinstance(settings, CommonSettings):
            check_values(settings)
        if complete is not None:
            settings = complete(settings)
        if namespace.print_config:
            print_config(settings)
            raise ConfigPrinted
        return settings

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise self._user_error(message) from None

    def _user_error(self, message: str) -> UserError:
        """One line for a complaint of argparse or jsonargparse."""
        message = message.strip()
        if match := re.match(r"(?i)unrecognized arguments: (.*)", message):
            unknown = next((word for word in match[1].split() if word.startswith("-")), None)
            if unknown is None:
                return UserError(f"unexpected argument '{match[1].split()[0]}' for {self.prog}: see {self.prog} --help")
            flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            return nearest(unknown.split("=")[0], flags, "option")
        if match := re.match(r'Parser key "(\w+)"', message):
            key = match[1]
            value = re.search(r"(?:Given|Got) value: ?(.*)", message.splitlines()[-1])
            given = shortened(value[1]) if value else "?"
            assert self.settings_class is not None
            hint = get_type_hints(self.settings_class)[key]
            name = key if self.where else flag(key)
            if choices := literal(hint):
                return UserError(f"{self.where}{nearest(given, choices, name)}")
            return UserError(f"{self.where}{name} is {given!r}: it must be {in_words(hint)}")
        return UserError(f"{self.where}{message.splitlines()[0]} (see {self.prog} --help)")


def groups(cls: type) -> dict[type, str]:
    """The dataclasses a settings class is made of, with the title of their flags; general ones first."""
    bases = [base for base in dataclass_bases(cls) if own_fields(base)]
    titles = {ExperimentSettings: "experiment", RunSettings: "run", CommonSettings: "general"}
    return {base: titles.get(base) or re.sub("^Vintix|(Settings|Bench)$", "", base.__name__).lower() for base in bases}


def dataclass_bases(cls: type) -> list[type]:
    """The class and those of its bases that are dataclasses, in method resolution order."""
    return [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The fields a dataclass declares itself."""
    own = inspect.get_annotations(cls)
    return [f for f in dataclasses.fields(cls) if f.name in own]


def default_of(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(dataclass_bases(cls)):
        tree = _syntax_tree(Path(inspect.getfile(base)))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__).body
        for node, following in itertools.pairwise(body):
            match node, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
    return docs


@functools.cache
def _syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def literal(hint: Any) -> list[str]:
    """The choices of a Literal or of a list of a Literal; [] for any other type."""
    item = get_args(hint)[0] if get_origin(hint) is list else hint
    return list(get_args(item)) if get_origin(item) is Literal else []


def scalar(hint: Any) -> type:
    """int of `int`, `int | None` and `list[int]`."""
    return hint if isinstance(hint, type) and not get_args(hint) else get_args(hint)[0]


def metavar(hint: Any) -> str:
    return "|".join(literal(hint)) or METAVARS[scalar(hint)]


def in_words(hint: Any) -> str:
    return IN_WORDS[scalar(hint)]


def default_in_words(default: Any, scaled: bool) -> str:
    if default is None:
        return "(default: by --scale)" if scaled else ""
    if isinstance(default, list):
        return f"(default: {' '.join(map(str, default))})" if default else ""
    return f"(default: {str(default).lower() if isinstance(default, bool) else default})"


def config_names(configs: Path | None) -> list[str]:
    return [] if configs is None else sorted(path.stem for path in configs.glob("*.yaml"))


def config_help(configs: Path | None) -> str:
    names = ", ".join(config_names(configs))
    return "YAML file with any of these settings (underscores for dashes)" + (
        f", or one of: {names}." if names else "."
    )


def read_config(name: str, cls: type, configs: Path | None = None) -> dict[str, Any]:
    """The checked values of a config file, given by path or by its name in the folder of named ones."""
    path = configs / f"{name}.yaml" if configs is not None and name in config_names(configs) else user_path(name)
    if path.is_dir() or not path.exists():  # a pipe, as of `--config <(…)`, can be read
        if configs is None or path.suffix or path.name != name:
            raise UserError(f"--config {name}: {'a folder: give a YAML file' if path.is_dir() else 'no such file'}")
        raise nearest(name, config_names(configs), "config", "(or give the path of a YAML file)")
    return check_config(read_yaml(path), cls, f"{path}: ")


class YamlLoader(yaml.SafeLoader):
    """Tells the line of a key that is there twice, of which PyYAML takes the last without a word, and of a value that
    looks like a date or a number and is none, for which it raises a bare ValueError."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a YAML mapping of settings is needed, such as max_tokens: 500000")
    return values


def check_config(values: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
    """The values with their types checked and converted (YAML reads 1e-4 as text)."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}{nearest(str(key), list(hints), 'setting')}")
        if value is None and type(None) not in get_args(hints[key]):
            raise UserError(f"{where}{key} has no value: give it one, or leave the key out")
        if get_origin(hints[key]) is list and not isinstance(value, list):
            raise UserError(f"{where}{key} is {value!r}: it must be a list, such as [{value}]")
    parser = Parser("")
    parser.add_settings(cls)
    parser.where = where
    checked = parser.parse_object(values, defaults=False)
    for key in values:
        refuse_unusable(checked[key], f"{where}{key}")
    return {key: checked[key] for key in values}


def refuse_unusable(value: Any, name: str) -> None:
    """Raises UserError for a value of the right type that nothing can compute with or write down."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{name} is {item}: it must be a finite number")
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise UserError(f"{name} is {shortened(str(item))}: it must lie within 64 bits")
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise UserError(f"{name} is {item!a}: it must be UTF-8 text") from None
            if "\0" in item:
                raise UserError(f"{name} is {item!a}: it must be text without NUL")


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def print_config(settings: Any) -> None:
    """The settings as YAML, each under its description."""
    docs = field_docs(type(settings))
    for name, value in dataclasses.asdict(settings).items():
        text = yaml.safe_dump({name: value}, allow_unicode=True, width=10**6)
        sys.stdout.write(f"# {docs[name]}\n{text}")


def preset_files() -> list[str]:
    """Names of the presets in the package, found without importing torch."""
    return sorted(path.stem for path in (SCALES_FOLDER.parent / "models" / "presets").glob("*.yaml"))
