"""A CALIB directory, read: what it says is checked before it is believed, and its files against the
sizes and hashes that were recorded with them.

`calibration.json` holds what most readers want; the `block-NNNNN.safetensors` beside it hold the
full statistics, which `Calibration.observer` reads.
"""

from __future__ import annotations

import shlex
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
from quantkit.schemes.algorithms import ALGORITHMS, CHANGES_WEIGHTS
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.recipe import ObserverChoice, Recipe

if TYPE_CHECKING:
    from quantkit.calibration.observers import InputObserver
    from quantkit.ops.reference import QuantizedTensor

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class InputStatistics:
    """What was seen at one input: which Linears read it, and its largest magnitudes.

    amax: outside the first positions; estimated where an expert saw too few tokens. quarters: amax
    after each quarter of the data.
    file: the block's, in CALIB.
    """

    name: str
    linears: tuple[str, ...]
    in_features: int
    tokens: int
    amax: float
    first_position_amax: float
    quarters: tuple[float, ...] = ()
    is_estimated: bool = False
    file: str = ""


@dataclass(frozen=True)
class Calibration:
    """A CALIB directory, opened."""

    path: Path
    description: dict[str, Any]
    inputs: dict[str, InputStatistics]  # by each Linear's name
    kv_amax: dict[str, tuple[float, float]]  # attention module → largest key, largest value

    @classmethod
    def open(cls, path: str | Path) -> Calibration:
        """Read a CALIB whose every value is of its kind and whose every file is as it was written;
        anything else is a CalibrationError.
        """
        path = Path(path)
        if not (path / CALIBRATION_FILE).is_file():
            raise CalibrationError(
                f"{path} is no calibration (it has no {CALIBRATION_FILE}); make one with: quantkit"
                f" calibrate MODEL -o {shlex.quote(str(path))}"
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
            _require_chosen(description)
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
        """A calibration made for a recipe serves that one only; one made without serves all."""
        earlier = self.description.get("recipe")
        if earlier is None and recipe.chooses_weights:
            names = " and ".join(algorithm.name for algorithm in recipe.algorithms)
            raise CalibrationError(
                f"{self.path} holds statistics alone, and {names} choose weights with data;"
                " calibrate again, with --recipe"
            )
        neutral = ObserverChoice()  # the statistics serve every observer
        if (
            earlier is not None
            and replace(Recipe.from_mapping(earlier, str(self.path)), observer=neutral).canonical()
            != replace(recipe, observer=neutral).canonical()
        ):
            raise CalibrationError(
                f"{self.path} was made for another recipe; export with the same recipe, or"
                " calibrate without one, which serves every scheme"
            )

    def require_recoverable(self) -> None:
        """Refuse algorithms that changed weights in another way than by rotating them or scaling
        their rows and columns: only that is undone from codes.
        """
        recipe = self.description.get("recipe")
        if recipe is None:
            return
        for algorithm in Recipe.from_mapping(recipe, str(self.path)).algorithms:
            if algorithm.row.changes == CHANGES_WEIGHTS:
                raise CalibrationError(
                    f"{self.path}: {algorithm.name} changed weights in a way that can't be undone"
                    " from their codes, so layers can't be scored one by one; leave out"
                    " --calibration to score rounding to nearest"
                )

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """What algorithms chose: NAME.weight (codes) and NAME.weight_scale [block rows, block
        columns] of Linears, and other parameters that changed.
        """
        names = (self.description.get("chosen") or {"files": []})["files"]
        return {
            name: info for file in names for name, info in read_header(self.path / file).items()
        }

    @property
    def untied(self) -> dict[str, str]:
        """The output head's tensor and the embedding's, where an algorithm gave them values of
        their own.
        """
        return (self.description.get("chosen") or {}).get("untied") or {}

    def quantized_weight(self, linear: str, spec: QuantSpec) -> QuantizedTensor | None:
        """The codes and scales that were chosen for a Linear, if any were."""
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
        """Refuse chosen weights that aren't of these Linears' shapes and formats (name → shape,
        spec), or of the checkpoint's other tensors.
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
                    f"{self.path} holds {name} as {info.dtype} {list(info.shape)}, which the recipe"
                    " and the model have no place for; calibrate again"
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

        INT8 leaves the first positions out: one enormous token there would take the codes from all
        others. A float format has range to spare and clipping that token costs more.
        """
        statistics = self.inputs[linear]
        amax = statistics.amax
        if observer.kind != "absmax" and not statistics.is_estimated:
            from quantkit.calibration.observers import observed_amax

            amax = observed_amax(self.observer(linear), observer, spec)
        return max(
            amax, statistics.first_position_amax if spec.format.kind == "float" or not amax else 0.0
        )


# ---- Is it what `calibrate` wrote?


def _require_as_written(path: Path, entry: Mapping[str, Any]) -> None:
    """A file with the size and the hash that were recorded when it was written."""
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
            raise Damage(f"it names the file {name[:100]!r}, which is not beside it")
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
        tuple(entry["amax_quarters"]),
        entry["estimated"],
        entry["file"],
    )


# What readers of calibration.json rely on.
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


def _require_chosen(description: Mapping[str, Any]) -> None:
    """What algorithms wrote, and the recipe that asked for them."""
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
    chosen = require_kind(description, "chosen", KINDS["object"])
    linear: dict[str, str] = {"name": "text", "algorithm": "text", "reason": "text, or absent"}
    schema: dict[str, Any] = {"linears": [linear], "untied": "texts by name"}
    for name, row in ALGORITHMS.items():
        # Earlier versions didn't write the sections of algorithms that they didn't have.
        known = [key for key in row.sections if key in chosen or name in algorithms]
        schema |= {key: [row.sections[key]] for key in known}
        linear |= {key: f"{kind}{OPTIONAL}" for key, kind in row.linear_fields.items()}
    require(chosen, schema)
    is_file = _is_names_of(description["files"])
    require_kind(chosen, "files", Kind("names of its files", is_file))


def _is_names_of(files: Mapping[str, Any]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and all(is_text(name) and name in files for name in value)
    )
