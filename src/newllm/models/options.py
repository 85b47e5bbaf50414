"""What options of layers and models may be: each check raises UserError, one line that says what would be valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from newllm.errors import UserError


def check_count(name: str, value: Any, least: int = 1) -> None:
    """The value is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise UserError(f"{name} is {value!r}: it must be a whole number of at least {least}")


def check_switch(name: str, value: Any) -> None:
    """The value is true or false."""
    if type(value) is not bool:
        raise UserError(f"{name} is {value!r}: it must be true or false")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """The value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: it must be {' or '.join(map(repr, choices))}")


def check_divides(whole: str, size: int, parts: str, number: int) -> None:
    """A size divides into so many equal parts."""
    if size % number:
        raise UserError(f"{whole} {size} does not divide into {parts} {number}")
