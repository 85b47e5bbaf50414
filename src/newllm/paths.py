"""Paths as users type them, what stands there, and the folder for what is made once and kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from pathlib import Path

from newllm.errors import UserError


def user_path(name: str) -> Path:
    """A path as it was typed, `~` and `~user` replaced; a file whose own name begins with ~ is taken as it is."""
    path = Path(name)
    if not path.exists():
        with contextlib.suppress(RuntimeError):  # no such user
            path = path.expanduser()
    return path


def model_folder(name: str | Path) -> Path:
    """Where the weights and config.json of a run folder (in model/) or a model folder are.

    Raises UserError where there is no config.json.
    """
    folder = user_path(str(name))
    for path in (folder / "model", folder):
        if (path / "config.json").is_file():
            return path
    raise UserError(f"no model in {name}: expected a run folder or one with config.json and model.safetensors")


def spelt_alike(name: str) -> str:
    """What a path is called wherever it is given from: its last part. A name that is no path stays as it is."""
    path = user_path(name)
    return as_text(path.resolve().name) if path.exists() else name


def as_text(file_name: str) -> str:
    r"""A file name that can be written down: bytes of it that are no UTF-8 as in caf\xe9.txt."""
    return file_name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def weights_hash(folder: Path) -> str:
    """Identifies the weights of a run folder or model folder, wherever it is."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("model/*.safetensors")])
    return _content_hash(tuple((file, file.stat().st_mtime_ns) for file in files))


_plugins_as_run: dict[Path, str] = {}


def plugin_is_run(file: Path) -> None:
    """From now on `plugin_hash` is that of the code as it stands here, which is about to be run."""
    _plugins_as_run[file.resolve()] = hashlib.sha256(file.read_bytes()).hexdigest()


def plugin_hash(file: Path) -> str:
    """Identifies the code of a plugin: as this process has run it, since whoever waits for a run may edit the file."""
    return _plugins_as_run.get(file.resolve()) or hashlib.sha256(file.read_bytes()).hexdigest()


@functools.cache
def _content_hash(files: tuple[tuple[Path, int], ...]) -> str:
    """Of files, each with when it was written; a run is asked for its hash many times."""
    digest = hashlib.sha256()
    for file, _ in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def cache_folder(chosen: str | None = None) -> Path:
    """For tokenizers, token files and compiled kernels: `chosen`, else $NEWLLM_CACHE, else ~/.cache/newllm."""
    return user_path(chosen or os.environ.get("NEWLLM_CACHE") or "~/.cache/newllm")
