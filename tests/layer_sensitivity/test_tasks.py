"""Models that don't predict the next token are scored by their own loss: masked language models by
their hidden tokens, encoders with decoders by the target.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_llama import make_tokenizer
from tiny_models import MASKED, make_model

from quantkit.data.windows import Window
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.final_hidden_states import make_final_hidden_states
from quantkit.evaluation.metrics import KLD, PPL_DELTA
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.quantized_model import load_quantized_model
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.layer_sensitivity.base_model import open_base_model
from quantkit.layer_sensitivity.choices import RECIPE, Choices
from quantkit.layer_sensitivity.layer_swap import LayerSwapper
from quantkit.layer_sensitivity.options import SensitivityOptions
from quantkit.layer_sensitivity.passes import open_layer_groups
from quantkit.layer_sensitivity.result import Sensitivity
from quantkit.layer_sensitivity.score import score_sensitivity
from quantkit.layer_sensitivity.variants import run_variants
from quantkit.models import saved_states
from quantkit.schemes.recipe import Recipe

pytestmark = pytest.mark.slow  # each test runs several commands on a model

INT8 = Recipe.from_mapping({"scheme": "int8-dynamic"}, "test")
LENGTH = 24


@pytest.fixture(scope="module", params=["llama", "bert", "roberta", "t5", "bart"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tasks") / kind
    make_model(place, kind, vocab_size=make_tokenizer(place, mask=kind in MASKED))
    return place


@pytest.fixture(scope="module")
def short_text(model, _text_master, tmp_path_factory) -> Path:
    """Two windows, so that the drawn ones of `sensitivity` are all that `eval` takes."""
    from quantkit.data.tokenizer import load_tokenizer

    tokenizer, path = load_tokenizer(model), tmp_path_factory.mktemp("texts") / "short.txt"
    tokens = tokenizer(_text_master.read_text(), add_special_tokens=False).input_ids
    path.write_text(tokenizer.decode(tokens[: 2 * LENGTH + LENGTH // 2]))
    return path


@pytest.fixture(scope="module")
def result(model, short_text) -> Sensitivity:
    return score_sensitivity(
        SensitivityOptions(
            model, INT8, data=(str(short_text),), max_tokens=2 * LENGTH, seq_len=LENGTH
        )
    )


def test_a_groups_score_is_what_eval_finds_when_it_is_exported_alone(
    model, kind, short_text, result, tmp_path
):
    groups = result.scores.groups
    everything = [name for group in groups for name in group.linears]
    # Of an encoder and a decoder: one group of each.
    for group in (groups[0], groups[-1]):
        others = [name for name in everything if name not in group.linears]
        recipe = Recipe.from_mapping({"scheme": "int8-dynamic", "ignore": others}, "test")
        out = tmp_path / re.sub(r"\W+", "-", group.name)
        export(plan_export(ExportOptions(model, out, recipe)))
        found = evaluate(
            EvaluationOptions(model, (out,), (str(short_text),), seq_len=LENGTH, cache=False)
        )
        assert result.tokens_scored == sum(found.window_tokens)
        metrics, scored = found.quants[0].metrics, group.choices[RECIPE].metrics
        assert scored.kld == pytest.approx(metrics[KLD].mean, rel=1e-9) and scored.kld > 0
        assert scored.ppl_delta_pct.value == pytest.approx(metrics[PPL_DELTA].value, rel=1e-6)


def test_each_variant_is_what_the_checkpoint_serves_and_none_quantized_is_the_model(
    model, kind, tmp_path
):
    """To the last bit: a decoder reads what its own variant's encoder made."""
    plan = plan_export(ExportOptions(model, tmp_path / "out", INT8))
    export(plan)
    groups = open_layer_groups(Choices(plan), False, "cpu").groups
    assert {name for group in groups for name in group.linears} == set(plan.linears)
    window, first_alone = Window(tuple(range(2, 40))), (1, *[0] * (len(groups) - 1))
    with torch.inference_mode():
        base = open_base_model(plan, False, "cpu")
        states = run_variants(
            base.blocks,
            {0: torch.tensor([window.tokens])},
            [(0,) * len(groups), first_alone, (1,) * len(groups)],
            [group.block for group in groups],
            LayerSwapper(base, Choices(plan), groups).swaps,
        )
        for variant, path in ((0, model), (2, tmp_path / "out")):
            expected = make_final_hidden_states(
                load_quantized_model(path, "cpu"), {0: window}, len(window.tokens)
            )
            assert torch.equal(states.get(variant, 0), expected.states.get(0))
            expected.close()
        assert not torch.equal(states.get(0, 0), states.get(1, 0))
    states.close()


def test_groups_of_all_blocks_have_kinds_that_tell_them_apart(result):
    groups = result.scores.groups
    for block in {group.block for group in groups}:
        kinds = [group.kind for group in groups if group.block == block]
        assert len(kinds) == len(set(kinds))
        assert not any(re.search(r"\d+\.|\.\d+", kind) for kind in kinds)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_walk_that_is_killed_goes_on_to_the_same_bytes(
    model, short_text, share, tmp_path, monkeypatch
):
    """Also in a decoder, whose encoder doesn't run again."""
    monkeypatch.setattr(saved_states, "SECONDS_BETWEEN_SAVES", 0.0)

    def options(name: str, resume: bool = False) -> SensitivityOptions:
        return SensitivityOptions(
            model,
            INT8,
            data=(str(short_text),),
            max_tokens=2 * LENGTH,
            seq_len=LENGTH,
            output=tmp_path / name,
            resume=resume,
        )

    score_sensitivity(options("whole.json"))

    def die(name: str, done: float, total: float) -> None:
        if name == "restored" and done > share * total:
            raise Killed

    with pytest.raises(Killed):
        score_sensitivity(options("r.json"), die)
    reached: list[tuple[str, float]] = []
    score_sensitivity(
        options("r.json", resume=True), lambda name, done, total: reached.append((name, done))
    )
    first = next(done for name, done in reached if name == "restored")
    assert not any(name == "groups" for name, _ in reached) and first > 1
    whole, resumed = (
        json.loads((tmp_path / name).read_text()) for name in ("whole.json", "r.json")
    )
    assert resumed == whole
