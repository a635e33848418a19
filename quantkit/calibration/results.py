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

from quantkit.checkpoint.files import blake3_file
from quantkit.checkpoint.finished_output import CALIBRATION_FILE
from quantkit.checkpoint.header import TensorInfo, read_header
from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.errors import CalibrationError, CheckpointError, RecipeError
from quantkit.schemes.recipe import ObserverChoice, Recipe
from quantkit.schemes.scheme import QuantSpec

if TYPE_CHECKING:
    from quantkit.calibration.observers import InputObserver
    from quantkit.ops.reference import QuantizedTensor

SCHEMA_VERSION = 4
FLOAT32_MAX = 3.4028234663852886e38


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
            version = _count(description, "schema_version")
            if version != SCHEMA_VERSION:
                raise CalibrationError(
                    f"{path} has calibration format {version}, this quantkit reads"
                    f" {SCHEMA_VERSION}; calibrate again"
                )
            files = _checked_files(description)
            inputs: dict[str, InputStatistics] = {}
            for entry in _entries(description, "inputs"):
                statistics = _input_statistics(entry, files)
                inputs |= dict.fromkeys(statistics.linears, statistics)
            kv_amax = {
                _text(entry, "module"): (_magnitude(entry, "k_amax"), _magnitude(entry, "v_amax"))
                for entry in _entries(description, "kv")
            }
            _require_rest(description)
        except CheckpointError:
            raise CalibrationError(
                f"{path}/{CALIBRATION_FILE} is damaged (it can't be read as a JSON object);"
                " calibrate again"
            ) from None
        except _Damage as damage:
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


class _Damage(Exception):
    """What is wrong with calibration.json."""


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
    files = _value(description, "files", "an object", lambda value: isinstance(value, dict))
    for name, entry in files.items():
        if Path(name).name != name or "\0" in name or not isinstance(entry, dict):
            raise _Damage(f"it names the file {name[:100]!r}, which is not beside it")
        _count(entry, "bytes"), _text(entry, "blake3")
    return files


def _input_statistics(entry: Mapping[str, Any], files: Mapping[str, Any]) -> InputStatistics:
    quarters = _value(
        entry,
        "amax_quarters",
        "four magnitudes",
        lambda value: (
            isinstance(value, list) and len(value) == 4 and all(map(_is_magnitude, value))
        ),
    )
    _count(entry, "held_out_values"), _count(entry, "held_out_above")
    return InputStatistics(
        _text(entry, "name"),
        tuple(_texts(entry, "linears")),
        _count(entry, "in_features"),
        _count(entry, "tokens"),
        _magnitude(entry, "amax"),
        _magnitude(entry, "first_position_amax"),
        tuple(quarters),
        _value(entry, "estimated", "true or false", lambda value: isinstance(value, bool)),
        _value(
            entry,
            "file",
            "one of its files",
            lambda value: isinstance(value, str) and value in files,
        ),
    )


def _require_rest(description: Mapping[str, Any]) -> None:
    """What others read of it, so that they needn't ask whether it is there."""
    (
        _text(_object(description, "model"), "path"),
        _text(_object(description, "model"), "fingerprint"),
    )
    (
        _texts(_object(description, "data"), "sources"),
        _texts(_object(description, "data"), "source_sha256"),
        _text(description, "token_pieces"),
    )
    for key in ("windows", "windows_requested", "seq_len", "tokens"):
        _count(description, key)
    _value(
        description,
        "seed",
        "a whole number",
        lambda value: isinstance(value, int) and not isinstance(value, bool),
    )
    _value(description, "all_experts", "true or false", lambda value: isinstance(value, bool))
    for entry in _entries(description, "experts"):
        _text(entry, "module"), _counts(entry, "starved")
        if "tokens" in entry:
            _counts(entry, "tokens")
    if description.get("chosen") is not None:
        chosen = _object(description, "chosen")
        for entry in _entries(chosen, "folds"):
            _text(entry, "into"), _text(entry, "measure"), _texts(entry, "linears")
            (
                _magnitude(entry, "error"),
                _magnitude(entry, "plain_error"),
                _magnitude(entry, "strength"),
            )
        for entry in _entries(chosen, "rotations"):
            _text(entry, "block"), _magnitude(entry, "change")
            for key in ("norms", "writers", "heads"):
                _value(
                    entry,
                    key,
                    "a list of texts",
                    lambda value: isinstance(value, list) and all(map(_is_text, value)),
                )
            if "linears" in entry:  # earlier versions didn't say
                _value(
                    entry,
                    "linears",
                    "how Linears are rotated",
                    lambda value: (
                        isinstance(value, dict) and all(map(_is_rotated_linear, value.values()))
                    ),
                )
        for name, source in _object(chosen, "untied").items():
            _text({name: source}, name)
        for entry in _entries(chosen, "refused"):
            _text(entry, "linear"), _text(entry, "reason")
        for entry in _entries(chosen, "linears"):
            _text(entry, "name"), _text(entry, "algorithm"), _text({"reason": ""} | entry, "reason")
            (
                _magnitude({"error": 0} | entry, "error"),
                _magnitude({"plain_error": 0} | entry, "plain_error"),
            )
            _value(
                {"bias_corrected": False} | entry,
                "bias_corrected",
                "true or false",
                lambda value: isinstance(value, bool),
            )
        _value(
            chosen,
            "files",
            "names of its files",
            lambda value: (
                isinstance(value, list)
                and all(isinstance(name, str) and name in description["files"] for name in value)
            ),
        )
    if description.get("recipe") is not None:
        try:
            Recipe.from_mapping(_object(description, "recipe"), "its recipe")
        except RecipeError as error:
            raise _Damage(str(error)) from None


def _value(entry: Mapping[str, Any], key: str, wanted: str, is_so: Callable[[Any], bool]) -> Any:
    if key not in entry:
        raise _Damage(f"'{key}' is missing")
    if not is_so(entry[key]):
        raise _Damage(f"'{key}' is {repr(entry[key])[:60]}, not {wanted}")
    return entry[key]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_magnitude(value: Any) -> bool:
    """Finite in float32, in which it was measured; neither NaN nor a bool."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= FLOAT32_MAX
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rotated_linear(value: Any) -> bool:
    kinds = {
        "norm": str,
        "adds_one": bool,
        "writes": bool,
        "reads_heads": bool,
        "writes_heads": bool,
    }
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(isinstance(value[key], kind) for key, kind in kinds.items())
    )


def _count(entry: Mapping[str, Any], key: str) -> int:
    return _value(entry, key, "a count", _is_count)


def _counts(entry: Mapping[str, Any], key: str) -> list[int]:
    return _value(
        entry,
        key,
        "a list of counts",
        lambda value: isinstance(value, list) and all(map(_is_count, value)),
    )


def _magnitude(entry: Mapping[str, Any], key: str) -> float:
    return float(_value(entry, key, "a finite magnitude", _is_magnitude))


def _text(entry: Mapping[str, Any], key: str) -> str:
    return _value(entry, key, "text", _is_text)


def _texts(entry: Mapping[str, Any], key: str) -> list[str]:
    return _value(
        entry,
        key,
        "a list of texts",
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
    )


def _object(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    return _value(entry, key, "an object", lambda value: isinstance(value, dict))


def _entries(entry: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return _value(
        entry,
        key,
        "a list of objects",
        lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    )
