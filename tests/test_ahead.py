"""Work that threads do ahead of its taker."""

import threading
import time

import pytest

from cellstore.learn.batches import Ahead, read_ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("cellstore-")]


def slow(number: int) -> int:
    time.sleep(0.004 if number % 3 == 0 else 0)
    if number == 7:
        raise ValueError("seven")
    return number * number


def test_order_does_not_depend_on_which_is_ready_first() -> None:
    assert list(read_ahead(range(7), slow, 3)) == [0, 1, 4, 9, 16, 25, 36]
    assert list(Ahead(read_ahead(range(7), slow, 2))) == [0, 1, 4, 9, 16, 25, 36]
    assert threads() == []


def test_errors_come_out_in_their_place() -> None:
    got = []
    with pytest.raises(ValueError, match="seven"):
        got.extend(Ahead(read_ahead(range(20), slow, 2)))
    assert got == [0, 1, 4, 9, 16, 25, 36]
    assert threads() == []


def test_threads_end_when_the_taker_stops() -> None:
    closed = []

    def endless():
        try:
            yield from read_ahead(iter(int, 1), lambda _: 1, 2)
        finally:
            closed.append(True)

    taken = iter(Ahead(endless(), depth=2))
    assert next(taken) == 1
    assert threads() != []
    taken.close()
    assert threads() == []
    assert closed == [True]


def test_no_more_is_made_than_asked_for() -> None:
    made = []

    def counted():
        for number in range(100):
            made.append(number)
            yield number

    taken = iter(Ahead(counted(), depth=2))
    for given in range(1, 30):
        next(taken)
        time.sleep(0.001)
        assert len(made) <= given + 3  # two wait, one is in the making
    taken.close()
