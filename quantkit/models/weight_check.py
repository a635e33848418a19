"""Checking that a checkpoint has every tensor of a model, in the right shape, before a run begins.

Otherwise a missing or misshapen tensor would show only when its block is loaded, hours later.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.models.skeleton import require_no_missing
from quantkit.models.weight_map import ParameterSource, WeightMap


def require_complete(
    model: Any,
    weight_map: WeightMap,
    shapes: Mapping[str, tuple[int, ...]],
    shared: Container[str],
    where: str,
) -> None:
    """Raise CheckpointError for a missing or misshapen tensor.

    model: a PreTrainedModel on the meta device.
    weight_map: of this model and checkpoint.
    shapes: name of each stored tensor → shape.
    shared: parameters that are stored as another one.
    where: path of the checkpoint, for messages.
    """
    expected = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = [
        name
        for name in expected
        if not weight_map.is_made(name)
        and name not in tied
        and name not in shared
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    require_no_missing(where, missing)
    for parameter, source in weight_map.sources.items():
        _require_equal_parts(parameter, source, shapes, where)
        if weight_map.is_split(parameter):
            continue
        wanted = tuple(expected[parameter].shape)
        name = source.lists[0][0]
        elements = sum(math.prod(shapes[name]) for names in source.lists for name in names)
        # A transposed or merged tensor has as many elements as its parameter. One that is only
        # renamed also has its shape.
        if elements != math.prod(wanted) or (
            weight_map.is_plain(parameter) and shapes[name] != wanted
        ):
            described = (
                f"{name} has the shape {list(shapes[name])}"
                if len(source.lists[0]) == 1
                else f"{len(source.lists[0])} tensors make"
            )
            raise CheckpointError(
                f"in {where} {described}, {parameter} needs {list(wanted)} by the model's"
                " configuration; fetch it again"
            )


def _require_equal_parts(
    parameter: str, source: ParameterSource, shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise CheckpointError unless the tensors that make a parameter are all there, and alike."""
    counts = {len(names) for names in source.lists}
    if len(counts) > 1:
        raise CheckpointError(
            f"{where} lacks some of the tensors that make {parameter}: {sorted(counts)} are there;"
            " fetch or export it again"
        )
    for names in source.lists:
        usual = Counter(shapes[name] for name in names).most_common(1)[0][0]
        odd = next((name for name in names if shapes[name] != usual), None)
        if odd is not None:
            raise CheckpointError(
                f"{odd} in {where} has the shape {list(shapes[odd])}, others of its kind"
                f" {list(usual)}; fetch it again"
            )
