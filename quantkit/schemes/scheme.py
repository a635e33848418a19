"""What to quantize and how, as values: Granularity, QuantSpec, QuantScheme, Recipe. No torch here.

Words are those of compressed-tensors (`num_bits type strategy group_size block_structure dynamic
symmetric ignore targets`), so that a recipe reads like the `quantization_config` that it becomes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8, NumberFormat


def _size(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{where} is {value!r}, not a positive whole number")
    return value


@dataclass(frozen=True)
class Granularity:
    """Who shares one scale, as the shape of a block of a `[rows, columns]` matrix; None spans the
    whole dimension.
    """

    name: str
    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for size in (self.rows, self.columns):
            if size is not None:
                _size(size, f"the {self.name} size")

    def block_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The block's shape for a matrix of this size; at least 1 × 1 so that empty matrices have a
        shape too.
        """
        return max(1, self.rows or rows), max(1, self.columns or columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """How many blocks stand below and beside one another: the shape of the scales."""
        block_rows, block_columns = self.block_shape(rows, columns)
        return -(-rows // block_rows), -(-columns // block_columns)

    def __str__(self) -> str:
        if self.name == "group":
            return f"groups of {self.columns}"
        return f"{self.rows}×{self.columns} block" if self.name == "block" else f"per {self.name}"


TENSOR = Granularity("tensor", None, None)
CHANNEL = Granularity("channel", 1, None)
TOKEN = Granularity("token", 1, None)


def group(size: int) -> Granularity:
    return Granularity("group", 1, size)


def block(rows: int, columns: int) -> Granularity:
    return Granularity("block", rows, columns)


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. `dynamic`: its scales are computed from each input as it
    arrives.

    `scale_format`: None for ordinary floating-point scales, E8M0 for powers of two.
    """

    format: NumberFormat
    granularity: Granularity
    dynamic: bool = False
    scale_format: NumberFormat | None = None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], where: str) -> QuantSpec:
        """Read compressed-tensors' arguments of one tensor; `where` names them in errors."""
        if not isinstance(arguments, Mapping):
            raise RecipeError(
                f"{where} must be a mapping with num_bits, type and strategy, not {arguments!r}"
            )
        known = {
            "num_bits",
            "type",
            "symmetric",
            "strategy",
            "group_size",
            "block_structure",
            "dynamic",
        }
        # Written by compressed-tensors itself; they don't change what the codes mean.
        known |= {"observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"}
        unknown = set(arguments) - known
        if unknown:
            raise RecipeError(
                f"{where} has the unknown key {quoted(unknown)}; allowed are {quoted(known)}"
            )
        num_bits, kind = str(arguments.get("num_bits", 8)), str(arguments.get("type", "int"))
        formats = {("8", "int"): INT8, ("8", "float"): FP8_E4M3}
        if (num_bits, kind) not in formats:
            raise RecipeError(
                f"{where} asks for {num_bits} bits of type {kind!r}; quantkit has 8 bits of type"
                " int or float"
            )
        if arguments.get("symmetric", True) is not True:
            raise RecipeError(
                f"{where} is asymmetric (symmetric: {arguments['symmetric']}); quantkit writes and"
                " reads symmetric codes only"
            )
        if arguments.get("actorder") not in (None, False, "static", "weight"):
            raise RecipeError(
                f"{where} has actorder {arguments['actorder']!r}, which reorders groups; quantkit"
                " reads plain order only"
            )
        strategy = arguments.get("strategy")
        if strategy is None:
            strategy = "group" if arguments.get("group_size") else "tensor"
        if strategy == "group":
            granularity = group(_size(arguments.get("group_size"), f"{where}: group_size"))
        elif strategy == "block":
            structure = arguments.get("block_structure")
            if not isinstance(structure, (list, tuple)) or len(structure) != 2:
                raise RecipeError(
                    f"{where} has the strategy 'block' and needs block_structure: [rows, columns]"
                )
            granularity = block(*(_size(size, f"{where}: block_structure") for size in structure))
        else:
            simple = {"tensor": TENSOR, "channel": CHANNEL, "token": TOKEN}
            if not isinstance(strategy, str) or strategy not in simple:
                raise RecipeError(
                    f"{where} has the unknown strategy {strategy!r}; choose one of tensor, channel,"
                    " token, group, block"
                )
            granularity = simple[strategy]
        if arguments.get("group_size") not in (None, -1) and strategy != "group":
            raise RecipeError(
                f"{where} has a group_size but the strategy '{strategy}'; write strategy: group, or"
                " leave group_size out"
            )
        power_of_two = str(arguments.get("scale_dtype")) in (
            "torch.uint8",
            "uint8",
            "torch.float8_e8m0fnu",
        )
        dynamic = arguments.get("dynamic", False)
        if not isinstance(dynamic, bool):
            raise RecipeError(f"{where} has dynamic: {dynamic!r}; allowed are true and false")
        return cls(formats[num_bits, kind], granularity, dynamic, E8M0 if power_of_two else None)

    def to_arguments(self) -> dict[str, Any]:
        """The same in compressed-tensors' words, with no key that its version 0.17 doesn't know."""
        arguments: dict[str, Any] = {
            "num_bits": self.format.bits,
            "type": self.format.kind,
            "symmetric": True,
            "strategy": self.granularity.name,
            "dynamic": self.dynamic,
        }
        if self.granularity.name == "group":
            arguments["group_size"] = self.granularity.columns
        if self.granularity.name == "block":
            arguments["block_structure"] = [self.granularity.rows, self.granularity.columns]
        if self.scale_format is E8M0:
            arguments["scale_dtype"] = "torch.uint8"
        return arguments

    def __str__(self) -> str:
        name = {"INT8": "INT8", "FP8_E4M3": "E4M3"}.get(self.format.name, self.format.name)
        scale = ", E8M0 scale" if self.scale_format is E8M0 else ""
        return f"{name} {self.granularity}{scale}{', dynamic' if self.dynamic else ''}"


@dataclass(frozen=True)
class QuantScheme:
    """How one layer is quantized: its weight, and its input activations unless they stay as they
    are.
    """

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.granularity.name == "token":
            raise RecipeError(
                f"scheme {self.name}: weights are fixed, so they can be neither dynamic nor per"
                " token"
            )
        if self.input is None:
            return
        if self.input.format != self.weight.format:
            raise RecipeError(
                f"scheme {self.name}: weights in {self.weight.format.name} and inputs in"
                f" {self.input.format.name} have no kernel; use one format for both"
            )
        if self.input.dynamic and self.input.granularity.name not in ("token", "group"):
            raise RecipeError(
                f"scheme {self.name}: dynamic inputs are per token or per group, not per"
                f" {self.input.granularity.name}"
            )
        if not self.input.dynamic and self.input.granularity != TENSOR:
            raise RecipeError(
                f"scheme {self.name}: static inputs are per tensor, not per"
                f" {self.input.granularity.name}"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether a static input scale has to be measured first."""
        return self.input is not None and not self.input.dynamic

    @property
    def same_arithmetic(self) -> tuple[QuantSpec, QuantSpec | None]:
        """What decides codes and results; the name does not."""
        return self.weight, self.input

    @classmethod
    def parse(cls, description: Any, where: str = "scheme") -> QuantScheme:
        """A scheme from its name or alias, or from a mapping {weights: ..., input_activations:
        ...}.
        """
        if isinstance(description, QuantScheme):
            return description
        if isinstance(description, str):
            return _scheme_named(description)
        if not isinstance(description, Mapping) or "weights" not in description:
            raise RecipeError(
                f"{where} must be a scheme's name or a mapping with 'weights', not {description!r}"
            )
        unknown = set(description) - {"weights", "input_activations"}
        if unknown:
            raise RecipeError(
                f"{where} has the unknown key {quoted(unknown)}; allowed are 'weights' and"
                " 'input_activations'"
            )
        weight = QuantSpec.from_arguments(description["weights"], f"{where}: weights")
        inputs = description.get("input_activations")
        input_spec = (
            None
            if inputs is None
            else QuantSpec.from_arguments(inputs, f"{where}: input_activations")
        )
        return cls.of(weight, input_spec)

    @classmethod
    def of(cls, weight: QuantSpec, input_spec: QuantSpec | None) -> QuantScheme:
        """The scheme with this arithmetic, under its usual name where it has one."""
        for scheme in SCHEMES.values():
            if scheme.same_arithmetic == (weight, input_spec):
                return scheme
        kind = "int8" if weight.format is INT8 else "fp8"
        shape = {"group": f"group{weight.granularity.columns}"}.get(
            weight.granularity.name, weight.granularity.name
        )
        mode = (
            "weight-only" if input_spec is None else "dynamic" if input_spec.dynamic else "static"
        )
        return cls(f"{kind}-{shape}-{mode}", weight, input_spec)

    def to_description(self) -> Any:
        """What `parse` reads back: the name where it says everything."""
        if SCHEMES.get(self.name) == self:
            return self.name
        return {
            "weights": self.weight.to_arguments(),
            "input_activations": self.input and self.input.to_arguments(),
        }


def quoted(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in sorted(map(str, words)))


_E4M3_CHANNEL, _INT8_CHANNEL = QuantSpec(FP8_E4M3, CHANNEL), QuantSpec(INT8, CHANNEL)
_E4M3_TOKEN, _INT8_TOKEN = (
    QuantSpec(FP8_E4M3, TOKEN, dynamic=True),
    QuantSpec(INT8, TOKEN, dynamic=True),
)

SCHEMES: dict[str, QuantScheme] = {
    scheme.name: scheme
    for scheme in (
        QuantScheme("fp8-dynamic", _E4M3_CHANNEL, _E4M3_TOKEN),
        QuantScheme("fp8-static", _E4M3_CHANNEL, QuantSpec(FP8_E4M3, TENSOR)),
        QuantScheme("fp8-tensor", QuantSpec(FP8_E4M3, TENSOR), QuantSpec(FP8_E4M3, TENSOR)),
        QuantScheme(
            "fp8-block",
            QuantSpec(FP8_E4M3, block(128, 128)),
            QuantSpec(FP8_E4M3, group(128), dynamic=True),
        ),
        QuantScheme(
            "mxfp8",
            QuantSpec(FP8_E4M3, group(32), scale_format=E8M0),
            QuantSpec(FP8_E4M3, group(32), True, E8M0),
        ),
        QuantScheme("fp8-weight-only", _E4M3_CHANNEL),
        QuantScheme("int8-dynamic", _INT8_CHANNEL, _INT8_TOKEN),
        QuantScheme("int8-static", _INT8_CHANNEL, QuantSpec(INT8, TENSOR)),
        QuantScheme("int8-weight-only", _INT8_CHANNEL),
    )
}

ALIASES = {
    "FP8_DYNAMIC": "fp8-dynamic",
    "FP8_STATIC": "fp8-static",
    "FP8": "fp8-tensor",
    "FP8_BLOCK": "fp8-block",
    "MXFP8": "mxfp8",
    "W8A8": "int8-dynamic",
    "INT8": "int8-dynamic",
    "W8A16": "int8-weight-only",
}


def _scheme_named(name: str) -> QuantScheme:
    spelled = name.strip().lower()
    names = dict(SCHEMES) | {alias.lower(): SCHEMES[target] for alias, target in ALIASES.items()}
    for candidate in (spelled, spelled.replace("_", "-"), spelled.replace("-", "_")):
        if candidate in names:
            return names[candidate]
    close = difflib.get_close_matches(spelled.replace("_", "-"), list(names), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(f"unknown scheme '{name}'; {hint}the schemes are {', '.join(SCHEMES)}")
