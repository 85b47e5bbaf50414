"""A memory on disk: one safetensors file, which knows the model it belongs to and whether it is whole."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from newllm import __version__
from newllm.errors import UserError, first_line
from newllm.models.memory import MemoryTensors, count_rows
from newllm.paths import user_path

if TYPE_CHECKING:
    from newllm.models import TransformerLM

FORMAT = "newllm-memory"
FORMAT_VERSION = "1"
# The fields of a header, beside format and checksum.
KINDS = {"model": str, "about": str, "layers": list, "tokens_read": int, "sources": list, "version": str}
# What of a configuration does not decide the numbers that a model computes.
NOT_SHAPING = {
    "num_hidden_layers",
    "initializer_range",
    "embedding_std",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


@dataclass(frozen=True)
class MemoryFile:
    """What stands in a memory file beside its tensors."""

    model: str
    """Fingerprint of the model that read, see `fingerprint`."""
    about: str
    """That model in words."""
    layers: list[dict]
    """Of every memory layer: index, type, memories, rows, written (segments, row by row), frozen, shapes, bytes."""
    tokens_read: int
    sources: list[str]
    """Names of the texts that were read."""
    version: str
    """Of the library that wrote the file."""

    @property
    def bytes(self) -> int:
        """Of the tensors of all layers and rows."""
        return sum(layer["bytes"] for layer in self.layers)


def save_memory(model: TransformerLM, path: str | Path, *, tokens_read: int, sources: Sequence[str] = ()) -> MemoryFile:
    """Writes the memory of `model`, all at once or not at all; an existing file is replaced.

    Raises:
        UserError: the memory is empty, or the file cannot be written.
    """
    path, state = Path(path), model.get_memory_state()
    if not any(name.endswith(".written") and tensor.any() for name, tensor in state.items()):
        raise UserError("the memory is empty: read something first, by model(ids, update_memory=True)")
    layers = _layers({n: layer.type_name for n, layer in model.memory_layers().items()}, state)
    file = MemoryFile(fingerprint(model), describe(model), layers, tokens_read, list(sources), __version__)
    fields = {name: json.dumps(value, ensure_ascii=False) for name, value in vars(file).items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION} | fields
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    staging = path.with_name(path.name + ".incomplete")
    try:
        staging.write_bytes(save(state, header | {"sha256": _digest(header, state)}))
        staging.replace(path)
    except OSError as error:
        raise UserError(f"{path}: the memory cannot be written: {error.strerror}") from error
    finally:
        staging.unlink(missing_ok=True)
    return file


def load_memory(model: TransformerLM, path: str | Path) -> MemoryFile:
    """Puts the memory of a file in the place of the model's.

    Raises:
        UserError: as `read_memory`, or a memory of another model; the model's memory is then as it was.
    """
    file, state = read_memory(path)
    own = fingerprint(model)
    if file.model != own:
        raise UserError(
            f"{path}: this memory belongs to model {file.model[:12]} ({file.about}), "
            f"the model given is {own[:12]} ({describe(model)}): a memory can only be read by the model that wrote it"
        )
    try:
        model.set_memory_state(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return file


def read_memory(path: str | Path) -> tuple[MemoryFile, MemoryTensors]:
    """What a memory file holds, without its model.

    Raises:
        UserError: no such file, not a memory file, one of another format version, or not as it was written.
    """
    path = user_path(str(path))
    if not path.is_file():
        raise UserError(f"{path}: no such memory file; `newllm memory absorb` writes one")
    try:
        with safe_open(path, framework="pt") as opened:
            header: dict[str, str] = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path}: not a memory file, or a truncated one: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: a safetensors file, but no memory written by newllm")
    if header.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: memory format {header.get('format_version')}; newllm {__version__} reads {FORMAT_VERSION}"
        )
    if header.pop("sha256", None) != _digest(header, state):
        raise UserError(f"{path}: damaged or changed after it was written: its content does not match its checksum")
    try:
        return _file({name: header[name] for name in header.keys() - {"format", "format_version"}}, state), state
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] if isinstance(error, ValueError) else "a field is built otherwise"
        raise UserError(f"{path}: a memory file with a header that newllm does not write: {reason}") from None


def _file(header: dict[str, str], state: MemoryTensors) -> MemoryFile:
    """The fields of a header, if they are those of these tensors; else some error: a forger may write anything."""
    fields = {name: json.loads(value) for name, value in header.items()}
    if odd := sorted(fields.keys() ^ KINDS.keys()):
        raise ValueError(f"'{odd[0]}' is {'unknown' if odd[0] in fields else 'missing'}")
    for name, kind in KINDS.items():
        if type(fields[name]) is not kind:
            raise ValueError(f"'{name}' is {header[name]}")
    file = MemoryFile(**fields)
    if file.tokens_read < 0 or not all(type(source) is str for source in file.sources):
        raise ValueError("'tokens_read' or 'sources'")
    if not file.layers or file.layers != _layers({layer["index"]: layer["type"] for layer in file.layers}, state):
        raise ValueError("'layers' are not those of its tensors")
    return file


def fingerprint(model: TransformerLM) -> str:
    """sha256 over configuration and weights, as hex: equal for models that compute the same from the same memory."""
    config = {name: getattr(model.config, name) for name in model.config.option_names() if name not in NOT_SHAPING}
    return _sha256([json.dumps(config, sort_keys=True)], model.state_dict())


def describe(model: TransformerLM) -> str:
    """'infini, 5 × pythia; D 512; 70,426,633 parameters'."""
    types = [spec["type"] for spec in model.config.layer_specs]
    runs = [(len(list(group)), name) for name, group in itertools.groupby(types)]
    layers = ", ".join(name if count == 1 else f"{count} × {name}" for count, name in runs)
    return f"{layers}; D {model.config.hidden_size}; {model.num_parameters():,} parameters"


def _layers(types: dict[int, str], state: MemoryTensors) -> list[dict]:
    """What a header says of the memory layers, whose types are given by their places in the model."""
    layers = []
    for n, type_name in types.items():
        tensors = {name.split(".")[1]: t for name, t in state.items() if name.split(".")[0] == str(n)}
        frozen = tensors.pop("frozen", torch.tensor([], dtype=torch.int64))
        _, N, _, _, _ = tensors["matrix"].shape
        layers.append(
            {
                "index": n,
                "type": type_name,
                "memories": N,
                "rows": count_rows(state),
                "written": [int(count) for count in tensors["written"]],
                "frozen": [int(memory) for memory in frozen],
                "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
                "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            }
        )
    return layers


def _digest(header: dict[str, str], state: MemoryTensors) -> str:
    """sha256 over all of a file but the place of its numbers: it finds damage and edits, not a forger."""
    return _sha256([json.dumps(header, sort_keys=True)], state)


def _sha256(texts: Iterable[str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
