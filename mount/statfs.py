"""What `df` says of the mount: the room that is left for staging, none on a read-only mount. Packages take none."""

from __future__ import annotations

import os
from typing import Final

import pyfuse3

from castore.ingest.files import StagedFiles

_UNIT: Final = 4096
_NAME_MAX: Final = 255


def statfs_of(files: StagedFiles | None) -> pyfuse3.StatvfsData:
    """The staging disk's room, or what `ingest.staging_max_bytes` leaves when that is less; nothing for None."""
    data = pyfuse3.StatvfsData()
    data.f_bsize = data.f_frsize = _UNIT
    data.f_namemax = _NAME_MAX
    if files is None:
        return data
    disk = os.statvfs(files.folder)
    free_bytes = max(0, min(files.disk.left_bytes(disk), files.max_bytes - files.staged_bytes))
    total_bytes = max(files.staged_bytes + free_bytes, 0)
    data.f_blocks = total_bytes // _UNIT
    data.f_bfree = data.f_bavail = free_bytes // _UNIT
    data.f_files = disk.f_files
    data.f_ffree = data.f_favail = disk.f_favail
    return data
