"""Numbers of tokens, written with a decimal unit: 80M, 1B, 512k."""

import re
from decimal import Decimal

from jsonargparse.typing import register_type

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Tokens(int):
    """A number of tokens: an int that is read from and printed as `80M` (decimal units k, M, B, T)."""

    def __new__(cls, amount: "int | str") -> "Tokens":
        """Convert an int or a text such as `2.5B`. Raises ValueError unless it is a whole number of tokens, 0 or more."""
        if isinstance(amount, str):
            match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*([kKMBT]?)", amount.strip())
            if match is None:
                raise ValueError(f"{amount!r} is not an amount of tokens: write 80M, 1B, 512k or a whole number")
            number, unit = match.groups()
            unit = "k" if unit == "K" else unit
            exact = Decimal(number) * UNITS[unit]
            if exact != int(exact):
                raise ValueError(f"{amount!r} is not a whole number of tokens")
            amount = int(exact)
        if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
            raise ValueError(f"{amount!r} is not an amount of tokens: write 80M, 1B, 512k or a whole number")
        return super().__new__(cls, amount)

    def __str__(self) -> str:
        """Format the exact number in the largest unit that divides it, as configuration files have it."""
        for unit in ("T", "B", "M", "k"):
            if self and self % UNITS[unit] == 0:
                return f"{self // UNITS[unit]}{unit}"
        return str(int(self))


def short(amount: float) -> str:
    """Format a number for people, rounded to three digits and a unit: 1234 -> `1.23k`."""
    for unit in ("T", "B", "M", "k"):
        if amount >= 0.9995 * UNITS[unit]:  # what rounds to 1000 of a unit is 1 of the next
            return f"{amount / UNITS[unit]:.3g}{unit}"
    return f"{amount:.3g}"


register_type(Tokens, serializer=str, deserializer=Tokens, deserializer_exceptions=(ValueError, TypeError))
