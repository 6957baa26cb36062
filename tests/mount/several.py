"""A mounted store with two backends, for the tests of routing: `near`, a folder, and `far`, of the type under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from castore.catalog.reader import CatalogReader
from castore.config import load_config
from castore.digest import MANIFEST_ALGORITHM, Digest
from castore.storage.layout import key_of
from tests.damage import read_object
from tests.mount.crash_round import rows
from tests.mount.store import MountedStore
from tests.places import LocalPlace, Place

NEAR = "near"
FAR = "far"


class SeveralBackends:
    """A store of `make_store` whose configuration is written anew, and what of it is where."""

    def __init__(self, make_store: Callable[..., MountedStore], far: Place, routing: str = "") -> None:
        self.store = make_store('publish_wait = "3s"\n')
        self.far = far
        self.near = LocalPlace(self.store.root)
        self._sections = {NEAR: self.near.section(NEAR), FAR: far.section(FAR)}
        self.configure(NEAR, FAR, routing=routing)
        self.store.castore("init")
        # Known from here on, whatever the configuration will say.
        self.settings = dict(load_config(self.store.config).backends)

    def configure(self, *backend_ids: str, routing: str = "") -> None:
        """Write the configuration with these backends, the first of them the default."""
        text = self.store.config.read_text()
        before = text[: text.index("[backends.")] if "[backends." in text else text
        http = text[text.index("[http]") :].split("[[")[0]
        sections = "".join(self._sections[backend_id] for backend_id in backend_ids)
        default = "" if "default =" in routing else f'default = "{backend_ids[0]}"\n'
        self.store.config.write_text(f"{before}{sections}[routing]\n{default}{routing}\n{http}")

    # looking

    def digests(self, ref: str, contents: Iterable[bytes]) -> set[Digest]:
        """Of a package with files of these contents, and of its manifest."""
        shown = json.loads(self.store.castore("package", "show", ref, "--json"))
        return {Digest.parse(shown["manifest_digest"]), *map(Digest.of, contents)}

    def holders(self, digest: Digest) -> set[str]:
        """The backends where an object with exactly those bytes lies; asked past castore."""
        return {backend_id for backend_id in (NEAR, FAR) if self.is_in(backend_id, digest)}

    def is_in(self, backend_id: str, digest: Digest) -> bool:
        try:
            data = read_object(self.settings[backend_id], digest)
        except FileNotFoundError:
            return False
        except Exception as exc:
            if getattr(exc, "response", {}).get("Error", {}).get("Code") == "NoSuchKey":
                return False
            raise
        assert Digest.of(data, digest.algorithm) == digest, f"{backend_id}: other bytes under {key_of(digest)}"
        return True

    def locations(self, digest: Digest) -> set[str]:
        """Where the catalog says that it is, well."""
        with CatalogReader(self.store.state / "catalog.db") as catalog:
            return catalog.good_backends(digest)

    def check_where(self, ref: str, contents: Iterable[bytes], expected: set[str]) -> None:
        """Every object of a package lies there, and nowhere else, and the catalog says so."""
        for digest in self.digests(ref, contents):
            assert self.holders(digest) == expected, digest
            assert self.locations(digest) == expected, digest
        shown = json.loads(self.store.castore("package", "show", ref, "--json"))
        assert set(shown["backend_ids"]) == expected

    def manifests_in_near(self) -> list[Path]:
        """The manifests that lie in the folder."""
        folder = Path(self.settings[NEAR].place) / MANIFEST_ALGORITHM
        return [path for path in folder.rglob("*") if path.is_file()]

    def sql(self, query: str) -> list[Any]:
        """Rows of the catalog."""
        return list(rows(self.store.state / "catalog.db", query))
