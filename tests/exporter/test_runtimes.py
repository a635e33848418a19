"""What runtimes and hardware refuse."""

from dataclasses import replace

import pytest

from quantkit.errors import RuntimeLimitError
from quantkit.exporter.runtimes import as_computed, hardware_mode, runtime_problems
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, TOKEN, QuantSpec, block, group
from quantkit.schemes.scheme import CATALOGUE, SCHEMES, QuantScheme
from quantkit.schemes.serving import HARDWARE, RUNTIMES

FP8 = [name for name in SCHEMES if "fp8" in name]
FP8_WITH_INPUTS = [name for name in FP8 if SCHEMES[name].input is not None]


def linear(name: str, scheme: str, rows: int = 256, columns: int = 256) -> QuantizedLinearInfo:
    return QuantizedLinearInfo(f"model.layers.0.{name}", (rows, columns), SCHEMES[scheme])


def attention(scheme: str, rows: int = 256, columns: int = 256) -> list[QuantizedLinearInfo]:
    return [
        linear(f"self_attn.{leaf}", scheme, rows, columns)
        for leaf in ("q_proj", "k_proj", "v_proj")
    ]


# Who loads what


def test_every_row_tells_of_every_runtime_and_hardware():
    for row in CATALOGUE.values():
        assert set(row.runtimes) == set(RUNTIMES)
        assert set(row.hardware) == set(HARDWARE)
        assert set(row.refuses_experts) <= set(RUNTIMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_has_its_row_whatever_it_is_called(name):
    renamed = QuantScheme("renamed", SCHEMES[name].weight, SCHEMES[name].input)
    assert renamed.row is CATALOGUE[name]


def test_int8_in_groups_belongs_to_the_packed_family():
    groups = QuantScheme.parse(
        {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}}
    )
    assert groups.row is CATALOGUE["int8-weight-only"]
    assert runtime_problems("vllm", [QuantizedLinearInfo("a", (64, 64), groups)], []) == []


@pytest.mark.parametrize(
    "description",
    [
        {"weights": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64}},
        {
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [64, 64],
            }
        },
        {
            "weights": {"num_bits": 8, "type": "int", "strategy": "tensor"},
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        },
    ],
    ids=str,
)
def test_a_scheme_of_no_row_is_unknown_to_every_runtime(description):
    scheme = QuantScheme.parse(description)
    assert scheme.row is None
    for runtime in RUNTIMES:
        (problem,) = runtime_problems(runtime, [QuantizedLinearInfo("a", (64, 64), scheme)], [])
        assert "not known to load" in problem


@pytest.mark.parametrize(
    ("weight", "inputs", "like"),
    [
        (QuantSpec(FP8_E4M3, TENSOR), QuantSpec(FP8_E4M3, TOKEN, dynamic=True), "fp8-dynamic"),
        (QuantSpec(FP8_E4M3, block(64, 64)), QuantSpec(FP8_E4M3, group(64), True), "fp8-block"),
        (QuantSpec(FP8_E4M3, group(64)), QuantSpec(FP8_E4M3, TENSOR), "fp8-static"),
        (QuantSpec(FP8_E4M3, block(64, 64)), None, "fp8-weight-only"),
        (QuantSpec(FP8_E4M3, group(32), scale_format=E8M0), None, "mxfp8"),
        (QuantSpec(INT8, TENSOR), QuantSpec(INT8, TOKEN, dynamic=True), "int8-dynamic"),
        (QuantSpec(INT8, TENSOR), None, "int8-weight-only"),
    ],
    ids=lambda value: str(value),
)
def test_other_granularities_run_where_schemes_of_the_same_kernel_do(weight, inputs, like):
    scheme = QuantScheme.of(weight, inputs)
    for hardware in HARDWARE:
        assert hardware_mode(scheme, hardware) == hardware_mode(SCHEMES[like], hardware)


def test_hardware_of_an_unknown_number_format_is_not_guessed():
    toy = replace(INT8, name="INT6", bits=6)
    scheme = QuantScheme("toy", QuantSpec(toy, CHANNEL))
    for hardware in HARDWARE:
        with pytest.raises(RuntimeLimitError, match="not known"):
            as_computed(scheme, hardware)


@pytest.mark.parametrize("name", SCHEMES)
def test_vllm_loads_every_scheme_of_even_sizes(name):
    assert runtime_problems("vllm", attention(name), ["lm_head"]) == []


@pytest.mark.parametrize(
    "runtime, refused",
    [
        ("vllm", set()),
        ("transformers", set()),
        ("sglang", {"mxfp8", "int8-static"}),
        ("tensorrt-llm", set(SCHEMES) - {"fp8-dynamic", "fp8-block"}),
    ],
)
def test_each_runtime_refuses_what_it_cannot_load(runtime, refused):
    assert {name for name in SCHEMES if runtime_problems(runtime, attention(name), [])} == refused


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static", "int8-weight-only"])
def test_tensorrt_llm_refuses_int8(name):
    (problem,) = runtime_problems("tensorrt-llm", attention(name), [])
    assert "tensorrt-llm" in problem
    assert name in problem


def test_a_problem_of_one_scheme_is_told_once():
    mixed = [*attention("int8-dynamic"), linear("mlp.down_proj", "fp8-dynamic")]
    assert len(runtime_problems("tensorrt-llm", mixed, [])) == 1


# Sizes


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_blocks_of_128_on_576_outputs_are_refused(runtime):
    (problem,) = runtime_problems(runtime, attention("fp8-block", 576, 576), [])
    assert "out_features 576" in problem
    assert "128" in problem
    assert runtime_problems(runtime, attention("fp8-block", 640, 576), []) == []


def test_the_last_of_a_fused_set_may_have_any_size():
    q_proj, k_proj, v_proj = attention("fp8-block")
    assert (
        runtime_problems("vllm", [q_proj, k_proj, linear("self_attn.v_proj", "fp8-block", 192)], [])
        == []
    )
    assert runtime_problems(
        "vllm", [q_proj, linear("self_attn.k_proj", "fp8-block", 192), v_proj], []
    )


def test_a_linear_outside_fused_sets_may_have_any_size_in_vllm():
    assert runtime_problems("vllm", [linear("mlp.down_proj", "fp8-block", 576, 200)], []) == []


def test_transformers_needs_even_inputs_of_block_schemes_only():
    (problem,) = runtime_problems(
        "transformers", [linear("mlp.down_proj", "fp8-block", 256, 576)], []
    )
    assert "in_features 576" in problem
    assert (
        runtime_problems("transformers", [linear("mlp.down_proj", "fp8-block", 576, 256)], []) == []
    )
    assert (
        runtime_problems("transformers", [linear("mlp.down_proj", "fp8-dynamic", 576, 576)], [])
        == []
    )


# Fused sets


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_a_fused_set_of_two_schemes_is_a_problem(runtime):
    q_proj, k_proj, _ = attention("fp8-dynamic")
    (problem,) = runtime_problems(
        runtime, [q_proj, k_proj, linear("self_attn.v_proj", "int8-dynamic")], []
    )
    assert "q_proj fp8-dynamic" in problem
    assert "v_proj int8-dynamic" in problem


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_a_fused_set_quantized_in_part_is_a_problem(runtime):
    gate = [linear("mlp.gate_proj", "fp8-dynamic")]
    (problem,) = runtime_problems(runtime, gate, ["model.layers.0.mlp.up_proj"])
    assert "up_proj unquantized" in problem


def test_a_fused_set_left_as_a_whole_is_none():
    left = [info.name for info in attention("fp8-dynamic")]
    assert runtime_problems("vllm", [linear("mlp.down_proj", "fp8-dynamic")], left) == []


def test_transformers_and_tensorrt_llm_merge_nothing():
    for runtime in ("transformers", "tensorrt-llm"):
        assert (
            runtime_problems(
                runtime, [linear("mlp.gate_proj", "fp8-dynamic")], ["model.layers.0.mlp.up_proj"]
            )
            == []
        )


# Experts


@pytest.mark.parametrize(
    "runtime, refused",
    [
        ("vllm", {"fp8-static", "fp8-weight-only", "int8-static"}),
        ("sglang", {"mxfp8", "int8-dynamic", "int8-static"}),
        (
            "transformers",
            set(SCHEMES) - {"fp8-dynamic", "fp8-static", "fp8-tensor", "fp8-weight-only"},
        ),
    ],
)
def test_experts_take_fewer_schemes(runtime, refused):
    experts = {
        name: [
            linear(f"mlp.experts.0.{leaf}", name) for leaf in ("gate_proj", "up_proj", "down_proj")
        ]
        for name in SCHEMES
    }
    assert {name for name in SCHEMES if runtime_problems(runtime, experts[name], [])} == refused


# Hardware


@pytest.mark.parametrize("hardware", ["ampere", "cpu"])
def test_without_fp8_units_inputs_stay_unquantized(hardware):
    for name in ("fp8-dynamic", "fp8-block", *(["mxfp8"] if hardware == "ampere" else [])):
        computed = as_computed(SCHEMES[name], hardware)
        assert (computed.weight, computed.input) == (SCHEMES[name].weight, None)


@pytest.mark.parametrize("name", ["mxfp8", "fp8-weight-only"])
def test_what_the_cpu_build_has_no_kernel_for_is_refused(name):
    with pytest.raises(RuntimeLimitError, match="no kernel"):
        as_computed(SCHEMES[name], "cpu")


@pytest.mark.parametrize("name", ["fp8-static", "fp8-tensor"])
def test_static_fp8_runs_on_ampere_without_input_quantization_and_not_on_a_cpu(name):
    assert as_computed(SCHEMES[name], "ampere").input is None
    with pytest.raises(RuntimeLimitError, match="static FP8"):
        as_computed(SCHEMES[name], "cpu")


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
def test_blackwell_refuses_int8_inputs(name):
    with pytest.raises(RuntimeLimitError, match="Blackwell"):
        as_computed(SCHEMES[name], "blackwell")
    for hardware in set(HARDWARE) - {"blackwell"}:
        assert as_computed(SCHEMES[name], hardware) is SCHEMES[name]


@pytest.mark.parametrize("hardware", ["blackwell", "hopper", "ada"])
def test_fp8_is_native_from_ada_on(hardware):
    for name in set(FP8_WITH_INPUTS) - {"mxfp8"}:
        assert as_computed(SCHEMES[name], hardware) is SCHEMES[name]


def test_mxfp8_is_native_on_blackwell_only():
    assert [
        hardware for hardware in HARDWARE if hardware_mode(SCHEMES["mxfp8"], hardware) == "native"
    ] == ["blackwell"]


def test_packed_int8_weights_do_not_run_on_a_cpu():
    with pytest.raises(RuntimeLimitError, match="packed INT8"):
        as_computed(SCHEMES["int8-weight-only"], "cpu")
    assert as_computed(SCHEMES["int8-weight-only"], "turing") is SCHEMES["int8-weight-only"]


def test_without_hardware_a_scheme_is_computed_as_it_says():
    for scheme in SCHEMES.values():
        assert as_computed(scheme, None) is scheme


def test_mixers_that_vllm_does_not_quantize_are_told():
    names = [f"backbone.layers.0.mixer.{leaf}" for leaf in ("in_proj", "x_proj", "out_proj")]
    linears = [QuantizedLinearInfo(name, (128, 128), SCHEMES["fp8-dynamic"]) for name in names]
    assert any(
        "no quantized Mamba 1 mixers" in problem
        for problem in runtime_problems("vllm", linears, ())
    )
    assert runtime_problems("vllm", [linears[0], linears[2]], ()) == []
    assert runtime_problems("transformers", linears, ()) == []
