"""The table of algorithms. A row says what recipes and `calibration.json` need to know about an
algorithm, and names the module that implements it.

A new algorithm is a row here and a module with three functions:

    needs(settings) -> Needs                             what must be measured first
    change_block(block_run, settings) -> BlockChanges    if it works on a BLOCK (block_run.py), or
    quantize_group(group, settings) -> None              if it works on a GROUP (layer_group.py)
    describe(report) -> Description                      for `calibrate` and `inspect`

`settings["damping"]` is a setting's value. `report` is the object `chosen` of
`calibration.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from quantkit.errors import RecipeError

# What an algorithm works on: a whole block before its Linears are quantized, or a group of Linears
# that share an input.
BLOCK, GROUP = "block", "group"


@dataclass(frozen=True)
class Setting:
    """A setting of an algorithm: a number, or true and false where the default is one of these.

    default: an int allows only whole numbers; None if the algorithm finds the value itself.
    low, high: the smallest and the largest number allowed.
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


# (title, column names, rows, indices of columns with numbers)
Table = tuple[str, tuple[str, ...], list[list[str]], tuple[int, ...]]


@dataclass(frozen=True)
class Description:
    """A report of what an algorithm did.

    remarks: sentences that `calibrate` prints.
    tables: that `inspect` prints.
    """

    remarks: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class AlgorithmRow:
    """What is known about an algorithm.

    module: full name of the module that implements it.
    works_on: BLOCK or GROUP.
    is_recoverable: whether `sensitivity` can undo from the codes what it does to weights, as it can
        a rotation, or scaled rows and columns.
    settings: what a recipe may set, by name.
    sections: the lists that it adds to `chosen` in calibration.json, by name: the kind of each
        field of an entry (`calibration/fields.py`).
    linear_fields: the fields that it may add to a Linear's entry, with their kinds.
    """

    module: str
    works_on: str = GROUP
    is_recoverable: bool = True
    settings: Mapping[str, Setting] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    linear_fields: Mapping[str, str] = field(default_factory=dict)

    def implementation(self) -> ModuleType:
        return import_module(self.module)


# In the order in which they run, whatever their order in a recipe. `rtn`, rounding to nearest, is
# what `export` does without an algorithm.
ALGORITHMS: dict[str, AlgorithmRow] = {
    "rotation": AlgorithmRow(
        "quantkit.calibration.rotate",
        works_on=BLOCK,
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
