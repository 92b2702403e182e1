"""Work that threads do before its results are asked for."""

import itertools
import threading
import time

import pytest

from cellstore.learn.batches import prefetch


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("cellstore-")]


def slow(number: int) -> int:
    time.sleep(0.004 if number % 3 == 0 else 0)
    if number == 7:
        raise ValueError("seven")
    return number * number


def test_order_does_not_depend_on_which_is_ready_first() -> None:
    assert list(prefetch(range(7), slow, 3)) == [0, 1, 4, 9, 16, 25, 36]
    assert threads() == []


def test_errors_come_out_in_their_turn() -> None:
    got = []
    with pytest.raises(ValueError, match="seven"):
        got.extend(prefetch(range(20), slow, 2))
    assert got == [0, 1, 4, 9, 16, 25, 36]
    assert threads() == []


def test_threads_end_when_the_taker_stops() -> None:
    taken = prefetch(itertools.count(), lambda number: number, 2)
    assert next(taken) == 0
    assert threads() != []
    taken.close()
    assert threads() == []


def test_no_more_is_made_than_asked_for() -> None:
    made: list[int] = []
    taken = prefetch(range(100), made.append, 2)
    for given in range(1, 30):
        next(taken)
        time.sleep(0.001)
        assert len(made) <= given + 3  # two wait, one is in the making
    taken.close()
