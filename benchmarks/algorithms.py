"""What each algorithm of a recipe gains on SmolLM2-135M, alone and together, as a table.

    python benchmarks/algorithms.py --data wiki.test.raw [--calibration-data c4.txt] \\
        [--windows 20] [--samples 16] [--only NAME ...] [-o benchmarks/results]

Calibrations are shorter than those of quality.py, so the rows are comparable with each other only.
Each row is written to algorithms.json and algorithms.md when it is done; --only adds rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from export import machine
from quality import LENGTH, make, opened_model

from quantkit.checkpoint.units import format_bytes
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.intervals import Difference
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.report import markdown_table

BEST_INT8 = [("smoothquant", {}), ("gptq", {})]
BEST_FP8 = [("smoothquant", {}), ("scale_search", {}), ("gptq", {})]
# Name → scheme, algorithms with their settings.
ROWS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "int8-dynamic": ("int8-dynamic", []),
    "int8-dynamic: gptq": ("int8-dynamic", [("gptq", {})]),
    "int8-dynamic: smoothquant": ("int8-dynamic", [("smoothquant", {})]),
    "int8-dynamic: smoothquant, gptq": ("int8-dynamic", BEST_INT8),
    "fp8-dynamic": ("fp8-dynamic", []),
    "fp8-dynamic: scale_search": ("fp8-dynamic", [("scale_search", {})]),
    "fp8-dynamic: gptq": ("fp8-dynamic", [("gptq", {})]),
    "fp8-dynamic: smoothquant": ("fp8-dynamic", [("smoothquant", {})]),
    "fp8-dynamic: smoothquant, scale_search, gptq": ("fp8-dynamic", BEST_FP8),
    "int8-dynamic: smoothquant, gptq with passes: 0": (
        "int8-dynamic",
        [("smoothquant", {}), ("gptq", {"passes": 0})],
    ),
    "int8-dynamic: smoothquant, gptq with correct_inputs: true": (
        "int8-dynamic",
        [("smoothquant", {}), ("gptq", {"correct_inputs": True})],
    ),
    "int8-dynamic: rotation": ("int8-dynamic", [("rotation", {"untie": True})]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration-data", help="text to calibrate on; default: the bundled one")
    parser.add_argument("--windows", type=int, default=20, help="evaluated windows")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ROWS))
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    model = opened_model(arguments)
    path = arguments.output / "algorithms.json"
    report: dict[str, Any] = {
        "machine": machine(),
        "data": Path(arguments.data).name,
        "calibration_data": Path(arguments.calibration_data or "bundled").name,
        "windows": arguments.windows,
        "samples": arguments.samples,
        "rows": {},
    }
    if arguments.only and path.is_file():
        earlier = json.loads(path.read_text())
        if any(earlier[key] != report[key] for key in report if key != "rows"):
            raise SystemExit("--only: the earlier rows are of another run; measure all again")
        report = earlier
    for name in arguments.only or ROWS:
        report["rows"][name] = _measured(name, model, arguments)
        report["rows"] = {each: report["rows"][each] for each in ROWS if each in report["rows"]}
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(_markdown(report))
        print(name, report["rows"][name], flush=True)


def _measured(name: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    scheme, algorithms = ROWS[name]
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary) / "recipe.yaml"
        content = {"scheme": scheme, "algorithms": [{each: of} for each, of in algorithms]}
        recipe.write_text(yaml.safe_dump(content))
        output, cost = make(model, recipe, Path(temporary), arguments)
        (quant,) = evaluate(
            EvaluationOptions(
                model, (output,), (arguments.data,), LENGTH, LENGTH * arguments.windows
            )
        ).to_json()["quants"]
    kept = ("ppl_delta_pct", "kld", "top1_agreement", "bytes")
    return {key: quant[key] for key in kept} | {"cpu_seconds": cost["cpu_seconds"]}


def _markdown(report: dict[str, Any]) -> str:
    rows = [
        (
            name,
            Difference(**row["ppl_delta_pct"]).text(),
            _kl_text(row["kld"]),
            f"{100 * row['top1_agreement']:.1f} %",
            format_bytes(row["bytes"]),
            f"{row['cpu_seconds'] / 60:.1f}",
        )
        for name, row in report["rows"].items()
    ]
    columns = ("recipe", "ΔPPL [95 %]", "KL mean [95 %]", "same top-1", "size", "CPU minutes")
    return (
        "# What each algorithm gains\n\nSmolLM2-135M-Instruct,"
        f" {report['data']}, {report['windows']} windows of {LENGTH}, protocol gptq. Calibrated on"
        f" {report['samples']} windows of 512 tokens ({report['calibration_data']}).\nMachine:"
        f" {report['machine']}.\n\n{markdown_table(columns, rows)}"
    )


def _kl_text(kld: dict[str, float]) -> str:
    return f"{kld['mean']:.4f} [{kld['mean_low']:.4f}, {kld['mean_high']:.4f}]"


if __name__ == "__main__":
    main()
