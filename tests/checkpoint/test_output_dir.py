"""Directories that are whole or absent, and what may be replaced."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

import quantkit.checkpoint.output_dir
from quantkit.checkpoint.output_checks import check_output
from quantkit.checkpoint.output_dir import OutputDirectory
from quantkit.checkpoint.writer import write_tensors
from quantkit.errors import OutputError


def test_output_appears_only_when_whole(tmp_path):
    output = OutputDirectory(tmp_path / "out", {"model": "x"})
    (output.partial / "config.json").write_text("{}")
    assert not (tmp_path / "out").exists()
    output.commit()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert not output.partial.exists()


def test_resume_continues_only_the_same_work(tmp_path):
    OutputDirectory(tmp_path / "out", {"model": "x", "recipe": "r"}).record("shard", "hash")
    with pytest.raises(OutputError, match="`resume=True`"):
        OutputDirectory(tmp_path / "out", {"model": "x", "recipe": "r"})
    with pytest.raises(OutputError, match="different model"):
        OutputDirectory(tmp_path / "out", {"model": "y", "recipe": "r"}, resume=True)
    assert OutputDirectory(tmp_path / "out", {"model": "x", "recipe": "r"}, resume=True).done == {
        "shard": "hash"
    }


def test_overwrite_replaces_results_but_nothing_else(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        check_output(mine, overwrite=False)
    with pytest.raises(OutputError, match="neither"):
        check_output(mine, overwrite=True)
    (mine / "config.json").write_text("{}")
    output = OutputDirectory(mine, {}, overwrite=True)
    assert (mine / "thesis.txt").exists()  # until the new one is whole
    (output.partial / "config.json").write_text("new")
    output.commit()
    assert (mine / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_overwriting_leaves_the_old_or_the_new_at_every_moment(tmp_path, monkeypatch):
    """Stopped after any of commit's steps, OUT is whole."""

    class Stopped(BaseException):
        pass

    for exchange in (quantkit.checkpoint.output_dir.exchange_names, lambda first, second: False):
        for steps in range(6):
            out = tmp_path / f"{exchange.__name__}-{steps}"
            out.mkdir()
            (out / "config.json").write_text("old")
            output = OutputDirectory(out, {"a": "1"}, overwrite=True)
            (output.partial / "config.json").write_text("new")
            left = steps

            def step(function):
                def call(*arguments, **options):
                    nonlocal left
                    if not left:
                        raise Stopped
                    left -= 1
                    return function(*arguments, **options)

                return call

            with monkeypatch.context() as patch:
                patch.setattr(quantkit.checkpoint.output_dir, "exchange_names", step(exchange))
                patch.setattr(os, "rename", step(os.rename))
                patch.setattr(
                    quantkit.checkpoint.output_dir.shutil,
                    "rmtree",
                    step(quantkit.checkpoint.output_dir.shutil.rmtree),
                )
                with contextlib.suppress(Stopped):
                    output.commit()
            if exchange is quantkit.checkpoint.output_dir.exchange_names:
                assert (out / "config.json").read_text() == ("new" if steps else "old")
            again = OutputDirectory(out, {"a": "2"}, overwrite=True)
            (again.partial / "config.json").write_text("newest")
            again.commit()
            assert (out / "config.json").read_text() == "newest" and not out.with_name(
                f"{out.name}.partial"
            ).exists()


def test_overwrite_does_not_replace_a_model_that_is_not_quantized(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_tensors(model / "model.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(OutputError, match="not quantized"):
        check_output(model, overwrite=True)
    (model / "config.json").write_text('{"quantization_config": {}}')
    check_output(model, overwrite=True)


def test_a_run_stopped_before_its_last_rename_is_continued_from_the_manifest(tmp_path):
    output = OutputDirectory(tmp_path / "out", {"a": "1"})
    output.record("x.safetensors", {"bytes": 1, "blake3": "…"})
    (output.partial / "quantkit.json").write_text(
        json.dumps(
            {"fingerprint": {"a": "1"}, "files": {"x.safetensors": {"bytes": 1, "blake3": "…"}}}
        )
    )
    (output.partial / "progress.json").unlink()
    assert set(OutputDirectory(tmp_path / "out", {"a": "1"}, resume=True).done) == {"x.safetensors"}
    (output.partial / "progress.json").unlink()
    with pytest.raises(OutputError, match="different a"):
        OutputDirectory(tmp_path / "out", {"a": "2"}, resume=True)


@pytest.mark.parametrize("kind", ["file", "device", "fifo", "dangling link", "link to a device"])
def test_output_that_is_no_directory_is_refused_even_with_overwrite(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "gone")
    elif kind == "link to a device":
        out.symlink_to("/dev/null")
    else:
        out = Path("/dev/full")
    with pytest.raises(OutputError, match="is a file"):
        check_output(out, overwrite=True)
