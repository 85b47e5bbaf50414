"""The Hugging Face hub: data sets and tokenizers by name, with one clear line where there is no network.

The hub's clients retry for minutes without a network; one request with a short limit is asked first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from newllm.errors import UserError, first_line
from newllm.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PILE_DATASET = "monology/pile-uncopyrighted"
STREAM_DOCUMENTS = 20_000
"""Documents read from a stream of the hub unless --max-documents says otherwise."""
TIMEOUT_SECONDS = 5.0


def local_folder(source: str) -> Path | None:
    """`source` as a folder of this machine, or None where it names something on the hub."""
    path = user_path(source)
    return path if path.is_dir() else None


def require(name: str, kind: Literal["dataset", "model"], instead: str) -> None:
    """Asks the hub once, for a few seconds at most, whether `name` is there.

    Raises:
        UserError: the hub cannot be reached (ends with what to do `instead`), or knows no such name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    what = "data set" if kind == "dataset" else "tokenizer"
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"no {what} '{name}' on the Hugging Face hub (or it needs a login); {instead}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"cannot reach the Hugging Face hub for {what} '{name}'; {instead}") from error


def stream_rows(source: str) -> Iterator[dict[str, Any]]:
    """Rows of the training split (or the first one) of NAME[:CONFIG] on the hub, or of a local folder.

    Raises:
        UserError: no network, no such data set or config, or files `datasets` cannot read.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log beside the one line of our error
    name, config = source, None
    if local_folder(source) is None:
        name, _, config = source.partition(":")
        require(name, "dataset", "without a network use --data shakespeare or --data PATH with your own text")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
        yield from splits["train"] if "train" in splits else next(iter(splits.values()))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"hf:{source}: the library `datasets` cannot read it: {first_line(error)}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A ready tokenizer: from a folder, from the local cache of the hub, or from the hub.

    Raises:
        UserError: no network, no such tokenizer, a folder that holds none, or a file.
    """
    from transformers import AutoTokenizer

    folder = local_folder(name)
    if folder is not None and not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{name}: this folder holds no tokenizer (tokenizer_config.json, as save_pretrained writes it)")
    if folder is None and user_path(name).exists():
        raise UserError(f"--tokenizer {name} is a file: give a folder as save_pretrained writes it, a name or bpe")
    if folder is not None:
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # damage shows in many ways; `tokenizers` raises a bare Exception
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{name}: damaged tokenizer (tokenizer.json, tokenizer_config.json): {what}") from error
    with contextlib.suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    # It is not in this machine's cache of the hub.
    require(name, "model", "use --tokenizer bpe, or a folder that holds a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"the model '{name}' on the hub has no usable tokenizer: {first_line(error)}") from error
