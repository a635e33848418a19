"""What commands print on a terminal of 80 and of 100 columns: no line is wider, and the important
numbers are there. stdout is a pseudo terminal in these tests.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from rich.cells import cell_len

WIDTHS = (80, 100)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """A pseudo terminal whose text is read by a thread, because it holds few characters."""

    def __init__(self, columns: int) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()

    def _drain(self) -> None:
        while True:
            try:
                piece = os.read(self._master, 65536)
            except OSError:  # the other side is closed
                return
            if not piece:
                return
            self._read.append(piece)

    def text(self) -> str:
        """What was printed, once all have closed the other side."""
        self._thread.join()
        os.close(self._master)
        return ESCAPES.sub("", b"".join(self._read).decode()).replace("\r\n", "\n")


@pytest.fixture
def printed(monkeypatch):
    """printed(80, "eval", …) → what the command prints on a terminal of 80 columns."""
    from quantkit.cli.main import main

    def invoke(columns: int, *arguments: object) -> str:
        terminal = Terminal(columns)
        monkeypatch.setenv("COLUMNS", str(columns))
        with os.fdopen(terminal.slave, "w") as slave, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", slave)
            main.main([str(argument) for argument in arguments], standalone_mode=False)
        return terminal.text()

    return invoke


def assert_fits(text: str, columns: int) -> None:
    widest = max(text.splitlines(), key=cell_len)
    assert text.strip() and cell_len(widest) <= columns, widest


@pytest.fixture
def results(run, llama, text, export_to, tmp_path):
    """The results of `eval -o` of one quantized model and of three with long names."""
    outs = []
    for scheme in ("fp8-dynamic", "int8-dynamic", "int8-static"):
        name = tmp_path / f"a-model-with-a-long-name-135M-Instruct-{scheme}"
        export_to(scheme).rename(name)
        outs.append(name)
    files = [tmp_path / "one.json", tmp_path / "three.json"]
    for file, quants in zip(files, (outs[:1], outs)):
        options = ("--data", text, "--seq-len", 32, "--max-tokens", 320, "-o", file, "-q")
        assert run("eval", llama, *quants, "--noise-floor", *options).exit_code == 0
    return files


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
def test_eval_and_compare_fit(columns, results, printed, monkeypatch):
    import json

    from quantkit.cli import evaluate
    from quantkit.evaluation.result import Evaluation

    for file, count in zip(results, (1, 3)):
        result = Evaluation.from_json(json.loads(file.read_text()))
        for verbose in (False, True):
            terminal = Terminal(columns)
            monkeypatch.setenv("COLUMNS", str(columns))
            with os.fdopen(terminal.slave, "w") as slave, monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", slave)
                evaluate._print_tables(result, verbose)
            text = terminal.text()
            assert_fits(text, columns)
            assert text.count("dynamic") >= min(count, 2)
            for quant in result.quants:
                delta = quant.metrics.values["ppl_delta_pct"]
                assert f"{delta.value:+.2f} %" in text
                assert f"[{delta.low:+.2f}, {delta.high:+.2f}]" in text
                assert f"{quant.metrics.values['kld'].mean:.5f}" in text
            assert ("not shown: " in text and "with -v, or -o FILE" in text) != verbose
            assert "tokens/s" in text
    compared = printed(columns, "compare", results[1], results[1], "-q")
    assert_fits(compared, columns)
    assert "+0.00 %" in compared and "fp8-dynamic" in compared


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
def test_eval_itself_fits(columns, llama, text, export_to, printed):
    options = ("--data", text, "--seq-len", 32, "--max-tokens", 320, "-q")
    shown = printed(columns, "eval", llama, export_to("int8-dynamic"), *options)
    assert_fits(shown, columns)
    assert "ΔPPL [95 %]" in shown and "worst layers" in shown


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
def test_sensitivity_fits(columns, llama, text, printed):
    options = ("--data", text, "--seq-len", 32, "--max-tokens", 64, "--max-size", "+5%", "-q")
    shown = printed(columns, "sensitivity", llama, "--scheme", "int8-dynamic", *options)
    assert_fits(shown, columns)
    assert "{gate,up}_proj" in shown and "floor" in shown and "budget: " in shown


@pytest.mark.parametrize("columns", WIDTHS)
def test_tables_of_checkpoints_and_plans_fit(columns, llama, calib, export_to, printed, tmp_path):
    out = export_to("int8-static")
    for arguments, words in [
        (("inspect", out), ["int8-static", "dtype"]),
        (("inspect", calib), ["input of", "amax", "q_proj"]),
        (("inspect", calib, "-v"), ["settled", "ppm", "q_proj"]),
        (("verify", out, "--base", llama), ["weight SQNR, dB", "down_proj"]),
        (("verify", out, "--base", llama, "-v"), ["lm_head", "reason"]),
        (
            ("export", llama, "-o", tmp_path / "x", "--scheme", "fp8-dynamic", "--dry-run"),
            ["q_proj.weight", "quantized", "kB", "total"],
        ),
    ]:
        shown = printed(columns, *arguments)
        assert_fits(shown, columns)
        for word in words:
            assert word in shown, (arguments, word)


@pytest.mark.parametrize("columns", WIDTHS)
def test_schemes_and_doctor_fit(columns, printed):
    from quantkit.schemes.scheme import SCHEMES

    schemes = printed(columns, "schemes", "-v")
    assert_fits(schemes, columns)
    for name in SCHEMES:
        assert name in schemes
    assert "turing" in schemes and "cpu" in schemes
    doctor = printed(columns, "doctor")
    assert_fits(doctor, columns)
    assert "jinja2" in doctor and "ok" in doctor


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_benchmarks_table_fits(columns, printed, monkeypatch):
    from quantkit.cli import bench

    figure = bench.Figure(
        "int8", "matmul_int8", 4096, 14336, 512, 123456.7, 1234.0, 567.8,
        {"bfloat16 linear": 12.34, "torch._int_mm with scales": 1.05},
    )  # fmt: skip
    monkeypatch.setattr(bench, "benchmark", lambda *_: [figure] * 3)
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 12.3)
    shown = printed(columns, "bench", "-q")
    assert_fits(shown, columns)
    assert "matmul_int8" in shown and "123456.7" in shown and "4096 × 14336" in shown


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_width_is_that_of_the_window(columns):
    """As a process, without COLUMNS."""
    terminal = Terminal(columns)
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-m", "quantkit", "schemes"]
    subprocess.run(
        command, stdin=terminal.slave, stdout=terminal.slave, env=environment, check=True
    )
    os.close(terminal.slave)
    shown = terminal.text()
    assert_fits(shown, columns)
    assert max(map(cell_len, shown.splitlines())) > columns - 10


def test_elsewhere_the_table_is_whole(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("schemes").stdout
    assert max(map(cell_len, shown.splitlines())) > 100
    assert "not shown" not in shown and "ampere" in shown and "…" not in shown


def test_escape_sequences_in_names_are_shown_as_text(monkeypatch):
    from quantkit.cli.tables import print_table

    terminal = Terminal(80)
    with os.fdopen(terminal.slave, "w") as slave, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", slave)
        print_table(("name", "[bold]x"), [("a\x1b[31mb", "[red]c")], "t\x1b]0;title\x07")
    shown = terminal.text()
    assert "\\x1b[31mb" in shown and "[red]c" in shown and "[bold]x" in shown
    assert "\x1b" not in shown and "\x07" not in shown
