"""`castore storage repair`, as people and programs call it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Cli
from tests.cli.test_storage_verify import FILES, Make, documents, everywhere, make
from tests.damage import cut_short, flip_a_bit, read_object, remove
from tests.places import Place

__all__ = ["make"]


@everywhere
def test_from_another_backend(cli: Cli, make: Make) -> None:
    store, digests = make("main", "copy")
    tool, doc = digests[b"bin/tool"], digests[b"share/doc"]
    flip_a_bit(store.config.backends["main"], tool)
    remove(store.config.backends["copy"], doc)
    assert cli("storage", "repair").stdout.splitlines()[0].startswith("looked at 0 of 0 failed locations")
    cli("storage", "verify", code=1)
    lines = cli("storage", "repair", "--backend", "main").stdout.splitlines()
    assert lines[0] == f"repaired: 2000 bytes of {tool} in backend main, from backend copy"
    assert lines[1].startswith("looked at 1 of 1 failed locations, 2.0 KiB in ")
    assert lines[2] == "repaired: 1, verified: 0, no copy: 0, changed: 0, not repaired: 0"
    locations, summary = documents(cli("storage", "repair", "--json").stdout)
    (document,) = locations
    assert document.pop("duration_ms") >= 0
    assert document == {
        "backend_id": "copy",
        "digest": str(doc),
        "size_bytes": 3,
        "result": "repaired",
        "reason": "missing",
        "source": "backend",
        "source_backend_id": "main",
        "error": "",
        "packages": ["demo/1"],
    }
    assert (summary["repaired"], summary["exit_code"], summary["backends"]) == (1, 0, ["main", "copy"])
    cli("storage", "verify")


def test_nowhere_else_and_from_a_directory(cli: Cli, make: Make, tmp_path: Path) -> None:
    store, digests = make()
    digest = digests[b"share/\xff\n"]
    cut_short(store.config.backends["main"], digest)
    cli("storage", "verify", code=1)
    lines = cli("storage", "repair", code=1).stdout.splitlines()
    assert lines[:2] == [
        f"no good copy: 8 bytes of {digest} in backend main",
        "  demo/1: share/\\xff\\n",
    ]
    locations, _ = documents(cli("storage", "repair", "--json", code=1).stdout)
    assert locations[0]["paths"] == [{"package": "demo/1", "path": "share/\ufffd\n", "path_base64": "c2hhcmUv/wo="}]
    (tmp_path / "found").mkdir()
    (tmp_path / "found/anything").write_bytes(FILES[b"share/\xff\n"])
    lines = cli("storage", "repair", "--from", tmp_path / "found").stdout.splitlines()
    assert lines[0].endswith(" in backend main, from the directory")
    cli("storage", "verify")


def test_an_unreachable_backend(cli: Cli, make: Make, place: Place) -> None:
    store, digests = make("main", "copy")
    remove(store.config.backends["main"], digests[b"bin/tool"])
    cli("storage", "verify", code=1)
    with place.unreachable("copy"):
        done = cli("storage", "repair", code=2)
        assert done.stdout.startswith(f"not repaired: 2000 bytes of {digests[b'bin/tool']} in backend main: ")
    status = json.loads(cli("storage", "backends", "--json").stdout)["backends"][0]["by_status"]
    assert status == {"failed": 1, "verified": 3}
    cli("storage", "repair")
    assert read_object(store.config.backends["main"], digests[b"bin/tool"]) == FILES[b"bin/tool"]


def test_a_directory_that_is_not_there(cli: Cli) -> None:
    assert "'nowhere' does not exist" in cli("storage", "repair", "--from", "nowhere", code=2).stderr
