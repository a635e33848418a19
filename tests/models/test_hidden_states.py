"""Hidden states between two blocks: in memory and in files alike, and nothing left behind."""

import errno
import os
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from quantkit.errors import OutputError, QuantkitError
from quantkit.models.hidden_states import HiddenStates, available_memory, peak_memory_bytes

# Batches of several lengths: one number, one that fills a page of the file to the last byte, one
# beyond it.
SHAPES = {3: (1, 1, 1), 0: (2, 16, 64), 5: (3, 17, 64), 4: (1, 7, 5)}


def random_states(dtype: torch.dtype, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        number: torch.randn(shape, generator=generator).to(dtype)
        for number, shape in SHAPES.items()
    }


def assert_holds(states: HiddenStates, expected: dict[int, torch.Tensor]) -> None:
    for number, tensor in expected.items():
        got = states.get(number)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor), number


@pytest.fixture
def in_files(tmp_path):
    """Hidden states that don't fit into memory, in tmp_path."""
    states = HiddenStates(memory=0, directory=tmp_path)
    states.expect(SHAPES, torch.bfloat16)
    yield states
    states.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memory", [0, None])
def test_what_was_put_is_there_after_the_swap_block_after_block(dtype, memory, tmp_path):
    states = HiddenStates(memory, tmp_path)
    states.expect(SHAPES, dtype)
    assert any(tmp_path.iterdir()) == (memory == 0)
    for seed in range(4):
        for number, tensor in random_states(dtype, seed).items():
            states.put(number, tensor)
        states.swap()
        assert_holds(states, random_states(dtype, seed))
    assert states.numbers == [0, 3, 4, 5]
    states.close()


@pytest.mark.parametrize("memory", [0, None])
def test_a_batch_is_read_before_its_own_place_is_written(memory):
    """Each batch doubles in each block, whatever the order in which the batches come."""
    states = HiddenStates(memory)
    states.expect(SHAPES, torch.float32)
    for number, tensor in random_states(torch.float32, 0).items():
        states.put(number, tensor)
    states.swap()
    for order in ([0, 3, 4, 5], [5, 4, 3, 0]):
        for number in order:
            states.put(number, states.get(number) * 2)
        states.swap()
    assert_holds(
        states, {number: tensor * 4 for number, tensor in random_states(torch.float32, 0).items()}
    )
    states.close()


def test_in_files_the_former_states_stay_whole_until_the_swap(in_files):
    former, later = random_states(torch.bfloat16, 0), random_states(torch.bfloat16, 1)
    for number, tensor in former.items():
        in_files.put(number, tensor)
    in_files.swap()
    for number, tensor in later.items():
        in_files.put(number, tensor)
        assert_holds(in_files, former)
    in_files.swap()
    assert_holds(in_files, later)


def test_what_get_gave_is_not_changed_by_what_is_written_after(in_files):
    for seed in (0, 1):
        for number, tensor in random_states(torch.bfloat16, seed).items():
            in_files.put(number, tensor)
        in_files.swap()
        if not seed:
            held = {number: in_files.get(number) for number in SHAPES}
    for number, tensor in random_states(torch.bfloat16, 2).items():
        in_files.put(number, tensor)
    assert all(
        torch.equal(held[number], tensor)
        for number, tensor in random_states(torch.bfloat16, 0).items()
    )


def test_strided_states_are_kept_like_contiguous_ones(in_files):
    strided = torch.randn(16, 2, 64).bfloat16().transpose(0, 1)
    in_files.put(0, strided)
    in_files.swap()
    assert torch.equal(in_files.get(0), strided)


@pytest.mark.parametrize(
    "odd",
    [
        torch.full((2, 16, 64), 1 + 2**-20),
        torch.ones(4, 2, 16, 64, dtype=torch.bfloat16),
        torch.ones(2, 16, 1, dtype=torch.bfloat16),
    ],
)
def test_a_file_refuses_what_it_would_round_or_spread(in_files, odd):
    """A residual stream in float32, or of four streams, has no place in a file made for bfloat16
    [2, 16, 64].
    """
    with pytest.raises(QuantkitError, match="`memory`"):
        in_files.put(0, odd)


@pytest.mark.parametrize("beyond, needs_files", [(0, False), (-1, True)])
def test_files_are_made_if_memory_is_too_small_by_a_byte(beyond, needs_files, tmp_path):
    total = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    states = HiddenStates(total + beyond, tmp_path)
    states.expect(SHAPES, torch.bfloat16)
    assert any(tmp_path.iterdir()) == needs_files
    states.close()


@pytest.mark.parametrize("memory", [0, None])
def test_save_writes_what_get_gives(tmp_path, memory):
    states = HiddenStates(memory)
    states.expect(SHAPES, torch.bfloat16)
    for number, tensor in random_states(torch.bfloat16, 0).items():
        states.put(number, tensor)
    states.swap()
    if memory == 0:
        states.put(0, torch.zeros(SHAPES[0]).bfloat16())  # of the next block, which is not finished
    states.save(tmp_path / "saved.safetensors", others={"0.encoded": torch.ones(2)})
    states.close()
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == {*map(str, SHAPES), "0.encoded"}
    assert all(
        torch.equal(saved[str(number)], tensor)
        for number, tensor in random_states(torch.bfloat16, 0).items()
    )


def test_files_are_gone_after_close_and_closing_twice_is_fine(tmp_path):
    states = HiddenStates(memory=0, directory=tmp_path)
    states.expect(SHAPES, torch.bfloat16)
    assert len(list(tmp_path.iterdir())) == 2
    states.close()
    assert not list(tmp_path.iterdir())
    states.close()


def test_the_temporary_place_is_gone_after_close(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = HiddenStates(memory=0)
    states.expect(SHAPES, torch.bfloat16)
    assert [len(list(place.iterdir())) for place in tmp_path.iterdir()] == [2]
    states.close()
    assert not list(tmp_path.iterdir())
    states.close()


def test_closing_what_was_never_filled_is_fine():
    HiddenStates().close()


def test_the_room_is_reserved_before_the_first_block(in_files, tmp_path):
    """Writing into a hole of a mapped file where the disk is full would end the process."""
    for path in tmp_path.iterdir():
        assert path.stat().st_blocks * 512 >= 2 * sum(
            torch.Size(shape).numel() for shape in SHAPES.values()
        )


@pytest.mark.parametrize("files_that_fit", [0, 1])
def test_a_full_disk_is_told_with_advice_and_leaves_nothing(tmp_path, monkeypatch, files_that_fit):
    reserve, calls = os.posix_fallocate, []

    def full(*arguments: int) -> None:
        calls.append(arguments)
        if len(calls) > files_that_fit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)
    states = HiddenStates(memory=0, directory=tmp_path)
    with pytest.raises(
        OutputError,
        match=(
            rf"need 2 × .* in {tmp_path} \(No space left on device\); make room, raise `memory`, or"
            r" use fewer or shorter windows"
        ),
    ):
        states.expect(SHAPES, torch.bfloat16)
    states.close()
    assert not list(tmp_path.iterdir())


def test_a_link_under_the_files_name_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "hidden-states-a.bin").symlink_to(precious)
    states = HiddenStates(memory=0, directory=tmp_path)
    states.expect(SHAPES, torch.bfloat16)
    states.close()
    assert precious.read_text() == "precious"


def test_memory_figures_are_bytes():
    assert 2**24 < peak_memory_bytes() < 2**42
    assert 2**20 < available_memory() < 2**46


@pytest.mark.parametrize(
    ("limit", "most"), [("1000000", 600_000), ("400000", 0), ("max", None), ("broken", None)]
)
def test_a_containers_limit_counts_as_the_memory_there_is(limit, most, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("400000\n")
    unlimited = available_memory()
    monkeypatch.setattr("quantkit.models.hidden_states._CGROUP", tmp_path)
    found = available_memory()
    assert found == most if most is not None else found > unlimited / 2
