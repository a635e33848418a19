import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import (
    Checkpoint,
    OutputDirectory,
    ShardWriter,
    TensorPlan,
    check_disk_space,
    check_output,
    parse_bytes,
    plan_shards,
    read_header,
    resolve_model,
    tensor_bytes,
    write_tensors,
)
from quantkit.errors import CheckpointError, OutputError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0]).bfloat16(),
    "codes": torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn),
    "i8": torch.tensor([-128, 0, 127], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def model(tmp_path):
    """A directory that the reader takes for a checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_reader_agrees_with_safetensors(model):
    checkpoint = Checkpoint.open(model)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(
            checkpoint.read(name).view(torch.uint8) if tensor.dim() else checkpoint.read(name), tensor.view(torch.uint8) if tensor.dim() else tensor
        )


def test_safetensors_reads_what_the_writer_wrote(tmp_path):
    write_tensors(tmp_path / "out.safetensors", TENSORS)
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(bytes(tensor_bytes(loaded[name])) == bytes(tensor_bytes(tensor)) and loaded[name].shape == tensor.shape for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_writer_takes_tensors_in_any_order_and_refuses_wrong_ones(tmp_path):
    plans = [TensorPlan("x", "F32", (2,)), TensorPlan("y", "I8", (3,))]
    writer = ShardWriter(tmp_path / "s.safetensors", plans)
    writer.write("y", torch.tensor([1, 2, 3], dtype=torch.int8))
    with pytest.raises(AssertionError):
        writer.write("x", torch.zeros(3))
    with pytest.raises(AssertionError, match="never written"):
        writer.close()
    assert not (tmp_path / "s.safetensors").exists()
    writer.write("x", torch.ones(2))
    with pytest.raises(AssertionError, match="twice"):
        writer.write("x", torch.ones(2))
    writer.close()
    assert load_file(tmp_path / "s.safetensors")["x"].tolist() == [1, 1]


def damaged(path, header: dict | bytes, data: bytes = b"", claimed: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "claimed"),
    [
        ({"a": ENTRY}, b"1234", None),  # truncated data
        ({"a": ENTRY}, b"12345678", 10**6),  # header beyond the file
        ({"a": ENTRY}, b"12345678", 2**63),
        (b"not json", b"", None),
        (b"[]", b"", None),
        (b"\xff\xfe", b"", None),
        ({"a": {"dtype": "F32"}}, b"", None),
        ({"a": ENTRY | {"dtype": "F13"}}, b"12345678", None),
        ({"a": ENTRY | {"shape": [-2]}}, b"12345678", None),
        ({"a": ENTRY | {"shape": [2.0]}}, b"12345678", None),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678", None),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, b"12345678", None),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", None),  # overlapping
    ],
)
def test_broken_files_are_refused(tmp_path, header, data, claimed):
    with pytest.raises(CheckpointError):
        read_header(damaged(tmp_path / "x.safetensors", header, data, claimed))


def test_file_too_short_for_a_header_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="too short"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "gone.safetensors", "model.bin"])
def test_index_that_leaves_the_directory_or_names_nothing_is_refused(model, shard):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError):
        Checkpoint.open(model)


def test_tensor_in_two_shards_is_refused(model):
    (model / "model.safetensors").rename(model / "m1.safetensors")
    save_file({"a": torch.zeros(1)}, model / "m2.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m1.safetensors", "z": "m2.safetensors"}}))
    with pytest.raises(CheckpointError, match="both"):
        Checkpoint.open(model)


def test_tensor_of_the_index_that_no_shard_holds_is_refused(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors", "lost": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match="lost"):
        Checkpoint.open(model)


def test_shards_keep_groups_together_and_within_the_limit():
    groups = [[TensorPlan(f"{n}.w", "I8", (60,)), TensorPlan(f"{n}.s", "F32", (5,))] for n in range(5)]
    shards = plan_shards(groups, 160)
    assert [len(shard) for shard in shards] == [4, 4, 2]
    assert [plan for shard in shards for plan in shard] == [plan for group in groups for plan in group]
    assert len(plan_shards(groups, 1)) == 5  # a group larger than the limit still gets a shard


def test_output_appears_only_when_whole(tmp_path):
    output = OutputDirectory(tmp_path / "out", {"model": "x"})
    (output.partial / "config.json").write_text("{}")
    assert not (tmp_path / "out").exists()
    output.commit()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert not output.partial.exists()


def test_resume_continues_only_the_same_work(tmp_path):
    OutputDirectory(tmp_path / "out", {"model": "x", "recipe": "r"}).record("shard", "hash")
    with pytest.raises(OutputError, match="--resume"):
        OutputDirectory(tmp_path / "out", {"model": "x", "recipe": "r"})
    with pytest.raises(OutputError, match="different model"):
        OutputDirectory(tmp_path / "out", {"model": "y", "recipe": "r"}, resume=True)
    assert OutputDirectory(tmp_path / "out", {"model": "x", "recipe": "r"}, resume=True).done == {"shard": "hash"}


def test_overwrite_replaces_results_but_nothing_else(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        check_output(mine, overwrite=False)
    with pytest.raises(OutputError, match="neither"):
        check_output(mine, overwrite=True)
    (mine / "config.json").write_text("{}")
    output = OutputDirectory(mine, {}, overwrite=True)
    assert (mine / "thesis.txt").exists()  # until the new one is whole
    (output.partial / "config.json").write_text("new")
    output.commit()
    assert (mine / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_output_must_not_be_or_contain_the_input(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)
    for place in (tmp_path / "a" / "model", tmp_path / "a"):
        with pytest.raises(OutputError, match="input"):
            check_output(place, overwrite=True, reads=[tmp_path / "a" / "model"])


def test_disk_space_is_checked_before_the_start(tmp_path):
    check_disk_space(tmp_path / "out", 1)
    with pytest.raises(OutputError, match="free"):
        check_disk_space(tmp_path / "out", 10**18)


def test_fingerprint_tells_models_apart(model):
    before = Checkpoint.open(model).fingerprint()
    assert Checkpoint.open(model).fingerprint() == before
    changed = dict(TENSORS, b=torch.tensor([1.5, -2.5]).bfloat16())
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(model).fingerprint() != before


def test_sizes_are_read_in_decimal_and_binary_units():
    assert [parse_bytes(text) for text in ("5GB", "500MB", "2GiB", "10", "1.5kB")] == [5 * 10**9, 5 * 10**8, 2**31, 10, 1500]
    for wrong in ("", "many", "-1GB", "0", "5XB"):
        with pytest.raises(OutputError):
            parse_bytes(wrong)


def test_a_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert str(resolve_model("models/typo")) == "models/typo"
    assert str(resolve_model("./typo")) == "typo"


def test_unreachable_hub_id_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="hub id"):
        resolve_model("no-such-org-here/no-such-model")
