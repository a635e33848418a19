"""Open the calibration of an export, and check that it belongs to the model and the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.schemes.recipe import Recipe


def open_calibration(
    directory: Path | None,
    recipe: Recipe,
    model: Path,
    checkpoint: Checkpoint,
    fingerprint: str,
    linears: Mapping[str, QuantizedLinearInfo],
) -> Calibration | None:
    """Open the calibration of an export; None if `directory` is None and none is needed.

    directory: the output of `calibrate`.
    model: the model's directory, for messages.
    fingerprint: fingerprint of the checkpoint's contents.
    linears: name → quantized Linear.

    Raises CalibrationError if a calibration is needed but not given, or if it belongs to another
    model or recipe.
    """
    static = [linear for linear in linears.values() if linear.scheme.needs_calibration]
    if directory is None:
        _require_no_calibration(recipe, static, model)
        return None
    calibration = Calibration.open(directory)
    calibration.require_same_model(checkpoint, fingerprint)
    calibration.require_same_recipe(recipe)
    calibration.require_weights(
        {name: (linear.shape, linear.scheme.weight) for name, linear in linears.items()}, checkpoint
    )
    for linear in static:
        _require_statistics(calibration, linear)
    if recipe.kv_cache and not calibration.kv_amax:
        raise CalibrationError(
            f"{calibration.path} has no statistics of keys and values; this model has no ordinary"
            " KV cache",
            hint="leave out `kv_cache`",
        )
    return calibration


def _require_no_calibration(
    recipe: Recipe, static: Sequence[QuantizedLinearInfo], model: Path
) -> None:
    """Raise CalibrationError if the recipe can't be exported without a calibration.

    static: the Linears with static input scales.
    """
    if recipe.quantizes_weights:
        names = " and ".join(algorithm.name for algorithm in recipe.algorithms)
        raise CalibrationError(
            f"{names} need data to quantize weights",
            hint=(
                f"first `quantkit.calibrate({str(model)!r}, output='CALIB', recipe='RECIPE')`, then"
                " pass `calibration='CALIB'`"
            ),
        )
    if static or recipe.kv_cache:
        what = (
            f"{static[0].scheme.name} has static input scales, which"
            if static
            else "an FP8 KV cache has scales, which"
        )
        raise CalibrationError(
            f"{what} have to be measured",
            hint=(
                f"first `quantkit.calibrate({str(model)!r}, output='CALIB')`, then pass"
                " `calibration='CALIB'`"
            ),
        )


def _require_statistics(calibration: Calibration, linear: QuantizedLinearInfo) -> None:
    """Raise CalibrationError without statistics of a Linear's input."""
    statistics = calibration.inputs.get(linear.name)
    if statistics is None or not (statistics.tokens or statistics.amax):
        raise CalibrationError(
            f"{calibration.path} has no statistics of {linear.name}'s input",
            hint="skip it with `ignore`, or give it a dynamic scheme",
        )
    if statistics.in_features != linear.shape[1]:
        raise CalibrationError(
            f"{calibration.path} has {statistics.in_features} input features for {linear.name},"
            f" which has {linear.shape[1]}; calibrate again"
        )
