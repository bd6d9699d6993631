"""Which lane gets which order, what trials hear, and what happens when workers die."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from orchestrate.pool import Pool


def orders(*listed: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"name": "-".join(map(str, one)), "order": list(one), "split": "test"} for one in listed]


def run(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, 10))


async def lanes(pool: Pool, count: int) -> None:
    for lane in range(count):
        await pool.start(lane)


async def finish(pool: Pool, job: Any, value: float = 1.0) -> None:
    await pool.done(job["id"], job["order"]["name"], {"value": value})


def test_a_lane_keeps_to_its_trial_and_the_next_lane_takes_another() -> None:
    async def steps() -> None:
        pool = Pool(1, 2)
        await lanes(pool, 2)
        await pool.submit("a", {"x": 1}, orders((0, 1), (1, 0)))
        await pool.submit("b", {"x": 2}, orders((0, 1), (1, 0)))
        first: Any = await pool.take(0, None)
        second: Any = await pool.take(1, None)
        assert [first["settings"]["x"], second["settings"]["x"]] == [1, 2]
        await finish(pool, first)
        third: Any = await pool.take(0, first["id"])
        assert (third["settings"]["x"], third["order"]["name"]) == (1, "1-0")

    run(steps())


def test_a_lane_without_work_helps_with_the_order_least_like_those_under_way() -> None:
    async def steps() -> None:
        pool = Pool(1, 2)
        await lanes(pool, 2)
        await pool.submit("a", {}, orders((0, 1, 2), (0, 2, 1), (2, 1, 0), (2, 0, 1)))
        first: Any = await pool.take(0, None)
        second: Any = await pool.take(1, None)
        assert [job["order"]["name"] for job in (first, second)] == ["0-1-2", "2-1-0"]

    run(steps())


def test_all_workers_of_a_lane_get_the_same_orders_in_the_same_sequence() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1), (1, 0)))
        sequences: list[list[str]] = [[], [], []]

        async def worker(rank: int, lockstep: asyncio.Barrier) -> None:
            last = None
            while True:
                job: Any = await pool.take(0, last)
                if job is None:
                    return
                await lockstep.wait()
                sequences[rank].append(job["order"]["name"])
                if rank == 0:
                    await finish(pool, job)
                    if len(sequences[0]) == 2:
                        await pool.close()
                last = job["id"]
                await lockstep.wait()

        lockstep = asyncio.Barrier(3)
        await asyncio.gather(*(worker(rank, lockstep) for rank in range(3)))
        assert sequences == [["0-1", "1-0"]] * 3

    run(steps())


def test_a_trial_hears_of_stages_and_orders_in_turn() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1)))
        assert await pool.collect("a", 0.01) == []
        job: Any = await pool.take(0, None)
        await pool.stage(job["id"], {"position": 0})
        await pool.stage(job["id"], {"position": 1})
        await finish(pool, job, 7.0)
        news = await pool.collect("a", 5)
        assert [item["kind"] for item in news] == ["stage", "stage", "order"]
        assert news[2]["outcome"] == {"value": 7.0}
        assert await pool.collect("a", 0.01) == []

    run(steps())


def test_a_waiting_trial_and_a_waiting_lane_are_woken() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        taking = asyncio.create_task(pool.take(0, None))
        await asyncio.sleep(0.01)
        await pool.submit("a", {}, orders((0, 1)))
        job: Any = await taking
        collecting = asyncio.create_task(pool.collect("a", 5))
        await asyncio.sleep(0.01)
        await finish(pool, job)
        assert [item["kind"] for item in await collecting] == ["order"]

    run(steps())


def test_a_cancelled_trial_is_wanted_by_nobody() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1), (1, 0)))
        job: Any = await pool.take(0, None)
        assert await pool.wanted(job["id"])
        await pool.cancel("a")
        assert not await pool.wanted(job["id"])
        await pool.submit("b", {}, orders((1, 0)))
        following: Any = await pool.take(0, job["id"])
        assert following["order"]["name"] == "1-0"
        assert await pool.wanted(following["id"])

    run(steps())


def test_a_trial_that_is_started_again_begins_anew() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1)))
        old: Any = await pool.take(0, None)
        await pool.submit("a", {}, orders((0, 1)))
        assert not await pool.wanted(old["id"])
        await finish(pool, old)  # too late: nobody hears of it
        assert await pool.collect("a", 0.01) == []
        new: Any = await pool.take(0, old["id"])
        assert new["id"] != old["id"]

    run(steps())


def test_workers_that_died_get_their_order_again_until_its_trial_fails() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1), (1, 0)))
        await pool.submit("b", {}, orders((1, 0)))
        first: Any = await pool.take(0, None)
        await pool.start(0)
        again: Any = await pool.take(0, None)
        assert again == first
        await pool.start(0)
        other: Any = await pool.take(0, None)
        (failed,) = await pool.collect("a", 5)
        assert failed == {"kind": "failed", "reason": "workers died 2 times while they computed 0-1"}
        assert other["id"] != first["id"]
        await finish(pool, other)
        assert [item["kind"] for item in await pool.collect("b", 5)] == ["order"]

    run(steps())


def test_an_order_that_was_finished_before_its_workers_died_is_not_done_again() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1), (1, 0)))
        first: Any = await pool.take(0, None)
        await finish(pool, first)
        await pool.start(0)
        second: Any = await pool.take(0, None)
        assert second["order"]["name"] == "1-0"

    run(steps())


def test_a_failed_order_fails_its_trial_alone() -> None:
    async def steps() -> None:
        pool = Pool(1, 2)
        await lanes(pool, 2)
        await pool.submit("a", {}, orders((0, 1), (1, 0)))
        await pool.submit("b", {}, orders((0, 1)))
        first: Any = await pool.take(0, None)
        second: Any = await pool.take(1, None)
        await pool.failed(first["id"], "diverged")
        await pool.failed(first["id"], "diverged, says another worker")
        assert await pool.collect("a", 5) == [{"kind": "failed", "reason": "diverged"}]
        assert not await pool.wanted(first["id"])
        assert await pool.wanted(second["id"])

    run(steps())


@pytest.mark.parametrize("waiting", [True, False])
def test_without_any_lane_left_trials_fail_instead_of_waiting(waiting: bool) -> None:
    async def steps() -> None:
        pool = Pool(1, 2)
        await lanes(pool, 2)
        if waiting:
            await pool.submit("a", {}, orders((0, 1)))
        await pool.lane_closed(0, "lane 0 died")
        await pool.lane_closed(1, "lane 1 died")
        if not waiting:
            await pool.submit("a", {}, orders((0, 1)))
        (item,) = await pool.collect("a", 5)
        assert item["kind"] == "failed"
        assert "died" in item["reason"]

    run(steps())


def test_the_order_of_a_lane_that_is_given_up_goes_to_another() -> None:
    async def steps() -> None:
        pool = Pool(5, 2)
        await lanes(pool, 2)
        await pool.submit("a", {}, orders((0, 1)))
        job: Any = await pool.take(0, None)
        await pool.lane_closed(0, "died")
        other: Any = await pool.take(1, None)
        assert other["order"] == job["order"]

    run(steps())


def test_after_the_end_lanes_are_told_to_go_home() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        await pool.submit("a", {}, orders((0, 1)))
        job: Any = await pool.take(0, None)
        await pool.close()
        assert not await pool.wanted(job["id"])
        assert await pool.take(0, job["id"]) is None

    run(steps())


def test_waiting_for_work_is_not_time_on_orders() -> None:
    async def steps() -> None:
        pool = Pool(1, 1)
        await lanes(pool, 1)
        taking = asyncio.create_task(pool.take(0, None))
        await asyncio.sleep(0.3)
        await pool.submit("a", {}, orders((0, 1)))
        job: Any = await taking
        await asyncio.sleep(0.1)
        await finish(pool, job)
        await pool.close()
        await pool.take(0, job["id"])
        assert 0.1 <= await pool.busy_seconds() < 0.3

    run(steps())
