"""Slots: bounded, in the order of ranks."""

import threading
import time

from flows.running.step_queue import Slots


def test_slots_many_waiters_never_more_than_count():
    slots, running, peak = Slots(2), 0, 0
    guard = threading.Lock()

    def work(rank):
        nonlocal running, peak
        with slots.take(rank):
            with guard:
                running += 1
                peak = max(peak, running)
            time.sleep(0.01)
            with guard:
                running -= 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert peak == 2


def test_slots_freed_the_lowest_rank_goes_first():
    slots, order = Slots(1), []

    def work(rank):
        with slots.take(rank):
            order.append(rank)

    with slots.take(0):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in (5, 3, 9, 1)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(5)
    assert order == [1, 3, 5, 9]


def test_slots_body_raises_slot_is_free_again():
    slots = Slots(1)
    try:
        with slots.take(0):
            raise ValueError
    except ValueError:
        pass
    with slots.take(1):
        pass


def test_slots_taken_alone_are_all_there_are_and_the_lowest_rank_still_goes_first():
    slots, order, beside = Slots(2), [], []
    running, guard = set(), threading.Lock()

    def work(rank, alone):
        with slots.take(rank, alone=alone):
            with guard:
                order.append(rank)
                running.add(rank)
                beside.append((rank, frozenset(running)))
            time.sleep(0.02)
            with guard:
                running.remove(rank)

    with slots.take(0), slots.take(1):
        threads = [threading.Thread(target=work, args=(rank, rank == 3)) for rank in (5, 3, 4, 2)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)  # all wait
    for thread in threads:
        thread.join(5)
    assert order[:2] == [2, 3] and set(order[2:]) == {4, 5}
    assert dict(beside)[3] == {3}
