"""`inspect`: what a checkpoint or a CALIB holds, read from headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from quantkit.calibration.describe import is_unsettled
from quantkit.calibration.results import Calibration
from quantkit.checkpoint.formats import QuantizationConfig, read_quantization_config, stored_linears
from quantkit.checkpoint.output_dir import CALIBRATION_FILE
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.scheme import QuantScheme


def inspect_path(path: Path) -> dict[str, Any]:
    """A description of what is at `path`; `kind` is "checkpoint" or "calibration"."""
    if not path.exists():
        raise CheckpointError(
            f"there is nothing at {path}; give a model directory or a calibration directory"
        )
    if (path / CALIBRATION_FILE).is_file():
        return {"kind": "calibration"} | _describe_calibration(Calibration.open(path))
    return {"kind": "checkpoint"} | _describe_checkpoint(Checkpoint.open(path))


def _describe_calibration(calibration: Calibration) -> dict[str, Any]:
    keys = (
        "model",
        "data",
        "windows",
        "windows_requested",
        "seq_len",
        "tokens",
        "seed",
        "recipe",
        "all_experts",
        "quantkit_version",
        "kv",
        "experts",
    )
    description = {"path": str(calibration.path)} | {
        key: calibration.description.get(key) for key in keys
    }
    if calibration.description.get("chosen"):
        description["chosen"] = calibration.description["chosen"]
    return description | {
        "inputs": [
            entry | {"unsettled": is_unsettled(entry)}
            for entry in calibration.description["inputs"]
        ]
    }


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    config = read_quantization_config(checkpoint.config)
    stored, tensors = stored_linears(checkpoint.tensors), linears_of(checkpoint)
    scheme_of = {module: config.scheme_of(module) if config else None for module in stored}
    by_dtype: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        entry = by_dtype.setdefault(info.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    schemes = Counter(scheme.name if scheme else "unknown" for scheme in scheme_of.values())
    left = [name for name in tensors.modules("linear") if name not in stored]
    return {
        "path": str(checkpoint.path),
        "architecture": (
            checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")]
        )[0],
        "shards": len(checkpoint.shard_paths),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": by_dtype,
        "quantization": (
            {"method": config.file_format.name, "kv_cache": "fp8" if config.kv_cache else None}
            if config
            else None
        ),
        "schemes": dict(schemes),
        "linears_quantized": len(stored),
        "linears_left": left,
        "linears": [
            {
                "name": module,
                "scheme": scheme.name,
                "shape": _weight_shape(tensors.checkpoint, module, stored[module], config, scheme),
            }
            for module, scheme in scheme_of.items()
            if config and scheme
        ],
    }


def _weight_shape(
    checkpoint: Checkpoint,
    module: str,
    suffixes: list[str],
    config: QuantizationConfig,
    scheme: QuantScheme,
) -> list[int]:
    infos = {suffix: checkpoint.tensors[f"{module}.{suffix}"] for suffix in suffixes}
    headers = {suffix: (info.dtype, info.shape) for suffix, info in infos.items()}
    return list(config.file_format.weight_shape(scheme, headers, None) or ())
