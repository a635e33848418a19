"""What each scheme costs on SmolLM2-135M: perplexity, KL and size of every recipe in configs/, as a table.

    python benchmarks/quality.py --data wiki.test.raw --calibration-data c4.txt [--windows 24] [-o benchmarks/results]

Calibrates once, and again for each recipe whose algorithms choose weights (its seconds of export count that), exports every recipe, judges all of them on the same windows of 1024 tokens (protocol gptq) with the
reference arithmetic, as the schemes say. Writes quality.json and quality.md, with the machine they were made on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers

from quantkit import __version__
from quantkit.benchmark import processor
from quantkit.calibration import CalibrationOptions, calibrate
from quantkit.demo import smollm2
from quantkit.evaluation import EvaluationOptions, evaluate
from quantkit.export import export
from quantkit.output import format_bytes
from quantkit.plan import ExportOptions, plan_export
from quantkit.report import finite, markdown_table
from quantkit.scheme import Recipe
from quantkit.verdict import interval_text

LENGTH = 1024
CONFIGS = Path(__file__).parent.parent / "configs"


def machine() -> str:
    """The processor and the versions that the figures depend on."""
    return f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, transformers {transformers.__version__}, quantkit {__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration-data", help="text for the static scales; without it the text that comes with quantkit")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="measure these again and keep the other rows, made on the same machine and text")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = smollm2(print)
    with tempfile.TemporaryDirectory() as temporary:
        calibration = Path(temporary) / "calibration"
        data = (arguments.calibration_data,) if arguments.calibration_data else ()
        summary = calibrate(CalibrationOptions(model, calibration, data, num_samples=64, seq_len=512))
        print(f"calibrated on {summary.windows} × 512 tokens, {summary.tokens_per_second:.0f} tokens/s")
        seconds: dict[str, float] = {}
        for path in sorted(CONFIGS.glob("*.yaml")):
            if arguments.only and path.stem not in arguments.only:
                continue
            recipe = Recipe.load(path)
            if any(scheme.weight.granularity.name == "group" and 576 % scheme.weight.granularity.columns for scheme in recipe.schemes):
                print(f"{path.stem}: its groups don't divide 576; not measured")
                continue
            started, own = time.monotonic(), calibration
            if recipe.chooses_weights:
                own = Path(temporary) / f"calibration-{path.stem}"
                calibrate(CalibrationOptions(model, own, data, recipe, num_samples=64, seq_len=512))
            export(plan_export(ExportOptions(model, Path(temporary) / path.stem, recipe, own if recipe.needs_calibration else None)))
            seconds[path.stem] = time.monotonic() - started
        outputs = tuple(Path(temporary) / name for name in seconds)
        result = evaluate(
            EvaluationOptions(model, outputs, (arguments.data,), LENGTH, LENGTH * arguments.windows, exec="reference"),
            lambda name, done, total: print(f"{name} {done}/{total}", flush=True),
        )
        results = [{"recipe": name, "export_seconds": took} | quant for (name, took), quant in zip(seconds.items(), result["quants"])]
    kept = ("protocol", "data", "tokens_scored", "windows", "base")
    report = {"machine": machine(), "calibration": f"{summary.windows} × 512 tokens"} | {key: result[key] for key in kept} | {"recipes": results}
    report["data"]["sources"] = [Path(source).name for source in report["data"]["sources"]]
    report = _without_windows(finite(report))
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        report = _merged(json.loads((arguments.output / "quality.json").read_text()), report)
    (arguments.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.output / "quality.md").write_text(_markdown(report))
    print(_markdown(report))


def _merged(earlier: dict, report: dict) -> dict:
    """The earlier report with the new rows in place of the same recipes'."""
    for key in ("machine", "protocol", "data", "windows"):
        if earlier[key] != report[key]:
            raise SystemExit(f"--only: the earlier results have another {key}; measure all again")
    rows = {row["recipe"]: row for row in (*earlier["recipes"], *report["recipes"])}
    return report | {"recipes": [rows[name] for name in sorted(rows)]}


def _markdown(report: dict) -> str:
    base = report["base"]
    rows = [("bfloat16", f"{base['perplexity']:.3f}", "", "", "", format_bytes(base["bytes"]), "")]
    for row in report["recipes"]:
        figures = (f"{row['perplexity']:.3f}", interval_text(row["ppl_delta_pct"]), f"{row['kld']['mean']:.4f}", f"{100 * row['top1_agreement']:.1f} %")
        rows.append((row["recipe"], *figures, format_bytes(row["bytes"]), f"{row['export_seconds']:.1f} s"))
    columns = ("recipe", "perplexity", "ΔPPL [95 %]", "KL mean", "same top-1", "size", "export")
    title = f"SmolLM2-135M-Instruct, {report['data']['sources'][0]}, {report['tokens_scored']} tokens in {report['windows']} windows of {LENGTH}, protocol gptq, reference arithmetic"
    return f"# What each recipe costs\n\n{title}.\nMachine: {report['machine']}.\n\n{markdown_table(columns, rows)}"


def _without_windows(report: dict) -> dict:
    """Without the per-window sums, paths and layers: they are large, and `quantkit eval -o` gives them to who needs them."""
    dropped = ("window_nll", "window_kld", "window_same_top1", "path", "layers", "max_at")
    if isinstance(report, dict):
        return {key: _without_windows(value) for key, value in report.items() if key not in dropped}
    return [_without_windows(value) for value in report] if isinstance(report, list) else report


if __name__ == "__main__":
    main()
