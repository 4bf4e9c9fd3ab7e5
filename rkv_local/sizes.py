"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import math
import re

GIB, MIB = 1 << 30, 1 << 20

# K, M, G, T alone are binary, as in llama.cpp, Ollama and Java; KB, MB, GB, TB are powers of ten, as in SI.
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_FORM = "a size like 6GiB, 6.5G, 800MiB, or auto (M and MiB, G and GiB: powers of 1,024; MB, GB: of 1,000)"


def parse_size(value: str | int, field: str = "memory") -> int | None:
    """Bytes; None for 'auto'. A number without a unit is bytes.

    Raises:
        ValueError: no such size, or less than one MiB, which most often is a forgotten unit.
    """
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{field} is {value!r}, must be {_FORM}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{field} is {value!r}, must be {_FORM}")
        exact = float(match[1]) * _UNITS[match[2].lower()]
        size = math.floor(min(exact, 2.0**63))
    if size <= 0:
        raise ValueError(f"{field} is {value!r}, must be more than 0")
    if size < MIB:
        text = str(value).strip()
        bare = text[-1] in "0123456789."
        hint = f"was a unit forgotten? e.g. {text}GiB" if bare else "at least 1MiB is needed"
        raise ValueError(f"{field} is {value!r}, {size:,} bytes: {hint}")
    if size >= 2**60:
        raise ValueError(f"{field} is {value!r}, which no machine has")
    return size


def show(size: int, unit: int | None = None) -> str:
    """'4.58 GiB', or '93.2 MiB' below one GiB. unit: GIB or MIB instead."""
    unit = unit or unit_of(size)
    return f"{size / unit:.{2 if unit == GIB else 1}f} {'GiB' if unit == GIB else 'MiB'}"


def unit_of(size: int) -> int:
    """GIB or MIB: what a size is shown in."""
    return GIB if size >= GIB else MIB
