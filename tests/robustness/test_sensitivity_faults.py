"""Scorings that are killed, stopped, shared or out of disk: RESULT.json is absent or whole, and
--resume ends with the bytes of an undisturbed run.
"""

import json
import os
import re
import signal
import time

import pytest
from faults import FORKING, FULL_DISKS, KILLS_AT_CALLS, RANDOM_KILLS, RESUMING, drive
from processes import ranks
from tiny_llama import make_llama, make_text

LAYERS = 2

SCORING = (
    FORKING
    + """
import transformers
transformers.utils.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import quantkit.evaluation.logits, quantkit.layer_sensitivity.layer_swap
from quantkit.models import saved_states
from quantkit.cli.main import main

model, text, place = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])


def work(out, resume=False):
    saved_states.SECONDS_BETWEEN_SAVES = 0.0
    torch.set_num_threads(1)
    arguments = [model, "--scheme", "int8-dynamic", "--data", text, "--max-tokens", 96]
    arguments += ["--seq-len", 32, "--max-size", "+10%", "--device", "cpu", "-o", out, "-q"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(["sensitivity", *map(str, arguments), *(["--resume"] if resume else [])])
"""
    + RESUMING
)


def scoring(tmp_path, program: str) -> dict:
    model, text = (
        make_llama(
            tmp_path / "model", num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96
        ),
        tmp_path / "text.txt",
    )
    text.write_text(make_text(600))
    return drive(tmp_path, SCORING + program, model, text)


@pytest.mark.slow
def test_random_kills_end_with_the_same_bytes(tmp_path):
    report = scoring(tmp_path, f"KILLS = 10{RANDOM_KILLS}")
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["faults"] >= 10, report


@pytest.mark.slow
def test_a_kill_before_calls_of_the_file_system_ends_with_the_same_bytes(tmp_path):
    # Some of the many that are alike, and each of the end.
    report = scoring(
        tmp_path,
        "numbers = sorted({*range(1, 8), *range(8, count, 17), *range(count - 14, count +"
        f" 1)}}){KILLS_AT_CALLS}",
    )
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["faults"] >= 20, report


@pytest.mark.slow
def test_a_disk_that_fills_loses_no_score(tmp_path):
    """While scores are kept in RESULT.json.partial, and before the first and the last byte of
    RESULT.json: an error of one line, and --resume ends with the same bytes.
    """
    rooms = (
        "rooms = [1, *range(nbytes // 6, nbytes - nbytes // 6, nbytes // 6), nbytes -"
        " whole.stat().st_size, nbytes - 1]"
    )
    report = scoring(tmp_path, rooms + FULL_DISKS)
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["faults"] >= 8, report


# ---- As commands.


def command(model, text, output, *more: object) -> list[str]:
    arguments = [
        "sensitivity",
        model,
        "--scheme",
        "fp8-dynamic",
        "--data",
        text,
        "--max-tokens",
        320,
        "--seq-len",
        64,
        "-o",
        output,
        *more,
    ]
    return [str(argument) for argument in arguments]


@pytest.fixture
def whole(run, llama, text, tmp_path):
    done = run(*command(llama, text, tmp_path / "whole.json"))
    assert done.exit_code == 0, done.output
    return tmp_path / "whole.json"


@pytest.fixture
def stopped(run, llama, text, tmp_path, monkeypatch):
    """What SIGTERM leaves in a run that has scored some windows: the output that was asked for."""
    from quantkit.layer_sensitivity.progress import ResumeState

    add, rounds = ResumeState.add, []

    def stop_soon(self, *arguments):
        rounds.append(1)
        if len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ResumeState, "add", stop_soon)
        done = run(*command(llama, text, tmp_path / "r.json"))
    assert done.exit_code == 75 and re.search(
        r"stopped with \d of 5 windows scored; run it again with .*resume", done.stderr
    ), done.output
    return tmp_path / "r.json"


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_scores_no_window_twice(
    run, llama, text, whole, stopped, monkeypatch
):
    from quantkit.layer_sensitivity.progress import ResumeState

    assert not stopped.exists() and stopped.with_name("r.json.partial").is_dir()
    kept = [
        json.loads(path.read_text())
        for path in stopped.with_name("r.json.partial").glob("scores-*.json")
    ]
    add, scored = ResumeState.add, []
    monkeypatch.setattr(
        ResumeState,
        "add",
        lambda self, walk, found, *rest: (
            scored.extend((walk, window) for window in found) or add(self, walk, found, *rest)
        ),
    )
    done = run(*command(llama, text, stopped, "--resume"))
    assert done.exit_code == 0, done.output
    assert (
        stopped.read_bytes() == whole.read_bytes()
        and not stopped.with_name("r.json.partial").exists()
    )
    assert len(scored) == len(set(scored)) == 10 - sum(map(len, kept)) < 10
    again = run(*command(llama, text, stopped, "--resume"))
    assert (
        again.exit_code == 0
        and "already complete" in again.stderr
        and stopped.read_bytes() == whole.read_bytes()
    )


@pytest.mark.slow
def test_other_work_is_not_gone_on_with(run, llama, text, stopped, tmp_path):
    plain = run(*command(llama, text, stopped))
    assert (
        plain.exit_code == 1
        and "left by an interrupted run; continue it with --resume" in plain.stderr
    )
    for more, words in [
        (("--max-tokens", 256), "a different --max-tokens, different windows"),
        (("--seed", 1), "a different seed"),
    ]:
        refused = run(*command(llama, text, stopped, *more, "--resume"))
        assert refused.exit_code == 1 and words in refused.stderr, refused.output
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: int8-dynamic")
    arguments = [
        part
        for part in command(llama, text, stopped, "--recipe", recipe, "--resume")
        if part not in ("--scheme", "fp8-dynamic")
    ]
    refused = run(*arguments)
    assert refused.exit_code == 1 and "with a different recipe" in refused.stderr
    # A budget decides no score.
    assert run(*command(llama, text, stopped, "--max-size", "+5%", "--resume")).exit_code == 0
    refused = run(*command(llama, text, stopped, "--max-size", "+9%", "--resume"))
    assert refused.exit_code == 1 and "was made with a different --max-size" in refused.stderr


def test_resume_needs_its_output(run, llama, text, tmp_path):
    assert (
        run("sensitivity", llama, "--scheme", "fp8-dynamic", "--data", text, "--resume").exit_code
        == 2
    )
    assert (
        run(
            "sensitivity",
            llama,
            "--from",
            tmp_path / "r.json",
            "-o",
            tmp_path / "o.json",
            "--resume",
        ).exit_code
        == 2
    )


@pytest.mark.slow
def test_two_processes_find_what_one_does(llama, text, whole, tmp_path):
    """To the last bit: a window's scores are made by one process, and sums over windows in their
    order.
    """
    two = ranks(*command(llama, text, tmp_path / "two.json"))
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "two.json").read_bytes() == whole.read_bytes()
    assert two.stdout.count("the worst layer groups with another scheme") == 1


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_left(llama, text, whole, stopped):
    two = ranks(*command(llama, text, stopped, "--resume"))
    assert two.returncode == 0, two.stderr
    assert (
        stopped.read_bytes() == whole.read_bytes()
        and not stopped.with_name("r.json.partial").exists()
    )


@pytest.mark.slow
def test_a_refusal_is_said_once(llama, text, tmp_path):
    refused = ranks(*command(llama, text, tmp_path / "r.json", "--max-size", "1kB"))
    assert (
        refused.returncode != 0 and len(re.findall("Error: .*the smallest is", refused.stderr)) == 1
    ), refused.stderr
