BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
INSERT INTO "_sqlite_migrations" VALUES(1,'castore.catalog','0001_first','2026-11-28 00:42:39.568741+00:00');
INSERT INTO "_sqlite_migrations" VALUES(2,'castore.catalog','0002_proof_of_locations','2026-11-28 00:42:40.059925+00:00');
INSERT INTO "_sqlite_migrations" VALUES(3,'castore.catalog','0003_backend_probes','2026-11-28 00:42:40.062979+00:00');
INSERT INTO "_sqlite_migrations" VALUES(4,'castore.catalog','0004_order_of_verification','2026-11-28 01:15:00.444148+00:00');
INSERT INTO "_sqlite_migrations" VALUES(5,'castore.catalog','0005_event_deliveries','2026-11-28 01:15:11.736497+00:00');
INSERT INTO "_sqlite_migrations" VALUES(6,'castore.catalog','0006_deletion_and_tags','2026-11-28 08:23:29.925757+00:00');
CREATE TABLE backend_probes (
        backend_id TEXT PRIMARY KEY,          -- the id in the configuration
        probed_at_ns INTEGER NOT NULL,        -- when the probe ended
        server TEXT NOT NULL,                 -- what the backend says it is; '' for nothing
        findings TEXT NOT NULL                -- JSON array of objects: name, question, expected, answer, enforced,
                                              --   consequence, severity; in the order in which they were asked
    ) WITHOUT ROWID;
CREATE TABLE blobs (
        blob_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given anew: the kernel keeps pages of by-digest/ under it
        algorithm TEXT NOT NULL,              -- of the digest
        digest BLOB NOT NULL,                 -- 32 raw bytes
        size_bytes INTEGER NOT NULL,
        block_size_bytes INTEGER NOT NULL,    -- of this blob: the unit of its checksums
        checksum_algorithm TEXT NOT NULL,     -- 'xxh3-64' or 'sha256'
        checksums BLOB NOT NULL,              -- one after another, in order of blocks; empty for an empty blob
        UNIQUE (digest, algorithm)
    );
INSERT INTO "blobs" VALUES(1,'sha256',X'7692C3AD3540BB803C020B3AEE66CD8887123234EA0C6E7143C0ADD73FF431ED',3,131072,'xxh3-64',X'911FABA7321FE1A0');
INSERT INTO "blobs" VALUES(2,'sha256',X'E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855',0,131072,'xxh3-64',X'');
INSERT INTO "blobs" VALUES(3,'manifest-sha256',X'E59625A822497C164D60705EB3FD6975C375CA213B8140137A826A77790986A9',10,131072,'xxh3-64',X'0B6F98C07F082B63');
CREATE TABLE catalog_info (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        catalog_id TEXT NOT NULL,             -- UUID made by `castore init`: the `source` of events
        created_at_ns INTEGER NOT NULL
    );
INSERT INTO "catalog_info" VALUES(1,'0b4f6f2e-6b0c-4c1e-8d43-2f9d1c7c1a11',1700000000000000000);
CREATE TABLE deleted_packages (
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
    );
CREATE TABLE deletions (
        algorithm TEXT NOT NULL,              -- of the digest
        digest BLOB NOT NULL,                 -- 32 raw bytes
        backend_id TEXT NOT NULL,             -- where
        size_bytes INTEGER NOT NULL,          -- of the blob; of an orphan as the backend says
        is_orphan INTEGER NOT NULL,           -- 0: it has a location, whose status is 'deleting'
        begun_at_ns INTEGER NOT NULL,         -- no request to delete it is sent later than a while after that
        PRIMARY KEY (digest, algorithm, backend_id)
    ) WITHOUT ROWID;
CREATE TABLE entries (
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
    );
INSERT INTO "entries" VALUES(1026,1024,X'312E33',1026,1,493,1000,1000,1600000000000000000,1700000000000000000,0,1,0,X'');
INSERT INTO "entries" VALUES(1027,1026,X'6C6962',1027,1,493,1000,1000,1600000000000000000,1700000000000000000,0,1,0,X'');
INSERT INTO "entries" VALUES(1028,1027,X'FF206F6E65',1028,2,420,1000,1000,1600000000000000000,1700000000000000000,3,2,1,X'');
INSERT INTO "entries" VALUES(1029,1026,X'68617264',1028,2,420,1000,1000,1600000000000000000,1700000000000000000,3,2,1,X'');
INSERT INTO "entries" VALUES(1030,1026,X'656D707479',1030,2,420,1000,1000,1600000000000000000,1700000000000000000,0,1,2,X'');
INSERT INTO "entries" VALUES(1031,1026,X'6C696E6B',1031,3,511,1000,1000,1600000000000000000,1700000000000000000,3,1,0,X'6C6962');
CREATE TABLE entry_attributes (
        inode INTEGER NOT NULL,
        name BLOB NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (inode, name)
    ) WITHOUT ROWID;
INSERT INTO "entry_attributes" VALUES(1028,X'757365722E6E6F7465',X'00FF');
CREATE TABLE event_deliveries (
        sink TEXT PRIMARY KEY,                -- 'file' or 'webhook'
        sequence INTEGER NOT NULL,            -- all events up to this one were delivered, were not wanted, or are lost
        delivered_at_ns INTEGER NOT NULL,     -- when an attempt last succeeded; 0 for never
        failing_since_ns INTEGER NOT NULL,    -- the first attempt that failed since; 0 for none
        error TEXT NOT NULL,                  -- why the last attempt failed; '' if it did not
        lost_count INTEGER NOT NULL,          -- events that expired before they could be delivered
        lost_at_ns INTEGER NOT NULL           -- when the last of these did; 0 for never
    ) WITHOUT ROWID;
CREATE TABLE events (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,  -- ascending; where followers go on
        event_id TEXT NOT NULL UNIQUE,        -- CloudEvents `id`: a UUID
        type TEXT NOT NULL,                   -- for example v1.package.published
        subject TEXT NOT NULL,                -- a digest or a NAME/VERSION
        time_ns INTEGER NOT NULL,
        data TEXT NOT NULL                    -- JSON object, as docs/events/ describes it by type
    );
INSERT INTO "events" VALUES(1,'5c0d8c1e-8f0d-4a43-9d5e-0f4b7f9d2a77','v1.package.published','zlib/1.3',1700000000000000000,'{"name":"zlib","version":"1.3","producer":"ci","retention_class":"release","publisher_uid":1000,"backend_ids":["local"],"file_count":3,"size_bytes":3,"manifest_digest":"manifest-sha256:e59625a822497c164d60705eb3fd6975c375ca213b8140137a826a77790986a9"}');
CREATE TABLE package_names (
        name TEXT PRIMARY KEY,                -- NAME by the rule of docs/SEMANTICS.md
        inode INTEGER NOT NULL UNIQUE,        -- of the directory packages/NAME; parent_id of its versions' roots
        latest_inode INTEGER NOT NULL UNIQUE, -- of the symbolic link packages/NAME/latest
        uid INTEGER NOT NULL,                 -- owner, group and mode of ingest/NAME at the first publish:
        gid INTEGER NOT NULL,                 --   they decide who may add versions
        mode INTEGER NOT NULL,                -- permission bits only
        mtime_ns INTEGER NOT NULL,            -- the time of the last publish or delete
        latest_version TEXT NOT NULL          -- the version published last; '' when all are deleted
    ) WITHOUT ROWID;
INSERT INTO "package_names" VALUES('zlib',1024,1025,1000,1000,493,1700000000000000000,'1.3');
CREATE TABLE package_tags (
        name TEXT NOT NULL REFERENCES package_names (name),
        tag TEXT NOT NULL,                    -- as a VERSION may be, or 'latest'
        version TEXT NOT NULL,                -- which it points to
        inode INTEGER NOT NULL,               -- of the link packages/NAME/TAG, new with each change; 0 for latest
        set_at_ns INTEGER NOT NULL,           -- when it came to point there
        PRIMARY KEY (name, tag)
    ) WITHOUT ROWID;
CREATE TABLE packages (
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
    );
INSERT INTO "packages" VALUES(1,'zlib','1.3',1026,'ci','release',1000,1700000000000000000,3,3,3,'["local"]');
CREATE TABLE put_intents (
        algorithm TEXT NOT NULL,
        digest BLOB NOT NULL,
        backend_id TEXT NOT NULL,
        owner TEXT NOT NULL,                  -- which process: its UUID, so that only the dead ones' are taken over
        created_at_ns INTEGER NOT NULL,
        PRIMARY KEY (digest, algorithm, backend_id)
    ) WITHOUT ROWID;
INSERT INTO "put_intents" VALUES('sha256',X'0000000000000000000000000000000000000000000000000000000000000000','local','6d1f',1700000000000000000);
CREATE TABLE sequences (
        name TEXT PRIMARY KEY,                -- 'inode': the one number space of entry ids and inodes
        next_value INTEGER NOT NULL           -- the first number that no lease has handed out
    ) WITHOUT ROWID;
INSERT INTO "sequences" VALUES('inode',1049600);
CREATE TABLE storage_locations (
        blob_id INTEGER NOT NULL REFERENCES blobs (blob_id),
        backend_id TEXT NOT NULL,             -- the id in the configuration
        status TEXT NOT NULL CHECK (status IN ('stored', 'verified', 'failed', 'deleting')),
        reason TEXT NOT NULL,                 -- '' unless failed: digest_mismatch, size_mismatch or missing
        stored_at_ns INTEGER NOT NULL,        -- when the backend acknowledged the last put
        verified_at_ns INTEGER NOT NULL,      -- when verify last looked at the object; 0 for never
        PRIMARY KEY (blob_id, backend_id)
    ) WITHOUT ROWID;
INSERT INTO "storage_locations" VALUES(1,'local','verified','',1700000000000000000,1700000000000000001);
INSERT INTO "storage_locations" VALUES(2,'local','stored','',1700000000000000000,0);
INSERT INTO "storage_locations" VALUES(3,'local','stored','',1700000000000000000,0);
CREATE TABLE tag_changes (
        change_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- ascends in the order of changes
        name TEXT NOT NULL,
        tag TEXT NOT NULL,                    -- 'latest' for its pin
        version TEXT NOT NULL,                -- '' when the tag was removed
        changed_at_ns INTEGER NOT NULL,       -- when
        changed_by_uid INTEGER NOT NULL       -- by whom
    );
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE INDEX locations_by_status ON storage_locations (status, backend_id);
CREATE UNIQUE INDEX entries_by_name ON entries (parent_id, name);
CREATE INDEX entries_by_parent ON entries (parent_id);
CREATE INDEX entries_by_blob ON entries (blob_id) WHERE blob_id <> 0;
CREATE INDEX locations_by_proof ON storage_locations (backend_id, max(stored_at_ns, verified_at_ns))
        WHERE status IN ('stored', 'verified');
CREATE INDEX packages_by_manifest ON packages (manifest_blob_id);
CREATE UNIQUE INDEX packages_by_root ON packages (root_id);
CREATE INDEX locations_by_verification ON storage_locations (backend_id, verified_at_ns, blob_id);
CREATE INDEX deleted_by_manifest ON deleted_packages (manifest_blob_id);
CREATE INDEX deleted_by_name ON deleted_packages (name, version);
CREATE UNIQUE INDEX tags_by_inode ON package_tags (inode) WHERE inode <> 0;
CREATE INDEX tag_changes_by_tag ON tag_changes (name, tag);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('blobs',3);
INSERT INTO "sqlite_sequence" VALUES('events',1);
COMMIT;
