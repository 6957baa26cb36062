"""`castore storage replicate`, as people and programs call it: what it says, how it ends, how it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.digest import Digest
from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.cli.test_storage_verify import high_water_kib
from tests.damage import flip_a_bit, read_object
from tests.places import PLACES, Place
from tests.published import PublishedStore, numbered_files

everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
FILES = {b"bin/tool": b"tool" * 500, b"share/doc": b"doc", b"share/\xff\n": b"odd name"}

Make = Callable[..., tuple[PublishedStore, dict[bytes, Digest]]]


@pytest.fixture
def make(tmp_path: Path, place: Place, cli: Cli) -> Make:
    """Makes the store of the command line, with backends `first` and `second` and packages of the same files."""
    cli.environ["CASTORE_CONFIG"] = str(tmp_path / "castore.toml")

    def make(
        files: dict[bytes, bytes] = FILES, refs: tuple[str, ...] = ("demo/1",), backends: tuple[str, ...] = ("first",)
    ) -> tuple[PublishedStore, dict[bytes, Digest]]:
        store = PublishedStore(tmp_path, place, "first", "second")
        digests: dict[bytes, Digest] = {}

        async def fill() -> None:
            await store.create()
            for ref in refs:
                digests.update(await store.publish(ref, files, *backends))
            await store.aclose()

        trio.run(fill)
        return store, digests

    return make


def replicate(cli: Cli, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return cli("storage", "replicate", "--from", "first", "--to", "second", *arguments, code=code)


def documents(text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The documents of the objects, and the summary."""
    *objects, summary = map(json.loads, text.splitlines())
    return objects, summary


def package_backends(cli: Cli, ref: str) -> list[str]:
    found: list[str] = json.loads(cli("package", "show", ref, "--json").stdout)["backend_ids"]
    return found


@everywhere
def test_all_packages(cli: Cli, make: Make) -> None:
    store, digests = make(refs=("demo/1", "demo/2"))
    lines = replicate(cli).stdout.splitlines()
    assert lines[0].startswith("copied 5 of 5 objects to second, 2.0 KiB in ")
    assert lines[1:] == ["copied: 5, failed: 0, changed: 0, not copied: 0; packages now whole there: 2"]
    for digest in digests.values():
        assert read_object(store.config.backends["second"], digest) == read_object(
            store.config.backends["first"], digest
        )
    assert package_backends(cli, "demo/1") == package_backends(cli, "demo/2") == ["first", "second"]
    assert cli("storage", "verify", "--backend", "second").stdout.splitlines()[-1].startswith("verified: 5, failed: 0")
    assert cli("events").stdout.count("  copied from first to second") == 5
    # The second run has nothing to do.
    assert replicate(cli).stdout.startswith("copied 0 of 0 objects to second, 0 B in ")


def test_one_package_as_json(cli: Cli, make: Make) -> None:
    _, digests = make(refs=("demo/1", "demo/2"))
    objects, summary = documents(replicate(cli, "--package", "demo/2", "--json").stdout)
    assert {one["digest"] for one in objects} == {str(digest) for digest in digests.values()}
    assert {(one["from"], one["to"], one["result"], one["error"]) for one in objects} == {
        ("first", "second", "copied", "")
    }
    (tool,) = [one for one in objects if one["digest"] == str(digests[b"bin/tool"])]
    assert (tool["size_bytes"], tool["reason"], tool["packages"]) == (2000, None, ["demo/1", "demo/2"])
    assert (summary["object_count"], summary["copied"], summary["package"]) == (4, 4, "demo/2")
    assert (summary["package_count"], summary["incomplete"], summary["exit_code"]) == (1, [], 0)
    assert (package_backends(cli, "demo/1"), package_backends(cli, "demo/2")) == (["first"], ["first", "second"])


def test_a_bad_object_is_named(cli: Cli, make: Make) -> None:
    store, digests = make(refs=("demo/1", "demo/2"))
    flip_a_bit(store.config.backends["first"], digests[b"bin/tool"])
    lines = replicate(cli, code=1).stdout.splitlines()
    assert lines[0].startswith(f"failed: digest_mismatch in backend first: 2000 bytes of {digests[b'bin/tool']}; found")
    assert lines[1:3] == ["  demo/1: bin/tool", "  demo/2: bin/tool"]
    assert lines[3].startswith("copied 4 of 5 objects to second")
    assert lines[4] == "copied: 4, failed: 1, changed: 0, not copied: 0; packages now whole there: 0"
    assert lines[5:] == [f"not whole in second: demo/{version} lacks 1 of its objects there" for version in (1, 2)]
    assert "failed (digest_mismatch) in first" in cli("events").stdout
    objects, summary = documents(replicate(cli, "--json", code=1).stdout)
    assert (objects, summary["exit_code"]) == ([], 1)
    assert summary["incomplete"] == [{"package": f"demo/{version}", "object_count": 1} for version in (1, 2)]


@everywhere
@pytest.mark.parametrize("ill", ["first", "second"])
def test_an_unreachable_backend(cli: Cli, make: Make, place: Place, ill: str) -> None:
    make()
    with place.unreachable(ill):
        done = replicate(cli, code=2)
    assert "\nnot copied: " in f"\n{done.stdout}"
    assert done.stderr.splitlines()[-1].startswith("castore: error: given up: ")
    assert replicate(cli).stdout.startswith("copied 4 of 4 objects")


def test_what_cannot_be_asked_for(cli: Cli, make: Make) -> None:
    make()
    command = ("storage", "replicate", "--from", "first", "--to")
    assert cli.error(*command, "third") == "--to third: no such backend is configured; there are first, second"
    assert cli.error(*command, "first") == "--to first: expected another backend than that of --from"
    assert cli.error(*command, "second", "--package", "demo/9") == "demo/9: no such package is published"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_second_run_goes_on_where_the_first_was_stopped(cli: Cli, make: Make, number: int) -> None:
    store, digests = make(numbered_files(1500))
    command = ("storage", "replicate", "--from", "first", "--to", "second", "--json")
    with cli.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(number)
        # Not `communicate`: it knows nothing of what the line's reader has buffered.
        lines = [first, *process.stdout]
        stderr = process.stderr.read()
        process.wait(WAIT_SECONDS)
    # A kill may come in the middle of a line.
    seen = [one for one in (json.loads(line) for line in lines if line.endswith("\n")) if "digest" in one]
    assert process.returncode == (130 if number == signal.SIGINT else -number), stderr
    assert len(seen) < 1501, "it was over before it could be stopped"
    if number == signal.SIGINT:
        assert "castore: interrupted: " in stderr.splitlines()[-1]
    objects, summary = documents(replicate(cli, "--json").stdout)
    # What is recorded is not copied again. A kill may come between a commit and its words.
    again = {one["digest"] for one in objects} & {one["digest"] for one in seen}
    assert again == set()
    assert len(objects) + len(seen) <= 1501
    assert (summary["copied"], summary["package_count"]) == (len(objects), 1)
    assert (
        cli("storage", "verify", "--backend", "second").stdout.splitlines()[-1].startswith("verified: 1501, failed: 0")
    )
    assert list(store.config.store.state_dir.glob("tmp*")) == []
    assert len(digests) == 1501


@everywhere
def test_memory_is_bounded(cli: Cli, make: Make) -> None:
    """Eight objects that would take half a gigabyte."""
    _, digests = make({b"%d" % number: bytes([number]) * (64 << 20) for number in range(8)})
    command = ("storage", "replicate", "--from", "first", "--to", "second", "--json")
    peak_kib = 0
    with cli.start(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in digests:
            assert json.loads(process.stdout.readline())["result"] == "copied"
            peak_kib = max(peak_kib, high_water_kib(process.pid))
        process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0
    assert 20 * 1024 < peak_kib < 250 * 1024, f"{peak_kib} KiB"
