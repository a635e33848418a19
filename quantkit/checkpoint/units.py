"""Numbers of bytes and of things, as people write and read them."""

from __future__ import annotations

import re

from quantkit.errors import OutputError


def format_bytes(count: float) -> str:
    """A size for people: decimal units, as disks and hubs count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def counted(count: int, noun: str) -> str:
    """A number of things for people."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def parse_bytes(text: str) -> int:
    """A size such as 5GB, 500MB or 2GiB in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if not match or len(match[1]) > 12:
        raise OutputError(f"the size '{text}' is not understood; write for example 5GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kMGT".index(match[2].replace("K", "k") or " "))
