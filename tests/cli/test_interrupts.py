import os
import signal
import threading

import pytest

from quantkit.cli.interrupts import stop_on_signals


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop(number):
    with stop_on_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop() and should_stop()


def test_the_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
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
