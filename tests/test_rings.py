"""The ring of x in cuda/matmul.cu as a state machine: every order in which boxes may arrive is tried.

One thread asks for boxes in order, and for box b only when box b - slots has been released. Boxes arrive in any order.
A way takes the boxes of every ``ways``-th chunk, two each, in order. It waits for use number u of a slot with the
parity of u alone, as an mbarrier does: the wait ends when the number of finished uses differs from u in parity.
"""

import pytest
from gpus import GPUS

from flute.kernels import tiles


def taken_too_early(slots: int, ways: int, chunks: int) -> bool:
    """Whether some order of arrivals lets a way go on with a box that has not arrived."""
    mine = [[box for chunk in range(way, chunks, ways) for box in (2 * chunk, 2 * chunk + 1)] for way in range(ways)]
    start = (0, frozenset(), tuple([0] * ways))  # boxes asked for, those on their way, boxes each way has released
    seen, todo = {start}, [start]
    while todo:
        asked, flying, done = todo.pop()
        released = {box for boxes, count in zip(mine, done, strict=True) for box in boxes[:count]}
        following = []
        if asked < 2 * chunks and (asked < slots or asked - slots in released):
            following.append((asked + 1, flying | {asked}, done))
        following += [(asked, flying - {box}, done) for box in flying]
        for way, (boxes, count) in enumerate(zip(mine, done, strict=True)):
            if count == len(boxes):
                continue
            box = boxes[count]
            finished = sum(1 for other in range(box % slots, asked, slots) if other not in flying)
            if finished % 2 != box // slots % 2:  # the wait ends
                if box >= asked or box in flying:
                    return True
                following.append((asked, flying, (*done[:way], count + 1, *done[way + 1 :])))
        for state in following:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return False


@pytest.mark.parametrize(("slots", "ways"), [(3, 1), (4, 1), (5, 1), (4, 2), (6, 3)])
def test_a_slot_of_one_way_is_never_taken_too_early(slots: int, ways: int) -> None:
    assert not taken_too_early(slots, ways, 2 * ways + 2)


@pytest.mark.parametrize(("slots", "ways"), [(5, 2), (6, 2), (8, 3)])
def test_slots_that_ways_share_can_be(slots: int, ways: int) -> None:
    """The search finds what once went wrong: five boxes of two ways, three wrong answers in 22,650 on an H100."""
    assert taken_too_early(slots, ways, 2 * ways + 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_tiling_gives_slots_to_one_way(bits: int) -> None:
    found = [
        one for m in (9, 17, 40, 100, 200, 1000) for one in tiles.candidates(GPUS["H100"], m, 4096, 4096, bits, 64)
    ]
    stacks = [one for m in (16, 1024) for one in tiles.candidates_grouped(GPUS["H100"], m, 8, 4096, 4096, bits, 64)]
    assert any(one.ways > 1 for one in found) and any(one.ways > 1 for one in stacks)
    assert all(one.ways == 1 or one.boxes % (2 * one.ways) == 0 for one in found + stacks)
