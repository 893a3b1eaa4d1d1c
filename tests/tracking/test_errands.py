"""Calls beside the training: in order, never waited for when added, replaced when they fail or hang."""

from __future__ import annotations

import threading
import time

from lmlab.tracking.errands import Errands


def test_they_are_made_in_order_and_finish_waits() -> None:
    made: list[int] = []
    errands = Errands()
    for number in range(20):
        errands.add(lambda number=number: made.append(number), instead=lambda: made.append(-1))
    errands.finish(30)
    assert made == list(range(20))


def test_one_that_fails_is_replaced_and_the_next_is_made() -> None:
    made: list[str] = []
    errands = Errands()
    errands.add(lambda: [][0], instead=lambda: made.append("instead"))
    errands.add(lambda: made.append("next"), instead=lambda: made.append("not this"))
    errands.finish(30)
    assert made == ["instead", "next"]


def test_one_that_hangs_holds_nobody_up() -> None:
    made: list[str] = []
    forever = threading.Event()
    errands = Errands()
    began = time.monotonic()
    errands.add(lambda: forever.wait(60), instead=lambda: made.append("instead"))
    errands.add(lambda: made.append("never"), instead=lambda: made.append("instead of the next"))
    errands.finish(0.2)
    assert time.monotonic() - began < 30
    assert made == ["instead", "instead of the next"]
    forever.set()


def test_nothing_to_do_is_finished_at_once() -> None:
    began = time.monotonic()
    Errands().finish(60)
    assert time.monotonic() - began < 30


def test_no_thread_is_left_waiting() -> None:
    before = set(threading.enumerate())
    errands = Errands()
    errands.add(lambda: None, instead=lambda: None)
    (thread,) = set(threading.enumerate()) - before
    errands.finish(30)
    thread.join(30)
    assert not thread.is_alive()
