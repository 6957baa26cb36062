"""Asks the questions of a probe, each within a deadline, and makes findings of the replies. Has no question itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

import trio

from castore.errors import StorageError
from castore.storage.spi import Finding

QUESTION_S: Final = 30.0
"""Seconds for one question. The largest moves 11 MiB, which takes a third of that at 1 MiB/s."""
PROBE_S: Final = 300.0
"""Seconds for all questions of a probe: sixty of them at five seconds each. Whoever asks waits for it."""
SILENT_QUESTIONS: Final = 2
"""Questions in a row without a reply within QUESTION_S, after which no more are asked: the backend hangs."""
TRIES: Final = 2
"""A question that met a temporary error is asked once more: one connection that broke says nothing of a server."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a question came to. `answer` is a few words in which the backend's own code or number occurs."""

    enforced: Literal["yes", "no", "not supported"]
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """`ask` raises StorageError when the question cannot be answered; asked again, it begins anew.

    The other fields are those of a `Finding`.
    """

    name: str
    text: str
    expected: str
    ask: Callable[[], Awaitable[Reply]]
    consequence: str = ""


async def ask_all(
    questions: Iterable[Question], *, question_s: float = QUESTION_S, probe_s: float = PROBE_S
) -> tuple[Finding, ...]:
    """A finding for each question, in their order; one after the other, so that none disturbs another.

    Takes `probe_s` at most: whatever was not asked by then is unknown.
    """
    end = trio.current_time() + probe_s
    findings = []
    silent = 0
    for question in questions:
        if silent == SILENT_QUESTIONS:
            findings.append(_finding(question, "unknown", "not asked: the backend had stopped answering"))
            continue
        left = end - trio.current_time()
        if left <= 0:
            findings.append(_finding(question, "unknown", f"not asked: the probe took its {probe_s:g} s"))
            continue
        finding = None
        with trio.move_on_after(min(question_s, left)) as scope:
            finding = await _ask(question)
        if finding is None:
            finding = _finding(question, "unknown", f"no answer within {min(question_s, left):.0f} s")
        silent = silent + 1 if scope.cancelled_caught else 0
        findings.append(finding)
    return tuple(findings)


async def _ask(question: Question) -> Finding:
    tries = 0
    while True:
        tries += 1
        try:
            reply = await question.ask()
        except StorageError as exc:
            if not exc.temporary or tries == TRIES:
                return _finding(question, "unknown", str(exc))
        else:
            return _finding(question, reply.enforced, reply.answer)


def _finding(question: Question, enforced: Literal["yes", "no", "not supported", "unknown"], answer: str) -> Finding:
    return Finding(
        name=question.name,
        question=question.text,
        expected=question.expected,
        answer=answer,
        enforced=enforced,
        consequence=question.consequence,
    )
