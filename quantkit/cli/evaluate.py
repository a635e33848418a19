"""`quantkit eval`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import UserPath, device_option, different_sources, remote_code_option
from quantkit.data.protocols import PROTOCOLS
from quantkit.errors import OutputError
from quantkit.schemes.serving import EXECUTIONS, HARDWARE

if TYPE_CHECKING:
    from quantkit.evaluation.result import Evaluation


@command("eval")
@click.argument("base")
@click.argument("quants", nargs=-1, metavar="[QUANT]...")
@click.option(
    "--data",
    multiple=True,
    required=True,
    callback=different_sources,
    metavar="FILE",
    help=".txt, .jsonl, .parquet, or dataset:NAME[:CONFIG[:SPLIT]].",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    help="Tokens per window.  [default: 2048 (masked LMs: 64), or the model's positions if fewer]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Evaluate at most this many tokens, in whole windows.",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="gptq",
    show_default=True,
    help="How the text is cut into windows and scored.",
)
@click.option("-o", "--output", type=UserPath(dir_okay=False), help="Write the result as JSON.")
@click.option("--html", type=UserPath(dir_okay=False), help="Write a self-contained HTML report.")
@click.option(
    "--markdown",
    type=UserPath(dir_okay=False),
    help="Write the result as a section for a model card.",
)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="EXPR",
    help=(
        "Exit with 3 unless this holds, e.g. 'ppl_delta_pct<=1.0'; also kld_mean, top1, size_ratio."
        " Repeatable."
    ),
)
@click.option(
    "--strict", is_flag=True, help="Exit with 4 if the text is too short to decide a gate."
)
@click.option(
    "--exec",
    "exec",
    type=click.Choice(EXECUTIONS),
    default="auto",
    show_default=True,
    help=(
        "auto: compiled kernels where available; kernel: refuse Linears that have none; reference:"
        " the reference arithmetic only."
    ),
)
@click.option(
    "--hardware", type=click.Choice(HARDWARE), help="Emulate the arithmetic of this hardware."
)
@click.option(
    "--noise-floor",
    is_flag=True,
    help="Also measure the noise floor: the effect of one more rounding after each block.",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Neither reuse BASE's hidden states from an earlier run nor store them.",
)
@device_option
@remote_code_option
def eval_command(
    out: Output, base: str, quants: tuple[str, ...], strict: bool, no_cache: bool, **arguments: Any
) -> None:
    """Compare quantized checkpoints (QUANT) with BASE on the same text.

    The exported files are evaluated with the arithmetic of a runtime. With BASE alone, eval reports
    its perplexity. Several processes can share the windows:
    torchrun --nproc-per-node N -m quantkit eval ...
    """
    from quantkit.api.evaluate import evaluate

    files = EvalFiles(*(arguments.pop(name) for name in ("output", "html", "markdown")))
    files.check()
    with out.run("eval", arguments["device"], stops=False) as run:
        result = evaluate(base, quants, cache=not no_cache, **arguments, **run)
    if not out.is_first:
        return
    files.write(result)
    _print_evaluation(out, result)
    result.require_gates(strict)
    if not quants:
        out.note(f"Next: quantkit quantize {shlex.quote(base)} -o OUT --scheme fp8-dynamic")


@dataclass(frozen=True)
class EvalFiles:
    """The files that `eval` writes: the result as JSON, as a page, and for a model card."""

    output: Path | None
    html: Path | None
    markdown: Path | None

    def check(self) -> None:
        """Refuse, before anything runs, what can't be written."""
        require_places(output=self.output, html=self.html, markdown=self.markdown)

    def write(self, result: Evaluation) -> None:
        from quantkit.checkpoint.files import finite, write_json, write_text

        if self.output is not None:
            write_json(self.output, finite(result.to_json()))
        if self.markdown is not None:
            write_text(self.markdown, result.to_markdown())
        if self.html is not None:
            write_text(self.html, result.to_html())


def require_places(**files: Path | None) -> None:
    """Refuse files that are the same, whose directory doesn't exist, or that need a missing extra.
    files: by option.
    """
    given = {name: path for name, path in files.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        *first, last = (f"--{name.replace('_', '-')}" for name in files)
        raise click.UsageError(f"give {', '.join(first)} and {last} different files")
    for path in given.values():
        if not path.absolute().parent.is_dir():
            raise OutputError(
                f"there is no directory {path.absolute().parent} to write {path.name} to; create"
                " it first"
            )
    if "html" in given:
        from quantkit.evaluation.plots import require_matplotlib

        require_matplotlib()


def _print_evaluation(out: Output, result: Evaluation) -> None:
    from quantkit.evaluation.report import evaluation_remarks

    out.json(result)
    if not out.as_json:
        _print_tables(result, out.verbose)
    for remark in evaluation_remarks(result):
        out.note(remark)


def _print_tables(result: Evaluation, verbose: bool) -> None:
    from quantkit.cli.tables import print_report
    from quantkit.evaluation.report import evaluation_title, layer_table, metric_table, model_table
    from quantkit.evaluation.verdict import model_names

    names, layers = model_names(result), layer_table(result)
    print_report(model_table(result), names, evaluation_title(result), verbose)
    if result.quants:
        print_report(metric_table(result), names, None, verbose)
    if layers.rows:
        print_report(layers, names, None, verbose)
