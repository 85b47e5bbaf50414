"""Words for lists and numbers."""


def join(items: list[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def count(amount: int, noun: str) -> str:
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    return f"{words[amount] if amount < len(words) else amount} {noun}{'' if amount == 1 else 's'}"


def amount(number: int, noun: str) -> str:
    """'1,024 tokens', '1 token'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
