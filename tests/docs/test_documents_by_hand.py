"""The README, the tutorial and the how-tos, followed by copying their blocks: on real mounts, with a real S3 server."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.shell_blocks import ROOT, Block, Reader, blocks_of, lacks
from tests.servers.seaweedfs import SeaweedFS

NOBODY = 65534
HOW_TOS = sorted((ROOT / "docs/how-to").glob("*.md"))
BY_FRESH_MACHINE = "./scripts/run"
"""Where a block begins with it, scripts/fresh-machine runs it."""
SECOND_VERSION = """\
castore mount ~/castore-demo/mnt --background
cd ~/castore-demo/mnt
mkdir ingest/licences/1.1
cp -a /usr/share/common-licenses/. ingest/licences/1.1
exec 3>ingest/licences/1.1/open
! mv ingest/licences/1.1 packages/licences/ 2>/dev/null
exec 3>&-
"""
"""What the README says may happen: that a publish finds something open."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """That any user of the host can reach; pytest's own folders are private."""
    made = Path(tempfile.mkdtemp(prefix="castore-docs-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_the_readme_as_root(folder: Path) -> None:
    blocks = [block for block in blocks_of(ROOT / "README.md") if not block.commands.startswith(BY_FRESH_MACHINE)]
    assert [block.commands.split()[0] for block in blocks] == ["export", "getfattr", "castore"]
    blocks.insert(1, Block(SECOND_VERSION))
    blocks.append(Block("cd ~ && castore umount ~/castore-demo/mnt"))
    Reader(folder).run(blocks, cwd=ROOT)


def test_the_tutorial_as_an_unprivileged_user(folder: Path) -> None:
    reader = Reader(folder, NOBODY)
    blocks = blocks_of(ROOT / "docs/TUTORIAL.md")
    assert len([block for block in blocks if block.says]) > 5
    reader.run(blocks)
    assert list(reader.home.glob("castore*")) == []


@pytest.mark.parametrize("document", HOW_TOS, ids=[path.stem for path in HOW_TOS])
def test_a_how_to(folder: Path, s3_server: SeaweedFS, document: Path) -> None:
    keys = {"S3_ACCESS_KEY": s3_server.access_key, "S3_SECRET_KEY": s3_server.secret_key}
    instead = {"https://rgw.example.internal": s3_server.endpoint_url, "artifacts": folder.name.replace("_", "-")}
    blocks = blocks_of(document)
    assert len(blocks) > 3
    Reader(folder, environ=keys, instead=instead).run(blocks)


def test_a_document_that_is_wrong_is_found(folder: Path) -> None:
    with pytest.raises(AssertionError, match="no such package"):
        Reader(folder).run([Block("castore init"), Block("castore package show not/there"), Block("true")])
    assert lacks("a\nb: 12 s\nc\n", "a\nb: ... s\n") == []
    assert lacks("a\nc\n", "c\na\n") == ["a"]
