"""Every Python block of README and docs/ runs, in a directory with a tiny model and short texts
under the names that the blocks use.
"""

import re
import shutil
from pathlib import Path

import pytest
from documents import DOCS, README, ROOT, code_blocks
from tiny_llama import make_text

import quantkit as qk

TEXTS = ("text.txt", "wiki.test.raw", "calibration.txt", "c4.txt")
# The notebook's page is left out: its blocks need each other, and the notebook has a test.
PAGES = [README, *sorted(path for path in DOCS.glob("*.md") if path.stem != "quickstart")]
SNIPPETS = [block for path in PAGES for block in code_blocks(path) if block.language == "python"]
# Output directory → the functions that make it.
OUTPUTS = {"OUT": r"qk\.(quantize|export)\(", "CALIB": r"qk\.calibrate\("}


@pytest.fixture(scope="module")
def outputs(_llama_master, _calibration_master, tmp_path_factory) -> dict[str, Path]:
    """What blocks read that others have made: name → directory."""
    out = tmp_path_factory.mktemp("outputs") / "OUT"
    qk.export(_llama_master, out, "fp8-dynamic")
    return {"OUT": out, "CALIB": _calibration_master}


@pytest.fixture
def directory(tmp_path, monkeypatch, llama) -> Path:
    """The working directory of a block."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "MODEL")
    Path("configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(TEXTS):
        Path(name).write_text(make_text(6000, seed=seed))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::quantkit.errors.QuantkitWarning")
@pytest.mark.parametrize("block", SNIPPETS, ids=[block.where for block in SNIPPETS])
def test_runs(block, directory, outputs, capsys):
    for name, makers in OUTPUTS.items():
        if not re.search(rf"{makers}[^)]*\"{name}\"", block.text):
            shutil.copytree(outputs[name], directory / name)
    code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec")
    exec(code, {"__name__": "snippet"})


def test_there_are_snippets():
    assert sum(block.path == README for block in SNIPPETS) == 1
    assert len(SNIPPETS) > 8
