"""Named moments at which a process kills itself when a test asks for it. Does nothing else, and nothing without that.

`CASTORE_FAILPOINT=NAME` or `NAME:N` in the environment of a process: it dies by SIGKILL when it comes to that point for
the N-th time, by default the first. So the crash tests meet every step between creating a file and the answer to a
publish, and not only those that a kill from outside is likely to meet.
"""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "CASTORE_FAILPOINT"

POINTS: Final = {
    "import.copied": "bytes of an import lie in staging, and have no names",
    "import.staged": "they have names and digests",
    "file.created": "a name and an empty file are there, the kernel is not answered",
    "file.written": "bytes are in the staged file",
    "file.closing": "size and digest are known, the workspace does not have them",
    "file.staged": "the workspace has them",
    "put.picked": "a file is to be put, no intent is committed",
    "put.intended": "the intents are committed, nothing is sent",
    "object.written": "a local object is on disk under its temporary name",
    "object.renamed": "it has its own name, its folder is not synced",
    "put.stored": "the backend has acknowledged, the catalog does not know",
    "put.located": "the location is committed, the workspace says that the file is not stored",
    "put.settled": "the workspace says that it is",
    "publish.frozen": "the version cannot be changed any more",
    "publish.drafted": "its manifest lies in staging",
    "publish.noted": "the workspace knows that it is being published",
    "publish.intended": "the intent of the manifest is committed",
    "publish.put": "every backend of the route has the manifest",
    "publish.committed": "the package is in the catalog",
    "publish.unlinked": "the version is gone from ingest/",
    "publish.forgetting": "some of its staged bytes are gone",
    "publish.forgotten": "the workspace knows nothing of it any more, the kernel is not answered",
    "deletion.taken_over": "a put has its intent in the place of the mark of a collection that died, nothing is sent",
    "events.sent": "a sink has taken events, the catalog does not know",
}
"""Every point, in the order in which a small package meets them, and what is so at that moment."""

COMMAND_POINTS: Final = {
    "gc.purging": "a package can be restored no more, nothing of it is gone",
    "gc.manifest_marked": "its manifest is marked in every backend",
    "gc.manifest_gone": "its manifest is gone, its entries are there",
    "gc.entries_gone": "some of its entries are gone",
    "gc.purged": "the catalog knows nothing of it any more, its blobs are there",
    "gc.marked": "blobs that nothing needs are marked, none is deleted",
    "gc.orphans_marked": "so are orphans",
    "gc.deleting": "some objects that were marked are gone, the catalog does not know of any",
    "gc.deleted": "all of them are gone",
    "gc.forgotten": "and their rows",
    "upgrade.copied": "an older catalog is copied, and not changed",
    "upgrade.migrated": "it is changed, and nothing is committed",
    "repair.kept": "good bytes of a failed location lie aside, nothing is noted",
    "repair.intended": "the intent of their put is committed, nothing is sent",
    "put.part": "a server has a part of an object, which is not there yet",
    "repair.put": "the backend has acknowledged, nothing is read back",
    "repair.recorded": "the location is verified, nobody was told",
    "export.filled": "every file of an export is written, its directory is not in its place",
}
"""The same of commands that work beside a daemon."""

_name, _, _number = os.environ.get(VARIABLE, "").partition(":")
_left = int(_number) if _number.isdecimal() else 1


def failpoint(name: str) -> None:
    """Die here if that was asked for."""
    global _left
    if name != _name:
        return
    _left -= 1
    if not _left:
        os.kill(os.getpid(), signal.SIGKILL)
