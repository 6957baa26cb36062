"""The commands of "Running castore", run as they stand there: beside a mount, on a store where each has work to do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.shell_blocks import ROOT, Block, Reader, blocks_of

ELSEWHERE = {
    "export CASTORE_TEST_S3_ENDPOINT=": "needs a server of the reader's own",
    "scripts/rgw ": "tests/storage/s3/test_rgw_script.py runs it",
    "radosgw-admin ": "needs a cluster; tests/storage/s3/test_s3_policy.py works with those rights",
}
"""Blocks that are not run here, and why."""

STORE = """\
mkdir ~/srv ~/mnt
mount --bind ~/srv /srv
mount --bind ~/mnt /mnt
mkdir -p /srv/build/out /srv/backup /mnt/old-tapes /mnt/castore
echo tool > /srv/build/out/tool
castore init --state-dir ~/store >/dev/null
export CASTORE_CONFIG=~/.config/castore/castore.toml
for id in archive rgw old; do
    printf '\\n[backends.%s]\\ntype = "local"\\npath = "/srv/%s"\\n' $id $id >> $CASTORE_CONFIG
done
sed -i 's|^path = .*store/objects.*|path = "/srv/local"|' $CASTORE_CONFIG
cat >> $CASTORE_CONFIG <<'END'
[[routing.rules]]
retention_class = "release"
backend = "local"
copies = ["rgw"]
[[retention.rules]]
retention_class = "nightly"
keep_last = 1
END
sed -i 's|^# listen = .*|listen = "127.0.0.1:0"|' $CASTORE_CONFIG
"""
PACKAGES = """\
castore init
castore package import /srv/build/out zlib/1.2 --retention-class release
castore package import /srv/build/out zlib/1.3
castore package import /srv/build/out tool/2.0 --retention-class nightly
castore mount /mnt/castore --background
"""
BEFORE = {
    "castore storage repair ": """\
find /srv/rgw/sha256 -type f -delete
castore storage verify --backend rgw || test $? = 1
""",
    "castore storage retire --backend old": """\
castore umount /mnt/castore
sed -i '/^\\[backends.old\\]/,/^path/d' $CASTORE_CONFIG
castore mount /mnt/castore --background
""",
    "castore catalog check ": "castore catalog backup backup.db",
    "# on the new host": """\
castore umount /mnt/castore
rm -rf ~/store
""",
}
"""What has to happen before a block makes sense, by how that begins."""

INSTEAD = {
    "castore mount /mnt/castore\n": "castore mount /mnt/castore --background\n",
    "castore package delete tool/2.0 ": "castore package delete tool/2.0 --yes ",
    "castore storage retire --backend old\n": "castore storage retire --backend old --yes\n",
    "castore events --follow --json ": "timeout --signal INT 0.5 castore events --follow --json || true ",
}
"""What asks at a terminal, or does not end by itself."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, and not pytest's."""
    made = Path(tempfile.mkdtemp(prefix="castore-docs-"))
    yield made
    shutil.rmtree(made)


def test_the_commands_of_running_castore(folder: Path) -> None:
    blocks = [Block(STORE), Block(PACKAGES)]
    left_out = []
    for block in blocks_of(ROOT / "docs/OPERATOR.md"):
        begins = [beginning for beginning in ELSEWHERE if block.commands.startswith(beginning)]
        left_out += begins
        if not begins:
            blocks += [Block(commands) for begin, commands in BEFORE.items() if block.commands.startswith(begin)]
            blocks.append(block)
    assert sorted(left_out) == sorted(ELSEWHERE)
    assert sum(block.commands.count("castore ") for block in blocks) > 50
    Reader(folder, instead=INSTEAD).run(blocks)
