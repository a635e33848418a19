"""The table of algorithms. One row says all that a recipe and `calibration.json` need to know of an
algorithm; the module that it names does the work.

A new algorithm is a row here and a module there. The module has three functions:

    needs(settings) -> Needs                     what has to be measured first (layer_group.py)
    change_block(block, settings) -> BlockChanges     (calibration/block_run.py), or
    quantize_group(group, settings) -> None           (algorithms/layer_group.py)
    describe(chosen) -> Description              for `calibrate` and `inspect`

`settings["damping"]` is a setting's value. `chosen` is that part of `calibration.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from quantkit.errors import RecipeError

# What an algorithm works on: a whole block, before codes are made, or the Linears that share an
# input.
BLOCK, GROUP = "block", "group"
# What it does to weights, beyond that they are rounded to codes. `sensitivity` recovers weights
# that were rotated or whose rows and columns were scaled, and refuses CHANGES_WEIGHTS.
CHANGES_NOTHING, ROTATES, SCALES, CHANGES_WEIGHTS = "nothing", "rotates", "scales", "weights"


@dataclass(frozen=True)
class Setting:
    """A number, a whole one where the default is one, or true and false, that a recipe may give an
    algorithm.

    default: None if the algorithm finds the value itself.
    low, high: the smallest and the largest value allowed.
    """

    default: float | int | bool | None
    low: float = 0.0
    high: float = 1.0

    def require_allowed(self, value: Any, where: str) -> None:
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise RecipeError(f"{where} is {value!r}; allowed are true and false")
        elif (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not self.low <= value <= self.high
        ):
            raise RecipeError(
                f"{where} is {value!r}, not a number from {self.low:g} to {self.high:g}"
            )
        elif isinstance(self.default, int) and not isinstance(value, int):
            raise RecipeError(f"{where} is {value!r}, not a whole number")


# (title, columns, rows, which columns are numbers)
Table = tuple[str, tuple[str, ...], list[list[str]], tuple[int, ...]]


@dataclass(frozen=True)
class Description:
    """What an algorithm did, for people.

    remarks: sentences, for `calibrate`.
    tables: for `inspect`.
    """

    remarks: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class AlgorithmRow:
    """module: its implementation, by its full name.
    works_on: BLOCK or GROUP.
    changes: what it does to weights, see above.
    settings: what a recipe may set.
    sections: the lists that it adds to `chosen` in calibration.json, and the kind of each entry's
        fields, as `calibration/fields.py` names them.
    linear_fields: what it adds to each Linear's entry, likewise. Other Linears lack these.
    """

    module: str
    works_on: str = GROUP
    changes: str = CHANGES_NOTHING
    settings: Mapping[str, Setting] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    linear_fields: Mapping[str, str] = field(default_factory=dict)

    def implementation(self) -> ModuleType:
        return import_module(self.module)


# In the order in which they work, whatever the order in a recipe. `rtn`, rounding to nearest, is
# what `export` does without any.
ALGORITHMS: dict[str, AlgorithmRow] = {
    "rotation": AlgorithmRow(
        "quantkit.calibration.rotate",
        works_on=BLOCK,
        changes=ROTATES,
        settings={"residual": Setting(True), "heads": Setting(True), "untie": Setting(False)},
        sections={
            "rotations": {
                "block": "text",
                "change": "magnitude",
                "norms": "texts, maybe none",
                "writers": "texts, maybe none",
                "heads": "texts, maybe none",
                "linears": "rotated linears, or absent",  # earlier versions didn't say
            }
        },
    ),
    "smoothquant": AlgorithmRow(
        "quantkit.calibration.smooth",
        works_on=BLOCK,
        changes=SCALES,
        settings={"strength": Setting(None)},
        sections={
            "folds": {
                "into": "text",
                "measure": "text",
                "linears": "texts",
                "error": "magnitude",
                "plain_error": "magnitude",
                "strength": "magnitude",
            },
            "refused": {"linear": "text", "reason": "text"},
        },
    ),
    "scale_search": AlgorithmRow("quantkit.algorithms.scale_search"),
    "gptq": AlgorithmRow(
        "quantkit.algorithms.gptq",
        settings={
            "damping": Setting(0.03, 1e-6, 1.0),
            "act_order": Setting(True),
            "correct_inputs": Setting(False),
            "passes": Setting(3, 0, 100),
        },
        linear_fields={"error": "magnitude", "plain_error": "magnitude"},
    ),
    "bias_correction": AlgorithmRow(
        "quantkit.algorithms.bias_correction", linear_fields={"bias_corrected": "flag"}
    ),
    "rtn": AlgorithmRow("quantkit.algorithms.rounding"),
}
