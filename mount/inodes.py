"""The number space of inodes: which tree a number belongs to. Allocated numbers come from the catalog.

1 .. 1023             fixed directories and files of the mount
1024 .. 2^61 - 1      allocated by the catalog: names, packages' entries, ingest
2^61 + n              directories of by-digest/: n < 256 for ab, 256 + 16 bits for ab/cd
2^62 + blob_id        files of by-digest/
"""

from __future__ import annotations

from typing import Final

from castore.ingest.tree import INGEST_ROOT as INGEST_ROOT

ROOT: Final = 1
PACKAGES: Final = 2
BY_DIGEST: Final = 4
BY_DIGEST_ALGORITHM: Final = 5
CONTROL: Final = 6
STATUS_FILE: Final = 7
HEALTH_FILE: Final = 8

FIRST_ALLOCATED: Final = 1024
DIGEST_DIRECTORIES: Final = 1 << 61
DIGEST_FILES: Final = 1 << 62
