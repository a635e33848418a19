"""The reader against files that nobody should have made: damaged ones, and headers, indexes and
configs made to be wrong.

The law: the reader returns or raises CheckpointError, it takes memory by what is in a file and not
by what the file claims, and what it accepts, the safetensors library reads too, with the same
names, dtypes, shapes and bytes.

Runs are the same each time. QUANTKIT_FUZZ_EXAMPLES=N tries N examples of each law instead, other
ones in each run.
"""

import json
import os
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.header import DTYPES, read_header, row_count
from quantkit.checkpoint.model_files import INDEX_FILE
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tensor_reader import MappedShard, read_tensor
from quantkit.checkpoint.writer import tensor_bytes
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

EXAMPLES = os.environ.get("QUANTKIT_FUZZ_EXAMPLES")


def examples(number: int):
    """So many examples of a law, unless the environment asks for another number. An example that
    takes ten seconds hangs.
    """
    return settings(
        max_examples=int(EXAMPLES or number),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=timedelta(seconds=10),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(scope="module")
def place():
    """A directory in memory where there is one: thousands of small files are written into it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and bytes(tensor_bytes(one)) == bytes(tensor_bytes(other))


def accepted(path: Path) -> bool:
    """Whether the reader accepts a file; if so, it must see what the safetensors library sees, by
    each of its two ways.
    """
    try:
        tensors = read_header(path)
    except CheckpointError:
        return False
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(tensors)
        shard = MappedShard(path)
        for name, info in tensors.items():
            described, expected = theirs.get_slice(name), theirs.get_tensor(name)
            assert (described.get_dtype(), tuple(described.get_shape())) == (info.dtype, info.shape)
            tensor = read_tensor(info)
            assert tuple(tensor.shape) == info.shape and same_bits(tensor, expected)
            rows = row_count(info)
            assert same_bits(shard.rows(info, 0, rows), expected)
            if 2 <= rows < 2**20:
                halves = [
                    bytes(tensor_bytes(shard.rows(info, first, last)))
                    for first, last in ((0, rows // 2), (rows // 2, rows))
                ]
                assert b"".join(halves) == bytes(tensor_bytes(expected))
            shard.release(info, 0, rows)
            del tensor, expected
        shard.close()
    return True


# ---- What save_file writes.

TORCH_DTYPES = {name: getattr(torch, torch_name) for name, (_, torch_name) in DTYPES.items()}
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw):
    """A few small tensors of any dtype with any bits."""
    made = {}
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        dtype, shape = (
            TORCH_DTYPES[draw(st.sampled_from(sorted(DTYPES)))],
            draw(st.lists(st.integers(0, 5), max_size=3)),
        )
        size = torch.Size(shape).numel() * dtype.itemsize
        content = bytearray(draw(st.binary(min_size=size, max_size=size)))
        if dtype == torch.bool:
            content = bytearray(byte & 1 for byte in content)
        made[name] = (
            torch.frombuffer(content, dtype=dtype).reshape(shape)
            if content
            else torch.empty(shape, dtype=dtype)
        )
    return made


@pytest.mark.slow
@examples(300)
@given(tensors=tensors(), metadata=st.none() | st.dictionaries(names, names, max_size=3))
def test_reader_accepts_what_save_file_writes(place, tensors, metadata):
    path = place / "saved.safetensors"
    save_file(tensors, path, metadata)
    assert accepted(path)
    found = read_header(path)
    assert all(same_bits(read_tensor(found[name]), tensor) for name, tensor in tensors.items())


# ---- Damage to a good file.

GOOD = [
    save(
        {
            "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
            "b": torch.tensor([1.5, -2.0]).bfloat16(),
            "e": torch.zeros(0, 4),
        },
        {"format": "pt"},
    ),
    save(
        {
            "codes": torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn),
            "scalar": torch.tensor(7),
            "i8": torch.tensor([-128, 0, 127], dtype=torch.int8),
        }
    ),
    save({f"model.layers.{n}.weight": torch.full((3, n), n / 2).half() for n in range(5)}),
]
LENGTHS = (
    st.sampled_from(
        [0, 1, 2, 7, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000, 100_000_001]
    )
    | st.integers(0, 400)
    | st.integers(0, 2**64 - 1)
)


@st.composite
def damage(draw):
    """A good file after one to four accidents."""
    content = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(
                [
                    "flip",
                    "flip in header",
                    "digit",
                    "truncate",
                    "insert",
                    "remove",
                    "repeat",
                    "length",
                    "length and fill",
                ]
            )
        )
        at = draw(st.integers(0, max(0, len(content) - 1)))
        header = min(len(content), 8 + int.from_bytes(content[:8], "little"))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "flip in header" and header > 8:
            content[8 + at % (header - 8)] = draw(st.integers(0, 255))
        elif kind == "digit":
            digits = [place for place in range(8, header) if chr(content[place]).isdigit()]
            if digits:
                content[digits[at % len(digits)]] = draw(st.sampled_from(b"0123456789-.eE, "))
        elif kind == "truncate":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 16))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        elif kind == "length":
            content[:8] = struct.pack("<Q", draw(LENGTHS))
        elif kind == "length and fill":
            more = draw(st.integers(-8, 8))
            if 8 + more <= header and header - 8 + more >= 0:
                content[:8] = struct.pack("<Q", header - 8 + more)
                content[header:header] = b" " * max(0, more)
    return bytes(content)


@pytest.mark.slow
@examples(1200)
@given(content=damage())
def test_damaged_file_is_refused_or_read_as_safetensors_reads_it(place, content):
    path = place / "damaged.safetensors"
    path.write_bytes(content)
    accepted(path)


# ---- Headers made to be wrong.

integers = st.integers(-3, 12) | st.sampled_from(
    [2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]
)
scalars = st.none() | st.booleans() | integers | st.floats() | st.text(max_size=6)
jsons = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
UNKNOWN_DTYPES = [
    "F13",
    "f32",
    "",
    "C64",
    "F4",
    "F8_E4M3FNUZ",
    "U16",
    "U32",
    "U64",
    "I128",
    None,
    5,
    ["F32"],
    {"F32": 1},
]
FRAGMENTS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "-0",
    "1e2",
    "2.0",
    "1e400",
    "01",
    "true",
    '"2"',
    "[[2]]",
    "9" * 400,
    "9" * 5000,
    "[" * 200 + "]" * 200,
    "[" * 100_000,
    '{"a":1,"a":2}',
    '"\\ud800"',
    '"\\u0000"',
]


@st.composite
def odd_header(draw):
    """A header and what follows it: laid out well at first, then bent in up to three places."""
    entries, offset = [], 0
    for number in range(draw(st.integers(0, 4))):
        dtype, shape = (
            draw(st.sampled_from(sorted(DTYPES))),
            draw(st.lists(st.integers(0, 3), max_size=3)),
        )
        size = torch.Size(shape).numel() * DTYPES[dtype][0]
        entries.append(
            [
                f"t{number}",
                {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]},
            ]
        )
        offset += size
    size, metadata, before, after, encoding = offset, None, "", "", "utf-8"
    for _ in range(draw(st.integers(0, 3))):
        entry = draw(st.sampled_from(entries)) if entries else ["none", {}]
        fields = entry[1] if isinstance(entry[1], dict) else {}
        kind = draw(
            st.sampled_from(
                [
                    "dtype",
                    "shape",
                    "dimension",
                    "empty dimension",
                    "offsets",
                    "shift",
                    "swap",
                    "missing",
                    "extra",
                    "entry",
                    "raw",
                    "name",
                    "twice",
                    "order",
                ]
                + ["metadata", "size", "around", "encoding"]
            )
        )
        if kind == "dtype":
            fields["dtype"] = draw(st.sampled_from(UNKNOWN_DTYPES + sorted(DTYPES)))
        elif kind == "shape":
            fields["shape"] = draw(jsons | st.lists(integers, max_size=4) | st.just([1] * 70))
        elif kind == "dimension" and isinstance(fields.get("shape"), list):
            fields["shape"].insert(
                draw(st.integers(0, 3)), draw(scalars | st.just(1) | st.just([2]))
            )
        elif kind == "empty dimension":
            fields["shape"] = draw(st.permutations([0, draw(integers), draw(integers)]))
            fields["data_offsets"] = [draw(st.sampled_from([0, offset]))] * 2
        elif kind == "offsets":
            fields["data_offsets"] = draw(jsons | st.lists(integers, min_size=2, max_size=3))
        elif kind == "shift" and isinstance(fields.get("data_offsets"), list):
            by = draw(st.integers(-4, 4))
            fields["data_offsets"] = [
                n + by if isinstance(n, int) else n for n in fields["data_offsets"]
            ]
        elif kind == "swap" and isinstance(fields.get("data_offsets"), list):
            fields["data_offsets"].reverse()
        elif kind == "missing" and fields:
            fields.pop(draw(st.sampled_from(sorted(fields))))
        elif kind == "extra":
            fields[draw(st.text(max_size=4))] = draw(jsons)
        elif kind == "entry":
            entry[1] = draw(jsons)
        elif kind == "raw":
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            fields[key] = f"@{draw(st.sampled_from(FRAGMENTS))}@"
        elif kind == "name":
            entry[0] = draw(
                st.text(max_size=8)
                | st.sampled_from(["", "__metadata__", "\ud800", "a\0b", "../x", "n" * 5000])
            )
        elif kind == "twice" and entries:
            entries.append([entry[0], draw(st.sampled_from(entries))[1]])
        elif kind == "order":
            entries = draw(st.permutations(entries))
        elif kind == "metadata":
            metadata = draw(
                jsons | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3)
            )
            entries.insert(0, ["__metadata__", metadata])
        elif kind == "size":
            size = max(0, offset + draw(st.integers(-3, 3)))
        elif kind == "around":
            before, after = (
                draw(st.sampled_from(["", " ", "\ufeff", "\n", "\0"])),
                draw(st.sampled_from(["", " " * 9, "\n", "\0", "}", "{}"])),
            )
        elif kind == "encoding":
            encoding = draw(st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32", "latin-1"]))
    members = []
    for name, entry in entries:
        value = json.dumps(entry, ensure_ascii=draw(st.booleans()))
        for fragment in FRAGMENTS:
            value = value.replace(json.dumps(f"@{fragment}@"), fragment)
        members.append(f"{json.dumps(name)}:{value}")
    raw = (before + "{" + ",".join(members) + "}" + after).encode(
        encoding, "surrogatepass" if encoding.startswith("utf") else "replace"
    )
    return (
        struct.pack("<Q", len(raw))
        + raw
        + bytes(range(256)) * (size // 256)
        + bytes(range(size % 256))
    )


@pytest.mark.slow
def test_odd_header_is_refused_or_read_as_safetensors_reads_it(place):
    outcomes = Counter()

    @examples(1500)
    @given(content=odd_header())
    def law(content):
        path = place / "odd.safetensors"
        path.write_bytes(content)
        outcomes[accepted(path)] += 1

    law()
    assert min(outcomes[True], outcomes[False]) > 0.1 * outcomes.total(), outcomes


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        '{"a":{"dtype":"F32","shape":[1099511627776,1099511627776,1099511627776],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[' + ",".join(["9" * 4000] * 50) + '],"data_offsets":[0,4]}}',
        "[" * 50_000,
        "{" * 50_000,
    ],
)
@pytest.mark.parametrize("claimed", [None, 99_999_999, 2**40, 2**64 - 1])
def test_memory_follows_what_is_in_the_file_not_what_it_claims(tmp_path, header, claimed):
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        struct.pack("<Q", len(header) if claimed is None else claimed) + header.encode() + bytes(4)
    )
    tracemalloc.start()
    accepted(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("dimension", "count"), [("9" * 4000, 150), ("4611686018427387904", 25_000)]
)
def test_time_follows_the_length_of_a_header(tmp_path, dimension, count):
    """Multiplying many large dimensions as exact integers takes time by the square of their number:
    seconds for this header, hours for 100 MB.
    """
    header = (
        '{"a":{"dtype":"F32","shape":[' + ",".join([dimension] * count) + '],"data_offsets":[0,4]}}'
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    started = time.perf_counter()
    assert not accepted(path)
    assert time.perf_counter() - started < 1


# ---- Indexes and configs.

SHARD_NAMES = [
    "m1.safetensors",
    "m2.safetensors",
    "../outside.safetensors",
    "/etc/passwd",
    "/etc/hosts.safetensors",
    "sub/m1.safetensors",
    "./m1.safetensors",
    "m3.safetensors",
    "",
    ".",
    "..",
    ".safetensors",
    "m1.safetensors/",
    "m1\0.safetensors",
    "m1.safetensors\0",
    "\ud800.safetensors",
    "n" * 300 + ".safetensors",
    "m1.bin",
    "d.safetensors",
    "~/m1.safetensors",
    "m\n.safetensors",
    "n" * 5000 + ".safetensors",
    5,
    None,
    True,
    ["m1.safetensors"],
    {},
    1.5,
]


@pytest.fixture(scope="module")
def indexed(place):
    """Two shards, a third beside the directory that nothing may reach, and a directory that is
    called like a shard.
    """
    path = place / "indexed"
    path.mkdir()
    (path / "d.safetensors").mkdir()
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, path / "m1.safetensors")
    save_file({"c": torch.zeros(2, 2)}, path / "m2.safetensors")
    save_file({"a": torch.zeros(2)}, place / "outside.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("shard", SHARD_NAMES)
def test_index_reaches_nothing_but_files_beside_it(indexed, shard):
    (indexed / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": "m1.safetensors", "other": shard}})
    )
    with pytest.raises(CheckpointError):
        Checkpoint.open(indexed)
    (indexed / INDEX_FILE).unlink()


def as_text(content: object, cut: int | None) -> bytes:
    raw = json.dumps(content).encode()
    return raw if cut is None else raw[: cut % (len(raw) + 1)]


sound_maps = st.dictionaries(st.sampled_from("abc"), st.sampled_from(SHARD_NAMES[:2]), max_size=3)
weight_maps = st.dictionaries(
    st.sampled_from([*"abcd", "", "\ud800"]) | st.text(max_size=4),
    st.sampled_from(SHARD_NAMES[:2] * 20 + SHARD_NAMES),
    max_size=5,
)
indexes = (
    st.fixed_dictionaries({"weight_map": sound_maps | weight_maps}, optional={"metadata": jsons})
    | st.fixed_dictionaries({"weight_map": jsons})
    | jsons
)
cuts = st.none() | st.none() | st.none() | st.integers(0, 300)


@pytest.mark.slow
def test_odd_index_is_refused_or_reads_shards_beside_it_only(indexed):
    outcomes = Counter()

    @examples(800)
    @given(index=indexes, cut=cuts)
    def law(index, cut):
        (indexed / INDEX_FILE).write_bytes(as_text(index, cut))
        try:
            checkpoint = Checkpoint.open(indexed)
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert str(error)
            return
        outcomes["read"] += 1
        assert {path.parent for path in checkpoint.shard_paths} == {indexed}
        assert set(index["weight_map"]) <= set(checkpoint.tensors)
        for name in checkpoint.tensors:
            checkpoint.read(name)

    law()
    (indexed / INDEX_FILE).unlink()
    assert outcomes["read"] > 0.02 * outcomes.total(), outcomes


@pytest.fixture(scope="module")
def linear(place):
    """A model of one Linear."""
    path = place / "linear"
    path.mkdir()
    save_file(
        {
            "model.layers.0.mlp.up_proj.weight": torch.ones(4, 8).bfloat16(),
            "model.norm.weight": torch.ones(8),
        },
        path / "model.safetensors",
    )
    return path


BLOCK_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "input_activations": None,
}
GROUPS_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "naive-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": GROUP},
}
MODELOPT_CONFIG = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


@st.composite
def odd_config(draw):
    """A config.json: any JSON, or a quantization_config with up to two of its values replaced."""
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
    if draw(st.booleans()):
        return draw(
            jsons
            | st.dictionaries(
                st.sampled_from([*config, "torch_dtype", "quantization_config"]), jsons, max_size=4
            )
        )
    quantization = json.loads(
        json.dumps(draw(st.sampled_from([BLOCK_CONFIG, GROUPS_CONFIG, MODELOPT_CONFIG])))
    )
    for _ in range(draw(st.integers(0, 2))):
        at = quantization
        while True:
            keys = sorted(at) if isinstance(at, dict) else range(len(at))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(at[key], (dict, list)) or draw(st.booleans()):
                break
            at = at[key]
        if key is not None:
            at[key] = draw(
                jsons
                | st.lists(integers, min_size=2, max_size=2)
                | st.sampled_from(["re:(", "gptq", "re:" + "(a*)*" * 3, "[", "\ud800"])
            )
    return config | {"quantization_config": quantization}


@pytest.mark.slow
@examples(800)
@given(config=odd_config(), cut=cuts)
def test_odd_config_is_refused_or_planned_with(linear, config, cut):
    (linear / "config.json").write_bytes(as_text(config, cut))
    try:
        checkpoint = Checkpoint.open(linear)
        quantization = read_quantization_config(checkpoint.config)
    except CheckpointError as error:
        assert str(error)
        return
    if quantization is not None:
        for name in ("lm_head", "model.layers.0.mlp.up_proj"):
            quantization.scheme_of(name)
    try:
        plan_export(
            ExportOptions(linear, linear / "unused", Recipe(QuantScheme.parse("fp8-dynamic"))),
            checkpoint=checkpoint,
        )
    except QuantkitError as error:
        assert str(error)


# ---- A whole export.

MODEL_NAMES = [
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.bias",
    "model.layers.0.mlp.up_proj.weight_scale",
    "model.layers.0.mlp.up_proj.weight_scale_inv",
    "model.layers.0.mlp.up_proj.weight_packed",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.conv.weight",
    "model.rotary.inv_freq",
    "\u00fc\n\0",
]
shapes = st.lists(st.integers(0, 9), max_size=3) | st.sampled_from(
    [[256, 128], [130, 128], [1, 1], [3, 4], [0, 2**40], [2**12, 0], [1, 0, 7]]
)


@st.composite
def odd_model(draw):
    """Tensors with the names of a model's, and any dtypes and shapes: a Linear that can be
    quantized, most often.
    """
    made = {}
    for name in draw(st.lists(st.sampled_from(MODEL_NAMES[1:]), max_size=5, unique=True)):
        dtype, shape = (
            TORCH_DTYPES[draw(st.sampled_from(["BF16"] * 6 + ["F32"] * 4 + sorted(DTYPES)))],
            draw(shapes),
        )
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        made[name] = torch.randn(shape, generator=generator).to(dtype)
    first = draw(st.sampled_from([[4, 8], [130, 256], [128, 128], [1, 1], [3, 5]]))
    return {
        MODEL_NAMES[0]: (
            torch.randn(first, generator=torch.Generator().manual_seed(1)).to(
                draw(st.sampled_from([torch.bfloat16, torch.float32]))
            )
        )
    } | made


@pytest.mark.slow
def test_export_of_an_odd_model_completes_or_refuses(place):
    outcomes = Counter()

    @examples(60)
    @given(
        tensors=odd_model(),
        scheme=st.sampled_from(
            ["fp8-dynamic", "int8-dynamic", "fp8-block", "int8-weight-only", "mxfp8"]
        ),
        shard=st.sampled_from([1, 10**9]),
    )
    def law(tensors, scheme, shard):
        with tempfile.TemporaryDirectory(dir=place) as directory:
            model, out = Path(directory) / "model", Path(directory) / "out"
            model.mkdir()
            (model / "config.json").write_text('{"tie_word_embeddings": true}')
            save_file(tensors, model / "model.safetensors")
            try:
                plan = plan_export(
                    ExportOptions(
                        model, out, Recipe(QuantScheme.parse(scheme)), max_shard_bytes=shard
                    )
                )
                export(plan)
            except QuantkitError as error:
                outcomes["refused"] += 1
                assert str(error) and not out.exists()
                return
            outcomes["exported"] += 1
            exported, left = (
                Checkpoint.open(out),
                [row.name for row in plan.parameters if row.status != "quantized"],
            )
            for path in exported.shard_paths:
                assert accepted(path)
            assert all(same_bits(exported.read(name), tensors[name]) for name in left)

    law()
    assert outcomes["exported"] > 0.1 * outcomes.total(), outcomes
