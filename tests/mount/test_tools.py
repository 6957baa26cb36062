"""The tools that copy trees, on a real mount: cp, rsync, tar, unzip. Whole trees are compared, not samples."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from pathlib import Path

from tests.mount.store import MountedStore, run_tool
from tests.mount.trees import assert_same, make_tree, snapshot


def test_cp_archive_both_ways(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source, attributes=True)
    box = shared_store.ingest("copied/1")
    run_tool("cp", "-a", f"{source}/.", box)
    assert_same(box, source)
    package = shared_store.publish("copied/1")
    assert_same(package, source)
    run_tool("cp", "-a", package, tmp_path / "back")
    assert_same(tmp_path / "back", source)


def test_cp_makes_the_version_directory(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    (shared_store.mnt / "ingest/whole").mkdir()
    run_tool("cp", "-a", source, shared_store.mnt / "ingest/whole/2.0")
    run_tool("mv", shared_store.mnt / "ingest/whole/2.0", shared_store.mnt / "packages/whole/")
    assert_same(shared_store.package("whole/2.0"), source)
    run_tool("diff", "-r", "--no-dereference", source, f"{shared_store.package('whole/latest')}/")


def test_cp_of_a_published_package_into_ingest(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    run_tool("cp", "-a", f"{source}/.", shared_store.ingest("again/1"))
    first = shared_store.publish("again/1")
    run_tool("cp", "-a", f"{first}/.", shared_store.ingest("again/2"))
    (shared_store.ingest("again/2") / "share/private").write_text("changed\n")
    second = shared_store.publish("again/2")
    assert_same(first, source)
    here, there = snapshot(second), snapshot(first)
    changed = {path for path in there if path != b"." and here[path].content != there[path].content}
    assert changed == {b"share/private"}


def test_cp_sparse(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "holes"
    with source.open("wb") as file:
        file.truncate(8_000_000)
        os.pwrite(file.fileno(), b"in the midst", 5_000_000)
    box = shared_store.ingest("sparse/1")
    run_tool("cp", "-a", "--sparse=always", source, box / "holes")
    run_tool("cp", "-a", "--sparse=never", source, box / "filled")
    package = shared_store.publish("sparse/1")
    run_tool("cmp", source, package / "holes")
    run_tool("cmp", source, package / "filled")
    run_tool("cp", "--sparse=always", package / "filled", tmp_path / "back")
    run_tool("cmp", source, tmp_path / "back")
    digests = {os.getxattr(package / name, "user.castore.digest") for name in ("holes", "filled")}
    assert len(digests) == 1


def test_rsync_transfers_nothing_the_second_time(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source, attributes=True)
    box = shared_store.ingest("synced/1")
    rsync = ("rsync", "-aHX", "-i", "--stats", f"{source}/")
    first = run_tool(*rsync, f"{box}/")
    assert _transferred(first) > 10
    assert_same(box, source)
    second = run_tool(*rsync, f"{box}/")
    assert _transferred(second) == 0
    assert _itemized(second) == []
    package = shared_store.publish("synced/1")
    # Into what is published nothing can be written, and nothing has to be.
    third = run_tool(*rsync, f"{package}/")
    assert _transferred(third) == 0
    assert _itemized(third) == []
    assert_same(package, source)


def test_rsync_delete_and_changes(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    box = shared_store.ingest("resynced/1")
    run_tool("rsync", "-aH", f"{source}/", f"{box}/")
    (box / "extra/below").mkdir(parents=True)
    (box / "extra/below/file").write_text("to go")
    (source / "share/4096").write_bytes(b"n" * 4096)
    (source / "share/1").unlink()
    (source / "lib/module3.txt").rename(source / "lib/module3.md")
    with (source / "share/3000000").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"changed inside")
    # Delta transfer reads the old file while it writes the new one; without the window, rsync compares whole seconds.
    rsync = ("rsync", "-aH", "--modify-window=-1", "--no-whole-file", "--delete", f"{source}/", f"{box}/")
    run_tool(*rsync)
    assert_same(box, source)
    (source / "share/131072").write_bytes(b"i" * 131_072)
    run_tool(*rsync, "--inplace")
    assert _itemized(run_tool(*rsync, "--itemize-changes")) == []
    assert_same(shared_store.publish("resynced/1"), source)


def _transferred(stats: str) -> int:
    found = re.search(r"Number of regular files transferred: ([\d,]+)", stats)
    assert found, stats
    return int(found[1].replace(",", ""))


def _itemized(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"[<>ch.*][fdLDS][^ ]{9} ", line)]


def test_tar_in_and_out(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    # Sorted, and with a format that keeps no times but mtime: equal trees give equal archives.
    create = ("tar", "-c", "--sort=name", "--format=gnu", "-f")
    run_tool(*create, tmp_path / "source.tar", "-C", source, ".")
    box = shared_store.ingest("tarred/1")
    run_tool("tar", "-x", "-f", tmp_path / "source.tar", "-C", box)
    package = shared_store.publish("tarred/1")
    run_tool(*create, tmp_path / "package.tar", "-C", package, ".")
    assert (tmp_path / "package.tar").read_bytes() == (tmp_path / "source.tar").read_bytes()
    run_tool("tar", "--compare", "-f", tmp_path / "source.tar", "-C", package)


def test_tar_keeps_nanoseconds_and_attributes(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source, attributes=True)
    run_tool("tar", "-c", "--xattrs", "--format=posix", "-z", "-f", tmp_path / "source.tar.gz", "-C", source, ".")
    box = shared_store.ingest("posix-tar/1")
    run_tool("tar", "-x", "--xattrs", "-p", "-f", tmp_path / "source.tar.gz", "-C", box)
    assert_same(shared_store.publish("posix-tar/1"), source)


def test_tar_archive_inside_the_mount(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    box = shared_store.ingest("archive/1")
    run_tool("tar", "-c", "-f", box / "source.tar", "-C", source, ".")
    # -r appends in place, behind the last member and over the end mark.
    run_tool("tar", "-r", "-f", box / "source.tar", "-C", source, "bin/tool")
    package = shared_store.publish("archive/1")
    (tmp_path / "out").mkdir()
    run_tool("tar", "-x", "-f", package / "source.tar", "-C", tmp_path / "out")
    run_tool("diff", "-r", "--no-dereference", source, tmp_path / "out")


def test_unzip(shared_store: MountedStore, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("top.txt", "top\n" * 1000)
        archive.writestr("a b/ü.bin", bytes(range(256)) * 999)
        archive.writestr("empty/", "")
    box = shared_store.ingest("zipped/1")
    run_tool("unzip", "-q", tmp_path / "some.zip", "-d", box, env={**os.environ, "LC_ALL": "C.UTF-8"})
    package = shared_store.publish("zipped/1")
    assert (package / "top.txt").read_text() == "top\n" * 1000
    assert (package / "a b/ü.bin").read_bytes() == bytes(range(256)) * 999
    assert stat.S_ISDIR((package / "empty").stat().st_mode)


def test_find_and_du_and_sha256sum(shared_store: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    sums = run_tool("sh", "-c", "find . -type f ! -name SHA256SUMS -exec sha256sum {} +", cwd=source)
    (source / "SHA256SUMS").write_text(sums)
    run_tool("cp", "-a", f"{source}/.", shared_store.ingest("summed/1"))
    package = shared_store.publish("summed/1")
    checked = run_tool("sha256sum", "-c", "--strict", "SHA256SUMS", cwd=package)
    assert len(checked.splitlines()) == len(sums.splitlines()) > 20
    assert all(line.endswith(": OK") for line in checked.splitlines())
    listing = ("find", ".", "-mindepth", "1", "-printf", r"%P %y %m %T@ %l\n")
    here, there = run_tool(*listing, cwd=package), run_tool(*listing, cwd=source)
    assert sorted(here.splitlines()) == sorted(there.splitlines())
    # Directories have no size of their own here.
    sizes = sum(path.lstat().st_size for path in (source / "share").iterdir())
    assert int(run_tool("du", "-s", "-b", "share", cwd=package).split()[0]) == sizes
