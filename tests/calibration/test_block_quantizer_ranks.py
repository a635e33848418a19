"""Weights chosen by several processes: what one process chooses, up to the order in which float32
sums are added up, and resumed to the same bytes.
"""

import json

import pytest
import torch
from chosen_weights import kld
from processes import DYING, command, contents, quantkit, ranks, torchrun
from safetensors.torch import load_file
from tiny_llama import make_llama

from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.schemes.recipe import Recipe

pytestmark = pytest.mark.slow

ALL = {
    "scheme": "int8-dynamic",
    "algorithms": [
        {"rotation": {"untie": True}},
        "smoothquant",
        "scale_search",
        "gptq",
        "bias_correction",
    ],
}


@pytest.fixture
def model(tmp_path):
    return make_llama(tmp_path / "model", attention_bias=True)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(ALL))
    return tmp_path / "recipe.yaml"


def test_two_processes_choose_what_one_does(model, recipe, text, tmp_path):
    """In the first set only rounding of sums differs: hardly a code does. Behind it inputs differ
    by such codes, so that more and more do: scales agree, and the loss must be the same.
    """
    for name, launch in (("one", quantkit), ("two", ranks)):
        done = launch(*command(model, text, tmp_path / name, "--recipe", recipe))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("gptq: codes of 14 Linears") == 1
    one, two = (load_file(tmp_path / name / "weights-00000.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    codes = {
        name.removesuffix(".weight"): (tensor.int() - two[name].int()).abs()
        for name, tensor in one.items()
        if tensor.dtype == torch.int8
    }
    assert len(codes) == 7
    for name, differing in codes.items():
        assert (
            float((differing > 0).float().mean())
            < (0.001 if name.endswith(("q_proj", "k_proj", "v_proj")) else 0.25)
            and int(differing.max()) <= 2
        ), name
    for name, tensor in one.items():
        if tensor.dtype == torch.int8:
            continue
        module, _, leaf = name.rpartition(".")
        # A bias takes the mean error of the codes of its row: where these differ it does too.
        same = codes[module].sum(1) == 0 if leaf == "bias" and module in codes else slice(None)
        torch.testing.assert_close(
            two[name][same].float(), tensor[same].float(), rtol=1e-2, atol=1e-4, msg=name
        )
    outer = [
        (tmp_path / name / "weights-outer.safetensors").read_bytes() for name in ("one", "two")
    ]
    assert outer[0] == outer[1]
    losses = []
    for name in ("one", "two"):
        export(
            plan_export(
                ExportOptions(model, tmp_path / f"out-{name}", Recipe.load(recipe), tmp_path / name)
            )
        )
        losses.append(kld(model, tmp_path / f"out-{name}", text))
    assert losses[1] == pytest.approx(losses[0], rel=0.25)


def test_processes_that_died_go_on_to_the_same_bytes(model, recipe, text, tmp_path):
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    whole = ranks(*command(model, text, tmp_path / "whole", "--recipe", recipe))
    assert whole.returncode == 0, whole.stderr
    arguments = command(model, text, tmp_path / "c", "--recipe", recipe)
    died = torchrun(str(program), *arguments, DIE="1")
    assert died.returncode != 0 and "down_proj holds NaN" in died.stderr
    again = torchrun(str(program), *arguments, "--resume")
    assert again.returncode == 0, again.stderr
    ours, theirs = contents(tmp_path / "c"), contents(tmp_path / "whole")
    assert ours == theirs


def test_a_rotation_that_cannot_be_done_is_refused_once(text, recipe, tmp_path):
    from tiny_llama import make_tokenizer
    from tiny_models import make_model

    make_model(tmp_path / "opt", "gpt_neox", vocab_size=384)
    make_tokenizer(tmp_path / "opt")
    refused = ranks(*command(tmp_path / "opt", text, tmp_path / "c", "--recipe", recipe))
    assert refused.returncode != 0 and refused.stderr.count("Error: rotation can't be done") == 1, (
        refused.stderr
    )
    assert not (tmp_path / "c.partial").exists()


def test_a_process_without_windows_holds_the_same_weights(model, text, tmp_path):
    """With one window all sums are one process's, so that codes and statistics are too, whoever
    made and sent them.
    """
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text(json.dumps({"scheme": "fp8-dynamic", "algorithms": ["smoothquant", "gptq"]}))
    arguments = ("--recipe", recipe, "--num-samples", 1)
    for name, launch in (("one", quantkit), ("two", ranks)):
        done = launch(*command(model, text, tmp_path / name, *arguments))
        assert done.returncode == 0, done.stderr
    for number in range(2):
        ours, theirs = (
            (tmp_path / name / f"weights-{number:05d}.safetensors").read_bytes()
            for name in ("one", "two")
        )
        assert ours == theirs
