import json
import os
from pathlib import Path

import pytest
from hub_server import serve
from processes import quantkit
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama

from quantkit.checkpoint.hub import is_hub_id, resolve_model
from quantkit.errors import CheckpointError

pytestmark = pytest.mark.slow  # each test runs several commands on a model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A tiny Llama in one shard for each tensor."""
    model = make_llama(tmp_path_factory.mktemp("hub") / "tiny", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        weight_map[name] = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, model / weight_map[name], {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (model / "model.gguf").write_bytes(b"another format")
    return model


@pytest.fixture
def hub(sharded, tmp_path):
    """hub(arguments...) runs quantkit as a process that sees a hub with org/tiny; hub.server
    counts.
    """
    with serve({"org/tiny": sharded}) as (server, address):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

        def run(*arguments):
            return quantkit(*arguments, cwd=tmp_path, **environment)

        run.server = server
        yield run


def shards_in(directory: Path) -> list[Path]:
    """Whole shards below a directory, links to them aside."""
    return [
        path
        for path in directory.rglob("*.safetensors")
        if path.is_file() and not path.is_symlink()
    ]


@pytest.mark.slow
def test_hub_model_exports_to_the_bytes_of_its_local_copy(hub, sharded, export_to, tmp_path):
    result = hub("export", "org/tiny", "-o", tmp_path / "out", "--scheme", "int8-dynamic")
    assert result.returncode == 0, result.stderr
    local = export_to("int8-dynamic", sharded, name="local")
    names = {path.name for path in local.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(
        (tmp_path / "out" / name).read_bytes() == (local / name).read_bytes()
        for name in names - {"quantkit.json"}
    )
    assert hub.server.fetched["model.gguf"] == 0
    # The shards lie in the cache now: nothing is fetched again.
    hub.server.fetched.clear()
    assert (
        hub("export", "org/tiny", "-o", tmp_path / "again", "--scheme", "fp8-dynamic").returncode
        == 0
    )
    assert not any(
        hub.server.fetched[path.name] > path.stat().st_size
        for path in sharded.glob("*.safetensors")
    )


@pytest.mark.slow
def test_streamed_shards_are_gone_when_their_tensors_are_done(hub, sharded, export_to, tmp_path):
    held = []
    hub.server.on_fetch = lambda name: (
        held.append(len(shards_in(tmp_path / "out.partial" / ".download")))
        if name.endswith(".safetensors")
        else None
    )
    result = hub(
        "export", "org/tiny", "-o", tmp_path / "out", "--scheme", "fp8-dynamic", "--stream-download"
    )
    assert result.returncode == 0, result.stderr
    assert len(held) == len(list(sharded.glob("*.safetensors")))
    assert max(held) <= len(os.sched_getaffinity(0)), "more shards on the disk than are in work"
    assert (
        not (tmp_path / "out.partial").exists()
        and not shards_in(tmp_path / "home")
        and not (tmp_path / "out" / ".download").exists()
    )
    local = export_to("fp8-dynamic", sharded, name="local")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        local / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_download_that_fails_keeps_what_is_done(hub, sharded, export_to, tmp_path):
    arguments = (
        "export",
        "org/tiny",
        "-o",
        tmp_path / "out",
        "--scheme",
        "fp8-dynamic",
        "--stream-download",
        "--max-shard-size",
        "50kB",
    )
    hub.server.broken = sorted(path.name for path in sharded.glob("*.safetensors"))[-2]
    result = hub(*arguments)
    assert (
        result.returncode == 1 and "--resume" in result.stderr and result.stderr.count("\n") == 1
    ), result.stderr
    kept = set(json.loads((tmp_path / "out.partial" / "progress.json").read_text())["done"])
    assert kept and not (tmp_path / "out").exists()
    hub.server.broken = None
    result = hub(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    local = export_to("fp8-dynamic", sharded, name="local", max_shard_bytes=50_000)
    assert all(
        (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        for path in local.glob("*.safetensors")
    )


def test_dry_run_of_a_hub_model_fetches_no_whole_shard(hub, tmp_path):
    fetched = []
    hub.server.on_fetch = fetched.append
    result = hub(
        "export",
        "org/tiny",
        "-o",
        tmp_path / "out",
        "--scheme",
        "fp8-dynamic",
        "--dry-run",
        "--json",
    )
    assert result.returncode == 0 and len(json.loads(result.stdout)["parameters"]) == 12, (
        result.stderr
    )
    assert not any(name.endswith(".safetensors") for name in fetched) and not list(
        tmp_path.glob("out*")
    )


def test_streaming_is_for_hub_ids_without_a_calibration(run, llama, calib, tmp_path):
    assert (
        run(
            "export", llama, "-o", tmp_path / "out", "--scheme", "fp8-dynamic", "--stream-download"
        ).exit_code
        == 2
    )
    result = run(
        "export",
        "org/tiny",
        "-o",
        tmp_path / "out",
        "--scheme",
        "fp8-static",
        "--calibration",
        calib,
        "--stream-download",
    )
    assert result.exit_code == 2 and "local copy" in result.stderr


def test_unknown_hub_id_is_refused_in_one_line(hub, tmp_path):
    result = hub("export", "org/absent", "-o", tmp_path / "out", "--scheme", "fp8-dynamic")
    assert (
        result.returncode == 1 and result.stderr.count("\n") == 1 and "org/absent" in result.stderr
    )


def test_a_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert resolve_model("models/gone") == Path("models/gone")
    assert (
        resolve_model("./a/b") == Path("a/b")
        and not is_hub_id("./a/b")
        and not is_hub_id("models/gone")
        and is_hub_id("org/name")
    )


def test_unreachable_hub_id_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="hub id"):
        resolve_model("no-such-org-here/no-such-model")
