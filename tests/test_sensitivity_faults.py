"""Scorings that are killed, stopped or shared: RESULT.json is absent or whole, and --resume ends with the bytes of an undisturbed run."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import make_llama, make_text
from killing import KILLING
from test_calibration_faults import torchrun

LAYERS = 2

DRIVER = (
    KILLING
    + """
import transformers
transformers.utils.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import quantkit.heads, quantkit.installing
from quantkit import resuming
from quantkit.scheme import QuantScheme, Recipe
from quantkit.sensitivity import SensitivityOptions, score_sensitivity

model, text, place = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
recipe = Recipe(QuantScheme.parse("int8-dynamic"))


def attempt(out, number=0, **changes):
    def work():
        resuming.SECONDS_BETWEEN_SAVES = 0.0
        torch.set_num_threads(1)
        score_sensitivity(SensitivityOptions(model, recipe, data=(text,), max_tokens=96, seq_len=32, max_size="+10%", device="cpu", output=out, **changes))

    return attempt_of(work, number)


whole = place / "whole"
assert ended(attempt(whole)) == 0, (place / "error").read_text()
expected, duration, count = whole.read_bytes(), float((place / "seconds").read_text()), int((place / "calls").read_text())
out, report = place / "out", {"killed": 0, "wrong": [], "calls": count}


def check(note):
    if out.exists() and out.read_bytes() != expected:
        report["wrong"].append(f"{note}: RESULT differs")


def finish(note):
    code = ended(attempt(out, resume=True))
    if code or out.read_bytes() != expected:
        report["wrong"].append(f"{note}: --resume ends with {code} {(place / 'error').read_text() if code else ''}")
    rest = sorted(path.name for path in place.glob("out*") if path != out and path.name != "out.tmp")
    if rest:
        report["wrong"].append(f"{note}: {rest} are left")
    for path in place.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
"""
)

RANDOM_KILLS = """
random.seed(5)
for number in range(40):
    if report["killed"] >= 10:
        break
    for again in range(random.choice([1, 2, 3])):
        child = attempt(out, resume=again > 0)
        time.sleep(duration * random.random())
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        report["killed"] += code == -9
        check(number)
        if code == 0:
            if not again:
                duration = min(duration, float((place / "seconds").read_text()))
            break
    finish(number)
print(json.dumps(report))
"""

CALLS = """
# Some of the many that are alike, and each of the end.
for number in sorted({*range(1, 8), *range(8, count, 17), *range(count - 14, count + 1)}):
    assert ended(attempt(out, number)) == -9, number
    report["killed"] += 1
    check(f"call {number}")
    finish(f"call {number}")
print(json.dumps(report))
"""


def drive(tmp_path, program: str) -> dict:
    """Run a program that ends by printing a JSON object."""
    model, text = make_llama(tmp_path / "model", num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96), tmp_path / "text.txt"
    text.write_text(make_text(600))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as place:
        done = subprocess.run([sys.executable, "-c", DRIVER + program, str(model), str(text), place], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_random_kills_end_with_the_same_bytes(tmp_path):
    report = drive(tmp_path, RANDOM_KILLS)
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["killed"] >= 10, report


def test_a_kill_before_calls_of_the_file_system_ends_with_the_same_bytes(tmp_path):
    report = drive(tmp_path, CALLS)
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["killed"] >= 20, report


# ---- As commands.


def command(model, text, output, *more: object) -> list[str]:
    arguments = ["sensitivity", model, "--scheme", "fp8-dynamic", "--data", text, "--max-tokens", 320, "--seq-len", 64, "-o", output, *more]
    return [str(argument) for argument in arguments]


@pytest.fixture
def whole(run, llama, text, tmp_path):
    done = run(*command(llama, text, tmp_path / "whole.json"))
    assert done.exit_code == 0, done.output
    return tmp_path / "whole.json"


@pytest.fixture
def stopped(run, llama, text, tmp_path, monkeypatch):
    """What SIGTERM leaves in a run that has scored some windows: the output that was asked for."""
    from quantkit.kept import KeptScores

    add, rounds = KeptScores.add, []

    def stop_soon(self, *arguments):
        rounds.append(1)
        if len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(KeptScores, "add", stop_soon)
        done = run(*command(llama, text, tmp_path / "r.json"))
    assert done.exit_code == 75 and re.search(r"SIGTERM with \d of 5 windows scored; what is done is kept; .*--resume", done.stderr), done.output
    return tmp_path / "r.json"


def test_a_stopped_run_goes_on_and_scores_no_window_twice(run, llama, text, whole, stopped, monkeypatch):
    from quantkit.kept import KeptScores

    assert not stopped.exists() and stopped.with_name("r.json.partial").is_dir()
    kept = [json.loads(path.read_text()) for path in stopped.with_name("r.json.partial").glob("scores-*.json")]
    add, scored = KeptScores.add, []
    monkeypatch.setattr(KeptScores, "add", lambda self, walk, found, *rest: scored.extend((walk, window) for window in found) or add(self, walk, found, *rest))
    done = run(*command(llama, text, stopped, "--resume"))
    assert done.exit_code == 0, done.output
    assert stopped.read_bytes() == whole.read_bytes() and not stopped.with_name("r.json.partial").exists()
    assert len(scored) == len(set(scored)) == 10 - sum(map(len, kept)) < 10
    again = run(*command(llama, text, stopped, "--resume"))
    assert again.exit_code == 0 and "finished already" in again.stderr and stopped.read_bytes() == whole.read_bytes()


def test_other_work_is_not_gone_on_with(run, llama, text, stopped, tmp_path):
    plain = run(*command(llama, text, stopped))
    assert plain.exit_code == 1 and "left by an interrupted run; continue it with --resume" in plain.stderr
    for more, words in [(("--max-tokens", 256), "a different --max-tokens, different windows"), (("--seed", 1), "a different seed")]:
        refused = run(*command(llama, text, stopped, *more, "--resume"))
        assert refused.exit_code == 1 and words in refused.stderr, refused.output
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: int8-dynamic")
    arguments = [part for part in command(llama, text, stopped, "--recipe", recipe, "--resume") if part not in ("--scheme", "fp8-dynamic")]
    refused = run(*arguments)
    assert refused.exit_code == 1 and "with a different recipe" in refused.stderr
    # A budget decides no score.
    assert run(*command(llama, text, stopped, "--max-size", "+5%", "--resume")).exit_code == 0
    refused = run(*command(llama, text, stopped, "--max-size", "+9%", "--resume"))
    assert refused.exit_code == 1 and "was made with a different --max-size" in refused.stderr


def test_resume_needs_its_output(run, llama, text, tmp_path):
    assert run("sensitivity", llama, "--scheme", "fp8-dynamic", "--data", text, "--resume").exit_code == 2
    assert run("sensitivity", llama, "--from", tmp_path / "r.json", "-o", tmp_path / "o.json", "--resume").exit_code == 2


def test_two_processes_find_what_one_does(llama, text, whole, tmp_path):
    """To the last bit: a window's scores are made by one process, and sums over windows in their order."""
    two = torchrun("-m", "quantkit", *command(llama, text, tmp_path / "two.json"))
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two.json").read_bytes() == whole.read_bytes()
    assert two.stdout.count("the worst sets given something else") == 1


def test_two_processes_go_on_from_what_one_left(llama, text, whole, stopped):
    two = torchrun("-m", "quantkit", *command(llama, text, stopped, "--resume"))
    assert two.returncode == 0, two.stderr
    assert stopped.read_bytes() == whole.read_bytes() and not stopped.with_name("r.json.partial").exists()


def test_a_refusal_is_said_once(llama, text, tmp_path):
    refused = torchrun("-m", "quantkit", *command(llama, text, tmp_path / "r.json", "--max-size", "1kB"))
    assert refused.returncode != 0 and len(re.findall("Error: .*the smallest is", refused.stderr)) == 1, refused.stderr
