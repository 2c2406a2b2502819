"""Interruptions get through wherever they arrive."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from pipeline.interruption import interruptible


class Finalized:
    """Interrupts the process from where no exception can propagate."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_termination_is_an_interruption():
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_interruption_that_a_finalizer_swallows_is_repeated():
    went_on = False
    with pytest.raises(KeyboardInterrupt), interruptible():
        finalized = Finalized()
        del finalized
        went_on = True
        time.sleep(30)
    assert went_on, "the finalizer did not swallow the interruption: the test shows nothing"


def test_handlers_are_put_back_and_no_repetition_comes_late():
    handlers = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with interruptible():
        finalized = Finalized()
        del finalized
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == handlers
    # A repetition now would end this process.
    time.sleep(1.5)


def test_other_exceptions_that_cannot_propagate_are_reported(
    monkeypatch: pytest.MonkeyPatch,
):
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    reported: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    with interruptible():
        faulty = Faulty()
        del faulty
    assert [type(item.exc_value) for item in reported] == [ValueError]
