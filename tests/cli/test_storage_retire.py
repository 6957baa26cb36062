"""`castore storage retire`: what it refuses, what it forgets, and what it leaves alone."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.catalog.connection import open_writer
from castore.catalog.records import StoredProbe
from castore.catalog.retiring import forget_in_packages, forget_locations
from castore.catalog.writer import Transaction
from castore.digest import Digest
from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.damage import read_object
from tests.event_schemas import check_event
from tests.places import PLACES, Place
from tests.published import PublishedStore

everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
FILES = {b"a": b"a", b"sub/b": b"b" * 5000}
OTHER = {b"c": b"cc"}


class Retiring:
    """A store with the backends `keep` and `old`: demo/1 is in both, other/1 in `old` alone."""

    def __init__(self, root: Path, place: Place, cli: Cli) -> None:
        self.cli = cli
        self.place = place
        self.store = PublishedStore(root, place, "keep", "old")
        cli.environ["CASTORE_CONFIG"] = str(self.store.config_path)
        self._text = self.store.config_path.read_text()
        trio.run(self._fill)

    async def _fill(self) -> None:
        await self.store.create()
        self.digests = await self.store.publish("demo/1", FILES, "old", "keep")
        self.only_old = await self.store.publish("other/1", OTHER, "old")
        staged = await self.store.store(b"staged, and in no package", "old")
        self.store.write(lambda transaction: transaction.add_intents([(staged.digest, "old")], owner="somebody"))
        for backend_id in ("keep", "old"):
            self.store.write(partial(Transaction.set_probe, probe=StoredProbe(backend_id, 1, "", ())))
        await self.store.aclose()

    def unconfigure(self) -> None:
        """Take `old` out of the configuration."""
        self.store.config_path.write_text(self._text.replace(self.place.section("old"), ""))

    def configure(self) -> None:
        self.store.config_path.write_text(self._text)

    def make_dispensable(self) -> None:
        """Copy what is in `old` alone, then take it out of the configuration."""
        self.configure()
        self.cli("storage", "replicate", "--from", "old", "--to", "keep")
        self.unconfigure()

    def rows(self, sql: str) -> list[Any]:
        database = open_writer(self.store.catalog_path).conn
        try:
            return list(database.execute(sql).fetchall())
        finally:
            database.close()

    def execute(self, sql: str) -> None:
        self.rows(sql)

    def facts(self) -> list[Any]:
        """All that retire may change."""
        return [
            self.rows(f"SELECT * FROM {table} ORDER BY 1, 2")
            for table in ("storage_locations", "put_intents", "backend_probes", "packages")
        ]

    def backends_of(self, ref: str) -> list[str]:
        found: list[str] = json.loads(self.cli("package", "show", ref, "--json").stdout)["backend_ids"]
        return found

    def refusal(self, *arguments: str) -> list[str]:
        """What it says when it finds that the backend is needed, and changes nothing."""
        before = self.facts()
        done = self.cli("storage", "retire", "--backend", "old", "--yes", *arguments, code=1)
        assert self.facts() == before
        return done.stderr.splitlines()


@pytest.fixture
def retiring(tmp_path: Path, place: Place, cli: Cli) -> Retiring:
    return Retiring(tmp_path, place, cli)


@everywhere
def test_what_nothing_needs_is_forgotten(retiring: Retiring) -> None:
    retiring.make_dispensable()
    assert retiring.backends_of("other/1") == ["old", "keep"]
    done = retiring.cli("storage", "retire", "--backend", "old", "--yes")
    assert done.stdout == "forgot backend old: 6 locations; its objects are where they were\n"
    assert retiring.rows("SELECT DISTINCT backend_id FROM storage_locations") == [("keep",)]
    told = [json.loads(line) for line in retiring.cli("events", "--json").stdout.splitlines()]
    gone = [event for event in told if event["type"] == "v1.storage.location_deleted"]
    assert {(event["data"]["backend_id"], event["data"]["reason"]) for event in gone} == {("old", "retired")}
    assert len({event["subject"] for event in gone}) == 6
    for event in gone:
        check_event(event)
    assert retiring.rows("SELECT count(*) FROM put_intents") == [(0,)]
    assert retiring.rows("SELECT backend_id FROM backend_probes") == [("keep",)]
    assert retiring.backends_of("demo/1") == retiring.backends_of("other/1") == ["keep"]
    backends = json.loads(retiring.cli("storage", "backends", "--json").stdout)["backends"]
    assert [backend["backend_id"] for backend in backends] == ["keep"]
    assert (
        retiring.cli("storage", "verify").stdout.splitlines()[-1]
        == "verified: 5, failed: 0, changed: 0, unreachable: 0"
    )
    # Its objects lie where they lay.
    for digest in [*retiring.digests.values(), *retiring.only_old.values()]:
        assert read_object(retiring.store.config.backends["old"], digest)
    line = retiring.cli.error("storage", "retire", "--backend", "old", "--yes")
    assert line == "--backend old: the catalog knows nothing of it; it knows of: keep"


def test_what_is_needed_is_named(retiring: Retiring) -> None:
    retiring.unconfigure()
    first, mend = retiring.refusal()
    assert first == (
        "castore: error: backend old is still needed: 2 blobs of 1 package without another good copy in a "
        "configured backend, for example of other/1"
    )
    assert "`castore storage replicate --from old --to ANOTHER`" in mend
    before = retiring.facts()
    done = retiring.cli("storage", "retire", "--backend", "old", "--yes", "--json", code=1)
    assert retiring.facts() == before
    assert json.loads(done.stdout) == {
        "backend_id": "old",
        "is_retired": False,
        "forgotten_location_count": 0,
        "location_count": 6,
        "needed_blob_count": 2,
        "needed_bad_count": 0,
        "needed_by_package_count": 1,
        "needed_by_packages": ["other/1"],
    }


def test_what_is_lost_is_not_forgotten(retiring: Retiring) -> None:
    """Without a row nobody would know that the blob is missing."""
    retiring.make_dispensable()
    retiring.execute("UPDATE storage_locations SET status = 'failed', reason = 'missing' WHERE backend_id = 'old'")
    retiring.execute(
        "DELETE FROM storage_locations WHERE backend_id = 'keep' AND blob_id = (SELECT min(blob_id) FROM blobs "
        "WHERE size_bytes = 5000)"
    )
    first, mend = retiring.refusal()
    assert "1 blob of 1 package " in first
    assert first.endswith("demo/1")
    assert mend == "castore: 1 of them without a good copy in old either: publish those bytes again"


def test_a_copy_in_a_backend_that_is_not_configured_does_not_count(retiring: Retiring) -> None:
    retiring.make_dispensable()
    retiring.execute("UPDATE storage_locations SET backend_id = 'gone' WHERE backend_id = 'keep'")
    assert "5 blobs of 2 packages" in retiring.refusal()[0]


def test_a_failed_copy_does_not_count(retiring: Retiring) -> None:
    retiring.make_dispensable()
    retiring.execute("UPDATE storage_locations SET status = 'failed', reason = 'missing' WHERE backend_id = 'keep'")
    assert "5 blobs of 2 packages" in retiring.refusal()[0]


def test_the_configuration_still_has_it(retiring: Retiring) -> None:
    retiring.make_dispensable()
    retiring.configure()
    text = retiring.store.config_path.read_text()
    rules = '[[routing.rules]]\nbackend = "old"\n[[routing.rules]]\nbackend = "keep"\ncopies = ["old"]\n'
    retiring.store.config_path.write_text(text.replace('default = "keep"', 'default = "old"') + rules)
    before = retiring.facts()
    line = retiring.cli.error("storage", "retire", "--backend", "old", "--yes")
    keys = "backends.old, routing.default, routing.rules[0].backend, routing.rules[1].copies"
    assert line == f"{retiring.store.config_path}: {keys}: backend old is still configured; take it out first"
    assert retiring.facts() == before


def test_it_asks(retiring: Retiring) -> None:
    retiring.make_dispensable()
    before = retiring.facts()
    assert "give --yes" in retiring.cli("storage", "retire", "--backend", "old", code=2).stderr
    for answer, code in ((b"n\n", 1), (b"y\n", 0)):
        assert retiring.facts() == before
        terminal, end = pty.openpty()
        try:
            command = [*retiring.cli.command, "storage", "retire", "--backend", "old"]
            process = subprocess.Popen(
                command,
                env=retiring.cli.environ,
                cwd=retiring.cli.home,
                stdin=end,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            os.write(terminal, answer)
            _, stderr = process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == code, stderr
            assert "Forget backend old and its 6 locations? [y/N]" in stderr
        finally:
            os.close(terminal)
            os.close(end)
    assert retiring.facts() != before


def test_packages_that_counted_as_stored_there_alone(retiring: Retiring) -> None:
    """Their copies came by other packages, or by a replication that was killed before it could say so."""
    retiring.make_dispensable()
    retiring.execute("UPDATE packages SET backend_ids = '[\"old\"]'")
    retiring.cli("storage", "retire", "--backend", "old", "--yes")
    assert retiring.backends_of("demo/1") == retiring.backends_of("other/1") == ["keep"]


def test_a_run_that_was_killed_is_finished_by_the_next(retiring: Retiring) -> None:
    retiring.make_dispensable()
    retiring.execute("DELETE FROM storage_locations WHERE backend_id = 'old'")
    done = retiring.cli("storage", "retire", "--backend", "old", "--yes")
    assert done.stdout.startswith("forgot backend old: 0 locations")
    assert retiring.backends_of("demo/1") == ["keep"]


def test_what_comes_to_be_needed_meanwhile_stays(retiring: Retiring) -> None:
    """The transaction that takes locations away looks again: here, after all was found dispensable, copies failed."""
    retiring.make_dispensable()
    victim: Digest = retiring.digests[b"a"]
    retiring.execute(
        "UPDATE storage_locations SET status = 'failed', reason = 'missing' WHERE backend_id = 'keep' "
        f"AND blob_id = (SELECT blob_id FROM blobs WHERE digest = x'{victim.raw.hex()}')"
    )
    database = open_writer(retiring.store.catalog_path).conn
    gone, last = forget_locations(database.execute, "old", ["keep"], 0)
    assert (len(gone), last > 0) == (5, True)
    assert forget_locations(database.execute, "old", ["keep"], last) == ([], 0)
    assert forget_in_packages(database.execute, "old", ["keep"], 10_000) == 0
    rows = database.execute("SELECT digest FROM storage_locations JOIN blobs USING (blob_id) WHERE backend_id = 'old'")
    assert [row[0] for row in rows] == [victim.raw]
    database.close()
    assert "1 blob of 1 package " in retiring.refusal()[0]
