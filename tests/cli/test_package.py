"""`castore package list | show | publish`, on packages that went through a real mount."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from castore.api.control import Handler, Report
from tests.cli.conftest import WAIT_SECONDS, Cli, Serve, read_terminal
from tests.mount.store import MountedStore


@pytest.fixture
def at(cli: Cli, store: MountedStore) -> Cli:
    """The command line on the mounted store."""
    cli.environ["CASTORE_CONFIG"] = str(store.config)
    return cli


def test_publish_list_show(at: Cli, store: MountedStore) -> None:
    for version, count in (("1.2", 1), ("1.3", 3)):
        folder = store.ingest(f"zlib/{version}")
        for number in range(count):
            (folder / f"file{number}").write_bytes(b"x" * 1024)
        assert at("package", "publish", f"zlib/{version}").stdout == f"published zlib/{version}\n"
    (store.ingest("Abc/1") / "empty").write_text("")
    assert json.loads(at("package", "publish", "Abc/1", "--json").stdout)["ref"] == "Abc/1"
    assert at.error("package", "publish", "Abc/1") == "Abc/1 is published already"
    assert at.error("package", "publish", "Abc/2") == "there is no ingest/Abc/2"

    lines = [line.split() for line in at("package", "list").stdout.splitlines()]
    assert lines[0] == ["REF", "FILES", "SIZE", "PUBLISHED", "PRODUCER", "CLASS", "BACKENDS"]
    assert [line[0] for line in lines[1:]] == ["Abc/1", "zlib/1.2", "zlib/1.3"]
    assert lines[3][1:4] == ["3", "3.0", "KiB"]
    assert lines[3][-2:] == ["standard", "local"]

    packages = json.loads(at("package", "list", "--json").stdout)["packages"]
    assert [package["ref"] for package in packages] == ["Abc/1", "zlib/1.2", "zlib/1.3"]
    last = packages[2]
    assert (last["name"], last["version"], last["file_count"], last["size_bytes"]) == ("zlib", "1.3", 3, 3072)
    assert (last["retention_class"], last["publisher_uid"], last["backend_ids"]) == ("standard", os.getuid(), ["local"])
    assert re.fullmatch(r"manifest-sha256:[0-9a-f]{64}", last["manifest_digest"])
    assert last["published_at_ns"] > packages[1]["published_at_ns"]

    for ref in ("zlib/1.3", "zlib/latest"):
        assert last.items() <= json.loads(at("package", "show", ref, "--json").stdout).items()
    shown = dict(
        re.split(r"  +", line, maxsplit=1) for line in at("package", "show", "zlib/latest").stdout.splitlines()
    )
    assert (shown["ref"], shown["files"], shown["size"]) == ("zlib/1.3", "3", "3.0 KiB")
    time, _, uid = shown["published"].partition(" by uid ")
    assert datetime.fromisoformat(time).timestamp() == last["published_at_ns"] // 10**9
    assert int(uid) == os.getuid()


def test_entries_of_any_name(at: Cli, store: MountedStore) -> None:
    folder = store.ingest("odd/1")
    nasty = b"clear\x1b[2J and\nbreak \\ \xff"
    Path(os.fsdecode(os.fsencode(folder) + b"/" + nasty)).write_bytes(b"x" * 1536)
    (folder / "caf\xe9").mkdir(mode=0o750)
    (folder / "caf\xe9/inner").write_text("")
    (folder / "caf\xe9/inner").chmod(0o751)
    (folder / "link").symlink_to("caf\xe9/\tinner")
    at("package", "publish", "odd/1")

    text = at("package", "show", "odd/1", "--files").stdout
    lines = text.split("\n\n", 1)[1].splitlines()
    assert len(lines) == 4
    assert "\x1b" not in text
    paths = {re.split(r"  +", line)[-1]: line for line in lines}
    assert paths["clear\\x1b[2J and\\nbreak \\\\ \\xff"].startswith("-rw-r--r--    1.5 KiB  ")
    assert paths["caf\xe9"].startswith("drwxr-x---")
    assert paths["caf\xe9/inner"].startswith("-rwxr-x--x")
    assert paths["link -> caf\xe9/\\tinner"].startswith("lrwxrwxrwx")

    entries = {
        entry["path"]: entry
        for entry in json.loads(at("package", "show", "odd/1", "--files", "--json").stdout)["entries"]
    }
    assert list(entries).index("caf\xe9") < list(entries).index("caf\xe9/inner")
    assert entries["caf\xe9"]["kind"] == "directory"
    assert (entries["caf\xe9/inner"]["kind"], entries["caf\xe9/inner"]["mode"]) == ("file", "0751")
    assert (entries["link"]["kind"], entries["link"]["target"]) == ("symlink", "caf\xe9/\tinner")
    odd = entries[nasty.decode(errors="replace")]
    assert base64.b64decode(odd["path_base64"]) == nasty
    assert odd["size_bytes"] == 1536
    assert odd["mtime_ns"] == os.lstat(os.fsencode(store.package("odd/1")) + b"/" + nasty).st_mtime_ns


def test_a_directory_of_several_pages(at: Cli, store: MountedStore) -> None:
    folder = store.ingest("many/1")
    for number in range(2100):
        (folder / f"{number:04d}").touch()
    at("package", "publish", "many/1")
    entries = json.loads(at("package", "show", "many/1", "--files", "--json").stdout)["entries"]
    assert sorted(entry["path"] for entry in entries) == [f"{number:04d}" for number in range(2100)]


def test_what_is_not_published(at: Cli) -> None:
    assert at("package", "list").stdout == "no packages are published\n"
    assert json.loads(at("package", "list", "--json").stdout) == {"packages": []}
    assert at.error("package", "show", "zlib/1.3") == "zlib/1.3: no such package is published"
    assert at.error("package", "show", "zlib/latest") == "zlib/latest: no such package is published"
    assert at.error("package", "show", "zlib").startswith("'zlib' is not a package reference: expected NAME/VERSION")
    assert "latest is the link" in at.error("package", "publish", "zlib/latest")


def test_publish_without_a_daemon(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    assert cli.error("package", "publish", "zlib/1.3") == f"no daemon is running for {tmp_path}/state"


def slow_publish(shown: threading.Event) -> Mapping[str, Handler]:
    """A publish that goes on only when its progress was seen."""

    async def publish(params: dict[str, Any], report: Report) -> dict[str, Any]:
        import trio

        await report({"stored_files": 1, "total_files": 2, "stored_bytes": 1024, "total_bytes": 3 * 2**20})
        await trio.to_thread.run_sync(shown.wait, WAIT_SECONDS)
        return {"ref": params["ref"]}

    return {"publish": publish}


def test_progress_in_plain_lines(cli: Cli, serve: Serve, tmp_path: Path) -> None:
    shown = threading.Event()
    cli("init", "--state-dir", tmp_path / "state")
    serve(tmp_path / "state/run/control.sock", slow_publish(shown))
    read_end, write_end = os.pipe()
    with cli.start("package", "publish", "zlib/1.3", stdout=write_end, stderr=write_end) as process:
        os.close(write_end)
        with open(read_end) as lines:
            # The heartbeat repeats the same progress, the line comes once.
            assert lines.readline() == "storing zlib/1.3: 1.0 KiB of 3.0 MiB, 1 of 2 files\n"
            shown.set()
            assert lines.read() == "published zlib/1.3\n"
        assert process.wait(WAIT_SECONDS) == 0


def test_progress_on_a_terminal(cli: Cli, serve: Serve, tmp_path: Path) -> None:
    shown = threading.Event()
    cli("init", "--state-dir", tmp_path / "state")
    serve(tmp_path / "state/run/control.sock", slow_publish(shown))
    terminal, end = pty.openpty()
    environ = {**cli.environ, "TERM": "xterm", "COLUMNS": "120"}

    def look(text: str) -> None:
        if "1 of 2 files" in text:
            shown.set()

    with cli.start("package", "publish", "zlib/1.3", stdout=end, stderr=end, env=environ) as process:
        os.close(end)
        try:
            text = read_terminal(terminal, look)
        finally:
            shown.set()
        assert process.wait(WAIT_SECONDS) == 0
    assert "storing zlib/1.3" in text
    assert "━" in text
    assert text.rstrip().endswith("published zlib/1.3")
