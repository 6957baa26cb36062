"""Measures what reads all of a large catalog: `catalog check`, `backup`, and `rebuild` from manifests. No test.

python -m tests.mount.catalog_scale DIR [--check N ...] [--rebuild N ...]
    checks and backs up a catalog of N entries, whose blobs are rows alone; and rebuilds one of N entries from packages
    of a thousand files in a local backend, each with an object of its own of a few bytes. Prints seconds, and the most
    memory of the command's whole process.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from castore.catalog.records import Kind
from castore.digest import BlobHasher, BlobSummary
from castore.registry.manifest import ManifestEntry, ManifestHeader, write_manifest
from castore.storage.layout import key_of
from tests.mount.scale import fill
from tests.mount.store import MountedStore

FILES: Final = 1_000
_FOLDER_FILES: Final = 50


# Not `ru_maxrss`, which begins with that of the parent.
_PEAK: Final = """
import runpy, sys
try:
    runpy.run_module("castore.cli", run_name="__main__", alter_sys=True)
finally:
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    print(line, file=sys.stderr)
"""


def timed(store: MountedStore, *arguments: str) -> str:
    """Run `castore`; how long it took, and its highest resident memory."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "--config", str(store.config), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - started
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return f"{taken:.1f} s, {int(done.stderr.split()[-2]) / 1024:.0f} MiB"


def make_objects(store: MountedStore, entries: int) -> None:
    """Packages of a thousand files in folders of fifty: objects and manifests where the local backend has them."""
    manifest = store.root / "manifest"
    for number in range(entries // (1 + FILES + FILES // _FOLDER_FILES)):
        header = ManifestHeader(
            name=f"pkg{number:06d}",
            version="1.0",
            producer="scale",
            retention_class="standard",
            publisher_uid=0,
            published_at_ns=1_700_000_000_000_000_000 + number,
            backend_ids=("local",),
            name_uid=0,
            name_gid=0,
            name_mode=0o755,
        )
        summary = write_manifest(manifest, header, _entries(store, number))
        _place(store, summary).write_bytes(manifest.read_bytes())
    manifest.unlink()


def _entries(store: MountedStore, number: int) -> Iterator[ManifestEntry]:
    yield _entry(b"", Kind.DIRECTORY)
    for index in range(FILES):
        folder = b"dir%02d" % (index // _FOLDER_FILES)
        if index % _FOLDER_FILES == 0:
            yield _entry(folder, Kind.DIRECTORY)
        data = b"%d of %d" % (index, number)
        hasher = BlobHasher()
        hasher.update(data)
        summary = hasher.finish()
        _place(store, summary).write_bytes(data)
        yield _entry(folder + b"/file-%06d.dat" % index, Kind.FILE, summary)


def _entry(path: bytes, kind: Kind, summary: BlobSummary | None = None) -> ManifestEntry:
    return ManifestEntry(path=path, kind=kind, mode=0o644, uid=0, gid=0, mtime_ns=0, blob=summary, attributes={})


def _place(store: MountedStore, summary: BlobSummary) -> Path:
    path = store.objects / key_of(summary.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--check", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--rebuild", type=int, nargs="*", default=[100_000, 1_000_000])
    given = parser.parse_args()
    for what, sizes in (("check", given.check), ("rebuild", given.rebuild)):
        for entries in sizes:
            folder = given.dir.resolve() / f"{what}-{entries}"
            folder.mkdir(parents=True)
            store = MountedStore(folder)
            if what == "check":
                fill(store.state / "catalog.db", entries)
            else:
                make_objects(store, entries)
                (store.state / "catalog.db").unlink()
                print(f"rebuild of {entries:,} entries: {timed(store, 'catalog', 'rebuild', '--backend', 'local')}")
            for what_else in (["check"], ["backup", str(folder / "backup.db")]):
                print(f"{what_else[0]} of {entries:,} entries: {timed(store, 'catalog', *what_else)}", flush=True)
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
