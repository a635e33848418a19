"""Write the pages of the documentation that follow from code and measurements.

    python docs/generate.py            # write those that are out of date
    python docs/generate.py --check    # only tell

| page | from |
|---|---|
| cli.md | Click's metadata of every command |
| models.md | the architectures of the tests, `benchmarks/results/sweep.md` and `architectures.md` |
| results.md | `benchmarks/results/*.md` and `kernels/bench/results/*.md` |
| quickstart.md | `quickstart.ipynb`, with its outputs |

The pages are committed, so that they can be read and linked without a build.
`tests/docs/test_generated.py` fails where one is out of date. The other pages are written by hand;
`tests/end_to_end/test_readme.py` writes the tables in them.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from architecture_kinds import architecture_table  # noqa: E402

from quantkit.cli.console import CONTEXT  # noqa: E402
from quantkit.cli.main import main as quantkit  # noqa: E402

NOTICE = "<!-- Written by `python docs/generate.py` from {source}; edit that instead. -->\n\n"


def pages() -> dict[Path, str]:
    """The generated pages: path → text."""
    return {
        DOCS / "cli.md": cli_page(),
        DOCS / "models.md": models_page(),
        DOCS / "results.md": results_page(),
        DOCS / "quickstart.md": notebook_page(DOCS / "quickstart.ipynb"),
    }


# Tables ------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(text: str) -> str:
    """Code in a cell of a table. Markdown's backticks can't hold a `|` there on every site."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return f"<code>{escaped}</code>"


# Command line ------------------------------------------------------------------------------------

EXAMPLES = {
    "bench": "quantkit bench --kind int8 --shape 4096x4096 --tokens 1",
    "calibrate": "quantkit calibrate MODEL -o CALIB --data text.txt --num-samples 64",
    "compare": "quantkit compare first.json second.json",
    "demo": "quantkit demo -o quantkit-demo",
    "doctor": "quantkit doctor --json",
    "eval": "quantkit eval MODEL OUT --data wiki.test.raw --gate 'ppl_delta_pct<=1.0'",
    "export": "quantkit export MODEL -o OUT --scheme fp8-static --calibration CALIB --runtime vllm",
    "inspect": "quantkit inspect OUT",
    "quantize": "quantkit quantize MODEL -o OUT --scheme fp8-dynamic",
    "schemes": "quantkit schemes",
    "sensitivity": "quantkit sensitivity MODEL --scheme int8-dynamic --max-kld 0.01",
    "verify": "quantkit verify OUT --base MODEL --runtime vllm",
}

EXIT_CODES = {
    0: "success",
    1: "failure: one line on stderr says what is wrong and what to do",
    2: "bad usage: an unknown option or value",
    3: "a gate, `verify` or the sanity check failed",
    4: "inconclusive: the text is too short to decide a gate (`eval --strict`)",
    5: "not comparable: other models, tokens or protocols",
    75: "interrupted by Ctrl-C or a signal; `--resume` continues where the command has it",
}

# Beyond 0, 1, 2 and 75, which every command can end with.
MORE_EXIT_CODES = {
    "quantize": {3: "`verify` or the sanity check failed; the files are kept"},
    "eval": {
        3: "a `--gate` doesn't hold",
        4: "with `--strict`: the text is too short to decide a gate",
        5: "QUANT isn't BASE, quantized, or has another tokenizer",
    },
    "compare": {5: "the results have different base models, texts or protocols"},
    "verify": {3: "the checkpoint has a fault"},
    "sensitivity": {5: "an earlier result is of another model"},
    "demo": {3: "a checkpoint of the demo has a fault"},
    "doctor": {1: "something is broken"},
}


def cli_page() -> str:
    names = sorted(quantkit.commands)
    sections = [command_section(name, quantkit.commands[name]) for name in names]
    commands = table(
        ("command", "what it does"),
        [
            [f"[`quantkit {name}`](#{name})", quantkit.commands[name].get_short_help_str(limit=200)]
            for name in names
        ],
    )
    exit_codes = table(
        ("exit code", "meaning"), [[str(number), text] for number, text in EXIT_CODES.items()]
    )
    return (
        "# Command line\n\n"
        + NOTICE.format(source="the commands' own metadata")
        + f"{help_text(quantkit).partition('Exit codes:')[0].rstrip()}\n\n{commands}\n"
        + "Results go to stdout, messages to stderr. `--json` prints the result as JSON.\n\n"
        + "## Exit codes\n\n"
        + f"{exit_codes}\n"
        + "A command's own codes are listed with it.\n\n"
        + "\n".join(sections)
    )


def command_section(name: str, command: click.Command) -> str:
    """A command: what it does, its usage, an example, its options and exit codes."""
    context = click.Context(command, info_name=f"quantkit {name}", **CONTEXT)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    records = [
        parameter.get_help_record(context)
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
    ]
    options = table(
        ("option", "meaning"),
        [[code(option), with_code(text)] for option, text in filter(None, records)],
    )
    codes = "".join(
        f"Exit code {number}: {text}.\n\n" for number, text in MORE_EXIT_CODES.get(name, {}).items()
    )
    return (
        f"## {name}\n\n{help_text(command)}\n\n"
        f"```text\n{usage}\n```\n\n"
        f"Example:\n\n```console\n$ {EXAMPLES[name]}\n```\n\n"
        f'{codes}<div class="options" markdown="1">\n\n{options}\n</div>\n'
    )


def help_text(command: click.Command) -> str:
    r"""A command's help as Markdown: a paragraph that Click keeps as it is (\b) becomes code."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    made = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b\n"):
            made.append(f"```text\n{inspect.cleandoc(paragraph[2:])}\n```")
        else:
            made.append(with_code(" ".join(paragraph.split())))
    return "\n\n".join(made)


def with_code(text: str) -> str:
    """The text, with options and a command line of torchrun as code if they aren't."""
    parts = text.split("`")
    pattern = r"torchrun [^.]*\.\.\.|(?<![\w-])--[a-z][a-z-]*"
    parts[::2] = [re.sub(pattern, r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts)


# Models ------------------------------------------------------------------------------------------


def models_page() -> str:
    sweep = Measured("benchmarks/results/sweep.md")
    served = Measured("benchmarks/results/architectures.md")
    return f"""# Models

{NOTICE.format(source="the tests and `benchmarks/results`")}\
quantkit knows no list of architectures. It builds a model from its `config.json` with transformers,
runs it block by block, and finds the Linears of each block by looking at them. Two tables say what
was tried: the architectures of the test suite, and every causal language model of transformers.

A model that quantkit can't take is refused in one sentence before anything is written.
`quantkit export MODEL --dry-run --scheme fp8-dynamic -o OUT` shows what would become of each
parameter.

## Architectures in the test suite

Each is built as a tiny random model and taken through `calibrate`, `export`, `verify` and `eval` in
the schemes of the column *export*. The column *transformers' loader* compares the logits of
transformers with those of `eval` on the exported files. The last column lists the schemes in which
vLLM's CPU build agrees with `eval`; the table at the end of this page defines *agrees*.

<div class="architectures" markdown="1">

{architecture_table()}
</div>

## {sweep.title}

Each is built with random weights, as small as its configuration allows, and taken through `export`,
`verify`, `eval` and `calibrate`.

{sweep.body(level=3)}
## {served.title}

<details markdown="1"><summary>KL divergences from vLLM's probabilities, by architecture</summary>

{served.body(level=3)}
</details>
"""


# Results -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A file that a benchmark wrote.

    path: relative to the repository.
    """

    path: str

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text()

    @property
    def title(self) -> str:
        return self.text.partition("\n")[0].removeprefix("# ")

    def body(self, level: int) -> str:
        """What follows the title, with headings from `level` on and the machine on its own line."""
        shifted = re.sub(
            r"^#+(?= )",
            lambda mark: "#" * (len(mark[0]) + level - 2),
            self.text.partition("\n")[2].strip().replace("\nMachine:", "\n\nMachine:"),
            flags=re.MULTILINE,
        )
        return f"{shifted}\n"


@dataclass(frozen=True)
class Section:
    """A section of the results.

    heading: what was measured.
    introduction: how to read it, and how to measure again.
    files: the files that hold it.
    folded: whether the tables are long, so that a reader opens them.
    picture: of the same measurements, as Markdown.
    """

    heading: str
    introduction: str
    files: tuple[str, ...]
    folded: bool = False
    picture: str = ""


QUALITY = (
    Section(
        "What each recipe costs",
        "Perplexity and KL divergence of every recipe in `configs/`, against the same model in"
        " bfloat16. So small a model shows every mistake; larger ones lose a fraction of this."
        " Measure again: `make quality DATA=wiki.test.raw`.",
        ("benchmarks/results/quality.md",),
        picture="![Rise of perplexity by recipe, with 95 % intervals](img/quality.svg)",
    ),
    Section(
        "What each algorithm gains",
        "Calibrations are shorter than those above, so these rows are comparable with each other"
        " only. Measure again: `python benchmarks/algorithms.py --data wiki.test.raw`.",
        ("benchmarks/results/algorithms.md",),
    ),
    Section(
        "Perplexity next to vLLM and transformers",
        "The same files and windows, scored by `eval` and by two other programs. Measure again:"
        " `python benchmarks/served.py`.",
        ("benchmarks/results/parity.md",),
    ),
    Section(
        "What vLLM serves",
        "Which files vLLM's CPU build loads, and the perplexity from its own log probabilities.",
        ("benchmarks/results/served.md",),
    ),
    Section(
        "Where the loss comes from",
        "A recipe is evaluated again and again, each time with the inputs of some Linears left"
        " unquantized. Measure again: `python benchmarks/error_budget.py`.",
        (
            "benchmarks/results/error_budget_int8-dynamic-best.md",
            "benchmarks/results/error_budget_fp8-dynamic-best.md",
        ),
    ),
)
SPEED = (
    Section(
        "Export",
        "Whole processes, start and `import torch` included, compared with `cp -r`. Measure again:"
        " `python benchmarks/export.py`.",
        ("benchmarks/results/export.md",),
    ),
    Section(
        "Calibrate",
        "Compared with one forward pass over the same tokens. Measure again:"
        " `python benchmarks/calibrate.py`.",
        ("benchmarks/results/calibrate.md",),
    ),
    Section(
        "Evaluate",
        "Compared with a plain loop over transformers. Measure again: `python benchmarks/eval.py`.",
        ("benchmarks/results/eval.md",),
    ),
    Section(
        "Evaluate by instruction set",
        "The CPU kernels choose the best instruction set of the machine; here each was asked for."
        " Measure again: `python kernels/bench/eval_levels.py`.",
        ("kernels/bench/results/eval_levels.md",),
    ),
    Section(
        "The move into rooms",
        "The package was a flat folder before it became the rooms of [Architecture]"
        "(architecture.md). This compares both.",
        ("benchmarks/results/rooms.md",),
    ),
    Section(
        "The library and its documents",
        "What importing quantkit costs, and how long its pages are.",
        ("benchmarks/results/interface.md",),
    ),
)
KERNELS = (
    Section(
        "Quantize blocks",
        "Measure again: `python kernels/bench/quantize_blocks.py`.",
        ("kernels/bench/results/quantize_blocks.md",),
    ),
    Section(
        "Observe rows",
        "Measure again: `python kernels/bench/observe_rows.py`.",
        ("kernels/bench/results/observe_rows.md",),
    ),
    Section(
        "Score logits",
        "Measure again: `python kernels/bench/score_logits.py`.",
        ("kernels/bench/results/score_logits.md",),
    ),
    Section(
        "Multiply",
        "Measure again: `python kernels/bench/matmul.py`.",
        ("kernels/bench/results/matmul.md",),
        folded=True,
    ),
)


def results_page() -> str:
    parts = [
        "# Results\n\n",
        NOTICE.format(source="`benchmarks/results` and `kernels/bench/results`"),
        "Every number here was measured by a program in `benchmarks/` or `kernels/bench/`, which"
        " wrote the table. Each section names its machine. *ΔPPL* is the rise of perplexity with"
        " its 95 % interval, and *KL* the mean KL divergence from the unquantized model in nats per"
        " token. [Evaluate](evaluate.md) explains both.\n\n",
    ]
    for chapter, sections in (
        ("Quality", QUALITY),
        ("Speed and memory", SPEED),
        ("Kernels", KERNELS),
    ):
        parts.append(f"## {chapter}\n\n")
        parts += [section_text(section) for section in sections]
    return "".join(parts).rstrip() + "\n"


def section_text(section: Section) -> str:
    bodies = [Measured(path).body(level=4) for path in section.files]
    names = ", ".join(f"`{path}`" for path in section.files)
    tables = "\n".join(bodies)
    if section.folded:
        tables = (
            '<details markdown="1"><summary>The tables</summary>\n\n' + tables + "\n</details>\n"
        )
    picture = f"{section.picture}\n\n" if section.picture else ""
    return (
        f"### {section.heading}\n\n{section.introduction} Stored in {names}.\n\n{picture}"
        f'<div class="measured" markdown="1">\n\n{tables}\n</div>\n\n'
    )


# Notebook ----------------------------------------------------------------------------------------


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that are stored in it."""
    title, *cells = json.loads(path.read_text())["cells"]
    shown = [CELLS[cell["cell_type"]](cell) for cell in cells]
    heading, _, introduction = joined(title["source"]).partition("\n")
    return (
        f"{heading}\n\n"
        + NOTICE.format(source=f"`docs/{path.name}`")
        + f"Download it: [{path.name}]({path.name}).\n\n"
        + "\n\n".join(text for text in (introduction.strip(), *shown) if text)
        + "\n"
    )


def joined(text: str | list[str]) -> str:
    """A notebook's text, which is stored as one string or as lines."""
    return text if isinstance(text, str) else "".join(text)


WIDTH = 88  # Columns of a page's code blocks; longer lines of outputs are wrapped.


def code_cell(cell: dict) -> str:
    blocks = [f"```python\n{joined(cell['source']).strip()}\n```"]
    for output in cell["outputs"]:
        stored = output.get("text") or output.get("data", {}).get("text/plain", "")
        if joined(stored).strip():
            lines = [
                textwrap.fill(line, WIDTH, subsequent_indent="    ", replace_whitespace=False)
                for line in joined(stored).rstrip().split("\n")
            ]
            blocks.append("\n".join(["```text", *lines, "```"]))
    return "\n\n".join(blocks)


CELLS: dict[str, Callable[[dict], str]] = {
    "markdown": lambda cell: joined(cell["source"]).strip(),
    "code": code_cell,
}


def main(check: bool = False) -> None:
    """Write the pages; with `check`, exit with 1 if one is out of date and write nothing."""
    outdated = {
        path: text
        for path, text in pages().items()
        if not path.exists() or path.read_text() != text
    }
    names = ", ".join(str(path.relative_to(ROOT)) for path in outdated)
    if check and outdated:
        sys.exit(f"{names}: out of date; run: python docs/generate.py")
    for path, text in outdated.items():
        path.write_text(text)
    print(f"wrote {names}" if outdated else "all pages are up to date")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
