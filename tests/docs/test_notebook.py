"""docs/quickstart.ipynb runs from its first cell to its last.
`python tests/docs/test_notebook.py` runs it and stores what its cells print.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent.parent / "docs" / "quickstart.ipynb"

# Runs cells, given as JSON on stdin, in one namespace; prints what each printed, as JSON.
RUN = """
import contextlib, io, json, sys
namespace, printed = {}, []
for source in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(source, "cell", "exec"), namespace)
    printed.append(output.getvalue())
json.dump(printed, sys.stdout)
"""


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: dict, directory: Path) -> list[str]:
    """What each code cell prints, in a process of its own that begins in `directory`."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    finished = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=directory,
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.slow
def test_its_cells_run_and_print_where_outputs_are_stored(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text())
    for cell, printed in zip(code_cells(notebook), run_cells(notebook, tmp_path)):
        assert bool(printed.strip()) == bool(cell["outputs"]), "".join(cell["source"])


def test_its_stored_outputs_are_what_cells_printed_and_no_errors():
    for cell in code_cells(json.loads(NOTEBOOK.read_text())):
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream"}


if __name__ == "__main__":
    notebook = json.loads(NOTEBOOK.read_text())
    with tempfile.TemporaryDirectory() as directory:
        printed = run_cells(notebook, Path(directory))
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed), start=1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        cell |= {"execution_count": number, "outputs": [stream] if text.strip() else []}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
