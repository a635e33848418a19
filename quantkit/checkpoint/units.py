"""Numbers of bytes and counts of things, as people read and write them."""

from __future__ import annotations

import re

from quantkit.errors import OutputError


def format_bytes(count: float) -> str:
    """A size in bytes as text, such as "1.5 GB", in decimal units as disks and hubs use them."""
    for unit in ("bytes", "kB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} MB" if abs(count) < 1000 else f"{count / 1000:.1f} GB"


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 tensor", "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# Between two numbers of a cell, and before the interval of a number.
_BETWEEN_NUMBERS = re.compile(r"(?<=·) | (?=[\[(])")


def number_parts(text: str) -> list[str]:
    """The parts of a cell of numbers between which a line may end: numbers with their units, and
    intervals. "+1.2 % [+1.1, +1.3]" has the parts "+1.2 %" and "[+1.1, +1.3]".
    """
    return _BETWEEN_NUMBERS.split(text)


def heading_words(text: str) -> list[str]:
    """The parts of a heading between which a line may end: words, and what is in brackets."""
    return re.findall(r"(?:\[[^\]]*\]|\S)+", text)


def parse_bytes(text: str) -> int:
    """The number of bytes in a size such as 5GB, 500MB or 2GiB.

    Raises OutputError if the text isn't a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if not match or len(match[1]) > 12:
        raise OutputError(f"the size '{text}' is not understood; write for example 5GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kMGT".index(match[2].replace("K", "k") or " "))
