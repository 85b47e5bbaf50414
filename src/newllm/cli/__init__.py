"""The command line: one function for each command. torch is imported only by the command that needs it.

Exit codes: 0 done, 1 a check failed or something unforeseen, 2 wrong input (one line: what, and what would be valid),
130 interrupted (state saved).
"""

from __future__ import annotations

import errno
import io
import os
import sys
from importlib import import_module

from newllm import __version__
from newllm.cli.registry import COMMANDS
from newllm.errors import UserError, nearest

for _module in ("models", "memory", "data", "bench", "vintix"):  # in the order of `newllm --help`
    import_module(f"{__name__}.{_module}")

# What the system has against a path wherever one is used; where more is to be said, the command says it.
REFUSALS = (errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS)
# What torch says of tensors that this machine, or any, cannot hold; NumPy raises a MemoryError.
TOO_LARGE = ("can't allocate memory", "out of memory", "calculation overflowed", "integer multiplication overflow")

OVERVIEW = """\
newllm compares language models that remember differently: same text, same budget, one report.

usage: newllm COMMAND [--help] …

{commands}

examples:
  newllm compare                                  four models on Shakespeare's plays, about five minutes, one report
  newllm compare --models pythia gqa --data my.txt --max-tokens 2000000
  newllm compare --plugin my_layer.py --models pythia my_layer
  newllm train --model gqa --out runs/gqa && newllm generate runs/gqa --prompt "To be"

Every command explains itself: newllm compare --help
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # Libraries report every file they load; what matters is said by the commands themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _make_streams_usable()
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"newllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = argv[0] in ("adapt", "compare", "train") or argv[:2] == ["vintix", "train"]
        continues = "; the same command continues where it was" if resumable else ""
        print(f"\nnewllm: interrupted{continues}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `newllm generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in TOO_LARGE)):
            raise
        what = str(error).rpartition("Allocator: ")[2].splitlines()[0] if str(error) else "no more could be had"
        print(f"newllm: error: not enough memory ({what}): choose a smaller model, batch or context", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        print(f"newllm: error: {error.filename}: {os.strerror(error.errno).lower()}", file=sys.stderr)
        return 2


def _make_streams_usable() -> None:
    """A standard stream that was closed by the caller, as by `<&-`, is an empty one; Python leaves None there.

    What an output cannot show, in an encoding that has no such character or in a file name that is no text, it shows by
    its number: no reason to lose what was measured.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif mode == "w" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help"):
        print(OVERVIEW.format(commands=_command_list("")), end="")
        return 0
    if first == "--version":
        print(f"newllm {__version__}")
        return 0
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1" and first != "train":
        raise UserError(f"{first} works in one process, WORLD_SIZE is {processes}: torchrun is for newllm train")
    if first in COMMANDS:
        return COMMANDS[first](argv[1:])
    group = {name.split()[1]: name for name in COMMANDS if name.startswith(f"{first} ")}
    if not group:
        names = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
        raise nearest(first, ["--help", "--version"] if first.startswith("-") else names, "command")
    second = argv[1] if len(argv) > 1 else "--help"
    if second in ("-h", "--help"):
        print(f"usage: newllm {first} COMMAND [--help] …\n\n{_command_list(first + ' ')}")
        return 0
    if second not in group:
        raise nearest(second, list(group), f"{first} command")
    return COMMANDS[group[second]](argv[2:])


def _command_list(prefix: str) -> str:
    return "\n".join(f"  {name:15} {command.about}" for name, command in COMMANDS.items() if name.startswith(prefix))
