"""Small tables for notebooks: what a result shows when it is the last line of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """A table of two columns, readable on light and dark pages.

    title: its caption.
    rows: name → value, as plain text.
    """
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return (
        f"<table><caption style='text-align:left;font-weight:bold'>{escape(title)}</caption>"
        f"{cells}</table>"
    )
