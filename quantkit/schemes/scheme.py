"""How one layer is quantized, as values, and the catalogue of schemes. No torch here.

Words are those of compressed-tensors (`num_bits type strategy group_size block_structure dynamic
symmetric ignore targets`), so that a recipe reads like the `quantization_config` that it becomes.

A new scheme is one row of CATALOGUE, at the end of this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import CODE_FORMATS, E8M0, FP8_E4M3, INT8, NumberFormat
from quantkit.schemes.serving import HARDWARE, MULTIPLES_OF_128, NATIVE, WEIGHTS, YES, Support


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
        """How many blocks there are down and across: the shape of the scales."""
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
        number_format = _number_format(arguments, where)
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
        granularity = _granularity(arguments, where)
        power_of_two = str(arguments.get("scale_dtype")) in (
            "torch.uint8",
            "uint8",
            "torch.float8_e8m0fnu",
        )
        dynamic = arguments.get("dynamic", False)
        if not isinstance(dynamic, bool):
            raise RecipeError(f"{where} has dynamic: {dynamic!r}; allowed are true and false")
        return cls(number_format, granularity, dynamic, E8M0 if power_of_two else None)

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
        if self.scale_format == E8M0:
            arguments["scale_dtype"] = "torch.uint8"
        return arguments

    def __str__(self) -> str:
        scale = f", {self.scale_format.label} scale" if self.scale_format else ""
        return f"{self.format.label} {self.granularity}{scale}{', dynamic' if self.dynamic else ''}"


def _number_format(arguments: Mapping[str, Any], where: str) -> NumberFormat:
    num_bits, kind = str(arguments.get("num_bits", 8)), str(arguments.get("type", "int"))
    for (bits, its_kind), number_format in CODE_FORMATS.items():
        if (str(bits), its_kind) == (num_bits, kind):
            return number_format
    known = " or ".join(f"{bits} bits of type {its_kind}" for bits, its_kind in CODE_FORMATS)
    raise RecipeError(f"{where} asks for {num_bits} bits of type {kind!r}; quantkit has {known}")


def _granularity(arguments: Mapping[str, Any], where: str) -> Granularity:
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
    return granularity


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
    def row(self) -> CatalogueRow | None:
        """The catalogue's row that says how this scheme is served, whatever it is called; None
        where no row speaks of it.
        """
        rows = CATALOGUE.values()
        same = (row for row in rows if row.scheme.same_arithmetic == self.same_arithmetic)
        return next(same, None) or next((row for row in rows if row.covers(self)), None)

    @property
    def family(self) -> str:
        """The name of the scheme that runtimes treat this one as, or "unknown"."""
        row = self.row
        return row.scheme.name if row is not None else UNKNOWN

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
        for row in CATALOGUE.values():
            if row.scheme.same_arithmetic == (weight, input_spec):
                return row.scheme
        kind = f"{weight.format.kind.replace('float', 'fp')}{weight.format.bits}"
        shape = {"group": f"group{weight.granularity.columns}"}.get(
            weight.granularity.name, weight.granularity.name
        )
        mode = (
            "weight-only" if input_spec is None else "dynamic" if input_spec.dynamic else "static"
        )
        return cls(f"{kind}-{shape}-{mode}", weight, input_spec)

    def to_description(self) -> Any:
        """What `parse` reads back: the name where it says everything."""
        row = CATALOGUE.get(self.name)
        if row is not None and row.scheme == self:
            return self.name
        return {
            "weights": self.weight.to_arguments(),
            "input_activations": self.input and self.input.to_arguments(),
        }


def quoted(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in sorted(map(str, words)))


UNKNOWN = "unknown"  # the family of a scheme that no row of the catalogue speaks of


def _nothing_else(scheme: QuantScheme) -> bool:
    return False


@dataclass(frozen=True)
class CatalogueRow:
    """One scheme: what it computes, what it is called, and where it is served.

    scheme: name, weight and input.
    runtimes: runtime → whether it loads the scheme.
    hardware: hardware → NATIVE, WEIGHTS, or the reason why vLLM can't serve the scheme there.
    aliases: other names that recipes and `--scheme` may use.
    refuses_experts: runtimes that load the scheme for Linears, but not for experts.
    covers: schemes that are no row of their own, and are served as this one is.
    default_rank: the place among schemes that are served equally widely, for `quantize` without a
        scheme. Speed and size come first, then loss. None: never a default, because its static
        scales need calibration.
    """

    scheme: QuantScheme
    runtimes: Mapping[str, Support]
    hardware: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    refuses_experts: tuple[str, ...] = ()
    covers: Callable[[QuantScheme], bool] = _nothing_else
    default_rank: int | None = None


def _on_runtimes(**others: Support) -> dict[str, Support]:
    """Every runtime loads it, except `others`."""
    loads = {"vllm": YES, "sglang": YES, "tensorrt-llm": YES, "transformers": YES}
    return loads | {name.replace("_", "-"): support for name, support in others.items()}


def _on_hardware(**others: str) -> dict[str, str]:
    """All hardware computes it natively, except `others`."""
    return dict.fromkeys(HARDWARE, NATIVE) | others


def _is_int8_in_groups(scheme: QuantScheme) -> bool:
    weight = scheme.weight
    return (
        scheme.input is None
        and weight.format == INT8
        and weight.scale_format is None
        and weight.granularity.name == "group"
    )


_E4M3_CHANNEL, _INT8_CHANNEL = QuantSpec(FP8_E4M3, CHANNEL), QuantSpec(INT8, CHANNEL)
_E4M3_TENSOR, _INT8_TENSOR = QuantSpec(FP8_E4M3, TENSOR), QuantSpec(INT8, TENSOR)
_E4M3_TOKEN, _INT8_TOKEN = (
    QuantSpec(FP8_E4M3, TOKEN, dynamic=True),
    QuantSpec(INT8, TOKEN, dynamic=True),
)
# FP8 products need Ada or later; before it, vLLM keeps FP8 weights and leaves inputs alone.
_FP8_HARDWARE = _on_hardware(ampere=WEIGHTS, turing=WEIGHTS, cpu=WEIGHTS)
_STATIC_FP8_HARDWARE = _FP8_HARDWARE | {
    "cpu": "vLLM's CPU build does not start with static FP8 inputs"
}
_INT8_HARDWARE = _on_hardware(blackwell="vLLM has no INT8 kernel for Blackwell")
_TRT_NEEDS_INPUTS = Support(False, "needs quantized inputs")
_TRT_MISREADS_INT8 = Support(False, "reads INT8 as FP8 in silence")

CATALOGUE: dict[str, CatalogueRow] = {
    row.scheme.name: row
    for row in (
        CatalogueRow(
            QuantScheme("fp8-dynamic", _E4M3_CHANNEL, _E4M3_TOKEN),
            _on_runtimes(),
            _FP8_HARDWARE,
            aliases=("FP8_DYNAMIC",),
            default_rank=0,
        ),
        CatalogueRow(
            QuantScheme("fp8-static", _E4M3_CHANNEL, _E4M3_TENSOR),
            _on_runtimes(
                tensorrt_llm=Support(False, "takes channel scales only with per-token inputs")
            ),
            _STATIC_FP8_HARDWARE,
            aliases=("FP8_STATIC",),
            refuses_experts=("vllm",),
        ),
        CatalogueRow(
            QuantScheme("fp8-tensor", _E4M3_TENSOR, _E4M3_TENSOR),
            _on_runtimes(tensorrt_llm=Support(False, "raises on per-tensor weights")),
            _STATIC_FP8_HARDWARE,
            aliases=("FP8",),
        ),
        CatalogueRow(
            QuantScheme(
                "fp8-block",
                QuantSpec(FP8_E4M3, block(128, 128)),
                QuantSpec(FP8_E4M3, group(128), dynamic=True),
            ),
            _on_runtimes(
                vllm=MULTIPLES_OF_128, sglang=MULTIPLES_OF_128, transformers=MULTIPLES_OF_128
            ),
            _FP8_HARDWARE,
            aliases=("FP8_BLOCK",),
            refuses_experts=("transformers",),
            default_rank=2,
        ),
        CatalogueRow(
            QuantScheme(
                "mxfp8",
                QuantSpec(FP8_E4M3, group(32), scale_format=E8M0),
                QuantSpec(FP8_E4M3, group(32), True, E8M0),
            ),
            _on_runtimes(
                sglang=Support(False, "has no MXFP8"),
                tensorrt_llm=Support(False, "is not known to load it"),
            ),
            dict.fromkeys(HARDWARE, WEIGHTS)
            | {"blackwell": NATIVE, "cpu": "vLLM's CPU build has no kernel for MXFP8"},
            aliases=("MXFP8",),
            refuses_experts=("transformers",),
            default_rank=5,
        ),
        CatalogueRow(
            QuantScheme("fp8-weight-only", _E4M3_CHANNEL),
            _on_runtimes(tensorrt_llm=_TRT_NEEDS_INPUTS),
            _on_hardware(
                cpu="vLLM's CPU build has no kernel for FP8 weights with unquantized inputs"
            ),
            refuses_experts=("vllm",),
            default_rank=4,
        ),
        CatalogueRow(
            QuantScheme("int8-dynamic", _INT8_CHANNEL, _INT8_TOKEN),
            _on_runtimes(sglang=Support(True, "dense models"), tensorrt_llm=_TRT_MISREADS_INT8),
            _INT8_HARDWARE,
            aliases=("W8A8", "INT8"),
            refuses_experts=("sglang", "transformers"),
            default_rank=1,
        ),
        CatalogueRow(
            QuantScheme("int8-static", _INT8_CHANNEL, _INT8_TENSOR),
            _on_runtimes(
                sglang=Support(False, "ignores static input scales"),
                tensorrt_llm=_TRT_MISREADS_INT8,
            ),
            _INT8_HARDWARE,
            refuses_experts=("vllm", "sglang", "transformers"),
        ),
        CatalogueRow(
            QuantScheme("int8-weight-only", _INT8_CHANNEL),
            _on_runtimes(tensorrt_llm=_TRT_NEEDS_INPUTS),
            _on_hardware(cpu="vLLM's CPU build has no kernel for packed INT8 weights"),
            aliases=("W8A16",),
            refuses_experts=("transformers",),
            covers=_is_int8_in_groups,
            default_rank=3,
        ),
    )
}
SCHEMES: dict[str, QuantScheme] = {name: row.scheme for name, row in CATALOGUE.items()}


def _scheme_named(name: str) -> QuantScheme:
    spelled = name.strip().lower()
    names = {key: row.scheme for key, row in CATALOGUE.items()}
    names |= {alias.lower(): row.scheme for row in CATALOGUE.values() for alias in row.aliases}
    for candidate in (spelled, spelled.replace("_", "-"), spelled.replace("-", "_")):
        if candidate in names:
            return names[candidate]
    close = difflib.get_close_matches(spelled.replace("_", "-"), list(names), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise RecipeError(f"unknown scheme '{name}'; {hint}the schemes are {', '.join(CATALOGUE)}")
