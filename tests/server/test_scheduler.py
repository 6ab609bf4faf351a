from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hanse.messages.wire import Resources
from hanse.server.scheduler import Queued, room, starts

GIB = 1 << 30


def cores(count: float) -> Resources:
    return Resources(cores=count)


def test_a_job_takes_every_site_that_has_room() -> None:
    free = {"a": cores(4), "b": cores(1), "c": cores(2)}
    assert starts([Queued("j", ("c", "b", "a"), 2, cores(2))], free=free) == {"j": ("a", "c")}


def test_a_job_waits_for_its_sites_and_holds_nobody_up() -> None:
    queue = [Queued("waits", ("a", "away"), 2, cores(1)), Queued("starts", ("a",), 1, cores(4))]
    assert starts(queue, free={"a": cores(4)}) == {"starts": ("a",)}


def test_a_job_that_lacks_room_keeps_its_sites() -> None:
    queue = [Queued("large", ("a", "b"), 2, cores(4)), Queued("small", ("a", "b", "c"), 1, cores(1))]
    assert starts(queue, free={"a": cores(4), "b": cores(3), "c": cores(1)}) == {"small": ("c",)}


def test_what_one_job_takes_the_next_has_not() -> None:
    resources = Resources(cores=1, memory_bytes=GIB, gpus=1)
    free = {"a": Resources(cores=4, memory_bytes=4 * GIB, gpus=1)}
    queue = [Queued("first", ("a",), 1, resources), Queued("second", ("a",), 1, resources), Queued("third", ("a",), 1, cores(1))]
    assert starts(queue, free=free) == {"first": ("a",)}  # the second waits for the GPU, and keeps the site


def test_a_job_that_ran_before_starts_with_all_its_sites() -> None:
    before = Queued("j", ("a", "b", "c"), 2, cores(2), fixed=True)
    assert starts([before], free={"a": cores(2), "b": cores(2)}) == {"j": ("a", "b", "c")}  # c may come later
    assert starts([before], free={"a": cores(2), "b": cores(2), "c": cores(1)}) == {}  # c has no room
    assert starts([before], free={"a": cores(2)}) == {}


def test_only_so_many_run_at_once() -> None:
    queue = [Queued(name, ("a",), 1, cores(0)) for name in "xyz"]
    assert starts(queue, free={"a": cores(1)}, running=1, max_running=3) == {"x": ("a",), "y": ("a",)}


def test_room_is_what_the_running_jobs_leave() -> None:
    assert room(Resources(cores=4, gpus=1), [cores(1), cores(1), Resources(gpus=1)]) == cores(2)
    assert room(cores(1), [cores(3)]) == cores(0)


names = st.sampled_from("abcde")
amounts = st.integers(0, 3).map(lambda count: Resources(cores=count))
jobs = st.builds(lambda sites, needed, resources: (tuple(sorted(sites)), needed, resources), st.sets(names), st.integers(1, 3), amounts)
queues = st.lists(jobs, max_size=8).map(lambda found: [Queued(f"job-{number}", *about) for number, about in enumerate(found)])


@given(queues, st.dictionaries(names, amounts), st.integers(0, 3), st.none() | st.integers(0, 5))
def test_nothing_is_given_twice_and_nobody_starts_too_small(
    queue: list[Queued], free: dict[str, Resources], running: int, max_running: int | None
) -> None:
    started = starts(queue, free=free, running=running, max_running=max_running)
    taken = dict.fromkeys(free, 0.0)
    for waiting in queue:
        for site in started.get(waiting.job, ()):
            assert site in waiting.sites
            taken[site] += waiting.resources.cores
    assert all(taken[site] <= free[site].cores for site in free)
    assert all(len(started[job.job]) >= job.needed for job in queue if job.job in started)
    if max_running is not None:
        assert len(started) <= max(0, max_running - running)


@given(queues, st.dictionaries(names, amounts))
def test_the_first_in_the_queue_starts_if_it_can_alone(queue: list[Queued], free: dict[str, Resources]) -> None:
    for number, waiting in enumerate(queue):
        if starts([waiting], free=free):
            earlier = queue[:number]
            assert waiting.job in starts([waiting, *earlier], free=free)


@given(queues, st.dictionaries(names, amounts))
def test_a_later_job_changes_nothing_for_the_earlier_ones(queue: list[Queued], free: dict[str, Resources]) -> None:
    whole = starts(queue, free=free)
    for number in range(len(queue)):
        some = starts(queue[:number], free=free)
        assert some == {job.job: whole[job.job] for job in queue[:number] if job.job in whole}
