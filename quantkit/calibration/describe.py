"""The entries of a block in `calibration.json`: its inputs, keys and values, and experts. Experts
with too few tokens get an estimated amax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.schemes.algorithms import Description
from quantkit.schemes.recipe import Recipe

if TYPE_CHECKING:
    from quantkit.calibration.hooks import BlockRecorder
    from quantkit.calibration.observers import BlockStatistics, InputObserver

# An expert with fewer tokens gets its amax from its weights and the layer's other experts.
MIN_EXPERT_TOKENS = 64
# An input is unsettled if the last quarter of the data raises its amax by more than this fraction,
UNSETTLED_GROWTH = 0.25
# or if more than this fraction of the last quarter's values exceed the amax of the others.
UNSETTLED_SHARE = 1e-4


def describe_block(
    statistics: BlockStatistics, recorder: BlockRecorder, file: str
) -> dict[str, Any]:
    """The JSON of one block: its inputs, keys and values, and experts.

    recorder: knows the block's experts.
    file: name of the file in CALIB with the block's full statistics.
    """
    inputs = {
        name: _describe_input(name, statistics.linears[name], observer, file)
        for name, observer in statistics.inputs.items()
    }
    experts = _estimate_starved_experts(inputs, recorder)
    for module, counts in statistics.experts.items():
        experts.setdefault(module, {"module": module, "starved": []})["tokens"] = counts.tolist()
    modules = dict.fromkeys(module for module, _ in statistics.heads)
    kv = []
    for module in modules:
        keys, values = (statistics.heads[module, which].amax for which in "kv")
        kv.append(
            {
                "module": module,
                "heads": keys.numel(),
                "k_amax": float(keys.max()),
                "v_amax": float(values.max()),
            }
        )
    return {"inputs": list(inputs.values()), "kv": kv, "experts": list(experts.values())}


def _describe_input(
    name: str, linears: Sequence[str], observer: InputObserver, file: str
) -> dict[str, Any]:
    quarters: list[float] = []
    for amax in observer.quarter_amax:
        quarters.append(max(amax or 0.0, quarters[-1] if quarters else 0.0))
    tokens, first_tokens, held_out, above = observer.counts.tolist()
    return {
        "name": name,
        "linears": list(linears),
        "in_features": observer.channel_amax.numel(),
        "tokens": tokens + first_tokens,
        "amax": observer.amax,
        "first_position_amax": observer.first_amax,
        "amax_quarters": quarters,
        "held_out_values": held_out,
        "held_out_above": above,
        "estimated": False,
        "file": file,
    }


def is_unsettled(entry: Mapping[str, Any]) -> bool:
    """Whether an input's amax still grew in the last quarter of the data. entry: of `inputs`."""
    if not entry["held_out_values"] or entry["estimated"]:
        return False
    before, after = entry["amax_quarters"][-2:]
    return (
        after > before * (1 + UNSETTLED_GROWTH)
        or entry["held_out_above"] > UNSETTLED_SHARE * entry["held_out_values"]
    )


def _estimate_starved_experts(
    inputs: dict[str, dict[str, Any]], recorder: BlockRecorder
) -> dict[str, dict[str, Any]]:
    """Estimate the amax of each expert with fewer than MIN_EXPERT_TOKENS tokens, in place. Returns
    the JSON entries of these experts by module.

    All experts of a layer read the same hidden states (Llama 4 scales them by at most 1). For the
    first input the estimate is therefore the largest amax of the other experts. The second input,
    act(g·x)·(u·x), grows with the row norms of the weights. Its estimate is the largest amax / gain
    of the others, times the expert's own gain.
    """
    starved: dict[str, dict[str, Any]] = {}
    for module, members in _expert_groups(inputs, recorder).items():
        entries = [(number, inputs[name], gain) for number, name, gain in members if name in inputs]
        fed = [entry for entry in entries if entry[1]["tokens"] >= MIN_EXPERT_TOKENS] or [
            entry for entry in entries if entry[1]["tokens"]
        ]
        per_gain = max(
            (statistics["amax"] / gain for _, statistics, gain in fed if gain > 0), default=0.0
        )
        listed = starved.setdefault(module[0], {"module": module[0], "starved": []})
        for number, statistics, gain in entries:
            if statistics["tokens"] < MIN_EXPERT_TOKENS:
                statistics["amax"] = max(statistics["amax"], per_gain * gain)
                statistics["estimated"] = True
                if number not in listed["starved"]:
                    listed["starved"].append(number)
    return starved


def _expert_groups(
    inputs: Mapping[str, Any], recorder: BlockRecorder
) -> dict[tuple[str, str], list[tuple[int, str, float]]]:
    """The inputs of a layer's experts: (experts' module, which input) → for each expert its number,
    the input's name, and the gain of its weights.
    """
    groups: dict[tuple[str, str], list[tuple[int, str, float]]] = {}
    known = set()
    for experts in recorder.experts.values():
        for which, linears, gains in (
            ("first", experts.first, [1.0] * experts.count),
            ("down", experts.down, experts.gains.tolist()),
        ):
            groups[experts.name, which] = [
                (number, names[0], gain) for number, (names, gain) in enumerate(zip(linears, gains))
            ]
            known |= {names[0] for names in linears}
    for name in inputs:
        found = re.match(r"(?P<module>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>.*)$", name)
        if found and name not in known:
            groups.setdefault((found["module"], found["leaf"]), []).append(
                (int(found["number"]), name, 1.0)
            )
    return groups


def algorithm_remarks(description: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about what algorithms did and what they skipped. description: calibration.json."""
    for each in algorithm_descriptions(description):
        yield from each.remarks


def algorithm_descriptions(description: Mapping[str, Any]) -> Iterator[Description]:
    """The report of each algorithm of a calibration, in the order of their work. description:
    calibration.json.
    """
    report, recipe = description.get("chosen"), description.get("recipe")
    if report and recipe:
        for algorithm in Recipe.from_mapping(recipe, "recipe").algorithms_in_order:
            yield algorithm.row.implementation().describe(report)
