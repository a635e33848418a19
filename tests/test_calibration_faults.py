"""Calibrations that are killed, stopped or shared: whatever happens, CALIB is absent or whole, and --resume ends with the bytes of an undisturbed run.

As in test_faults.py, a driver process imports torch and transformers once and forks each attempt.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
from conftest import make_llama, make_text, make_tokenizer
from killing import KILLING
from tiny_models import TARGET, make_model

LAYERS = 4

DRIVER = (
    KILLING
    + """
import transformers
transformers.utils.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
import quantkit.encoder_decoder, quantkit.recording
from quantkit import resuming
from quantkit.calibration import CalibrationOptions, calibrate

from quantkit.scheme import Recipe

model, text, place = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
chosen = {"recipe": Recipe.from_mapping(json.loads(sys.argv[4]), "recipe")} if sys.argv[4] else {}


def attempt(out, number=0, seconds_between_saves=0.0, **changes):
    def work():
        resuming.SECONDS_BETWEEN_SAVES = seconds_between_saves
        torch.set_num_threads(2)
        calibrate(CalibrationOptions(model, out, (text,), **({"num_samples": 6, "seq_len": 32, "batch_size": 1, "device": "cpu"} | chosen | changes)))

    return attempt_of(work, number)


whole = place / "whole"
assert ended(attempt(whole)) == 0
expected, duration, count = tree(whole), float((place / "seconds").read_text()), int((place / "calls").read_text())
out, report = place / "out", {"killed": 0, "runs": 0, "wrong": [], "files": len(expected), "calls": count}


def check():
    if out.exists() and tree(out) != expected:
        report["wrong"].append("OUT differs")


def finish(note):
    # The same command again until it is done.
    assert ended(attempt(out, resume=True)) == 0, (place / "error").read_text()
    if tree(out) != expected:
        report["wrong"].append(note)
    for path in place.glob("out*"):
        shutil.rmtree(path)
"""
)

RANDOM_KILLS = """
random.seed(3)
for number in range(60):
    if report["killed"] >= KILLS:
        break
    settings = {"seconds_between_saves": random.choice([0.0, 1000.0]), "memory": random.choice([None, 0])}
    for again in range(random.choice([1, 1, 2, 3])):
        child = attempt(out, resume=again > 0, **settings)
        report["runs"] += 1
        time.sleep(duration * random.random())
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        report["killed"] += code == -9
        check()
        if code == 0:
            # Spread over the time that a run takes, learnt anew from each that was not hit: the first may have been slow for reasons of its own.
            if not again:
                duration = min(duration, float((place / "seconds").read_text()))
            break
    finish(f"attempt {number}")
print(json.dumps(report))
"""

EVERY_CALL = """
# Each of the first block and of the end; the blocks between repeat the same calls.
numbers = [number for number in range(1, count + 1) if number < 24 or number > count - 16]
for number in numbers:
    assert ended(attempt(out, number)) == -9, number
    report["killed"] += 1
    check()
    finish(f"call {number}")
print(json.dumps(report))
"""


def drive(tmp_path, program: str, recipe: str = "", kind: str = "llama") -> dict:
    """Run a program that ends by printing a JSON object. recipe: as JSON."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    if kind == "llama":
        make_llama(model, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96)
    else:
        make_model(model, kind, vocab_size=make_tokenizer(model))
    text.write_text(make_text(1500))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as place:
        done = subprocess.run([sys.executable, "-c", DRIVER + program, str(model), str(text), place, recipe], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_twenty_random_kills_end_with_the_same_bytes(tmp_path):
    report = drive(tmp_path, RANDOM_KILLS.replace("KILLS", "20"))
    assert report["wrong"] == [] and report["files"] == LAYERS + 1
    assert report["killed"] >= 20, report


def test_so_do_kills_of_a_run_that_chooses_weights(tmp_path):
    recipe = json.dumps({"scheme": "int8-dynamic", "algorithms": ["smoothquant", "gptq"]})
    report = drive(tmp_path, RANDOM_KILLS.replace("KILLS", "6"), recipe)
    assert report["wrong"] == [] and report["files"] == 2 * LAYERS + 1
    assert report["killed"] >= 6, report


@pytest.mark.parametrize("kind", TARGET)
def test_so_do_kills_of_an_encoder_with_a_decoder(kind, tmp_path):
    report = drive(tmp_path, RANDOM_KILLS.replace("KILLS", "6"), kind=kind)
    assert report["wrong"] == [] and report["files"] == LAYERS + 1  # two blocks each
    assert report["killed"] >= 6, report


def test_a_kill_before_any_file_system_call_ends_with_the_same_bytes(tmp_path):
    report = drive(tmp_path, EVERY_CALL)
    assert report["wrong"] == []
    assert report["killed"] == min(39, report["calls"]) and report["calls"] > 40


# ---- Several processes.


def command(model, text, output, *more: object) -> list[str]:
    arguments = ["-m", "quantkit", "calibrate", model, "-o", output, "--data", text, "--num-samples", 8, "--seq-len", 64, "--batch-size", 1, *more]
    return [str(argument) for argument in arguments]


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=200, env=os.environ | environment)


def test_two_processes_measure_what_one_does(llama, text, tmp_path):
    """Maxima and counts to the last bit; sums of squares too, where adding float64 in another order loses nothing that is seen here."""
    import torch
    from safetensors.torch import load_file

    one = subprocess.run([sys.executable, *command(llama, text, tmp_path / "one")], capture_output=True, text=True, timeout=200)
    assert one.returncode == 0, one.stderr
    two = torchrun(*command(llama, text, tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("statistics of 8 inputs") == 1  # only the first one speaks
    assert (tmp_path / "two" / "calibration.json").exists()
    described = [json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two")]
    for key in ("inputs", "kv", "tokens", "data", "fingerprint"):
        assert described[0][key] == described[1][key], key
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(tmp_path / "two" / file.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if name.endswith("sum_of_squares"):
                torch.testing.assert_close(theirs[name], tensor, rtol=1e-12, atol=0)
            else:
                assert torch.equal(theirs[name], tensor), name


DYING = """
import atexit, os, pathlib, sys
from quantkit import calibration
from quantkit.errors import CalibrationError
write = calibration._Run._measure
def measure(self, number, *arguments):
    if self.ranks.rank == 1 and number == 1 and "DIE" in os.environ:
        raise CalibrationError("the input of model.layers.1.mlp.down_proj holds NaN")
    write(self, number, *arguments)
calibration._Run._measure = measure
def threads_left():
    names = [task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("gloo left behind" if any("gloo" in name for name in names) else "gloo is gone", file=sys.stderr)
if "DIE" not in os.environ:
    atexit.register(threads_left)
from quantkit.cli import main
main(sys.argv[1:])
"""


def test_a_rank_that_dies_ends_the_job_with_its_reason_and_resume_continues(llama, text, tmp_path):
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    arguments = command(llama, text, tmp_path / "c")[2:]
    died = torchrun(str(program), *arguments, DIE="1")
    assert died.returncode != 0 and "down_proj holds NaN" in died.stderr
    assert not (tmp_path / "c").exists()
    assert "block-00000.safetensors" in (tmp_path / "c.partial" / "progress.json").read_text()
    refused = torchrun(str(program), *arguments)
    assert refused.returncode != 0 and len(re.findall(r"Error: .*--resume", refused.stderr)) == 1
    again = torchrun(str(program), *arguments, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("gloo is gone") == 2, again.stderr  # a thread of gloo's that frees a tensor while Python ends would abort the process
    whole = subprocess.run([sys.executable, *command(llama, text, tmp_path / "w")], capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stderr
    ours, theirs = contents(tmp_path / "c"), contents(tmp_path / "w")
    assert ours.keys() == theirs.keys() and ours["calibration.json"].split(b'"files"')[0] == theirs["calibration.json"].split(b'"files"')[0]
