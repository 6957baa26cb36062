"""What the rules of retention let go. The rules are the configuration's; deleting is `castore.registry.deletion`'s."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from castore.catalog.deleting import packages_of_name
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Package
from castore.catalog.writer import Transaction
from castore.config import RetentionRule, RetentionSettings
from castore.registry.deletion import delete_package


@dataclass(frozen=True, slots=True)
class Expired:
    """A package that no rule keeps, and the number of the rule that decided, from 0."""

    package: Package
    rule: int


def expired_of_name(
    packages: Iterable[Package], tagged: Collection[str], rules: Sequence[RetentionRule], now_ns: int
) -> list[Expired]:
    """What expires of the packages of one NAME; `tagged` versions never do.

    For each package the first rule that matches decides. It keeps what is younger than `keep_for`, and the `keep_last`
    newest of those that it decides about.
    """
    seen = dict.fromkeys(range(len(rules)), 0)
    found: list[Expired] = []
    for package in sorted(packages, key=lambda one: (one.published_at_ns, one.package_id), reverse=True):
        number = next((number for number, rule in enumerate(rules) if _matches(rule, package)), None)
        if number is None:
            continue
        rule = rules[number]
        seen[number] += 1
        age_seconds = (now_ns - package.published_at_ns) / 1e9
        is_kept = (
            rule.keeps_all
            or (rule.keep_for_seconds is not None and age_seconds < rule.keep_for_seconds)
            or (rule.keep_last is not None and seen[number] <= rule.keep_last)
            or package.version in tagged
        )
        if not is_kept:
            found.append(Expired(package, number))
    return found


def _matches(rule: RetentionRule, package: Package) -> bool:
    return (
        fnmatchcase(package.retention_class, rule.retention_class)
        and fnmatchcase(package.name, rule.name)
        and fnmatchcase(package.producer, rule.producer)
    )


def expired_packages(reader: CatalogReader, settings: RetentionSettings) -> Iterator[Expired]:
    """What expires now, by NAME, the newest first. Nothing is changed."""
    now = time.time_ns()
    for name, packages in groupby(reader.packages(), key=lambda package: package.name):
        tagged = {tag.version for tag in reader.tags(name)}
        yield from expired_of_name(packages, tagged, settings.rules, now)


def delete_expired(transaction: Transaction, name: str, settings: RetentionSettings, *, uid: int) -> list[Expired]:
    """Delete what expires now of one NAME: it can be restored as whatever is deleted."""
    packages, tagged = packages_of_name(transaction, name)
    found = expired_of_name(packages, tagged, settings.rules, time.time_ns())
    for one in found:
        delete_package(
            transaction,
            name,
            one.package.version,
            uid=uid,
            restore_within_seconds=settings.restore_within_seconds,
            reason="retention",
        )
    return found
