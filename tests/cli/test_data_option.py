"""`--data` takes names of files: one that isn't there is refused, and never read as a text."""

import pytest

NAMES = ("corpus", "missing.txt", "no/such/directory/corpus")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["calibrate", "eval", "quantize", "sensitivity"])
def test_a_file_that_is_not_there_is_refused(command, name, llama, export_to, text, tmp_path, run):
    arguments = {
        "calibrate": (llama, "-o", tmp_path / "calib", "--seq-len", 2, "--num-samples", 2),
        "eval": (llama, export_to("fp8-dynamic"), "--seq-len", 2),
        "quantize": (llama, "-o", tmp_path / "out", "--scheme", "fp8-dynamic"),
        "sensitivity": (llama, "--scheme", "fp8-dynamic", "--seq-len", 2),
    }[command]
    for data in (("--data", name), ("--data", text, "--data", name)):
        refused = run(command, *arguments, *data)
        assert refused.exit_code == 1
        assert f"there is no data file {name}; give a .txt" in refused.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "calib").exists()


def test_a_directory_is_no_file(llama, tmp_path, run):
    refused = run("calibrate", llama, "-o", tmp_path / "calib", "--data", tmp_path)
    assert refused.exit_code == 1 and "there is no data file" in refused.stderr


def test_a_scheme_is_no_file(llama, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fp8-dynamic").write_text("no recipe")
    done = run("export", llama, "-o", tmp_path / "out", "--scheme", "fp8-dynamic")
    assert done.exit_code == 0, done.stderr
    refused = run("export", llama, "-o", tmp_path / "out2", "--scheme", "fp9")
    assert refused.exit_code == 1 and "unknown scheme 'fp9'" in refused.stderr
    assert ".yaml" not in refused.stderr


def test_quantize_refuses_to_be_one_of_several(llama, tmp_path, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = run("quantize", llama, "-o", tmp_path / "out", "--scheme", "fp8-dynamic")
    assert refused.exit_code == 1 and "runs in one process" in refused.stderr
