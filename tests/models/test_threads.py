"""Batches at once on threads of one core each, and modules that keep a state in themselves."""

import threading
import time
from contextlib import closing

import pytest
import torch
from torch import nn

from quantkit.models.threads import (
    StatefulModuleLock,
    denormals_as_zero,
    each_batch,
    one_thread,
    pool_of_single_threads,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_each_batch_gives_the_results_in_order(threads, count):
    numbers = [number * 7 % 19 for number in range(count)]
    assert list(each_batch(lambda number: number**2, numbers, CPU, threads)) == [
        number**2 for number in numbers
    ]


def test_each_batch_runs_as_many_at_once_as_there_are_threads():
    barrier = threading.Barrier(3)
    assert (
        len(
            set(
                each_batch(
                    lambda number: (barrier.wait(10), threading.get_ident())[1], range(3), CPU, 3
                )
            )
        )
        == 3
    )


def test_each_batch_works_no_further_ahead_than_its_threads():
    started = []
    results = each_batch(started.append, range(50), CPU, 2)
    next(results)
    time.sleep(0.1)
    assert len(started) <= 4
    results.close()
    assert len(started) <= 4


@pytest.mark.parametrize("threads", [1, 3])
def test_each_batch_is_one_thread_and_inference_and_ends_as_it_began(threads):
    before = torch.get_num_threads()
    seen = list(
        each_batch(
            lambda _: (torch.get_num_threads(), torch.is_inference_mode_enabled()),
            range(8),
            CPU,
            threads,
        )
    )
    assert seen == [(1, True)] * 8
    assert (torch.get_num_threads(), torch.is_inference_mode_enabled()) == (before, False)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_batch_passes_an_exception_on_behind_the_results_before_it(threads):
    before, results = torch.get_num_threads(), []
    with pytest.raises(ZeroDivisionError):
        for result in each_batch(lambda number: 6 // (number - 4), range(9), CPU, threads):
            results.append(result)
    assert results == [6 // (number - 4) for number in range(4)]
    assert torch.get_num_threads() == before


# ---- Modules that keep a state.


class Keeping(nn.Module):
    """Keeps the sum of its inputs in itself while it works, as a recurrent layer may: a second
    thread would add to the first one's.
    """

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        if as_buffer:
            self.register_buffer("state", torch.zeros(1))
        else:
            self.state = torch.zeros(1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.state = torch.zeros(1)
        for value in inputs:
            self.state = self.state + value
            time.sleep(0.001)
        return self.state


class Free(nn.Module):
    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def forward(self, alone: bool) -> None:
        if not alone:
            self.barrier.wait(10)


@pytest.mark.parametrize("as_buffer", [False, True])
def test_a_module_that_writes_to_itself_is_run_in_turn(as_buffer):
    turns, module = StatefulModuleLock(), nn.Sequential(Keeping(as_buffer))

    def work(number: int) -> float:
        with turns.held_for(module):
            return module(torch.full((10,), float(number))).item()

    assert list(each_batch(work, range(8), CPU, 4)) == [10.0 * number for number in range(8)]


def test_the_same_without_turns_mixes_states_up():
    module = Keeping(False)
    found = list(
        each_batch(lambda number: module(torch.full((10,), float(number))).item(), range(8), CPU, 4)
    )
    assert found != [10.0 * number for number in range(8)]


def test_other_modules_run_at_once_behind_the_first_run():
    turns, module = StatefulModuleLock(), Free(threading.Barrier(3))

    def work(alone: bool) -> None:
        with turns.held_for(module):
            module(alone)

    work(True)
    list(each_batch(work, [False] * 3, CPU, 3))


def test_a_forward_that_fails_leaves_the_turn_to_the_next():
    turns, module = StatefulModuleLock(), Keeping(False)
    with pytest.raises(TypeError), turns.held_for(module):
        module(None)
    with turns.held_for(module):
        assert module(torch.ones(2)).item() == 2


# ---- The caller's settings.


def flushes() -> bool:
    return torch.tensor([1e-38]).mul(1e-3).item() == 0


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_zero_in_the_context_and_afterwards_as_before(before):
    try:
        torch.set_flush_denormal(before)
        with denormals_as_zero():
            assert flushes()
        assert flushes() == before
        with pytest.raises(ZeroDivisionError), denormals_as_zero():
            raise ZeroDivisionError
        assert flushes() == before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_batch_leaves_no_thread_and_no_setting_when_its_loop_raises(threads):
    before = torch.get_num_threads(), set(threading.enumerate())
    held = each_batch(lambda number: number, range(50), CPU, threads)
    with pytest.raises(KeyboardInterrupt), closing(held) as results:
        for number in results:
            if number == 3:
                raise KeyboardInterrupt
    assert (torch.get_num_threads(), set(threading.enumerate())) == before


def test_a_pool_runs_nothing_more_once_its_context_ends():
    before, ran = torch.get_num_threads(), []
    with pytest.raises(ZeroDivisionError), pool_of_single_threads(2) as pool:
        for number in range(50):
            pool.submit(lambda number=number: (time.sleep(0.02), ran.append(number)))
        assert pool.submit(torch.get_num_threads) and torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert len(ran) < 10 and torch.get_num_threads() == before


def test_overlapping_calls_leave_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    inside, leave = threading.Event(), threading.Event()

    def work():
        with one_thread():
            inside.set()
            leave.wait(10)

    try:
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(10)
        with one_thread():
            leave.set()
            thread.join()
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [3]
    finally:
        torch.set_num_threads(before)
