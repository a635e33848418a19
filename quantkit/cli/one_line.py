"""Text from outside, made safe for a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """A message as one line without control characters.

    A message may quote names from a checkpoint that anyone made, and a terminal obeys escape
    sequences.
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )
