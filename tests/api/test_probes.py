"""Probes of backends: nobody waits for one that hangs, and many who ask cost one probe."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from castore.api.probes import FRESH_SECONDS, KEPT_SECONDS, WAIT_SECONDS, BackendProbes
from castore.storage.deadline import HEALTH_S, DeadlineBackend
from castore.storage.spi import BackendHealth, StorageBackend
from tests.storage.memory_backend import MemoryBackend


class Patient(MemoryBackend):
    """A backend whose probe takes as long as it is told to, and is counted."""

    def __init__(self, backend_id: str) -> None:
        super().__init__(backend_id)
        self.seconds = 0.0
        self.status = BackendHealth("pass", "fine")
        self.error: Exception | None = None
        self.probe_count = 0

    async def health(self) -> BackendHealth:
        self.probe_count += 1
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return self.status


@pytest.fixture
async def quick() -> Patient:
    return Patient("quick")


@pytest.fixture
async def slow() -> Patient:
    return Patient("slow")


@pytest.fixture
async def probes(nursery: trio.Nursery, quick: Patient, slow: Patient) -> BackendProbes:
    backends: dict[str, StorageBackend] = {"quick": quick, "slow": DeadlineBackend(slow)}
    probes = BackendProbes(backends)
    await nursery.start(probes.run)
    return probes


async def test_all_are_probed_at_once(autojump_clock: MockClock, probes: BackendProbes, slow: Patient) -> None:
    slow.seconds = WAIT_SECONDS / 2
    started = trio.current_time()
    found = await probes.latest()
    assert trio.current_time() - started == WAIT_SECONDS / 2
    assert {backend_id: probe.health.status for backend_id, probe in found.items()} == {"quick": "pass", "slow": "pass"}
    assert found["slow"].duration_ms == WAIT_SECONDS / 2 * 1000


async def test_a_result_is_given_again_while_it_is_fresh(
    autojump_clock: MockClock, probes: BackendProbes, quick: Patient
) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(probes.latest)
    assert quick.probe_count == 1
    await trio.sleep(FRESH_SECONDS + 0.1)
    quick.status = BackendHealth("fail", "gone")
    assert (await probes.latest())["quick"].health.status == "fail"
    assert quick.probe_count == 2


async def test_nobody_waits_for_one_that_hangs(autojump_clock: MockClock, probes: BackendProbes, slow: Patient) -> None:
    slow.seconds = 3600
    started = trio.current_time()
    found = await probes.latest()
    assert trio.current_time() - started == WAIT_SECONDS
    assert found["quick"].health.status == "pass"
    assert (found["slow"].health.status, found["slow"].duration_ms) == ("warn", None)
    await trio.sleep(HEALTH_S)
    assert (await probes.latest())["slow"].health.status == "fail"
    assert slow.probe_count == 1


async def test_what_was_known_counts_for_a_while(
    autojump_clock: MockClock, probes: BackendProbes, slow: Patient
) -> None:
    await probes.latest()
    slow.seconds = 3600
    await trio.sleep(FRESH_SECONDS + 0.1)
    assert (await probes.latest())["slow"].health.status == "pass"
    await trio.sleep(KEPT_SECONDS)
    # The probe that hung is over by then.
    assert (await probes.latest())["slow"].health.detail == f"no answer within {HEALTH_S:.1f} s"


async def test_what_is_old_counts_no_more(autojump_clock: MockClock, probes: BackendProbes, slow: Patient) -> None:
    await probes.latest()
    slow.seconds = 3600
    await trio.sleep(KEPT_SECONDS + 1)
    assert (await probes.latest())["slow"].health == BackendHealth("warn", "has not answered within 1 s")


async def test_a_probe_that_breaks_its_contract(
    probes: BackendProbes, quick: Patient, caplog: pytest.LogCaptureFixture
) -> None:
    quick.error = RuntimeError("on purpose")
    found = await probes.latest()
    assert (found["quick"].health.status, found["slow"].health.status) == ("fail", "pass")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
