"""The catalog's tables, every column explained, as migrations from the first version on. No queries here.

Numbers that end in `_ns` are nanoseconds since the epoch, UTC. Booleans are 0 and 1. 0 and '' mean "none" where a
column says so; NULL is used nowhere else than where a column says so. Names of entries are bytes, as Linux has them.

What columns are that have no comment where they stand:

    only, package_id, link_id       the number of the row; of a link, its readdir cookie
    name, version                   NAME and VERSION; the name of an entry or of an attribute
    value                           of an attribute
    inode, version_inode            of the entry that it is about; of the VERSION directory
    shared_inode                    what mounts show instead of `inode`: the number of an equal file of another package,
                                    whose row may be gone by now; 0 for none. See castore.catalog.sharing
    kind                            1 directory, 2 file, 3 symbolic link
    uid, gid, nlink                 owner, group, number of names
    mtime_ns, ctime_ns              when the content changed last; when anything did
    created_at_ns, published_at_ns  when the row was made; when the package was published
    time_ns                         when it happened
    producer, retention_class       as declared, or the defaults at publish
    latest_inode                    of the symbolic link packages/NAME/latest
    blob_id, manifest_blob_id       the blob that it is about; the package's manifest
    algorithm, digest               the tag of a digest, and its 32 raw bytes
    size_bytes                      of all its bytes
    block_size_bytes, checksum_algorithm, checksums    as of `blobs`
    backend_id                      the id in the configuration
    status                          stored: acknowledged, not re-read yet; verified: re-read and right; failed: missing
                                    or wrong; deleting: nothing needs it, and it is on its way out
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

SCHEMA_VERSION: Final = 7
"""`PRAGMA user_version` of a catalog that has every migration below."""


@dataclass(frozen=True, slots=True)
class Migrations:
    """How a database came to be what it is: (name, statements) of each step, in order. A step is never changed."""

    name: str
    steps: tuple[tuple[str, tuple[str, ...]], ...]

    def apply(self, connection: Any, *, stop_before: str | None = None) -> None:
        """Make the steps that were not made yet, in the transaction that is open, else each in one of its own."""
        # Here, and not above: it takes a fifth of the start of a command that only reads.
        from sqlite_utils import Database
        from sqlite_utils.migrations import Migrations as Applied

        applied = Applied(self.name)
        for name, statements in self.steps:
            applied(name=name)(_step(statements))
        applied.apply(Database(connection), stop_before=stop_before)


MIGRATIONS_TABLE: Final = "_sqlite_migrations"
"""Where sqlite-utils notes the steps that were made."""


def _step(statements: tuple[str, ...]) -> Any:
    def step(database: Any) -> None:
        for statement in statements:
            database.execute(statement)

    return step


_TABLES_1: Final = (
    # One row: what this catalog is.
    """CREATE TABLE catalog_info (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        catalog_id TEXT NOT NULL,             -- UUID made by `castore init`: the `source` of events
        created_at_ns INTEGER NOT NULL
    )""",
    # Numbers handed out in ranges, so that inodes are unique over packages and ingest, and over processes.
    """CREATE TABLE sequences (
        name TEXT PRIMARY KEY,                -- 'inode': the one number space of entry ids and inodes
        next_value INTEGER NOT NULL           -- the first number that no lease has handed out
    ) WITHOUT ROWID""",
    # A NAME below packages/. The row comes with its first published version.
    """CREATE TABLE package_names (
        name TEXT PRIMARY KEY,                -- NAME by the rule of docs/SEMANTICS.md
        inode INTEGER NOT NULL UNIQUE,        -- of the directory packages/NAME; parent_id of its versions' roots
        latest_inode INTEGER NOT NULL UNIQUE, -- of the symbolic link packages/NAME/latest
        uid INTEGER NOT NULL,                 -- owner, group and mode of ingest/NAME at the first publish:
        gid INTEGER NOT NULL,                 --   they decide who may add versions
        mode INTEGER NOT NULL,                -- permission bits only
        mtime_ns INTEGER NOT NULL,            -- the time of the last publish or delete
        latest_version TEXT NOT NULL          -- the version published last; '' when all are deleted
    ) WITHOUT ROWID""",
    # The immutable bytes of files, and the manifests of packages (algorithm 'manifest-sha256').
    """CREATE TABLE blobs (
        blob_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given anew: the kernel keeps pages of by-digest/ under it
        algorithm TEXT NOT NULL,              -- of the digest
        digest BLOB NOT NULL,                 -- 32 raw bytes
        size_bytes INTEGER NOT NULL,
        block_size_bytes INTEGER NOT NULL,    -- of this blob: the unit of its checksums
        checksum_algorithm TEXT NOT NULL,     -- 'xxh3-64' or 'sha256'
        checksums BLOB NOT NULL,              -- one after another, in order of blocks; empty for an empty blob
        UNIQUE (digest, algorithm)
    )""",
    # Where blobs are.
    """CREATE TABLE storage_locations (
        blob_id INTEGER NOT NULL REFERENCES blobs (blob_id),
        backend_id TEXT NOT NULL,             -- the id in the configuration
        status TEXT NOT NULL CHECK (status IN ('stored', 'verified', 'failed', 'deleting')),
        reason TEXT NOT NULL,                 -- '' unless failed: digest_mismatch, size_mismatch or missing
        stored_at_ns INTEGER NOT NULL,        -- when the backend acknowledged the last put
        verified_at_ns INTEGER NOT NULL,      -- when verify last looked at the object; 0 for never
        PRIMARY KEY (blob_id, backend_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX locations_by_status ON storage_locations (status, backend_id)",
    # Puts that were begun. A row without its location means: the object may be there, whole, and what an unfinished put
    # left of it may be, too. So a row goes with the commit of the location, or when nothing unfinished is left.
    """CREATE TABLE put_intents (
        algorithm TEXT NOT NULL,
        digest BLOB NOT NULL,
        backend_id TEXT NOT NULL,
        owner TEXT NOT NULL,                  -- which process: its UUID, so that only the dead ones' are taken over
        created_at_ns INTEGER NOT NULL,
        PRIMARY KEY (digest, algorithm, backend_id)
    ) WITHOUT ROWID""",
    # Published packages.
    """CREATE TABLE packages (
        package_id INTEGER PRIMARY KEY,
        name TEXT NOT NULL REFERENCES package_names (name),
        version TEXT NOT NULL,
        root_id INTEGER NOT NULL,             -- entry_id and inode of its root directory
        producer TEXT NOT NULL,
        retention_class TEXT NOT NULL,
        publisher_uid INTEGER NOT NULL,       -- who created the ingest directory, beside what was declared
        published_at_ns INTEGER NOT NULL,
        file_count INTEGER NOT NULL,          -- entries that are files
        size_bytes INTEGER NOT NULL,          -- of all files, hard links counted once
        manifest_blob_id INTEGER NOT NULL REFERENCES blobs (blob_id),
        backend_ids TEXT NOT NULL,            -- JSON array: the backends that publish waited for, the primary one first
        UNIQUE (name, version)
    )""",
    # The names in packages. The implicit rowid that ends every index makes entries_by_parent (parent, entry_id):
    # readdir is one range scan whose cookie is the entry_id.
    """CREATE TABLE entries (
        entry_id INTEGER PRIMARY KEY,         -- from the 'inode' sequence; equals inode for an inode's first name
        parent_id INTEGER NOT NULL,           -- inode of the directory; of packages/NAME for a root
        name BLOB NOT NULL,
        inode INTEGER NOT NULL,               -- further hard links repeat it, and every column below
        kind INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),  -- 1 directory, 2 file, 3 symbolic link
        mode INTEGER NOT NULL,                -- permission bits only
        uid INTEGER NOT NULL,
        gid INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL,            -- when the package was published
        size_bytes INTEGER NOT NULL,          -- of a file: its blob's; of a link: its target's; of a directory 0
        nlink INTEGER NOT NULL,
        blob_id INTEGER NOT NULL,             -- 0 unless a file
        target BLOB NOT NULL                  -- '' unless a symbolic link
    )""",
    "CREATE UNIQUE INDEX entries_by_name ON entries (parent_id, name)",
    "CREATE INDEX entries_by_parent ON entries (parent_id)",
    "CREATE INDEX entries_by_blob ON entries (blob_id) WHERE blob_id <> 0",
    # Extended attributes that publishers set (user.*), kept with the package.
    """CREATE TABLE entry_attributes (
        inode INTEGER NOT NULL,
        name BLOB NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (inode, name)
    ) WITHOUT ROWID""",
    # What happened, in the transaction that made it so. Delivered from here, at least once.
    """CREATE TABLE events (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,  -- ascending; where followers go on
        event_id TEXT NOT NULL UNIQUE,        -- CloudEvents `id`: a UUID
        type TEXT NOT NULL,                   -- for example v1.package.published
        subject TEXT NOT NULL,                -- a digest or a NAME/VERSION
        time_ns INTEGER NOT NULL,
        data TEXT NOT NULL                    -- JSON object, as docs/events/ describes it by type
    )""",
)


_TABLES_2: Final = (
    # How long ago the bytes of a good location were last known to be right, by backend: acknowledged or re-read.
    """CREATE INDEX locations_by_proof ON storage_locations (backend_id, max(stored_at_ns, verified_at_ns))
        WHERE status IN ('stored', 'verified')""",
    "CREATE INDEX packages_by_manifest ON packages (manifest_blob_id)",
)


_TABLES_3: Final = (
    # What the last probe of a backend found.
    """CREATE TABLE backend_probes (
        backend_id TEXT PRIMARY KEY,          -- the id in the configuration
        probed_at_ns INTEGER NOT NULL,        -- when the probe ended
        server TEXT NOT NULL,                 -- what the backend says it is; '' for nothing
        findings TEXT NOT NULL                -- JSON array of objects: name, question, expected, answer, enforced,
                                              --   consequence, severity; in the order in which they were asked
    ) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX packages_by_root ON packages (root_id)",
)


_TABLES_4: Final = (
    # The order in which verify looks at locations: never verified, then the oldest.
    "CREATE INDEX locations_by_verification ON storage_locations (backend_id, verified_at_ns, blob_id)",
)


_TABLES_5: Final = (
    # How far the events were delivered to each sink of the configuration that is not just a reader.
    """CREATE TABLE event_deliveries (
        sink TEXT PRIMARY KEY,                -- 'file' or 'webhook'
        sequence INTEGER NOT NULL,            -- all events up to this one were delivered, were not wanted, or are lost
        delivered_at_ns INTEGER NOT NULL,     -- when an attempt last succeeded; 0 for never
        failing_since_ns INTEGER NOT NULL,    -- the first attempt that failed since; 0 for none
        error TEXT NOT NULL,                  -- why the last attempt failed; '' if it did not
        lost_count INTEGER NOT NULL,          -- events that expired before they could be delivered
        lost_at_ns INTEGER NOT NULL           -- when the last of these did; 0 for never
    ) WITHOUT ROWID""",
)


_TABLES_6: Final = (
    # Packages that were deleted and can be restored. Their entries are there; parent_id of their root is -root_id.
    """CREATE TABLE deleted_packages (
        deletion_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- ascends in the order of deletion
        name TEXT NOT NULL REFERENCES package_names (name),
        version TEXT NOT NULL,                -- more than one of a NAME/VERSION, when it was published again
        root_id INTEGER NOT NULL UNIQUE,      -- this and what follows as in packages
        producer TEXT NOT NULL,               -- as in packages
        retention_class TEXT NOT NULL,        -- as in packages
        publisher_uid INTEGER NOT NULL,       -- as in packages
        published_at_ns INTEGER NOT NULL,     -- as in packages
        file_count INTEGER NOT NULL,          -- as in packages
        size_bytes INTEGER NOT NULL,          -- as in packages
        manifest_blob_id INTEGER NOT NULL REFERENCES blobs (blob_id),  -- as in packages
        backend_ids TEXT NOT NULL,            -- as in packages
        deleted_at_ns INTEGER NOT NULL,       -- from when on the grace counts
        deleted_by_uid INTEGER NOT NULL,      -- who asked for it, or ran the rules of retention
        is_purging INTEGER NOT NULL           -- 1: its manifest may be gone, so that it cannot be restored
    )""",
    "CREATE INDEX deleted_by_manifest ON deleted_packages (manifest_blob_id)",
    "CREATE INDEX deleted_by_name ON deleted_packages (name, version)",
    # Objects that are about to be deleted, or may have been. A put of one waits until its row is gone.
    """CREATE TABLE deletions (
        algorithm TEXT NOT NULL,              -- of the digest
        digest BLOB NOT NULL,                 -- 32 raw bytes
        backend_id TEXT NOT NULL,             -- where
        size_bytes INTEGER NOT NULL,          -- of the blob; of an orphan as the backend says
        is_orphan INTEGER NOT NULL,           -- 0: it has a location, whose status is 'deleting'
        begun_at_ns INTEGER NOT NULL,         -- no request to delete it is sent later than a while after that
        PRIMARY KEY (digest, algorithm, backend_id)
    ) WITHOUT ROWID""",
    # Links beside the versions of a NAME, and the pin of its `latest`. Since a tag that moves has to be there all the
    # time, it keeps its inode: what the column says of that is older.
    """CREATE TABLE package_tags (
        name TEXT NOT NULL REFERENCES package_names (name),
        tag TEXT NOT NULL,                    -- as a VERSION may be, or 'latest'
        version TEXT NOT NULL,                -- which it points to
        inode INTEGER NOT NULL,               -- of the link packages/NAME/TAG, new with each change; 0 for latest
        set_at_ns INTEGER NOT NULL,           -- when it came to point there
        PRIMARY KEY (name, tag)
    ) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX tags_by_inode ON package_tags (inode) WHERE inode <> 0",
    # Every change of a tag.
    """CREATE TABLE tag_changes (
        change_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- ascends in the order of changes
        name TEXT NOT NULL,
        tag TEXT NOT NULL,                    -- 'latest' for its pin
        version TEXT NOT NULL,                -- '' when the tag was removed
        changed_at_ns INTEGER NOT NULL,       -- when
        changed_by_uid INTEGER NOT NULL       -- by whom
    )""",
    "CREATE INDEX tag_changes_by_tag ON tag_changes (name, tag)",
)


_TABLES_7: Final = (
    "ALTER TABLE entries ADD COLUMN shared_inode INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX entries_by_shared_inode ON entries (shared_inode) WHERE shared_inode <> 0",
)


_WORKSPACE_1: Final = (
    # What is at ingest/ and below it. The bytes of a file lie in staging/data/<inode in hex>.
    """CREATE TABLE nodes (
        inode INTEGER PRIMARY KEY,            -- from the catalog's 'inode' sequence; kept by publish
        version_inode INTEGER NOT NULL,       -- the VERSION directory that it lies in, itself included; 0 for a NAME
        kind INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
        mode INTEGER NOT NULL,                -- permission bits
        uid INTEGER NOT NULL,
        gid INTEGER NOT NULL,
        creator_uid INTEGER NOT NULL,         -- who made it, whatever chown did since
        mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,          -- of a file: as of its last close
        nlink INTEGER NOT NULL,               -- 0: unlinked and still open; swept at start
        target BLOB NOT NULL,                 -- '' unless a symbolic link
        state TEXT NOT NULL,                  -- a file's: receiving, staged, stored or failed; '' for others
        error TEXT NOT NULL,                  -- why it is failed, or why publish failed (on a VERSION directory)
        algorithm TEXT NOT NULL,              -- of the digest; '' while there is none
        digest BLOB NOT NULL,                 -- of the bytes as of the last close; '' while not computed
        block_size_bytes INTEGER NOT NULL,
        checksum_algorithm TEXT NOT NULL,
        checksums BLOB NOT NULL
    )""",
    "CREATE INDEX nodes_by_state ON nodes (state, version_inode) WHERE state <> ''",
    "CREATE INDEX nodes_by_version ON nodes (version_inode)",
    # Names. A readdir cookie is the link_id, which equals the inode for its first name: publish keeps cookies valid.
    """CREATE TABLE links (
        link_id INTEGER PRIMARY KEY,
        parent INTEGER NOT NULL,              -- inode of the directory; INGEST_ROOT for a NAME
        name BLOB NOT NULL,
        inode INTEGER NOT NULL REFERENCES nodes (inode)
    )""",
    "CREATE UNIQUE INDEX links_by_name ON links (parent, name)",
    "CREATE INDEX links_by_parent ON links (parent)",
    "CREATE INDEX links_by_inode ON links (inode)",
    # Extended attributes (user.*), those of publish among them.
    """CREATE TABLE attributes (
        inode INTEGER NOT NULL,
        name BLOB NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (inode, name)
    ) WITHOUT ROWID""",
    # The inodes that packages/NAME and its `latest` have from the moment that ingest/NAME exists.
    """CREATE TABLE names (
        name TEXT PRIMARY KEY,
        inode INTEGER NOT NULL,
        latest_inode INTEGER NOT NULL
    ) WITHOUT ROWID""",
    # A publish under way: what a restart needs to finish or undo it.
    """CREATE TABLE publishing (
        version_inode INTEGER NOT NULL,
        name TEXT NOT NULL,                   -- the NAME/VERSION to be
        version TEXT NOT NULL,
        manifest BLOB NOT NULL,               -- raw digest of the manifest object that may have been put
        PRIMARY KEY (version_inode, manifest)
    ) WITHOUT ROWID""",
)


_WORKSPACE_2: Final = (
    # Versions that an import makes: the next import of the same version may change them.
    """CREATE TABLE imports (
        version_inode INTEGER PRIMARY KEY REFERENCES nodes (inode) ON DELETE CASCADE
    )""",
)


catalog_migrations: Final = Migrations(
    "castore.catalog",
    (
        ("0001_first", _TABLES_1),
        ("0002_proof_of_locations", _TABLES_2),
        ("0003_backend_probes", _TABLES_3),
        ("0004_order_of_verification", _TABLES_4),
        ("0005_event_deliveries", _TABLES_5),
        ("0006_deletion_and_tags", _TABLES_6),
        ("0007_shared_inodes", _TABLES_7),
    ),
)
"""Of the catalog."""

workspace_migrations: Final = Migrations(
    "castore.workspace",
    (
        ("0001_first", _WORKSPACE_1),
        ("0002_imports", _WORKSPACE_2),
    ),
)
"""Of the workspace."""
