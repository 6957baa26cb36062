"""What must hold in a catalog, as a table of queries: each gives the rows that break it. Runs nothing itself.

A query gives (where, what) of each offending row; a `where` that is a number is an entry_id. Every one reads its table
once, with look-ups by key beside it, so that it takes no memory to speak of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from castore.digest import CHECKSUM_BYTES, MANIFEST_ALGORITHM, PRIMARY_ALGORITHM

RESTORE: Final = (
    "restore a backup, or move the catalog away and run `castore catalog rebuild --backend ID` for each backend"
)
VERIFY: Final = "run `castore storage verify`, then restore a backup if it stays"
STORE_AGAIN: Final = "publish the same bytes again under another version, or restore a backup"

BLOCK_BYTES: Final = (4096, 1 << 24)
"""The smallest and the largest block size that makes sense; a read holds a whole block in memory."""
LARGEST_INODE: Final = (1 << 61) - 1
"""Above are the numbers of by-digest/."""
_ID_MAX: Final = (1 << 32) - 1
_LABEL_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant. `name` is the same for ever; `mend` is what to do when it does not hold.

    It is left out where there is no table that it `needs`. What a package that is being purged has left of its tree
    keeps it only when it `holds_in_purge`: its entries go in several transactions.
    """

    name: str
    title: str
    mend: str
    sql: str
    needs: str = "entries"
    holds_in_purge: bool = True


def _cases(where: str, source: str, *cases: tuple[str, str]) -> str:
    """A query over `source` for rows that break one of the rules; each is (SQL of what is wrong, SQL text of it)."""
    whens = " ".join(f"WHEN {wrong} THEN {text}" for wrong, text in cases)
    return f"SELECT {where}, CASE {whens} END AS what FROM {source} WHERE what IS NOT NULL"


def _name_is_wrong(column: str) -> str:
    """The rule of castore.registry.names, as SQL."""
    return (
        # As bytes: text ends at its first NUL.
        f"(length(CAST({column} AS BLOB)) NOT BETWEEN 1 AND 128 OR instr(CAST({column} AS BLOB), x'00') > 0 "
        f"OR {column} NOT GLOB '[A-Za-z0-9@]*' OR substr({column}, 2) GLOB '*[^A-Za-z0-9._+:@~-]*')"
    )


def _owner_is_wrong(prefix: str = "") -> str:
    return (
        f"{prefix}uid NOT BETWEEN 0 AND {_ID_MAX} OR {prefix}gid NOT BETWEEN 0 AND {_ID_MAX} "
        f"OR {prefix}mode NOT BETWEEN 0 AND 511"
    )


def _label_is_wrong(column: str) -> str:
    return f"length({column}) NOT BETWEEN 1 AND {_LABEL_MAX}"


_WIDTHS: Final = " ".join(f"WHEN '{name}' THEN {width}" for name, width in CHECKSUM_BYTES.items())
_CHECKSUM_BYTES: Final = (
    f"((size_bytes / block_size_bytes + (size_bytes % block_size_bytes > 0)) * CASE checksum_algorithm {_WIDTHS} END)"
)
_BLOB: Final = "algorithm || ':' || lower(hex(digest))"
_LOCATION: Final = f"coalesce({_BLOB}, 'blob ' || here.blob_id) || ' in ' || backend_id"
_INODE_IS_WRONG: Final = f"NOT BETWEEN 1024 AND {LARGEST_INODE}"

CHECKS: Final = (
    Check(
        "info",
        "the catalog knows what it is",
        RESTORE,
        "SELECT 'catalog_info', 'there are ' || count(*) || ' rows instead of one' FROM catalog_info "
        "HAVING count(*) <> 1 UNION ALL "
        + _cases(
            "'catalog_info'",
            "catalog_info",
            ("length(catalog_id) <> 36", "'catalog_id is no UUID'"),
            ("created_at_ns <= 0", "'created_at_ns is no time'"),
        ),
    ),
    Check(
        "sequences",
        "new inodes are free ones",
        RESTORE,
        "SELECT 'sequences', 'there is no row for inode' "
        "WHERE NOT EXISTS (SELECT 1 FROM sequences WHERE name = 'inode') UNION ALL "
        "SELECT 'sequences', 'the next inode is ' || next_value || ', but ' || used || ' is used' FROM sequences, "
        "(SELECT max(coalesce((SELECT max(entry_id) FROM entries), 0), "
        "coalesce((SELECT max(shared_inode) FROM entries WHERE shared_inode <> 0), 0), "
        "coalesce((SELECT max(max(inode, latest_inode)) FROM package_names), 0)) AS used) "
        f"WHERE name = 'inode' AND (next_value <= used OR next_value {_INODE_IS_WRONG})",
    ),
    Check(
        "names",
        "NAMEs follow the rule",
        RESTORE,
        _cases(
            "name",
            "package_names AS here",
            (_name_is_wrong("name"), "'is not a NAME'"),
            (_owner_is_wrong(), "'its owner, group or mode is out of range'"),
            (f"inode {_INODE_IS_WRONG} OR latest_inode {_INODE_IS_WRONG}", "'an inode is out of range'"),
            (
                (
                    "inode = latest_inode OR EXISTS (SELECT 1 FROM package_names AS other "
                    "WHERE other.inode = here.latest_inode) "
                    "OR EXISTS (SELECT 1 FROM entries WHERE entry_id IN (here.inode, here.latest_inode)) "
                    "OR EXISTS (SELECT 1 FROM entries WHERE shared_inode IN (here.inode, here.latest_inode) "
                    "  AND shared_inode <> 0)"
                ),
                "'one of its inodes is used twice'",
            ),
            (
                (
                    "latest_version <> '' AND NOT EXISTS (SELECT 1 FROM packages "
                    "WHERE packages.name = here.name AND version = latest_version)"
                ),
                "'latest is ' || latest_version || ', which is not published'",
            ),
            (
                "latest_version = '' AND EXISTS (SELECT 1 FROM packages WHERE packages.name = here.name)",
                "'has versions, but no latest'",
            ),
        ),
    ),
    Check(
        "packages",
        "packages follow the rules",
        RESTORE,
        _cases(
            "here.name || '/' || version",
            "packages AS here LEFT JOIN package_names USING (name) LEFT JOIN entries AS root ON entry_id = root_id "
            "LEFT JOIN blobs ON blobs.blob_id = manifest_blob_id",
            (f"version = 'latest' OR {_name_is_wrong('version')}", "'is not a VERSION'"),
            ("root.entry_id IS NULL", "'its root directory is missing'"),
            (
                "root.kind <> 1 OR root.parent_id IS NOT package_names.inode OR root.name IS NOT CAST(version AS BLOB)",
                "'its root is not the directory packages/NAME/VERSION'",
            ),
            (_label_is_wrong("producer"), "'its producer has no text, or too much'"),
            (_label_is_wrong("retention_class"), "'its retention class has no text, or too much'"),
            (
                f"publisher_uid NOT BETWEEN 0 AND {_ID_MAX} OR published_at_ns < 0",
                "'its publisher or its time is out of range'",
            ),
            ("blobs.blob_id IS NULL", "'its manifest is not known'"),
            (f"blobs.algorithm <> '{MANIFEST_ALGORITHM}'", "'its manifest is a blob of another kind'"),
            ("NOT json_valid(backend_ids)", "'backend_ids is not JSON'"),
            (
                (
                    "json_type(backend_ids) <> 'array' OR json_array_length(backend_ids) = 0 "
                    "OR EXISTS (SELECT 1 FROM json_each(backend_ids) WHERE type <> 'text' OR value = '') "
                    "OR (SELECT count(DISTINCT value) FROM json_each(backend_ids)) <> json_array_length(backend_ids)"
                ),
                "'backend_ids is not a list of different backends'",
            ),
        ),
    ),
    Check(
        "blobs",
        "digests, sizes and checksums agree in length",
        RESTORE,
        _cases(
            f"CASE length(digest) WHEN 32 THEN {_BLOB} ELSE 'blob ' || blob_id END",
            "blobs",
            (
                f"algorithm NOT IN ('{PRIMARY_ALGORITHM}', '{MANIFEST_ALGORITHM}')",
                "'is of an algorithm that is not known'",
            ),
            ("length(digest) <> 32", "'its digest has ' || length(digest) || ' bytes instead of 32'"),
            ("size_bytes < 0", "'its size is negative'"),
            (
                f"block_size_bytes NOT BETWEEN {BLOCK_BYTES[0]} AND {BLOCK_BYTES[1]}",
                "'its blocks have ' || block_size_bytes || ' bytes'",
            ),
            (
                f"checksum_algorithm NOT IN ({', '.join(map(repr, CHECKSUM_BYTES))})",
                "'its checksums are of an algorithm that is not known'",
            ),
            (
                f"length(checksums) <> {_CHECKSUM_BYTES}",
                f"'its checksums have ' || length(checksums) || ' bytes instead of ' || {_CHECKSUM_BYTES}",
            ),
        ),
    ),
    Check(
        "locations",
        "locations say what they may",
        VERIFY,
        _cases(
            _LOCATION,
            "storage_locations AS here LEFT JOIN blobs USING (blob_id)",
            ("backend_id = ''", "'names no backend'"),
            ("status NOT IN ('stored', 'verified', 'failed', 'deleting')", "'its status is ' || status"),
            (
                "status = 'failed' AND reason NOT IN ('digest_mismatch', 'size_mismatch', 'missing')",
                "'is failed, and does not say why'",
            ),
            ("status IN ('stored', 'verified') AND reason <> ''", "'is good, but has the reason ' || reason"),
            ("stored_at_ns < 0 OR verified_at_ns < 0", "'a time is negative'"),
            ("status = 'verified' AND verified_at_ns = 0", "'is verified, but never was looked at'"),
        ),
    ),
    Check(
        "intents",
        "puts under way name a digest and a backend",
        "start the daemon: it ends what earlier ones began",
        _cases(
            "'put_intents of ' || backend_id",
            "put_intents",
            (
                f"algorithm NOT IN ('{PRIMARY_ALGORITHM}', '{MANIFEST_ALGORITHM}') OR length(digest) <> 32",
                "'its digest is none'",
            ),
            ("backend_id = '' OR owner = ''", "'names no backend or no process'"),
        ),
    ),
    Check(
        "entries",
        "entries are files, directories or symbolic links as Linux has them",
        RESTORE,
        _cases(
            "entry_id",
            "entries",
            (f"entry_id {_INODE_IS_WRONG} OR inode {_INODE_IS_WRONG}", "'its number is out of range'"),
            ("length(name) NOT BETWEEN 1 AND 255", "'its name has ' || length(name) || ' bytes'"),
            (
                "name IN (x'2e', x'2e2e') OR instr(name, x'2f') > 0 OR instr(name, x'00') > 0",
                "'its name is none that Linux allows'",
            ),
            (_owner_is_wrong(), "'its owner, group or mode is out of range'"),
            ("nlink < 1", "'it has ' || nlink || ' names'"),
            ("kind = 1 AND entry_id <> inode", "'a directory has a second name'"),
            (
                "kind = 1 AND (size_bytes <> 0 OR blob_id <> 0 OR target <> x'' OR nlink <> 1)",
                "'a directory has bytes, a target or several names'",
            ),
            ("kind = 2 AND (blob_id = 0 OR target <> x'')", "'a file has no blob, or a target'"),
            (
                (
                    "kind = 3 AND (blob_id <> 0 OR size_bytes <> length(target) OR instr(target, x'00') > 0 "
                    "OR length(target) NOT BETWEEN 1 AND 4095)"
                ),
                "'a symbolic link has a blob, or no right target'",
            ),
        ),
    ),
    Check(
        "parents",
        "every entry lies in a directory that is there",
        RESTORE,
        "SELECT entry_id, 'its directory ' || parent_id || ' is not there' FROM entries AS here "
        "WHERE NOT EXISTS (SELECT 1 FROM entries AS above WHERE above.entry_id = here.parent_id AND above.kind = 1) "
        "AND NOT EXISTS (SELECT 1 FROM package_names WHERE inode = here.parent_id) "
        # As deletion leaves a root: the check of trees counts those that no deletion knows.
        "AND here.parent_id <> -here.entry_id",
    ),
    Check(
        "roots",
        "every version that is shown is a package",
        RESTORE,
        "SELECT entry_id, 'lies in packages/' || package_names.name || ', but no package has it as its root' "
        "FROM package_names JOIN entries ON parent_id = package_names.inode "
        "WHERE NOT EXISTS (SELECT 1 FROM packages WHERE root_id = entry_id)",
    ),
    Check(
        "files",
        "every file has its blob, of its size",
        RESTORE,
        "SELECT entry_id, CASE WHEN blobs.blob_id IS NULL THEN 'its blob is not known' "
        f"WHEN algorithm <> '{PRIMARY_ALGORITHM}' THEN 'its blob is a manifest' "
        "ELSE 'it has ' || here.size_bytes || ' bytes, its blob ' || blobs.size_bytes END "
        "FROM entries AS here LEFT JOIN blobs USING (blob_id) WHERE kind = 2 AND here.blob_id <> 0 AND "
        f"(blobs.blob_id IS NULL OR algorithm <> '{PRIMARY_ALGORITHM}' OR here.size_bytes <> blobs.size_bytes)",
    ),
    Check(
        "links",
        "hard links agree, and their number is right",
        RESTORE,
        # Further names are few: those whose entry_id is not the inode.
        "SELECT here.entry_id, CASE WHEN first.entry_id IS NULL THEN 'is a hard link to nothing' "
        "WHEN (SELECT inode FROM entries WHERE entry_id = first.inode) IS NOT first.inode THEN 'links to a link' "
        "ELSE 'differs from the other names of the same inode' END "
        "FROM entries AS here LEFT JOIN entries AS first ON first.entry_id = here.inode "
        "WHERE here.entry_id <> here.inode AND (first.entry_id IS NULL OR first.inode <> first.entry_id "
        "OR (first.kind, first.mode, first.uid, first.gid, first.mtime_ns, first.ctime_ns, first.size_bytes, "
        "first.nlink, first.blob_id, first.target) IS NOT (here.kind, here.mode, here.uid, here.gid, here.mtime_ns, "
        "here.ctime_ns, here.size_bytes, here.nlink, here.blob_id, here.target)) UNION ALL "
        "SELECT entry_id, 'says ' || nlink || ' names, and has ' || (1 + names) FROM "
        "(SELECT entry_id, nlink, 0 AS names FROM entries WHERE nlink > 1 AND entry_id = inode AND kind <> 1 "
        "  AND inode NOT IN (SELECT inode FROM entries WHERE entry_id <> inode) "
        "UNION ALL SELECT max(entry_id), max(nlink), count(*) FROM entries WHERE entry_id <> inode GROUP BY inode) "
        "WHERE nlink <> 1 + names",
        holds_in_purge=False,
    ),
    Check(
        "shared",
        "files that show one inode are alike",
        RESTORE,
        "SELECT here.entry_id, CASE "
        f"WHEN here.shared_inode {_INODE_IS_WRONG} THEN 'shows an inode that is out of range' "
        "WHEN here.kind <> 2 OR here.nlink <> 1 OR here.inode <> here.entry_id OR here.shared_inode = here.entry_id "
        "  THEN 'is no file of its own, but shows the inode of another' "
        "WHEN EXISTS (SELECT 1 FROM entry_attributes WHERE inode IN (here.entry_id, here.shared_inode)) "
        "  THEN 'shows a shared inode, and one of both has attributes' "
        "ELSE 'differs from what has the same inode' END "
        "FROM entries AS here LEFT JOIN entries AS other ON other.entry_id = coalesce("
        "  (SELECT entry_id FROM entries WHERE entry_id = here.shared_inode), "
        "  (SELECT min(entry_id) FROM entries WHERE shared_inode = here.shared_inode AND shared_inode <> 0)) "
        f"WHERE here.shared_inode <> 0 AND (here.shared_inode {_INODE_IS_WRONG} "
        "OR here.kind <> 2 OR here.nlink <> 1 OR here.inode <> here.entry_id OR here.shared_inode = here.entry_id "
        "OR EXISTS (SELECT 1 FROM entry_attributes WHERE inode IN (here.entry_id, here.shared_inode)) "
        "OR other.inode <> other.entry_id OR other.shared_inode NOT IN (0, here.shared_inode) "
        "OR (other.kind, other.mode, other.uid, other.gid, other.mtime_ns, other.ctime_ns, other.size_bytes, "
        "other.nlink, other.blob_id) IS NOT (here.kind, here.mode, here.uid, here.gid, here.mtime_ns, here.ctime_ns, "
        "here.size_bytes, here.nlink, here.blob_id))",
    ),
    Check(
        "attributes",
        "extended attributes belong to an entry, within Linux's limits",
        RESTORE,
        _cases(
            "inode",
            "entry_attributes AS here",
            (
                "NOT EXISTS (SELECT 1 FROM entries WHERE entry_id = here.inode)",
                "'has an attribute, but is not there'",
            ),
            (
                (
                    "length(name) NOT BETWEEN 6 AND 255 OR substr(name, 1, 5) <> CAST('user.' AS BLOB) "
                    "OR instr(name, x'00') > 0"
                ),
                "'has an attribute whose name is none of user.*'",
            ),
            ("length(value) > 65536", "'has an attribute of more than 64 KiB'"),
        ),
    ),
    Check(
        "stored",
        "every blob of a package has a location, and its manifest one in each of its backends",
        STORE_AGAIN,
        f"SELECT {_BLOB}, 'a published file has these bytes, and no backend has them' FROM blobs AS here "
        f"WHERE algorithm = '{PRIMARY_ALGORITHM}' AND EXISTS (SELECT 1 FROM entries "
        "  WHERE entries.blob_id = here.blob_id AND entries.blob_id <> 0) "
        "AND NOT EXISTS (SELECT 1 FROM storage_locations AS there WHERE there.blob_id = here.blob_id "
        "  AND status <> 'deleting') UNION ALL "
        "SELECT name || '/' || version, 'has no manifest in backend ' || value FROM packages, "
        "json_each(iif(json_valid(backend_ids), backend_ids, '[]')) WHERE NOT EXISTS (SELECT 1 "
        "FROM storage_locations AS there WHERE there.blob_id = manifest_blob_id AND there.backend_id = value "
        "AND status <> 'deleting')",
    ),
    Check(
        "deleted",
        "deleted packages have their root and their manifest",
        RESTORE,
        _cases(
            "here.name || '/' || version",
            "deleted_packages AS here LEFT JOIN entries AS root ON entry_id = root_id "
            "LEFT JOIN blobs ON blobs.blob_id = manifest_blob_id",
            ("root.entry_id IS NULL AND NOT is_purging", "'its root directory is missing'"),
            ("root.entry_id IS NOT NULL AND (root.kind <> 1 OR root.parent_id <> -root_id)", "'its root is not aside'"),
            ("EXISTS (SELECT 1 FROM packages WHERE packages.root_id = here.root_id)", "'is published, too'"),
            (f"blobs.algorithm IS NOT '{MANIFEST_ALGORITHM}'", "'its manifest is not known'"),
        ),
        needs="deleted_packages",
    ),
    Check(
        "tags",
        "tags point to versions that are published",
        "set them again with `castore package tag`",
        _cases(
            "here.name || '/' || tag",
            "package_tags AS here",
            (_name_is_wrong("tag"), "'is no TAG'"),
            (
                (
                    "NOT EXISTS (SELECT 1 FROM packages WHERE packages.name = here.name "
                    "AND packages.version = here.version)"
                ),
                "'points to ' || version || ', which is not published'",
            ),
            (
                (
                    "tag = 'latest' AND NOT EXISTS (SELECT 1 FROM package_names WHERE package_names.name = here.name "
                    "AND latest_version = here.version)"
                ),
                "'is pinned to ' || version || ', but latest is another one'",
            ),
        ),
        needs="package_tags",
    ),
    Check(
        "events",
        "events hold JSON objects",
        "delete those rows: events are told, not needed",
        _cases(
            "'event ' || sequence",
            "events",
            ("event_id = '' OR type = '' OR subject = ''", "'has no id, type or subject'"),
            ("NOT json_valid(data) OR json_type(data) <> 'object'", "'its data is no JSON object'"),
        ),
    ),
    Check(
        "probes",
        "probes hold JSON arrays",
        "run `castore storage probe --backend ID` again",
        _cases(
            "'probe of ' || backend_id",
            "backend_probes",
            ("NOT json_valid(findings) OR json_type(findings) <> 'array'", "'its findings are no JSON array'"),
        ),
    ),
)
"""In the order in which they are run."""
