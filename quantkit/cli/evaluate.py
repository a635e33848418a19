"""`quantkit eval`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import UserPath, device_option, different_sources, remote_code_option
from quantkit.data.protocols import PROTOCOLS
from quantkit.errors import FaultsFound, Inconclusive, OutputError
from quantkit.schemes.serving import HARDWARE

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
    help="Exit with 3 unless it holds, e.g. 'ppl_delta_pct<=1.0'; also kld_mean, top1, size_ratio.",
)
@click.option(
    "--strict", is_flag=True, help="Exit with 4 when the text is too short to decide a gate."
)
@click.option(
    "--exec",
    "exec_",
    type=click.Choice(["auto", "kernel", "reference"]),
    default="auto",
    show_default=True,
    help=(
        "auto: compiled kernels where available; kernel: refuse Linears without one; reference:"
        " reference arithmetic only."
    ),
)
@click.option(
    "--hardware", type=click.Choice(HARDWARE), help="Emulate the arithmetic of this hardware."
)
@click.option(
    "--noise-floor", is_flag=True, help="Also measure the effect of rounding noise alone."
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Neither reuse BASE's hidden states from an earlier run nor store them.",
)
@device_option
@remote_code_option
def eval_command(
    out: Output,
    base: str,
    quants: tuple[str, ...],
    data: tuple[str, ...],
    output: Path | None,
    html: Path | None,
    markdown: Path | None,
    gates: tuple[str, ...],
    strict: bool,
    exec_: str,
    no_cache: bool,
    **options: Any,
) -> None:
    """Compare quantized checkpoints (QUANT) with BASE on the same text.

    The exported files are evaluated with the arithmetic of a runtime. With BASE alone, its
    perplexity is reported. Several processes can share the windows:
    torchrun --nproc-per-node N -m quantkit eval ...
    """
    from quantkit.checkpoint.files import finite, write_json, write_text
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.cli.tables import Progress, print_json
    from quantkit.evaluation.evaluate import evaluate
    from quantkit.evaluation.html import evaluation_html, require_matplotlib
    from quantkit.evaluation.preflight import EvaluationOptions
    from quantkit.evaluation.report import evaluation_markdown, evaluation_remarks
    from quantkit.models.distributed import rank_of_environment

    require_places(output=output, html=html, markdown=markdown)
    if html is not None:
        require_matplotlib()
    paths = [resolve_model(base), *(resolve_model(quant) for quant in quants)]
    out.quiet = out.quiet or rank_of_environment() > 0
    out.quiet_libraries()
    with Progress("eval", out.quiet) as progress:
        result = evaluate(
            EvaluationOptions(
                paths[0],
                tuple(paths[1:]),
                data,
                gates=gates,
                exec=exec_,
                cache=not no_cache,
                **options,
            ),
            lambda name, done, total: progress.update(done, total, f"eval {name}"),
        )
    if rank_of_environment() > 0:
        return
    if output is not None:
        write_json(output, finite(result.to_json()))
    if markdown is not None:
        write_text(markdown, evaluation_markdown(result))
    if html is not None:
        write_text(html, evaluation_html(result))
    if out.as_json:
        print_json(result.to_json())
    else:
        _print_evaluation(result)
    for remark in evaluation_remarks(result):
        out.note(remark)
    _raise_gates(result, strict)
    if not quants:
        out.note(f"Next: quantkit quantize {shlex.quote(base)} -o OUT --scheme fp8-dynamic")


def require_places(**files: Path | None) -> None:
    """Refuse equal files, and files where nothing can be written, before anything has run. files:
    by the option.
    """
    given = {name: path for name, path in files.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        *first, last = (f"--{name.replace('_', '-')}" for name in files)
        raise click.UsageError(f"give {', '.join(first)} and {last} different files")
    for path in given.values():
        if not path.absolute().parent.is_dir():
            raise OutputError(
                f"there is no directory {path.absolute().parent} to write {path.name} to; make it"
                " first"
            )


def _print_evaluation(result: Evaluation) -> None:
    from quantkit.cli.tables import print_table
    from quantkit.evaluation.report import evaluation_title, layer_table, metric_table, model_table

    models, layers = model_table(result), layer_table(result)
    print_table(models.columns, models.rows, evaluation_title(result), right=models.right)
    if result.quants:
        metrics = metric_table(result)
        print_table(metrics.columns, metrics.rows, right=metrics.right)
    if layers.rows:
        print_table(layers.columns, layers.rows, right=layers.right)


def _raise_gates(result: Evaluation, strict: bool) -> None:
    failed = [gate for gate in result.gates if gate.result == "fail"]
    undecided = [gate for gate in result.gates if gate.result == "inconclusive"]
    if failed:
        raise FaultsFound(
            f"the gate {failed[0].expr} failed on {failed[0].path}: {failed[0].value:.4g}"
        )
    if undecided and strict:
        more = undecided[0].more_tokens_needed
        raise Inconclusive(
            f"the gate {undecided[0].expr} is undecided on this text"
            + (f"; it needs about {more} more tokens" if more else "; give more text")
        )
