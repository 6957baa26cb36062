"""How the questions of a probe are asked: deadlines, a second try, and what makes a finding of which severity."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from castore.errors import StorageDenied, StorageUnavailable
from castore.storage.probing import PROBE_S, QUESTION_S, SILENT_QUESTIONS, TRIES, Question, Reply, ask_all
from castore.storage.spi import Finding


def question(name: str, ask: Callable[[], Awaitable[Reply]], consequence: str = "") -> Question:
    return Question(name, f"what {name} asks", "something", ask, consequence)


async def yes() -> Reply:
    return Reply("yes", "200")


async def no() -> Reply:
    return Reply("no", "the wrong one is taken: 200")


async def hang() -> Reply:
    await trio.sleep_forever()
    raise AssertionError


async def test_severities() -> None:
    async def refused() -> Reply:
        return Reply("not supported", "501")

    async def denied() -> Reply:
        raise StorageDenied("these credentials may not")

    asks = {"yes": yes, "no": no, "refused": refused, "denied": denied}
    nice = await ask_all(question(name, ask) for name, ask in asks.items())
    relied_on = await ask_all(question(name, ask, "bytes are lost") for name, ask in asks.items())
    assert [finding.enforced for finding in nice] == ["yes", "no", "not supported", "unknown"]
    assert [finding.severity for finding in nice] == ["pass", "info", "info", "info"]
    assert [finding.severity for finding in relied_on] == ["pass", "fail", "fail", "unknown"]
    assert relied_on[1] == Finding(
        "no", "what no asks", "something", "the wrong one is taken: 200", "no", "bytes are lost"
    )
    assert relied_on[3].answer == "these credentials may not"


async def test_only_a_temporary_error_is_asked_again() -> None:
    tries = {"temporary": 0, "permanent": 0, "once": 0}

    async def temporary() -> Reply:
        tries["temporary"] += 1
        raise StorageUnavailable("the connection broke")

    async def permanent() -> Reply:
        tries["permanent"] += 1
        raise StorageDenied("may not")

    async def once() -> Reply:
        tries["once"] += 1
        if tries["once"] == 1:
            raise StorageUnavailable("the connection broke")
        return Reply("no", "200")

    findings = await ask_all(question(ask.__name__, ask) for ask in (temporary, permanent, once))
    assert [finding.enforced for finding in findings] == ["unknown", "unknown", "no"]
    assert tries == {"temporary": TRIES, "permanent": 1, "once": 2}


async def test_a_backend_that_hangs_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    asked = 0

    async def count_and_hang() -> Reply:
        nonlocal asked
        asked += 1
        return await hang()

    findings = await ask_all([question("first", yes), *(question("later", count_and_hang) for _ in range(5))])
    assert [finding.enforced for finding in findings] == ["yes", *["unknown"] * 5]
    assert asked == SILENT_QUESTIONS
    assert trio.current_time() == SILENT_QUESTIONS * QUESTION_S
    assert findings[1].answer == f"no answer within {QUESTION_S:.0f} s"
    assert findings[-1].answer == "not asked: the backend had stopped answering"


async def test_one_that_answers_now_and_then_is_asked_on(autojump_clock: trio.testing.MockClock) -> None:
    findings = await ask_all(question("any", ask) for ask in (hang, yes, hang, yes))
    assert [finding.enforced for finding in findings] == ["unknown", "yes", "unknown", "yes"]


async def test_a_probe_ends(autojump_clock: trio.testing.MockClock) -> None:
    async def slow() -> Reply:
        await trio.sleep(QUESTION_S - 1)
        return await yes()

    count = int(PROBE_S // (QUESTION_S - 1))
    findings = await ask_all(question("slow", slow) for _ in range(count + 5))
    assert trio.current_time() == PROBE_S
    assert [finding.enforced for finding in findings] == ["yes"] * count + ["unknown"] * 5
    assert findings[-1].answer == f"not asked: the probe took its {PROBE_S:g} s"
