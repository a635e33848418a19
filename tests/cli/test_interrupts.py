import os
import signal
import threading

import pytest

from quantkit.checkpoint.run_control import stop_if_asked
from quantkit.cli.interrupts import stop_on_signals
from quantkit.errors import Interrupted


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop(number):
    with pytest.raises(Interrupted), stop_on_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
        stop_if_asked(should_stop, "here")


def test_after_work_that_ended_before_it_was_asked_no_other_begins():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGTERM)


def test_the_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_is_caught():
    found = []

    def work():
        with stop_on_signals() as should_stop:
            found.append((should_stop(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGINT))]
