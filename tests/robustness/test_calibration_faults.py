"""Calibrations that are killed, stopped, shared or out of disk: whatever happens, CALIB is absent
or whole, and --resume ends with the bytes of an undisturbed run.
"""

import json
import re

import pytest
from faults import FORKING, FULL_DISKS, KILLS_AT_CALLS, RANDOM_KILLS, RESUMING, drive
from processes import DYING, command, contents, quantkit, ranks, torchrun
from tiny_llama import make_llama, make_text, make_tokenizer
from tiny_models import TARGET, make_model

pytestmark = pytest.mark.slow

LAYERS = 4

CALIBRATING = (
    FORKING
    + """
import transformers
transformers.utils.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
import quantkit.models.encoder_decoder, quantkit.calibration.hooks
from quantkit.models import saved_states
from quantkit.cli.main import main

model, text, recipe, place = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])


def work(out, seconds_between_saves=0.0, resume=False, memory=None):
    saved_states.SECONDS_BETWEEN_SAVES = seconds_between_saves
    torch.set_num_threads(2)
    arguments = [model, "-o", out, "--data", text, "--num-samples", 6, "--seq-len", 32]
    arguments += ["--batch-size", 1, "--device", "cpu", "-q"]
    arguments += ["--recipe", recipe] if recipe else []
    arguments += ["--resume"] if resume else []
    arguments += ["--memory", memory] if memory else []
    main(["calibrate", *map(str, arguments)])
"""
    + RESUMING
    + """

def options():
    return {
        "seconds_between_saves": random.choice([0.0, 1000.0]),
        "memory": random.choice([None, "1kB"]),
    }
"""
)


def calibrating(tmp_path, program: str, recipe: object = None, kind: str = "llama") -> dict:
    model, text, file = tmp_path / "model", tmp_path / "text.txt", tmp_path / "recipe.yaml"
    if kind == "llama":
        make_llama(model, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96)
    else:
        make_model(model, kind, vocab_size=make_tokenizer(model))
    text.write_text(make_text(1500))
    file.write_text(json.dumps(recipe))  # which is YAML too
    return drive(tmp_path, CALIBRATING + program, model, text, file if recipe else "")


def test_twenty_random_kills_end_with_the_same_bytes(tmp_path):
    report = calibrating(tmp_path, f"KILLS = 20{RANDOM_KILLS}")
    assert report["wrong"] == [] and report["files"] == LAYERS + 1
    assert report["faults"] >= 20, report


def test_so_do_kills_of_a_run_that_chooses_weights(tmp_path):
    recipe = {"scheme": "int8-dynamic", "algorithms": ["smoothquant", "gptq"]}
    report = calibrating(tmp_path, f"KILLS = 6{RANDOM_KILLS}", recipe)
    assert report["wrong"] == [] and report["files"] == 2 * LAYERS + 1
    assert report["faults"] >= 6, report


@pytest.mark.parametrize("kind", TARGET)
def test_so_do_kills_of_an_encoder_with_a_decoder(kind, tmp_path):
    report = calibrating(tmp_path, f"KILLS = 6{RANDOM_KILLS}", kind=kind)
    assert report["wrong"] == [] and report["files"] == LAYERS + 1  # two blocks each
    assert report["faults"] >= 6, report


def test_a_kill_before_any_file_system_call_ends_with_the_same_bytes(tmp_path):
    # Each of the first block and of the end; the blocks between repeat the same calls.
    numbers = (
        "numbers = [number for number in range(1, count + 1) if number < 24 or number > count - 16]"
    )
    report = calibrating(tmp_path, numbers + KILLS_AT_CALLS)
    assert report["wrong"] == []
    assert report["faults"] == min(39, report["calls"]) and report["calls"] > 40


def test_a_disk_that_fills_loses_nothing_that_was_finished(tmp_path):
    """Wherever in the run: an error of one line, and --resume ends with the same bytes."""
    report = calibrating(
        tmp_path, f"rooms = [1, *range(nbytes // 6, nbytes, nbytes // 6), nbytes - 1]{FULL_DISKS}"
    )
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["faults"] >= 7, report


def test_two_processes_measure_what_one_does(llama, text, tmp_path):
    """Maxima and counts to the last bit; sums of squares too, where adding float64 in another order
    loses nothing that is seen here.
    """
    import torch
    from safetensors.torch import load_file

    one = quantkit(*command(llama, text, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = ranks(*command(llama, text, tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("statistics of 8 inputs") == 1  # only the first one speaks
    assert (tmp_path / "two" / "calibration.json").exists()
    described = [
        json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two")
    ]
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


def test_a_rank_that_dies_ends_the_job_with_its_reason_and_resume_continues(llama, text, tmp_path):
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    arguments = command(llama, text, tmp_path / "c")
    died = torchrun(str(program), *arguments, DIE="1")
    assert died.returncode != 0 and "down_proj holds NaN" in died.stderr
    assert not (tmp_path / "c").exists()
    assert "block-00000.safetensors" in (tmp_path / "c.partial" / "progress.json").read_text()
    refused = torchrun(str(program), *arguments)
    assert refused.returncode != 0 and len(re.findall(r"Error: .*--resume", refused.stderr)) == 1
    again = torchrun(str(program), *arguments, "--resume")
    assert again.returncode == 0, again.stderr
    # a thread of gloo's that frees a tensor while Python ends would abort the process
    assert again.stderr.count("gloo is gone") == 2, again.stderr
    whole = quantkit(*command(llama, text, tmp_path / "w"))
    assert whole.returncode == 0, whole.stderr
    ours, theirs = contents(tmp_path / "c"), contents(tmp_path / "w")
    assert (
        ours.keys() == theirs.keys()
        and ours["calibration.json"].split(b'"files"')[0]
        == theirs["calibration.json"].split(b'"files"')[0]
    )
