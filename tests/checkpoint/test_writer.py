"""Safetensors files written in any order, and checked while they grow."""

import os
import threading

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.checkpoint.writer import ShardWriter, tensor_bytes, write_tensors
from quantkit.errors import OutputError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0]).bfloat16(),
    "codes": torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn),
    "i8": torch.tensor([-128, 0, 127], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


def test_safetensors_reads_what_the_writer_wrote(tmp_path):
    write_tensors(tmp_path / "out.safetensors", TENSORS)
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(
        bytes(tensor_bytes(loaded[name])) == bytes(tensor_bytes(tensor))
        and loaded[name].shape == tensor.shape
        for name, tensor in TENSORS.items()
    )
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
    with pytest.raises(AssertionError, match="written before"):
        writer.write("x", torch.ones(2))
    writer.close()
    assert load_file(tmp_path / "s.safetensors")["x"].tolist() == [1, 1]


def test_the_hash_is_that_of_the_file(tmp_path):
    path = tmp_path / "s.safetensors"
    writer = ShardWriter(path, [TensorPlan("x", "F32", (2,)), TensorPlan("y", "I8", (3,))])
    writer.write("y", torch.tensor([1, 2, 3], dtype=torch.int8))
    writer.write("x", torch.ones(2))
    assert writer.close() == blake3(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("place", ["header", "tensor"])
def test_bytes_that_change_before_they_are_re_read_are_refused(tmp_path, place):
    writer = ShardWriter(tmp_path / "s.safetensors", [TensorPlan("x", "U8", (1000,))])
    writer.write("x", torch.arange(1000).to(torch.uint8))
    partial = tmp_path / "s.safetensors.tmp"
    with open(partial, "r+b") as file:
        file.seek(20 if place == "header" else partial.stat().st_size - 500)
        file.write(b"\xff")
    with pytest.raises(OutputError, match="other bytes"):
        writer.close()
    assert not (tmp_path / "s.safetensors").exists()


def test_a_file_that_is_cut_short_before_it_is_re_read_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "s.safetensors", [TensorPlan("x", "U8", (1000,))])
    writer.write("x", torch.zeros(1000, dtype=torch.uint8))
    os.truncate(tmp_path / "s.safetensors.tmp", 500)
    with pytest.raises(OutputError, match="ends at byte 500"):
        writer.close()


def test_finish_waits_for_missing_parts_until_the_file_is_abandoned(tmp_path):
    writer = ShardWriter(tmp_path / "s.safetensors", [TensorPlan("x", "U8", (1000,))])
    writer.write_part("x", memoryview(bytearray(400)), 600)
    found = ["unfinished"]
    thread = threading.Thread(target=lambda: found.append(writer.finish()))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not writer.is_complete
    writer.abandon()
    thread.join(10)
    assert found[-1] is None and not (tmp_path / "s.safetensors").exists()
