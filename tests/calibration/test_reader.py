"""A calibration that was damaged is refused when it is opened, whoever opens it, in one line that
names the file.
"""

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.files import blake3_file
from quantkit.errors import CalibrationError

BLOCK = "block-00001.safetensors"


@pytest.fixture
def damaged(calib, copy):
    return copy(calib, "damaged")


def change(path, edit) -> None:
    described = json.loads((path / "calibration.json").read_text())
    edit(described)
    (path / "calibration.json").write_text(json.dumps(described))


def refusals(run, llama, path, tmp_path) -> set[str]:
    """What inspect and export say of it; neither leaves anything behind."""
    commands = [["inspect", path]]
    commands += [
        [
            "export",
            llama,
            "-o",
            tmp_path / "out",
            "--scheme",
            "int8-static",
            "--calibration",
            path,
            "--observer",
            how,
        ]
        for how in ("absmax", "mse")
    ]
    lines = set()
    for command in commands:
        result = run(*command)
        assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1, (
            result.output
        )
        lines.add(result.stderr.strip())
    assert not list(tmp_path.glob("out*"))
    return lines


def zero_a_histogram(path) -> None:
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith(".histogram")).zero_()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "it is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes of"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes of"),
        (
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
            "it has changed since it was written",
        ),
        (zero_a_histogram, ""),
    ],
)
def test_a_block_file_that_is_not_as_it_was_written_is_damaged(
    damage, what, run, llama, damaged, tmp_path
):
    damage(damaged / BLOCK)
    (line,) = refusals(run, llama, damaged, tmp_path)
    assert (
        line.startswith(f"Error: {damaged / BLOCK} is damaged (")
        and what in line
        and line.endswith("; calibrate again")
    )


def set_in(place: str, key: str, value):
    def edit(described) -> None:
        described[place][1][key] = value

    return edit


@pytest.mark.parametrize(
    "value", ["7", None, True, -1.0, float("nan"), float("inf"), 1e39, 10**400, [1.0]], ids=str
)
@pytest.mark.parametrize(
    ("place", "key"),
    [("inputs", "amax"), ("inputs", "first_position_amax"), ("kv", "k_amax"), ("kv", "v_amax")],
)
def test_a_magnitude_is_a_finite_number(place, key, value, damaged):
    change(damaged, set_in(place, key, value))
    with pytest.raises(
        CalibrationError, match=f"calibration.json is damaged .'{key}' is .*; calibrate again"
    ):
        Calibration.open(damaged)


@pytest.mark.parametrize("value", ["7", None, True, -1, 2.5, 2**70], ids=str)
@pytest.mark.parametrize("key", ["tokens", "in_features", "held_out_values", "held_out_above"])
def test_a_count_is_a_whole_number(key, value, damaged):
    change(damaged, set_in("inputs", key, value))
    with pytest.raises(CalibrationError, match=f"'{key}' is .*not a count"):
        Calibration.open(damaged)


@pytest.mark.parametrize(
    "edit",
    [
        set_in("inputs", "linears", "model"),
        set_in("inputs", "amax_quarters", [1.0]),
        set_in("inputs", "amax_quarters", [1.0, 2.0, float("nan"), 4.0]),
        set_in("inputs", "file", "../block-00001.safetensors"),
        set_in("inputs", "estimated", "no"),
        lambda described: described.update(inputs="none"),
        lambda described: described.update(kv=[1]),
        lambda described: described.update(model="another"),
        lambda described: described.update(data={"sources": [1]}),
        lambda described: described.update(experts=[{"module": "m", "starved": "all"}]),
        lambda described: described.update(recipe={"scheme": "no such"}),
        lambda described: described.update(schema_version="2"),
        lambda described: described.update(windows=None),
        lambda described: described.pop("files"),
        lambda described: described.update(files={"../x": {"bytes": 1, "blake3": ""}}),
        lambda described: described["files"].update({BLOCK: None}),
    ],
)
def test_what_is_not_of_its_kind_is_damage_and_no_traceback(edit, run, llama, damaged, tmp_path):
    change(damaged, edit)
    for line in refusals(run, llama, damaged, tmp_path):
        assert f"{damaged}/calibration.json is damaged (" in line and line.endswith(
            "; calibrate again"
        )


def test_a_calibration_that_is_cut_short_is_damaged(run, llama, damaged, tmp_path):
    os.truncate(damaged / "calibration.json", 1000)
    (line,) = refusals(run, llama, damaged, tmp_path)
    assert "calibration.json is damaged" in line


def test_every_hash_is_compared_with_its_own_file(damaged):
    """Two blocks whose files and sizes are alike, exchanged."""
    first, second = damaged / "block-00000.safetensors", damaged / BLOCK
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    assert blake3_file(first) != blake3_file(second)
    with pytest.raises(CalibrationError, match="block-00000.safetensors is damaged"):
        Calibration.open(damaged)


@pytest.mark.parametrize("key", ["fingerprint", "files"])
def test_resuming_beside_a_damaged_calibration_is_refused_in_a_line(
    key, run, llama, text, tmp_path
):
    command = [
        "calibrate",
        llama,
        "-o",
        tmp_path / "c",
        "--data",
        text,
        "--num-samples",
        2,
        "--seq-len",
        32,
    ]
    assert run(*command).exit_code == 0
    change(tmp_path / "c", lambda described: described.update({key: "no"}))
    refused = run(*command, "--resume")
    assert (
        refused.exit_code == 1
        and "calibration.json is damaged; start again with --overwrite" in refused.stderr
    )
