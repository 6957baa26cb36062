"""The settings of retention: how long what is deleted can be had back, what is kept of each class. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from castore.config_values import Table

KEEP_LAST_MAX: Final = 1_000_000
"""More versions of one NAME than anybody has."""


@dataclass(frozen=True, slots=True)
class RetentionRule:
    """What is kept of the packages whose class, NAME and producer match; the first rule that does decides.

    One that is younger than `keep_for_seconds` is kept, or among the `keep_last` newest of its NAME in the class. With
    neither, all are kept for ever.
    """

    retention_class: str
    name: str
    producer: str
    keep_for_seconds: float | None
    keep_last: int | None

    @property
    def keeps_all(self) -> bool:
        """Whether nothing expires by it."""
        return self.keep_for_seconds is None and self.keep_last is None


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """A deleted package can be restored for `restore_within_seconds`, at least until the next garbage collection then.

    An object that nothing needs is kept until it was stored `orphans_after_seconds` ago. Packages without a rule stay.
    """

    restore_within_seconds: float
    orphans_after_seconds: float
    rules: tuple[RetentionRule, ...]


def parse_retention(top: Table) -> RetentionSettings:
    """The table [retention]. Raises ConfigError."""
    table = top.table("retention", ("restore_within", "orphans_after", "rules"))
    known = ("retention_class", "name", "producer", "keep_for", "keep_last", "keep")
    return RetentionSettings(
        restore_within_seconds=table.duration("restore_within", "7d", maximum="3650d"),
        orphans_after_seconds=table.duration("orphans_after", "1d", maximum="3650d"),
        rules=tuple(_rule(rule) for rule in table.tables("rules", known)),
    )


def _rule(table: Table) -> RetentionRule:
    limits = [key for key in ("keep_for", "keep_last") if key in table]
    if "keep" in table:
        table.choice("keep", None, ("forever",))
        if limits:
            raise table.refuse("keep", f'either keep = "forever" or {" and ".join(limits)}, not both')
    elif not limits:
        raise table.missing("keep_for", 'a duration; or keep_last, or keep = "forever"')
    return RetentionRule(
        retention_class=table.text("retention_class", "*", allowed="a shell-style pattern"),
        name=table.text("name", "*", allowed="a shell-style pattern"),
        producer=table.text("producer", "*", allowed="a shell-style pattern"),
        keep_for_seconds=table.duration("keep_for", "0s", maximum="36500d") if "keep_for" in table else None,
        keep_last=table.count("keep_last", 1, minimum=1, maximum=KEEP_LAST_MAX) if "keep_last" in table else None,
    )
