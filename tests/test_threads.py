"""Ranks that are threads, on which other tests count: who hears of a rank that leaves."""

import pytest
from threads import ThreadWorld, on_ranks
from todi.errors import InputError
from todi.runtime.lost import PeersLost

RANKS = 8


@pytest.mark.parametrize("attempt", range(20))
def test_a_meeting_that_all_have_come_to_is_held(attempt):
    """However soon one of them leaves after it, and while the others have not woken up."""
    def work(world: ThreadWorld) -> None:
        assert world.gather(world.rank) == list(range(RANKS))
        world.barrier()
        raise InputError(f"of rank {world.rank}")

    assert [str(error) for error in on_ranks(RANKS, work)] == [f"of rank {rank}" for rank in range(RANKS)]


@pytest.mark.parametrize("fails", [False, True])
def test_whoever_waits_for_one_that_has_left_is_told(fails):
    """Whether it has ended well or not; those that wait for nobody end as they would."""
    def work(world: ThreadWorld) -> str:
        world.barrier()
        if world.rank == 2:
            return "done"
        if world.rank == 1:
            if fails:
                raise InputError("its own")
            return "done"
        world.barrier()
        return "met"

    said = on_ranks(RANKS, work)
    assert str(said[1]) == ("its own" if fails else "done") and said[2] == "done"
    assert all(isinstance(error, PeersLost) for error in [said[0], *said[3:]])
