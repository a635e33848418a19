"""How the tests are grouped over workers, and the fixtures that many rooms use: a tiny Llama, its
calibration, a text, the command line.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_llama import make_llama, make_text

# What tests judge is kept where nobody else looks, and goes with them.
_CACHE = tempfile.TemporaryDirectory(prefix="quantkit-tests-")
os.environ["QUANTKIT_CACHE"] = _CACHE.name

# A shell starts background jobs with SIGINT ignored, and processes inherit that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: torch's threads of two workers would wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups with slow tests come first, so that no worker is left with one alone at the end."""
    slow = {_group(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: _group(item.nodeid) not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """`--dist loadfile` by groups: xdist 3.8's own loadgroup does nothing under pytest 9.2."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return LoadGroups(config, log)


def _group(nodeid: str) -> str:
    """What one worker runs: a file, or of the file of all architectures, the tests of one model."""
    file, _, test = nodeid.partition("::")
    return file + test.partition("[")[2] if file.endswith("test_architectures.py") else file


@pytest.fixture(scope="session")
def _llama_master(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def _calibration_master(_llama_master, _text_master, tmp_path_factory) -> Path:
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions

    output = tmp_path_factory.mktemp("calibrations") / "calib"
    calibrate(
        CalibrationOptions(_llama_master, output, (str(_text_master),), num_samples=6, seq_len=64)
    )
    return output


@pytest.fixture(scope="session")
def _text_master(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(make_text(6000, seed=1))
    return path


# Read by many tests, changed by none: a test that changes files copies them first, with the `copy`
# fixture.
@pytest.fixture
def llama(_llama_master) -> Path:
    return _llama_master


@pytest.fixture
def calib(_calibration_master) -> Path:
    return _calibration_master


@pytest.fixture
def text(_text_master) -> Path:
    return _text_master


@pytest.fixture
def copy(tmp_path):
    """copy(directory) → a copy that a test may damage."""

    def make(directory: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(directory, tmp_path / name))

    return make


@pytest.fixture
def run():
    """run("export", ...) → the CLI's result, with .exit_code, .stdout and .stderr."""
    from click.testing import CliRunner

    from quantkit.cli.main import main

    def invoke(*arguments: object):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def run_json(run):
    """As `run`, with --json; returns what was printed."""

    def invoke(*arguments: object):
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return invoke


@pytest.fixture
def export_to(tmp_path, llama, calib):
    """export_to("fp8-dynamic") → the directory of the tiny Llama in that scheme."""
    from quantkit.exporter.plan import ExportOptions, plan_export
    from quantkit.exporter.write import export
    from quantkit.schemes.recipe import Recipe
    from quantkit.schemes.scheme import QuantScheme

    def make(
        scheme,
        model: Path = llama,
        calibration: Path | None = calib,
        kv_cache: str | None = None,
        name: str | None = None,
        **options,
    ) -> Path:
        recipe = (
            scheme
            if isinstance(scheme, Recipe)
            else Recipe(QuantScheme.parse(scheme), kv_cache=kv_cache)
        )
        output = tmp_path / (name or f"out-{recipe.scheme.name}")
        needed = calibration if recipe.needs_calibration else None
        export(plan_export(ExportOptions(model, output, recipe, needed, **options)))
        return output

    return make
