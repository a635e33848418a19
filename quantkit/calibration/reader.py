"""Read a CALIB directory. `calibration.json` is checked against its schema, and every file against
its recorded size and hash.

`calibration.json` holds what most readers need. The full statistics are in
`block-NNNNN.safetensors`, which `Calibration.observer` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.fields import (
    KINDS,
    OPTIONAL,
    Damage,
    Kind,
    Schema,
    is_text,
    require,
    require_kind,
)
from quantkit.checkpoint.files import blake3_file
from quantkit.checkpoint.finished_output import CALIBRATION_FILE
from quantkit.checkpoint.header import TensorInfo, read_header
from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.errors import CalibrationError, CheckpointError, RecipeError
from quantkit.schemes.algorithms import ALGORITHMS
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.recipe import ObserverChoice, Recipe

if TYPE_CHECKING:
    from quantkit.calibration.observers import InputObserver
    from quantkit.ops.reference import QuantizedTensor

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one input.

    name: of the first Linear that reads it, on disk.
    linears: names on disk of all Linears that read it.
    in_features: its number of channels.
    tokens: how many were measured.
    amax: largest magnitude outside first positions; estimated where an expert had too few tokens.
    first_position_amax: largest magnitude in first positions of windows.
    is_estimated: whether amax is estimated.
    file: name of the file in CALIB with its full statistics.
    """

    name: str
    linears: tuple[str, ...]
    in_features: int
    tokens: int
    amax: float
    first_position_amax: float
    is_estimated: bool = False
    file: str = ""


@dataclass(frozen=True)
class Calibration:
    """A CALIB directory, opened.

    path: of the directory.
    description: calibration.json.
    inputs: each Linear's name on disk → statistics of its input.
    kv_amax: attention module → largest magnitude of its keys, and of its values.
    """

    path: Path
    description: dict[str, Any]
    inputs: dict[str, InputStatistics]
    kv_amax: dict[str, tuple[float, float]]

    @classmethod
    def open(cls, path: str | Path) -> Calibration:
        """Open a CALIB and check it. Raises CalibrationError where it is damaged or too old."""
        path = Path(path)
        if not (path / CALIBRATION_FILE).is_file():
            raise CalibrationError(
                f"{path} is no calibration (it has no {CALIBRATION_FILE})",
                hint=f"make one with `quantkit.calibrate('MODEL', output={str(path)!r})`",
            )
        try:
            description = read_json(path / CALIBRATION_FILE, "")
            version = require_kind(description, "schema_version", KINDS["count"])
            if version != SCHEMA_VERSION:
                raise CalibrationError(
                    f"{path} has calibration format {version}, this quantkit reads"
                    f" {SCHEMA_VERSION}; calibrate again"
                )
            files = _checked_files(description)
            require(description, _SCHEMA)
            inputs: dict[str, InputStatistics] = {}
            for entry in description["inputs"]:
                statistics = _input_statistics(entry, files)
                inputs |= dict.fromkeys(statistics.linears, statistics)
            kv_amax = {
                entry["module"]: (float(entry["k_amax"]), float(entry["v_amax"]))
                for entry in description["kv"]
            }
            _require_algorithm_report(description)
        except CheckpointError:
            raise CalibrationError(
                f"{path}/{CALIBRATION_FILE} is damaged (it can't be read as a JSON object);"
                " calibrate again"
            ) from None
        except Damage as damage:
            raise CalibrationError(
                f"{path}/{CALIBRATION_FILE} is damaged ({damage}); calibrate again"
            ) from None
        for name, entry in files.items():
            _require_as_written(path / name, entry)
        return cls(path, description, inputs, kv_amax)

    def require_same_model(self, checkpoint: Checkpoint, fingerprint: str) -> None:
        if self.description["model"]["fingerprint"] != fingerprint:
            raise CalibrationError(
                f"{self.path} was made from another model ({self.description['model']['path']})"
                f" than {checkpoint.path}, or its files have changed since; calibrate this one"
            )

    def require_same_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe that this calibration isn't valid for. One that was made with a recipe is
        valid for that recipe only; one made without is valid for all that only round to nearest.
        """
        earlier = self.description.get("recipe")
        if earlier is None and recipe.quantizes_weights:
            names = " and ".join(algorithm.name for algorithm in recipe.algorithms)
            raise CalibrationError(
                f"{self.path} holds statistics alone, but the recipe's algorithms ({names}) run"
                " during calibration",
                hint="calibrate again with `recipe`",
            )
        neutral = ObserverChoice()  # any observer can be computed from the statistics
        if (
            earlier is not None
            and replace(Recipe.from_mapping(earlier, str(self.path)), observer=neutral).canonical()
            != replace(recipe, observer=neutral).canonical()
        ):
            raise CalibrationError(
                f"{self.path} was made for another recipe; export with the same recipe, or"
                " calibrate without one, for any scheme"
            )

    def require_recoverable(self) -> None:
        """Refuse a calibration whose algorithms changed weights in another way than by rotating
        them or scaling rows and columns: only these changes can be undone from codes.
        """
        recipe = self.description.get("recipe")
        if recipe is None:
            return
        for algorithm in Recipe.from_mapping(recipe, str(self.path)).algorithms:
            if not algorithm.row.is_recoverable:
                raise CalibrationError(
                    f"{self.path}: {algorithm.name} changed weights in a way that can't be undone"
                    " from their codes, so layers can't be scored one by one",
                    hint="leave out `calibration` to score rounding to nearest",
                )

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The tensors that algorithms made: NAME.weight (codes) and NAME.weight_scale, [block rows,
        block columns], of Linears, and other parameters that changed.
        """
        names = (self.description.get("chosen") or {"files": []})["files"]
        return {
            name: info for file in names for name, info in read_header(self.path / file).items()
        }

    @property
    def untied(self) -> dict[str, str]:
        """Name of the output head's tensor → name of the embedding's, where an algorithm untied
        them.
        """
        return (self.description.get("chosen") or {}).get("untied") or {}

    def quantized_weight(self, linear: str, spec: QuantSpec) -> QuantizedTensor | None:
        """A Linear's codes and scales, if an algorithm made them; else None."""
        from quantkit.ops.reference import QuantizedTensor

        if f"{linear}.weight_scale" not in self.weights:
            return None
        return QuantizedTensor(
            read_tensor(self.weights[f"{linear}.weight"]),
            read_tensor(self.weights[f"{linear}.weight_scale"]),
            spec,
        )

    def require_weights(
        self, linears: Mapping[str, tuple[tuple[int, ...], QuantSpec]], checkpoint: Checkpoint
    ) -> None:
        """Refuse weights that fit neither these Linears nor the checkpoint's other tensors.

        linears: name on disk → shape [out_features, in_features] and spec.
        """
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, (shape, spec) in linears.items():
            codes = {"int": "I8", "float": "F8_E4M3"}[spec.format.kind]
            expected |= {
                f"{name}.weight": (codes, tuple(shape)),
                f"{name}.weight_scale": ("F32", spec.granularity.scale_shape(*shape)),
            }
        others = {
            name: (info.dtype, info.shape)
            for name, info in checkpoint.tensors.items()
            if name not in expected
        }
        others |= {name: others[source] for name, source in self.untied.items() if source in others}
        for name, info in self.weights.items():
            if (info.dtype, info.shape) != (expected.get(name) or others.get(name)):
                raise CalibrationError(
                    f"{self.path} holds {name} as {info.dtype} {list(info.shape)}, which doesn't"
                    " fit the recipe and the model; calibrate again"
                )

    @cached_property
    def _headers(self) -> dict[str, dict[str, Any]]:
        return {}

    def observer(self, linear: str) -> InputObserver:
        """The full statistics of a Linear's input."""
        from quantkit.calibration.observers import InputObserver

        statistics = self.inputs[linear]
        if statistics.file not in self._headers:
            self._headers[statistics.file] = read_header(self.path / statistics.file)
        header = self._headers[statistics.file]
        try:
            names = [f"{statistics.name}.{name}" for name in InputObserver.__dataclass_fields__]
            return InputObserver.from_tensors(
                statistics.name, {name: read_tensor(header[name]) for name in names}
            )
        except KeyError as error:
            raise CalibrationError(
                f"{self.path}/{statistics.file} lacks {error}; calibrate again"
            ) from None

    def static_amax(self, linear: str, spec: QuantSpec, observer: ObserverChoice) -> float:
        """The magnitude that a static input scale maps to the largest code.

        INT8 leaves first positions out: a massive activation there would leave too few codes for
        all other tokens. FP8 has range to spare, and clipping that token costs more.
        """
        statistics = self.inputs[linear]
        amax = statistics.amax
        if observer.kind != "absmax" and not statistics.is_estimated:
            from quantkit.calibration.observers import observed_amax

            amax = observed_amax(self.observer(linear), observer, spec)
        return max(
            amax, statistics.first_position_amax if spec.format.kind == "float" or not amax else 0.0
        )


# ---- Checks of what is read.


def _require_as_written(path: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a file that hasn't the recorded size and hash."""
    if not path.is_file():
        what = "it is missing"
    elif path.stat().st_size != entry["bytes"]:
        what = f"it has {path.stat().st_size} bytes of {entry['bytes']}"
    elif blake3_file(path) != entry["blake3"]:
        what = "it has changed since it was written"
    else:
        return
    raise CalibrationError(f"{path} is damaged ({what}); calibrate again")


def _checked_files(description: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    files = require_kind(description, "files", KINDS["object"])
    for name, entry in files.items():
        if Path(name).name != name or "\0" in name or not isinstance(entry, dict):
            raise Damage(f"it names the file {name[:100]!r}, which is not in its directory")
        require(entry, {"bytes": "count", "blake3": "text"})
    return files


def _input_statistics(entry: Mapping[str, Any], files: Mapping[str, Any]) -> InputStatistics:
    is_file = Kind("one of its files", lambda value: is_text(value) and value in files)
    require_kind(entry, "file", is_file)
    return InputStatistics(
        entry["name"],
        tuple(entry["linears"]),
        entry["in_features"],
        entry["tokens"],
        float(entry["amax"]),
        float(entry["first_position_amax"]),
        entry["estimated"],
        entry["file"],
    )


# The fields of calibration.json that are read.
_SCHEMA: Schema = {
    "inputs": [
        {
            "name": "text",
            "linears": "texts",
            "in_features": "count",
            "tokens": "count",
            "amax": "magnitude",
            "first_position_amax": "magnitude",
            "amax_quarters": "four magnitudes",
            "held_out_values": "count",
            "held_out_above": "count",
            "estimated": "flag",
        }
    ],
    "kv": [{"module": "text", "k_amax": "magnitude", "v_amax": "magnitude"}],
    "experts": [{"module": "text", "starved": "counts", "tokens": "counts, or absent"}],
    "model": {"path": "text", "fingerprint": "text"},
    "data": {"sources": "texts", "source_sha256": "texts"},
    "token_pieces": "text",
    "windows": "count",
    "windows_requested": "count",
    "seq_len": "count",
    "tokens": "count",
    "seed": "whole number",
    "all_experts": "flag",
}


def _require_algorithm_report(description: Mapping[str, Any]) -> None:
    """Check `chosen` of calibration.json, by the sections of the recipe's algorithms."""
    algorithms: set[str] = set()
    if description.get("recipe") is not None:
        recipe = require_kind(description, "recipe", KINDS["object"])
        try:
            parsed = Recipe.from_mapping(recipe, "its recipe")
        except RecipeError as error:
            raise Damage(str(error)) from None
        algorithms = {algorithm.name for algorithm in parsed.algorithms}
    if description.get("chosen") is None:
        return
    report = require_kind(description, "chosen", KINDS["object"])
    linear: dict[str, str] = {"name": "text", "algorithm": "text", "reason": "text, or absent"}
    schema: dict[str, Any] = {"linears": [linear], "untied": "texts by name"}
    for name, row in ALGORITHMS.items():
        # Earlier versions didn't write sections of algorithms that they lacked.
        known = [key for key in row.sections if key in report or name in algorithms]
        schema |= {key: [row.sections[key]] for key in known}
        linear |= {key: f"{kind}{OPTIONAL}" for key, kind in row.linear_fields.items()}
    require(report, schema)
    is_file = _is_names_of(description["files"])
    require_kind(report, "files", Kind("names of its files", is_file))


def _is_names_of(files: Mapping[str, Any]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and all(is_text(name) and name in files for name in value)
    )
