"""The default scheme: the one that is served in the most places."""

import pytest
from tiny_llama import make_llama
from tiny_models import make_model

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RecipeError
from quantkit.exporter.default_scheme import default_scheme
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.runtimes import runtime_problems
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.serving import HARDWARE, RUNTIMES


def chosen(model, **where) -> str:
    return default_scheme(Checkpoint.open(model), **where).scheme.name


def test_fp8_dynamic_without_anything_in_mind_and_its_reason_names_all_runtimes(llama):
    choice = default_scheme(Checkpoint.open(llama))
    assert choice.scheme.name == "fp8-dynamic"
    assert all(name in choice.reason for name in (*RUNTIMES, *HARDWARE))


@pytest.mark.parametrize(
    ("hardware", "scheme"),
    [
        ("turing", "int8-dynamic"),
        ("ampere", "int8-dynamic"),
        ("cpu", "int8-dynamic"),
        ("blackwell", "fp8-dynamic"),
    ],
)
def test_hardware_that_computes_it_natively_comes_first(hardware, scheme, llama):
    assert chosen(llama, hardware=hardware) == scheme


def test_what_a_named_runtime_misreads_is_no_choice(llama):
    assert chosen(llama, runtime="tensorrt-llm", hardware="ampere") == "fp8-dynamic"


def test_a_format_of_one_scheme_decides(llama):
    assert (
        chosen(llama, file_format="fp8") == "fp8-block"
        and chosen(llama, file_format="modelopt") == "fp8-tensor"
    )


def test_blocks_stay_blocks(llama, export_to):
    assert chosen(export_to("fp8-block", file_format="fp8")) == "fp8-block"


def test_shapes_and_experts_that_other_schemes_do_not_fit(tmp_path):
    assert (
        chosen(
            make_llama(
                tmp_path / "odd",
                hidden_size=72,
                intermediate_size=250,
                num_attention_heads=9,
                num_key_value_heads=3,
            )
        )
        == "fp8-dynamic"
    )
    make_model(tmp_path / "moe", "qwen3_moe")
    assert chosen(tmp_path / "moe", runtime="transformers", hardware="ampere") == "fp8-dynamic"


def test_a_model_that_nothing_serves_is_refused(llama, monkeypatch):
    monkeypatch.setattr("quantkit.exporter.default_scheme.runtime_problems", lambda *_: ["no"])
    with pytest.raises(RecipeError, match="`recipe`"):
        chosen(llama, runtime="vllm")


@pytest.mark.parametrize("kind", ["gpt2", "granitemoe", "llama4_text"])
def test_the_reason_names_no_runtime_that_would_refuse_the_export(kind, tmp_path):
    """Weights stored transposed, and experts stacked in one tensor, are Linears to the choice as
    they are to the export.
    """
    make_model(tmp_path / kind, kind, times=2)
    choice = default_scheme(Checkpoint.open(tmp_path / kind))
    plan = plan_export(ExportOptions(tmp_path / kind, tmp_path / "out", Recipe(choice.scheme)))
    said = {runtime for runtime in RUNTIMES if runtime in choice.reason.partition(" load")[0]}
    assert said == {
        runtime for runtime in RUNTIMES if not runtime_problems(runtime, plan.linears.values(), ())
    }
