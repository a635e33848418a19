"""Tensors and `quantization_config` on disk, as runtimes read them."""

import pytest
import torch

from quantkit.checkpoint.formats import (
    FORMATS,
    QuantizationConfig,
    QuantizedLayers,
    kv_scale_module,
    read_quantization_config,
    stored_linears,
)
from quantkit.checkpoint.formats.compressed_tensors import compression_format
from quantkit.errors import CheckpointError
from quantkit.ops.reference import quantize
from quantkit.schemes.scheme import SCHEMES, QuantScheme

INT8_GROUPS = QuantScheme.parse(
    {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}}
)
COMPRESSED, BLOCKS, MODELOPT = FORMATS.values()
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "U8": torch.uint8,
}

# For a Linear [192, 256]: the compression format, then suffix → dtype and shape.
CODES = {"weight": ("F8_E4M3", (192, 256))}
INTEGERS = {"weight": ("I8", (192, 256))}
PACKED = {"weight_packed": ("I32", (192, 64)), "weight_shape": ("I64", (2,))}
PER_CHANNEL, PER_TENSOR = {"weight_scale": ("F32", (192, 1))}, {"weight_scale": ("F32", (1,))}
STATIC = {"input_scale": ("F32", (1,))}
ON_DISK = {
    "fp8-dynamic": ("float-quantized", CODES | PER_CHANNEL),
    "fp8-static": ("float-quantized", CODES | PER_CHANNEL | STATIC),
    "fp8-tensor": ("float-quantized", CODES | PER_TENSOR | STATIC),
    "fp8-block": ("float-quantized", CODES | {"weight_scale": ("F32", (2, 2))}),
    "mxfp8": ("mxfp8-quantized", CODES | {"weight_scale": ("U8", (192, 8))}),
    "fp8-weight-only": ("naive-quantized", CODES | PER_CHANNEL),
    "int8-dynamic": ("int-quantized", INTEGERS | PER_CHANNEL),
    "int8-static": ("int-quantized", INTEGERS | PER_CHANNEL | STATIC),
    "int8-weight-only": ("pack-quantized", PACKED | PER_CHANNEL),
    "int8-group64-weight-only": ("pack-quantized", PACKED | {"weight_scale": ("F32", (192, 4))}),
}
ALL = SCHEMES | {INT8_GROUPS.name: INT8_GROUPS}


def encode_linear(quantized, scheme, input_scale=None, file_format=COMPRESSED):
    """One quantized weight as the tensors of its format."""
    return file_format.encode_rows(quantized, scheme) | file_format.encode_constants(
        scheme, tuple(quantized.qdata.shape), quantized.scale, input_scale
    )


def config_of(schemes, skipped, default, kv_cache) -> dict:
    return COMPRESSED.config(QuantizedLayers(schemes, skipped, default, kv_cache))


def weight_of(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different size, the second one zero."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.exp2(
        torch.arange(rows).float() % 40 - 20
    ).reshape(-1, 1)
    values[1:2] = 0
    return values


def read(config: dict) -> QuantizationConfig:
    return read_quantization_config({"quantization_config": config})


# Tensors


@pytest.mark.parametrize("name", ON_DISK)
def test_tensors_have_the_names_dtypes_and_shapes_that_runtimes_read(name):
    form, tensors = ON_DISK[name]
    scheme = ALL[name]
    assert compression_format(scheme) == form
    assert COMPRESSED.tensors(scheme, (192, 256)) == tensors
    encoded = encode_linear(
        quantize(weight_of(192, 256), scheme.weight),
        scheme,
        torch.tensor(0.5) if scheme.needs_calibration else None,
    )
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in encoded.items()} == {
        suffix: (DTYPES[dtype], shape) for suffix, (dtype, shape) in tensors.items()
    }


@pytest.mark.parametrize("shape", [(192, 256), (1, 64), (3, 192)], ids=str)
@pytest.mark.parametrize("name", ON_DISK)
def test_an_encoded_linear_decodes_to_the_same_codes_and_scales(name, shape):
    scheme = ALL[name]
    quantized = quantize(weight_of(*shape), scheme.weight)
    tensors = encode_linear(
        quantized, scheme, torch.tensor([0.5]) if scheme.needs_calibration else None
    )
    decoded, input_scale = COMPRESSED.decode(tensors, scheme, "layer")
    assert torch.equal(decoded.qdata.float(), quantized.qdata.float())
    assert decoded.qdata.dtype == quantized.qdata.dtype
    assert torch.equal(decoded.scale, quantized.scale)
    assert torch.equal(decoded.dequantize(), quantized.dequantize())
    assert input_scale is None if not scheme.needs_calibration else input_scale.tolist() == [0.5]


def test_block_scales_cover_begun_blocks():
    assert COMPRESSED.tensors(SCHEMES["fp8-block"], (576, 130))["weight_scale"] == ("F32", (5, 2))


def test_mxfp8_scales_are_stored_as_exponent_plus_127():
    values = 448 * torch.exp2(torch.tensor([0.0, 3.0, -5.0, -126.0, 118.0])).reshape(-1, 1).repeat(
        1, 32
    )
    tensors = encode_linear(quantize(values, SCHEMES["mxfp8"].weight), SCHEMES["mxfp8"])
    assert tensors["weight_scale"].reshape(-1).tolist() == [127, 130, 122, 1, 245]


def test_packed_words_hold_code_plus_128_and_the_shape_of_the_weight():
    values = torch.tensor([[127.0, -127.0, 0.0, 1.0]])
    tensors = encode_linear(
        quantize(values, SCHEMES["int8-weight-only"].weight), SCHEMES["int8-weight-only"]
    )
    assert tensors["weight_packed"].view(torch.uint8).tolist() == [[255, 1, 128, 129]]
    assert tensors["weight_shape"].tolist() == [1, 4]


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "input_scale"])
def test_a_missing_tensor_is_refused_by_name(suffix):
    scheme = SCHEMES["fp8-static"]
    tensors = encode_linear(quantize(weight_of(3, 8), scheme.weight), scheme, torch.ones(1))
    del tensors[suffix]
    with pytest.raises(CheckpointError, match=rf"model\.layer\.{suffix} is missing"):
        COMPRESSED.decode(tensors, scheme, "model.layer")


@pytest.mark.parametrize("shape", [(1,), (2, 1), (6, 1)], ids=str)
def test_scales_that_do_not_fit_the_weight_are_refused(shape):
    scheme = SCHEMES["fp8-dynamic"]
    tensors = encode_linear(quantize(weight_of(3, 8), scheme.weight), scheme) | {
        "weight_scale": torch.ones(shape)
    }
    with pytest.raises(CheckpointError, match=r"needs \[3, 1\]"):
        COMPRESSED.decode(tensors, scheme, "layer")


def test_transposed_block_scales_are_refused():
    scheme = SCHEMES["fp8-block"]
    tensors = encode_linear(quantize(weight_of(256, 384), scheme.weight), scheme)
    tensors["weight_scale"] = tensors["weight_scale"].T
    with pytest.raises(CheckpointError, match=r"needs \[2, 3\]"):
        COMPRESSED.decode(tensors, scheme, "layer")


def test_a_scale_without_its_axis_of_one_is_read_all_the_same():
    scheme = SCHEMES["fp8-dynamic"]
    quantized = quantize(weight_of(3, 8), scheme.weight)
    decoded, _ = COMPRESSED.decode(
        {"weight": quantized.qdata, "weight_scale": quantized.scale.reshape(3)}, scheme, "layer"
    )
    assert torch.equal(decoded.scale, quantized.scale)


def test_deepseeks_scale_name_multiplies_as_well():
    scheme = SCHEMES["fp8-block"]
    quantized = quantize(weight_of(130, 200), scheme.weight)
    decoded, _ = BLOCKS.decode(
        {"weight": quantized.qdata, "weight_scale_inv": quantized.scale}, scheme, "layer"
    )
    assert torch.equal(decoded.dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    "name, columns, words",
    [
        ("mxfp8", 96, None),
        ("mxfp8", 100, "group size 32"),
        ("int8-group64-weight-only", 128, None),
        ("int8-group64-weight-only", 96, "group size 64"),
        ("int8-weight-only", 8, None),
        ("int8-weight-only", 6, "multiple of 4"),
        ("fp8-block", 130, None),
        ("fp8-dynamic", 7, None),
    ],
)
def test_shapes_that_cannot_be_stored_are_told(name, columns, words):
    obstacle = COMPRESSED.shape_obstacle(ALL[name], (5, columns))
    assert obstacle is None if words is None else words in obstacle


def test_stored_linears_are_modules_with_a_weight_scale_or_packed_weight():
    names = [
        "a.q_proj.weight",
        "a.q_proj.weight_scale",
        "b.weight_packed",
        "b.weight_scale",
        "c.weight",
        "c.weight_scale_inv",
        "d.weight",
        "a.k_scale",
    ]
    assert stored_linears(names) == {
        "a.q_proj": ["weight", "weight_scale"],
        "b": ["weight_packed", "weight_scale"],
        "c": ["weight", "weight_scale_inv"],
    }


# The config


def test_one_scheme_targets_the_class_name():
    config = config_of(
        {"a.q_proj": SCHEMES["fp8-dynamic"], "a.k_proj": SCHEMES["fp8-dynamic"]},
        ["lm_head"],
        SCHEMES["fp8-dynamic"],
        False,
    )
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }


def test_weight_only_groups_have_no_input_activations():
    config = config_of({"a": SCHEMES["int8-weight-only"]}, [], SCHEMES["int8-weight-only"], False)
    assert "input_activations" not in config["config_groups"]["group_0"]


def test_several_schemes_are_mixed_precision_and_name_their_modules():
    schemes = {
        "a.down_proj": SCHEMES["fp8-dynamic"],
        "a.q_proj": SCHEMES["int8-dynamic"],
        "a.k_proj": SCHEMES["int8-dynamic"],
    }
    config = config_of(schemes, ["lm_head"], SCHEMES["int8-dynamic"], False)
    groups = config["config_groups"]
    assert config["format"] == "mixed-precision"
    assert {tuple(group["targets"]): group["format"] for group in groups.values()} == {
        ("a.q_proj", "a.k_proj"): "int-quantized",
        ("a.down_proj",): "float-quantized",
    }
    assert groups["group_0"]["targets"] == ["a.q_proj", "a.k_proj"]


def test_the_kv_cache_scheme_is_written_only_when_asked_for():
    schemes = {"a": SCHEMES["fp8-dynamic"]}
    with_cache = config_of(schemes, [], SCHEMES["fp8-dynamic"], True)
    assert with_cache["kv_cache_scheme"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    assert read(with_cache).kv_cache
    assert not read(config_of(schemes, [], SCHEMES["fp8-dynamic"], False)).kv_cache


@pytest.mark.parametrize("name", ON_DISK)
def test_a_config_of_one_scheme_reads_back_as_the_scheme(name):
    config = read(config_of({"a.q_proj": ALL[name]}, ["lm_head", "a.gate"], ALL[name], False))
    assert config.scheme_of("a.q_proj") == ALL[name]
    assert config.scheme_of("lm_head") is config.scheme_of("a.gate") is None


def test_a_config_of_all_schemes_reads_back_the_scheme_of_each_module():
    schemes = {
        f"model.layers.{number}.q_proj": scheme for number, scheme in enumerate(ALL.values())
    }
    config = read(config_of(schemes, ["lm_head"], SCHEMES["fp8-dynamic"], True))
    assert {name: config.scheme_of(name) for name in schemes} == schemes
    assert config.scheme_of("lm_head") is config.scheme_of("model.layers.0.k_proj") is None


def test_ignore_wins_over_every_kind_of_target():
    weights = SCHEMES["int8-weight-only"].weight.to_arguments()
    stored = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"targets": ["Linear", "re:.*q_proj", "a.q_proj"], "weights": weights}
        },
    }
    for ignore in (["a.q_proj"], ["re:.*q_proj"], ["Linear"]):
        assert read(stored).scheme_of("a.q_proj") is not None
        assert read(stored | {"ignore": ignore}).scheme_of("a.q_proj") is None


def test_names_win_over_patterns_and_patterns_over_classes():
    def group(target: str, name: str) -> dict:
        return {"targets": [target], "weights": SCHEMES[name].weight.to_arguments()}

    groups = {
        "0": group("Linear", "int8-weight-only"),
        "1": group("re:.*q_proj", "fp8-weight-only"),
        "2": group("b.q_proj", "int8-weight-only"),
    }
    config = read({"quant_method": "compressed-tensors", "config_groups": groups})
    assert [config.scheme_of(name).name for name in ("a.k_proj", "a.q_proj", "b.q_proj")] == [
        "int8-weight-only",
        "fp8-weight-only",
        "int8-weight-only",
    ]
    assert config.scheme_of("a.k_proj", "Embedding") is None


def test_an_unquantized_model_has_no_quantization_config():
    assert read_quantization_config({"model_type": "llama"}) is None


def test_deepseeks_config_reads_as_block_fp8():
    stored = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    }
    config = read(stored)
    assert config.scheme_of("model.layers.0.mlp.up_proj") is SCHEMES["fp8-block"]
    assert config.scheme_of("lm_head") is config.scheme_of("model.layers.3.mlp.gate") is None


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4},
        {},
        [],
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": []},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"]}},
        },
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        },
        {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"},
        },
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": 128},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128]},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [None, 128]},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, None]},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [None, None]},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_read_is_refused(stored):
    with pytest.raises(CheckpointError, match="quantiz|kv_cache_scheme|fp8"):
        read(stored)


@pytest.mark.parametrize("file_format", FORMATS.values(), ids=FORMATS)
def test_kv_scales_are_found_by_the_name_that_their_format_gives_them(file_format):
    for suffix in ("k_scale", "v_scale"):
        assert kv_scale_module(file_format.kv_scale_name("a.self_attn", suffix)) == "a.self_attn"


def test_other_tensors_are_no_kv_scales():
    assert kv_scale_module("a.self_attn.k_proj.weight_scale") is None


@pytest.mark.parametrize("file_format", FORMATS.values(), ids=FORMATS)
def test_each_format_reads_its_own_config_and_decodes_its_own_tensors(file_format):
    scheme = file_format.only_scheme or SCHEMES["int8-static"]
    config = read(file_format.config(QuantizedLayers({"a.q_proj": scheme}, ["lm_head"], scheme)))
    assert config.file_format is file_format
    assert config.scheme_of("a.q_proj") == scheme
    assert config.scheme_of("lm_head") is None
    quantized = quantize(weight_of(256, 128), scheme.weight)
    input_scale = torch.tensor([0.5]) if scheme.needs_calibration else None
    encoded = encode_linear(quantized, scheme, input_scale, file_format)
    decoded, read_scale = file_format.decode(encoded, scheme, "a.q_proj")
    assert torch.equal(decoded.dequantize(), quantized.dequantize())
    assert read_scale == input_scale
    assert "a.q_proj" in stored_linears(f"a.q_proj.{suffix}" for suffix in encoded)
