"""Wrong input from outside, and how it is told."""

from __future__ import annotations

import difflib


class UserError(ValueError):
    """Wrong input from outside: one line that says what, where, and what would be valid. The CLI exits with 2."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, as far as it fits into a line; some say nothing."""
    return next(filter(str.strip, str(error).splitlines()), "no message")


def flag(name: str) -> str:
    """A setting as the command line has it: 'batch_size' is --batch-size."""
    return "--" + name.replace("_", "-")


def nearest(name: str, valid: list[str], what: str, where: str = "") -> UserError:
    """The error for an unknown name: names the nearest valid one, or all of them where none is near."""
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(sorted(valid))}"
    return UserError(f"unknown {what} '{name}'{where and ' ' + where}: {hint}")
