"""`quantkit inspect`: what a checkpoint or a calibration holds, read from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.checkpoint.units import counted, format_bytes
from quantkit.cli.console import Output, command
from quantkit.cli.tables import print_json, print_table
from quantkit.errors import CheckpointError
from quantkit.schemes.algorithms import Table

if TYPE_CHECKING:
    from quantkit.calibration.reader import Calibration
    from quantkit.checkpoint.formats import QuantizationConfig
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.schemes.scheme import QuantScheme


@command("inspect")
@click.argument("path")
def inspect_command(out: Output, path: str) -> None:
    """Show what a checkpoint or a calibration contains."""
    from quantkit.checkpoint.hub import resolve_model

    description = inspect_path(resolve_model(path))
    if out.as_json:
        print_json(description)
        return
    for title, columns, rows, right in inspection_tables(description):
        print_table(columns, rows, title, right, verbose=out.verbose)


def inspect_path(path: Path) -> dict[str, Any]:
    """A description of what is at `path`; its `kind` is "checkpoint" or "calibration"."""
    from quantkit.calibration.reader import Calibration
    from quantkit.checkpoint.finished_output import CALIBRATION_FILE
    from quantkit.checkpoint.reader import Checkpoint

    if not path.exists():
        raise CheckpointError(
            f"there is nothing at {path}; give a model directory or a calibration directory"
        )
    if (path / CALIBRATION_FILE).is_file():
        return {"kind": "calibration"} | _describe_calibration(Calibration.open(path))
    return {"kind": "checkpoint"} | _describe_checkpoint(Checkpoint.open(path))


def _describe_calibration(calibration: Calibration) -> dict[str, Any]:
    from quantkit.calibration.describe import is_unsettled

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
    from quantkit.checkpoint.formats import read_quantization_config, stored_linears
    from quantkit.models.tensor_roles import linears_of

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
    infos = checkpoint.tensors  # a stored stack of experts isn't among these: each is its own
    headers = {
        suffix: (infos[name].dtype, infos[name].shape)
        for suffix in suffixes
        if (name := f"{module}.{suffix}") in infos
    }
    return list(config.file_format.weight_shape(scheme, headers, None) or ())


def inspection_tables(description: Mapping[str, Any]) -> list[Table]:
    """The tables of `quantkit inspect`."""
    if description["kind"] == "checkpoint":
        return [_dtypes_table(description), *_schemes_tables(description)]
    return [
        _inputs_table(description),
        *_experts_tables(description),
        *_kv_tables(description),
        *_algorithm_tables(description),
    ]


# -- A checkpoint's tables.


def _dtypes_table(description: Mapping[str, Any]) -> Table:
    quantization = description["quantization"]
    method = "not quantized"
    if quantization:
        kv_cache = quantization["kv_cache"] or "not quantized"
        method = f"{quantization['method']}, KV cache {kv_cache}"
    title = (
        f"{description['path']}: {description['architecture']}, {method},"
        f" {format_bytes(description['bytes'])} in {counted(description['shards'], 'shard')}"
    )
    rows = [
        [dtype, str(entry["tensors"]), format_bytes(entry["bytes"])]
        for dtype, entry in sorted(description["dtypes"].items())
    ]
    return title, ("dtype", "tensors", "size"), rows, (1, 2)


def _schemes_tables(description: Mapping[str, Any]) -> list[Table]:
    rows = [[scheme, str(count)] for scheme, count in description["schemes"].items()]
    if description["linears_left"]:
        rows.append(["not quantized", str(len(description["linears_left"]))])
    title = "Linears in the decoder blocks"
    return [(title, ("scheme", "Linears"), rows, (1,))] if rows else []


# -- A calibration's tables.


def _inputs_table(description: Mapping[str, Any]) -> Table:
    title = (
        f"{description['path']}: {description['tokens']} tokens in"
        f" {counted(description['windows'], 'window')} of {description['seq_len']}, from"
        f" {', '.join(description['data']['sources'])}"
    )
    columns = (
        "input of",
        "Linears",
        "features",
        "tokens",
        "amax",
        "amax after each quarter",
        "held-out values above, ppm",
        "amax settled",
        "amax of first position",
    )
    rows = [_input_row(entry) for entry in description["inputs"]]
    return title, columns, rows, (1, 2, 3, 4, 5, 6, 8)


def _input_row(entry: Mapping[str, Any]) -> list[str]:
    above, settled = "", "no" if entry["unsettled"] else ""
    if entry["held_out_values"]:
        above = f"{1e6 * entry['held_out_above'] / entry['held_out_values']:.3g}"
        settled = settled or "yes"
    return [
        entry["name"],
        str(len(entry["linears"])),
        str(entry["in_features"]),
        str(entry["tokens"]),
        f"{entry['amax']:.4g}" + (" (estimated)" if entry["estimated"] else ""),
        " ".join(f"{amax:.4g}" for amax in entry["amax_quarters"]),
        above,
        settled,
        f"{entry['first_position_amax']:.4g}",
    ]


def _experts_tables(description: Mapping[str, Any]) -> list[Table]:
    rows = []
    for entry in description["experts"] or []:
        counts = [""] * 4
        if entry.get("tokens"):
            counts = [str(len(entry["tokens"])), *map(str, _spread(entry["tokens"]))]
        rows.append([entry["module"], *counts, " ".join(map(str, entry["starved"]))])
    columns = ("experts", "count", "fewest", "median", "most", "too few tokens")
    return [("tokens per expert", columns, rows, (1, 2, 3, 4))] if rows else []


def _spread(counts: Sequence[int]) -> tuple[int, int, int]:
    """The least, the median and the largest."""
    ordered = sorted(counts)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _kv_tables(description: Mapping[str, Any]) -> list[Table]:
    rows = [
        [entry["module"], f"{entry['k_amax']:.4g}", f"{entry['v_amax']:.4g}"]
        for entry in description["kv"] or []
    ]
    title = "keys and values, after rotary embedding"
    return [(title, ("attention", "key amax", "value amax"), rows, (1, 2))] if rows else []


def _algorithm_tables(description: Mapping[str, Any]) -> list[Table]:
    """What algorithms did to the weights: a table of each, and one of all Linears."""
    from quantkit.calibration.describe import algorithm_descriptions

    quantized = description.get("chosen")
    if not quantized:
        return []
    tables = [table for each in algorithm_descriptions(description) for table in each.tables]
    rows = [
        [
            entry["name"],
            entry["algorithm"],
            f"{entry['error'] / entry['plain_error']:.3f}" if entry.get("plain_error") else "",
            entry.get("reason", ""),
        ]
        for entry in quantized["linears"]
    ]
    columns = ("Linear", "quantized by", "squared error ÷ that of rounding", "why rounded")
    return [*tables, ("quantized weights", columns, rows, (2,))]
