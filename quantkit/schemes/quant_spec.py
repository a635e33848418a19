"""How one tensor is quantized: number format, scale granularity, static or dynamic scales.

Names follow compressed-tensors (`num_bits type strategy group_size block_structure dynamic
symmetric`), so a recipe reads like the `quantization_config` that it becomes. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import CODE_FORMATS, E8M0, NumberFormat


def _size(value: Any, where: str) -> int:
    """A positive whole number. where: names the value in errors."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{where} is {value!r}, not a positive whole number")
    return value


@dataclass(frozen=True)
class Granularity:
    """Which values share one scale, as the size of a block of a [rows, columns] matrix.

    name: "tensor", "channel", "token", "group" or "block", as in compressed-tensors.
    rows: rows of a block; None for all rows.
    columns: columns of a block; None for all columns.
    """

    name: str
    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for size in (self.rows, self.columns):
            # Groups and blocks have a size of their own; a file's null isn't "all rows".
            if size is not None or self.name in ("group", "block"):
                _size(size, f"the {self.name} size")

    def block_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of a block in a matrix of this size; at least 1 × 1, even if that is empty."""
        return max(1, self.rows or rows), max(1, self.columns or columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a matrix of this size: [block rows, block columns]."""
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
    """One scale for each `size` consecutive values of a row."""
    return Granularity("group", 1, size)


def block(rows: int, columns: int) -> Granularity:
    """One scale for each block of rows × columns values."""
    return Granularity("block", rows, columns)


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    format: number format of the codes.
    granularity: which values share a scale.
    dynamic: whether scales are computed from each input at run time.
    scale_format: E8M0 for scales that are powers of two; None for floating-point scales.
    """

    format: NumberFormat
    granularity: Granularity
    dynamic: bool = False
    scale_format: NumberFormat | None = None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], where: str) -> QuantSpec:
        """Read the arguments of one tensor, as compressed-tensors writes them.

        where: names the arguments in errors.

        Raises RecipeError for arguments that quantkit doesn't support.
        """
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
        # compressed-tensors writes these too; they don't change the meaning of codes.
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
        """The arguments of compressed-tensors, with no key that its version 0.17 doesn't know."""
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


def quoted(words: Iterable[str]) -> str:
    """The words in quotes, sorted and separated by commas."""
    return ", ".join(f"'{word}'" for word in sorted(map(str, words)))
