"""The Linears that an export doesn't quantize, by the names that runtimes know them by."""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantkit.models.assignment import Assignment
from quantkit.models.linear_views import experts_module
from quantkit.models.tensor_roles import is_of_other_tower
from quantkit.schemes.pattern import BLOCK

# Roles of tensors that may be a Linear in a runtime.
_LINEAR_KINDS = (
    "linear",
    "lm_head",
    "router",
    "outside the blocks",
    "other tower",
    "used directly",
    "unreached",
)


def ignore_targets(assignment: Assignment) -> list[str]:
    """Targets for the `ignore` list of `quantization_config`: the names of all modules that may be
    a Linear in a runtime and are not quantized, and a pattern for each layer's unquantized experts.
    """
    roles, linears = assignment.roles.values(), assignment.linears
    skipped = [
        role.name
        for role in roles
        if role.kind in _LINEAR_KINDS
        and len(role.shape) >= 2
        and role.tensor.endswith(".weight")
        and role.name not in linears
    ]
    # Runtimes have a module for each expert, even if a layer's experts are stored in one tensor.
    stacks = dict.fromkeys(
        experts_module(role.tensor)
        for role in roles
        if len(role.shape) == 3 and role.kind in ("linear", "unreached")
    )
    skipped += [
        rf"re:{re.escape(module)}\..*"
        for module in stacks
        if not any(name.startswith(f"{module}.") for name in linears)
    ]
    # A tied lm_head has no tensor, but runtimes have the module.
    if "lm_head" not in skipped and "lm_head" not in linears:
        skipped.append("lm_head")
    return skipped


def patterns_outside_blocks(quantized: Iterable[str], skipped: Iterable[str]) -> list[str]:
    """Patterns for skipped Linears next to the decoder blocks. A runtime may have them in another
    module: vLLM has Gemma 3n's projections in its `self_decoder`.

    quantized: names of the quantized Linears.
    skipped: names of the skipped ones.
    """
    block = next(filter(None, map(BLOCK.match, quantized)), None)
    if block is None:
        return []
    parent = block["prefix"][: block["prefix"].rfind(".") + 1]
    outside = [
        name
        for name in skipped
        if name.startswith(parent)
        and not name.startswith((f"{block['prefix']}.", "re:", "lm_head"))
    ]
    return [
        rf"re:.*\.{re.escape(name.removeprefix(parent))}$"
        for name in outside
        if not is_of_other_tower(name)
    ]
