"""Exports that are killed: whatever the moment, OUT is absent or whole, and the same command with
--resume ends with the bytes of an undisturbed run.

A driver process imports torch and quantkit once and forks each attempt, so that fifty kills take
seconds. Some kills come at a random time, the others at each file-system call in turn: those hit
the moments between two renames, which random ones miss.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import FORKING, FULL_DISKS, RESUMING, drive
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

LAYERS, WIDTH = 30, 192


def make_model(path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(64, WIDTH).bfloat16(),
        "model.norm.weight": torch.ones(WIDTH).bfloat16(),
    }
    for layer in range(LAYERS):
        tensors |= {
            f"model.layers.{layer}.mlp.{name}.weight": torch.randn(WIDTH, WIDTH).bfloat16()
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(WIDTH).bfloat16()
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("# A model\n")
    return path


# Functions that the tests' programs share. `attempt` starts an export in a child; `found` says what
# lies at OUT.
DRIVER = (
    FORKING
    + """
import quantkit.ops
from quantkit.exporter.write import export
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.schemes.scheme import QuantScheme
from quantkit.schemes.recipe import Recipe

model, place = Path(sys.argv[1]), Path(sys.argv[2])
FP8, INT8 = Recipe(QuantScheme.parse("fp8-dynamic")), Recipe(QuantScheme.parse("int8-dynamic"))


def attempt(out, number=0, recipe=FP8, **options):
    chosen = ExportOptions(model, out, recipe, max_shard_bytes=80_000, **options)
    return attempt_of(lambda: export(plan_export(chosen)), number)


def found(out, **wholes):
    # The name of the whole directory that OUT equals, "absent", or what is wrong.
    if not out.exists():
        return "absent"
    there = tree(out)
    odd = {
        name: sorted(
            file for file in there.keys() | whole.keys() if there.get(file) != whole.get(file)
        )[:3]
        for name, whole in wholes.items()
    }
    equal = [name for name in wholes if not odd[name]]
    return equal[0] if equal else f"in part; from these it differs in {odd}"


def clean():
    for path in place.iterdir():
        if path.name.startswith("out"):
            shutil.rmtree(path)
"""
)


RANDOM_KILLS = """
whole = place / "whole"
assert ended(attempt(whole)) == 0
expected, duration = tree(whole), float((place / "seconds").read_text())
random.seed(7)
out = place / "out"
report = {"killed": 0, "resumed and killed": 0, "wrong": []}
for number in range(50):
    # Spread over the time that a run takes, which is learnt anew from each that is not hit: other
    # work may slow this machine down, or cease.
    wait = duration * random.random()
    child, left = attempt(out), random.choice([0, 0, 1, 3])
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    report["killed"] += code == -9
    if code == 0:
        duration = (duration + float((place / "seconds").read_text())) / 2
    for again in range(9):
        state = found(out, whole=expected)
        if state not in ("absent", "whole"):
            report["wrong"].append(f"kill {number}: OUT is there {state}")
        if code == 0:
            break
        child = attempt(out, resume=True)
        if left:
            left -= 1
            time.sleep(random.random() * duration / 2)
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        report["resumed and killed"] += code == -9
        if code == 1:
            report["wrong"].append(f"kill {number}: --resume refuses: {said()}")
            break
    if code == 0 and found(out, whole=expected) != "whole":
        state = found(out, whole=expected)
        report["wrong"].append(f"kill {number}: the resumed run ended with OUT {state}")
    rest = sorted(path.name for path in place.glob("out*") if path != out)
    if code == 0 and rest:
        report["wrong"].append(f"kill {number}: {rest} are left")
    clean()
print(json.dumps(report))
"""


def test_killed_export_resumes_to_the_same_bytes_whatever_the_moment(tmp_path):
    report = drive(tmp_path, DRIVER + RANDOM_KILLS, make_model(tmp_path / "model"))
    assert report["killed"] >= 25 and report["resumed and killed"] >= 10, report
    assert not report["wrong"], "\n".join(report["wrong"])


KILL_AT_EACH_CALL = """
whole = place / "whole"
assert ended(attempt(whole)) == 0
expected, calls = tree(whole), int((place / "calls").read_text())
out, report = place / "out", {"calls": calls, "killed": 0, "wrong": []}
# Every call of the beginning and of the end, and some between: shards are written alike.
for number in [*range(1, 12), *range(12, calls - 12, 30), *range(calls - 12, calls + 1)]:
    code = ended(attempt(out, number))
    report["killed"] += code == -9
    note, state = f"call {number} of {calls}", found(out, whole=expected)
    if state not in ("absent", "whole"):
        report["wrong"].append(f"{note}: OUT is there {state}")
    code = ended(attempt(out, resume=True))
    state = found(out, whole=expected)
    if code:
        report["wrong"].append(f"{note}: --resume refuses: {said()}")
    elif state != "whole":
        report["wrong"].append(f"{note}: the resumed run ended with OUT {state}")
    rest = sorted(path.name for path in place.glob("out*") if path != out)
    if not code and rest:
        report["wrong"].append(f"{note}: {rest} are left")
    clean()
print(json.dumps(report))
"""


def test_export_killed_at_any_change_of_the_file_system_resumes_to_the_same_bytes(tmp_path):
    report = drive(tmp_path, DRIVER + KILL_AT_EACH_CALL, make_model(tmp_path / "model"))
    assert report["killed"] >= 25, report
    assert not report["wrong"], "\n".join(report["wrong"])


OVERWRITING = """
old, new = place / "old", place / "new"
assert ended(attempt(old, recipe=INT8)) == 0 and ended(attempt(new)) == 0
olds, news = tree(old), tree(new)
out = place / "out"
shutil.copytree(old, out)
assert ended(attempt(out, overwrite=True)) == 0
calls, report = int((place / "calls").read_text()), {"killed": 0, "wrong": []}
clean()
swap = calls - len(olds)  # about there; after it the old files are removed one by one
near = range(swap - 12, swap + 6)
for number in [*range(1, 8), *range(8, near[0], 60), *near, *range(swap + 6, calls, 15), calls]:
    shutil.copytree(old, out)
    code = ended(attempt(out, number, overwrite=True))
    report["killed"] += code == -9
    note, state = f"call {number} of {calls}", found(out, old=olds, new=news)
    if state not in ("old", "new"):
        report["wrong"].append(f"{note}: OUT is {state}")
    code = ended(attempt(out, resume=True, overwrite=True))
    if code:
        report["wrong"].append(f"{note}: --resume --overwrite refuses: {said()}")
        code = ended(attempt(out, overwrite=True))
    state = found(out, old=olds, new=news)
    if code or state != "new":
        report["wrong"].append(f"{note}: the next run ends with {code}, OUT is {state}")
    rest = sorted(path.name for path in place.glob("out*") if path != out)
    if not code and rest:
        report["wrong"].append(f"{note}: {rest} are left")
    clean()
print(json.dumps(report))
"""


def test_output_that_is_being_overwritten_is_the_old_one_or_the_new_one(tmp_path):
    report = drive(tmp_path, DRIVER + OVERWRITING, make_model(tmp_path / "model"))
    assert report["killed"] >= 25, report
    assert not report["wrong"], "\n".join(report["wrong"])


COMMAND = """
import quantkit.exporter.write
from quantkit.cli.main import main

model, place = Path(sys.argv[1]), Path(sys.argv[2])


def work(out, resume=False):
    arguments = [model, "-o", out, "--scheme", "fp8-dynamic", "--max-shard-size", "80kB", "-q"]
    main(["export", *map(str, arguments), *(["--resume"] if resume else [])])
"""


def test_a_disk_that_fills_loses_no_finished_shard(tmp_path):
    """Wherever in the export: an error of one line, and --resume ends with the same bytes."""
    rooms = "rooms = [1, *range(nbytes // 9, nbytes, nbytes // 9), nbytes - 1]"
    report = drive(
        tmp_path, FORKING + COMMAND + RESUMING + rooms + FULL_DISKS, make_model(tmp_path / "model")
    )
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["faults"] >= 10, report


def test_killed_command_resumes_to_the_same_bytes(run, tmp_path):
    """The real command, once."""
    model = make_model(tmp_path / "model")
    command = ["export", str(model), "--scheme", "fp8-dynamic", "--max-shard-size", "80kB", "-q"]
    assert run(*command, "-o", tmp_path / "whole").exit_code == 0
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "quantkit", *command, "-o", str(out)])
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and len(list((tmp_path / "out.partial").glob("*.safetensors"))) < 3
    ):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert run(*command, "-o", out, "--resume").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(
        (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]
