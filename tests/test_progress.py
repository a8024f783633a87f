"""Meters count for whoever listens, at a bounded rate, and never get in the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks import progress

Record = tuple[str, int, int | None]


class Recorder:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def __call__(self, task: str, done_bytes: int, total_bytes: int | None) -> None:
        self.records.append((task, done_bytes, total_bytes))


@pytest.fixture
def channel() -> Iterator[progress.Channel]:
    channel = progress.Channel()
    yield channel
    channel.close()


def test_outside_of_a_run_a_meter_does_nothing() -> None:
    meter = progress.meter(10)
    meter.add(10)
    assert meter.done_bytes == 0


def test_first_and_last_numbers_arrive_and_few_between() -> None:
    recorder = Recorder()
    with progress.reporting("unpack:a", recorder):
        meter = progress.meter(10_000)
        for _ in range(10_000):
            meter.add(1)
    assert recorder.records[0] == ("unpack:a", 1, 10_000)
    assert recorder.records[-1] == ("unpack:a", 10_000, 10_000)
    assert len(recorder.records) < 20


def test_rate_is_ten_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    recorder = Recorder()
    with progress.reporting("t", recorder):
        meter = progress.meter()
        for _ in range(100):
            meter.add(5)
            now += 0.03125
    assert [done for _, done, _ in recorder.records] == [5 + 20 * step for step in range(25)]
    assert {total for _, _, total in recorder.records} == {None}


def test_reporting_nests_and_ends() -> None:
    outer, inner = Recorder(), Recorder()
    with progress.reporting("a", outer):
        with progress.reporting("b", inner):
            progress.meter(1).add(1)
        progress.meter(2).add(2)
    progress.meter(3).add(3)
    assert (outer.records, inner.records) == ([("a", 2, 2)], [("b", 1, 1)])


def test_threads_of_a_stage_share_a_meter() -> None:
    recorder = Recorder()
    with progress.reporting("t", recorder):
        meter = progress.meter(40_000)

        def count() -> None:
            for _ in range(10_000):
                meter.add(1)

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.records[-1] == ("t", 40_000, 40_000)


@given(
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.integers(0, 1 << 62),
    st.none() | st.integers(0, 1 << 62),
)
def test_records_travel_whole(task: str, done: int, total: int | None) -> None:
    channel, recorder = progress.Channel(), Recorder()
    try:
        channel.send(task, done, total)
        channel.drain(recorder)
    finally:
        channel.close()
    assert recorder.records == [(task, done, total)]


def test_drain_passes_on_the_newest_record_of_each_task(channel: progress.Channel) -> None:
    recorder = Recorder()
    for done in range(5):
        channel.send("a", done, None)
        channel.send("b", done * 2, 8)
    channel.drain(recorder)
    assert recorder.records == [("a", 4, None), ("b", 8, 8)]
    channel.drain(recorder)
    assert len(recorder.records) == 2


def test_a_full_pipe_drops_records_and_blocks_nobody(channel: progress.Channel) -> None:
    recorder = Recorder()
    for done in range(50_000):
        channel.send("task", done, None)
    channel.drain(recorder)
    assert len(recorder.records) == 1
    assert 0 < recorder.records[0][1] < 49_999
    channel.send("task", 50_000, None)
    channel.drain(recorder)
    assert recorder.records[-1] == ("task", 50_000, None)


def test_a_record_that_could_be_torn_is_not_sent(channel: progress.Channel) -> None:
    recorder = Recorder()
    channel.send("x" * 5000, 1, None)
    channel.send("y", 1, None)
    channel.drain(recorder)
    assert recorder.records == [("y", 1, None)]
