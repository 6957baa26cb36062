"""`castore storage verify` and `castore storage backends`, as people and programs call them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.catalog.event_log import EventReader
from castore.digest import BLOCK_SIZE_BYTES, BlobSummary, Digest
from castore.storage.layout import key_of
from tests.cli.conftest import WAIT_SECONDS, Cli, read_terminal
from tests.damage import DAMAGES, cut_short, flip_a_bit, remove
from tests.places import PLACES, Place
from tests.published import PublishedStore, numbered_files

FILES = {b"bin/tool": b"tool" * 500, b"share/doc": b"doc", b"share/\xff\n": b"odd name"}


everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)

Make = Callable[..., tuple[PublishedStore, dict[bytes, Digest]]]


@pytest.fixture
def make(tmp_path: Path, place: Place, cli: Cli) -> Make:
    """Makes the store of the command line, with backends of the given ids and packages of the same files in all."""
    cli.environ["CASTORE_CONFIG"] = str(tmp_path / "castore.toml")

    def make(
        *backend_ids: str, files: dict[bytes, bytes] = FILES, refs: tuple[str, ...] = ("demo/1",)
    ) -> tuple[PublishedStore, dict[bytes, Digest]]:
        store = PublishedStore(tmp_path, place, *(backend_ids or ("main",)))
        digests: dict[bytes, Digest] = {}

        async def fill() -> None:
            await store.create()
            for ref in refs:
                digests.update(await store.publish(ref, files))
            await store.aclose()

        trio.run(fill)
        return store, digests

    return make


def documents(text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The documents of the locations, and the summary."""
    *locations, summary = map(json.loads, text.splitlines())
    return locations, summary


@everywhere
def test_all_good(cli: Cli, make: Make) -> None:
    make()
    done = cli("storage", "verify")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("looked at 4 of 4 locations, 2.0 KiB in ")
    assert lines[1:] == ["verified: 4, failed: 0, changed: 0, unreachable: 0"]


@everywhere
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_kind_of_damage_is_named_by_path(cli: Cli, make: Make, kind: str) -> None:
    store, digests = make(refs=("demo/1", "demo/2"))
    damage, reason = DAMAGES[kind]
    damage(store.config.backends["main"], digests[b"bin/tool"])
    lines = cli("storage", "verify", code=1).stdout.splitlines()
    assert lines[0].startswith(f"failed: {reason} in backend main: 2000 bytes of {digests[b'bin/tool']}")
    assert lines[1:3] == ["  demo/1: bin/tool", "  demo/2: bin/tool"]
    assert lines[3].startswith("looked at 5 of 5 locations")
    assert lines[4:] == ["verified: 4, failed: 1, changed: 0, unreachable: 0"]

    locations, summary = documents(cli("storage", "verify", "--json", code=1).stdout)
    assert len(locations) == 5
    (failed,) = [document for document in locations if document["status"] != "verified"]
    assert failed["digest"] == str(digests[b"bin/tool"])
    assert (failed["status"], failed["reason"]) == ("failed", reason)
    assert failed["packages"] == ["demo/1", "demo/2"]
    assert failed["paths"] == [{"package": f"demo/{version}", "path": "bin/tool"} for version in (1, 2)]
    assert failed["path_count"] == 2
    assert (summary["summary"], summary["exit_code"], summary["failed"], summary["verified"]) == (True, 1, 1, 4)
    assert (summary["location_count"], summary["looked_at"], summary["backends"]) == (5, 5, ["main"])


def test_names_that_are_not_text(cli: Cli, make: Make) -> None:
    store, digests = make()
    remove(store.config.backends["main"], digests[b"share/\xff\n"])
    assert "  demo/1: share/\\xff\\n" in cli("storage", "verify", code=1).stdout.splitlines()
    locations, _ = documents(cli("storage", "verify", "--json", code=1).stdout)
    (failed,) = [document for document in locations if document["status"] == "failed"]
    assert failed["paths"] == [{"package": "demo/1", "path": "share/\ufffd\n", "path_base64": "c2hhcmUv/wo="}]
    assert (failed["observed_digest"], failed["observed_size_bytes"]) == (None, None)


def test_a_manifest(cli: Cli, make: Make) -> None:
    store, digests = make()
    cut_short(store.config.backends["main"], digests[b""])
    lines = cli("storage", "verify", code=1).stdout.splitlines()
    assert lines[0].startswith(f"failed: size_mismatch in backend main: 22 bytes of {digests[b'']}; found 21 bytes of ")
    assert lines[1] == "  demo/1: its manifest"


def test_a_long_list_of_paths_is_cut(cli: Cli, make: Make) -> None:
    files = {b"copy %02d" % number: b"the same" for number in range(23)}
    store, digests = make(files=files)
    flip_a_bit(store.config.backends["main"], digests[b"copy 00"])
    lines = cli("storage", "verify", code=1).stdout.splitlines()
    assert lines[1:22] == [*(f"  demo/1: copy {number:02}" for number in range(20)), "  and 3 more"]


@everywhere
def test_the_choice_of_backends(cli: Cli, make: Make, place: Place) -> None:
    make("main", "copy")
    for arguments, backends in (
        ((), ["main", "copy"]),
        (("--backend", "copy"), ["copy"]),
        (("--backend", place.backend_type), ["main", "copy"]),
        (("--backend", "copy", "--backend", "main"), ["copy", "main"]),
    ):
        locations, summary = documents(cli("storage", "verify", "--json", *arguments).stdout)
        assert summary["backends"] == backends
        assert sorted({document["backend_id"] for document in locations}) == sorted(backends)


def test_an_id_counts_for_more_than_a_type(cli: Cli, make: Make, place: Place) -> None:
    make("main", place.backend_type)
    _, summary = documents(cli("storage", "verify", "--json", "--backend", place.backend_type).stdout)
    assert summary["backends"] == [place.backend_type]


def test_an_unknown_backend(cli: Cli, make: Make, place: Place) -> None:
    make("main")
    line = cli.error("storage", "verify", "--backend", "elsewhere")
    assert line == f"--backend elsewhere: no such backend is configured; there are main ({place.backend_type})"


@everywhere
def test_an_unreachable_backend(cli: Cli, make: Make, place: Place) -> None:
    make("main", "copy")
    with place.unreachable("main"):
        done = cli("storage", "verify", code=2)
        assert done.stdout.splitlines()[-1].startswith("verified: 4, failed: 0, changed: 0, unreachable: ")
        assert done.stderr.splitlines()[-1].startswith("castore: error: backend main is given up: ")
        _, summary = documents(cli("storage", "verify", "--json", code=2).stdout)
        assert [stopped["backend_id"] for stopped in summary["given_up"]] == ["main"]
        assert (summary["failed"], summary["exit_code"]) == (0, 2)
    assert json.loads(cli("storage", "backends", "--json").stdout)["backends"][0]["by_status"] == {"stored": 4}
    cli("storage", "verify")


def test_shards(cli: Cli, make: Make) -> None:
    make(files=numbered_files(30))
    seen: list[str] = []
    for shard in ("1/3", "2/3", "3/3"):
        locations, summary = documents(cli("storage", "verify", "--json", "--shard", shard).stdout)
        assert (summary["shard"], summary["location_count"]) == (shard, len(locations))
        seen += [document["digest"] for document in locations]
    assert len(seen) == len(set(seen)) == 31
    done = cli("storage", "verify", "--shard", "0/3", code=2)
    assert "'0/3': expected I/N, with N from 1 to 65536 and I from 1 to N" in done.stderr


def test_without_a_store(cli: Cli) -> None:
    assert "there is no catalog; run `castore init`" in cli.error("storage", "verify")


def test_interrupted(cli: Cli, make: Make) -> None:
    """Stopped by a signal in the middle of a large object: what was found is kept, and said."""
    store, _ = make()
    # Reading a hole of this size takes minutes.
    add_sparse(store, Digest("sha256", b"\xff" * 32), 200 << 30)
    with cli.start("storage", "verify", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = [json.loads(process.stdout.readline()) for _ in range(4)]
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, stderr
    assert {document["status"] for document in found} == {"verified"}
    summary = json.loads(stdout)
    assert (summary["interrupted"], summary["looked_at"], summary["location_count"]) == (True, 4, 5)
    assert stderr.splitlines()[-1] == "castore: interrupted: what was found of 4 locations is recorded"
    with EventReader(store.catalog_path) as reader:
        assert len(reader.events_after(0, 100)[0]) == 4


def add_sparse(store: PublishedStore, digest: Digest, size_bytes: int) -> Path:
    """An object of zeros that takes no space, in the backend `main`, a folder; its file."""
    (path,) = [Path(settings.place) for settings in store.config.backends.values() if settings.backend_id == "main"]
    target = path / key_of(digest)
    target.parent.mkdir(parents=True)
    target.touch()
    os.truncate(target, size_bytes)
    summary = BlobSummary(digest, size_bytes, BLOCK_SIZE_BYTES, "xxh3-64", b"")
    store.add_location(summary, "main")
    return target


def test_memory_is_bounded(cli: Cli, make: Make) -> None:
    store, _ = make(files=numbered_files(100))
    zeros = "49bc20df15e412a64472421e13fe86ff1c5165e18b2afccf160d4dc19fe68a14"  # of 1 GiB
    add_sparse(store, Digest("sha256", bytes.fromhex(zeros)), 1 << 30)
    peak_kib = 0
    with cli.start("storage", "verify", "--json", stdout=subprocess.DEVNULL) as process:
        # Not from wait4: that counts what the forked test process had, too.
        while process.poll() is None:
            peak_kib = max(peak_kib, high_water_kib(process.pid))
            time.sleep(0.01)
    assert process.returncode == 0
    assert 20 * 1024 < peak_kib < 150 * 1024, f"{peak_kib} KiB"


def high_water_kib(pid: int) -> int:
    """The most memory that a process had resident so far; 0 when it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class Endless:
    """An object that would be read for an hour, and is cut to nothing when a bar was seen."""

    def __init__(self, store: PublishedStore) -> None:
        self._path = add_sparse(store, Digest("sha256", b"\xff" * 32), 4 << 40)

    def look(self, text: str) -> None:
        if "━" in text:
            os.truncate(self._path, 0)


def test_on_a_terminal(cli: Cli, make: Make) -> None:
    store, digests = make()
    endless = Endless(store)
    remove(store.config.backends["main"], digests[b"bin/tool"])
    terminal, end = pty.openpty()
    environ = {**cli.environ, "TERM": "xterm", "COLUMNS": "150"}
    with cli.start("storage", "verify", stdout=end, stderr=end, env=environ) as process:
        os.close(end)
        text = read_terminal(terminal, endless.look)
        assert process.wait(WAIT_SECONDS) == 1
    assert "verifying main" in text
    assert " of 5 objects, " in text
    assert f"failed: missing in backend main: 2000 bytes of {digests[b'bin/tool']}" in text
    assert "  demo/1: bin/tool" in text
    assert text.rstrip().endswith("verified: 3, failed: 2, changed: 0, unreachable: 0")


def test_results_go_to_a_file_also_beside_a_bar(cli: Cli, make: Make, tmp_path: Path) -> None:
    store, _ = make()
    endless = Endless(store)
    terminal, end = pty.openpty()
    with (tmp_path / "out").open("wb") as out:
        environ = {**cli.environ, "TERM": "xterm", "COLUMNS": "150"}
        with cli.start("storage", "verify", "--json", stdout=out.fileno(), stderr=end, env=environ) as process:
            os.close(end)
            text = read_terminal(terminal, endless.look)
            assert process.wait(WAIT_SECONDS) == 1
    assert "verifying main" in text
    assert "location_count" not in text
    locations, _ = documents((tmp_path / "out").read_text())
    assert len(locations) == 5


def test_a_reader_that_goes_away(cli: Cli, make: Make) -> None:
    make()
    read_end, write_end = os.pipe()
    os.close(read_end)
    with cli.start("storage", "verify", "--json", stdout=write_end, stderr=subprocess.PIPE) as process:
        os.close(write_end)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 141
    assert [line for line in stderr.splitlines() if not line.startswith("verifying main: ")] == []


@everywhere
def test_backends(cli: Cli, make: Make, place: Place) -> None:
    store, digests = make("main", "copy")
    remove(store.config.backends["main"], digests[b"bin/tool"])
    cli("storage", "verify", code=1)
    lines = [line.split() for line in cli("storage", "backends").stdout.splitlines()]
    assert lines[0] == ["BACKEND", "TYPE", "HEALTH", "OBJECTS", "FAILED", "SIZE", "PROBED", "DETAIL"]
    assert lines[1][:5] == ["main", place.backend_type, "pass", "4", "1"]
    assert lines[2][:5] == ["copy", place.backend_type, "pass", "4", "0"]
    with place.unreachable("copy"):
        backends = json.loads(cli("storage", "backends", "--json", code=1).stdout)["backends"]
        assert [backend["health"] for backend in backends] == ["pass", "fail"]


def test_a_backend_that_is_no_longer_configured(cli: Cli, make: Make, place: Place) -> None:
    store, _ = make("main", "copy")
    text = store.config_path.read_text()
    store.config_path.write_text(text.replace(place.section("copy"), ""))
    backends = json.loads(cli("storage", "backends", "--json", code=1).stdout)["backends"]
    assert (backends[1]["backend_id"], backends[1]["health"]) == ("copy", "fail")
    assert (backends[1]["object_count"], backends[1]["detail"]) == (4, "not in the configuration")


def test_the_choice_of_locations(cli: Cli, make: Make) -> None:
    _, digests = make(refs=("demo/1", "demo/2"))
    everything = {str(digest) for digest in digests.values()}

    def seen(*arguments: str) -> list[str]:
        locations, summary = documents(cli("storage", "verify", "--json", *arguments).stdout)
        assert summary["looked_at"] == len(locations)
        assert summary["location_count"] == len(locations) or summary["ended_by"]
        return [document["digest"] for document in locations]

    longest = ("--older-than", "999999999999999999d")
    assert len(seen(*longest, "--max-bytes", "1")) == 1, "what was never verified is older than anything"
    assert len(seen(*longest)) == 4
    assert seen(*longest) == []
    assert len(seen()) == 5
    assert set(seen("--package", "demo/latest")) == everything
    share = {str(digests[path]) for path in (b"share/doc", b"share/\xff\n")}
    assert set(seen("--path", "demo/1/share")) == share
    assert seen("--path", "demo/1/bin/tool") == [str(digests[b"bin/tool"])]
    both = seen("--path", "demo/1/share/doc", "--digest", digests[b"bin/tool"].hex, "--digest", str(digests[b""]))
    assert set(both) == {str(digests[path]) for path in (b"share/doc", b"bin/tool", b"")}
    assert seen("--older-than", "1h") == []
    assert seen("--path", "demo/1/share", "--older-than", "1h") == []
    assert len(seen("--sample", "100%", "--rate", "1GiB/s", "--time-limit", "1h", "--max-bytes", "1GiB")) == 5
    done = cli("storage", "verify", "--max-bytes", "1")
    assert done.stdout.splitlines()[-1] == "ended by its byte limit; the next run goes on with what was not looked at"
    summary = documents(cli("storage", "verify", "--max-bytes", "1", "--json").stdout)[1]
    assert (summary["looked_at"], summary["location_count"], summary["ended_by"]) == (1, 5, "byte limit")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--package", "demo/9"), "--package demo/9: no such package is published"),
        (("--path", "demo/9/x"), "--path demo/9/x: demo/9 is not published"),
        (("--path", "demo/1/x"), "--path demo/1/x: no such file or directory in demo/1"),
        (("--digest", "abc"), "--digest abc: expected a digest such as sha256: and 64 hexadecimal digits"),
        (("--digest", "0" * 64), f"--digest {'0' * 64}: the catalog knows no such blob"),
    ],
)
def test_what_cannot_be_chosen(cli: Cli, make: Make, arguments: tuple[str, ...], said: str) -> None:
    make()
    assert cli.error("storage", "verify", *arguments) == said


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--older-than", "30", 'a duration such as "5s"'),
        ("--time-limit", "0s", 'a duration such as "5s"'),
        ("--max-bytes", "0", "an integer of bytes, or a size"),
        ("--rate", "50MiB", 'a size in a second such as "50MiB/s"'),
        ("--sample", "0%", 'a part such as "1%"'),
    ],
)
def test_values_that_mean_nothing(cli: Cli, option: str, value: str, expected: str) -> None:
    assert f"'{value}': expected {expected}" in cli("storage", "verify", option, value, code=2).stderr
