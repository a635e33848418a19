"""Rounding to nearest (RTN): the nearest code for each weight, with the absmax scale.

Linears without codes at the end are rounded in any case. A recipe names `rtn` to ask for nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.algorithms.layer_group import LayerGroup, Needs
from quantkit.schemes.algorithms import Description
from quantkit.schemes.recipe import Algorithm


def needs(settings: Algorithm) -> Needs:
    return Needs()


def quantize_group(group: LayerGroup, settings: Algorithm) -> None:
    group.round_to_nearest()


def describe(report: Mapping[str, Any]) -> Description:
    return Description()
