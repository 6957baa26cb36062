"""The settings of a store, frozen, from one TOML file. Opens nothing but that file, creates nothing, holds no secret.

`castore init` writes a commented file. How values are written is in `castore.config_values`, the settings of each kind
of backend are in `castore.config_backends`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import platformdirs

from castore.config_backends import (
    KEY_REFERENCES,
    BackendSettings,
    LocalSettings,
    S3Settings,
    key_references,
    parse_backends,
)
from castore.config_events import EventSettings, parse_events
from castore.config_retention import RetentionRule, RetentionSettings, parse_retention
from castore.config_values import SecretRef, Table, suggestion
from castore.digest import SHA256_BLOCKS, XXH3
from castore.errors import ConfigError

__all__ = [
    "CONFIG_VARIABLE",
    "LISTEN_RULE",
    "SYSTEM_CONFIG_PATH",
    "BackendSettings",
    "CacheSettings",
    "Config",
    "EventSettings",
    "FollowSettings",
    "HttpSettings",
    "IngestSettings",
    "LocalSettings",
    "RetentionRule",
    "RetentionSettings",
    "RoutingRule",
    "RoutingSettings",
    "S3Settings",
    "StoreSettings",
    "VerifySettings",
    "default_cache_dir",
    "default_state_dir",
    "find_config",
    "load_config",
    "parse_config",
    "parse_listen",
    "user_config_path",
]

SYSTEM_CONFIG_PATH: Final = Path("/etc/castore/castore.toml")
CONFIG_VARIABLE: Final = "CASTORE_CONFIG"

LISTEN_RULE: Final = '"HOST:PORT" or "[IPV6]:PORT", the port from 0 to 65535'

_TABLES: Final = ("store", "cache", "ingest", "backends", "routing", "verify", "retention", "http", "events", "follow")
_KIB: Final = 2**10
_MIB: Final = 2**20
_GIB: Final = 2**30
_TINY_MAX: Final = 64 * _KIB
"""A small blob is copied on the loop."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where the state of one store lies."""

    state_dir: Path

    @property
    def catalog_path(self) -> Path:
        """The catalog's database."""
        return self.state_dir / "catalog.db"

    @property
    def workspace_path(self) -> Path:
        """The database of the ingest tree."""
        return self.state_dir / "staging/workspace.db"

    @property
    def tiny_path(self) -> Path:
        """The database of small blobs: a cache, not worth a backup."""
        return self.state_dir / "tiny.db"

    @property
    def run_dir(self) -> Path:
        """What belongs to a running daemon: its lock and its control socket."""
        return self.state_dir / "run"

    @property
    def control_path(self) -> Path:
        """The daemon's control socket."""
        return self.run_dir / "control.sock"

    @property
    def puts_dir(self) -> Path:
        """Who puts beside the daemon, and lives."""
        return self.run_dir / "puts"

    @property
    def followed_path(self) -> Path:
        """Tells that the catalog is a copy of another host's, kept up to date by `castore mount --follow`."""
        return self.state_dir / "followed.json"

    @property
    def follow_dir(self) -> Path:
        """Where such copies are made."""
        return self.state_dir / "follow"

    @property
    def gc_lock_path(self) -> Path:
        """The lock of a garbage collection: one at a time."""
        return self.run_dir / "gc.lock"


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """The disk cache of blocks; `max_bytes` 0 keeps none.

    `same_disk` says whether it also keeps blocks of `local` backends whose folder is on its own file system. Blobs of
    at most `tiny_bytes` are kept in a database in the state directory instead, up to `tiny_max_bytes` of it. With
    `seed`, what is published goes there without being read. With `prefetch_siblings`, small files of a directory that
    is read file by file are fetched before they are asked for.
    """

    dir: Path
    max_bytes: int
    same_disk: bool = False
    seed: bool = True
    tiny_bytes: int = 8 * _KIB
    tiny_max_bytes: int = _GIB
    prefetch_siblings: bool = True


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """How files come in. `max_bytes_per_user` 0 means no bound; `keep_owner` keeps uid and gid of published files.

    A version in which nothing changed for `expire_after_seconds` is reported; 0 for never. What broken puts left is
    removed `sweep_after_seconds` after a mount for the first time.
    """

    default_retention_class: str
    publish_wait_seconds: float
    sync_wait_seconds: float
    staging_max_bytes: int
    max_bytes_per_user: int
    keep_owner: bool = False
    expire_after_seconds: float = 0
    sweep_after_seconds: float = 60


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """The first rule whose shell-style patterns match decides; publish waits for `backend` and all `copies`."""

    retention_class: str
    producer: str
    backend: str
    copies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """Which backend a package goes to. `function` is `MODULE:NAME`, asked instead of `rules`, or None."""

    default: str
    function: str | None
    rules: tuple[RoutingRule, ...]


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """What the daemon verifies in the background: what was not for `every_seconds` (0: nothing is), in `backends`
    (none: in all), reading at most `bytes_per_s` altogether.
    """

    every_seconds: float
    bytes_per_s: int
    backends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where the HTTP API listens; `host` is without brackets, `port` 0 lets the system choose."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class FollowSettings:
    """The keys for a replica of another host's catalog in S3. All None where the environment has them."""

    access_key_ref: SecretRef | None = None
    secret_key_ref: SecretRef | None = None
    session_token_ref: SecretRef | None = None

    @property
    def references(self) -> tuple[SecretRef, ...]:
        """Those that are set."""
        every = (self.access_key_ref, self.secret_key_ref, self.session_token_ref)
        return tuple(reference for reference in every if reference is not None)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, checked against each other. `source` is the file they come from, None for the defaults."""

    store: StoreSettings
    cache: CacheSettings
    ingest: IngestSettings
    backends: Mapping[str, BackendSettings]
    routing: RoutingSettings
    verify: VerifySettings
    retention: RetentionSettings
    http: HttpSettings
    events: EventSettings
    follow: FollowSettings
    source: Path | None

    @property
    def block_digest(self) -> str:
        """How all blocks that come in are checked: by sha256 when one backend wants it, since any may go there."""
        wanted = {settings.block_digest for settings in self.backends.values()}
        return SHA256_BLOCKS if SHA256_BLOCKS in wanted else XXH3

    def check_references(self, environ: Mapping[str, str] | None = None) -> None:
        """Resolve every reference to a secret and forget the result. Raises ConfigError for the first that fails."""
        buckets = [settings.references for settings in self.backends.values() if isinstance(settings, S3Settings)]
        for references in (*buckets, self.follow.references):
            for reference in references:
                reference.resolve(environ)


def user_config_path() -> Path:
    """Where `castore init` writes the file unless told: in the user's configuration folder."""
    return platformdirs.user_config_path("castore", appauthor=False) / "castore.toml"


def default_state_dir() -> Path:
    """The state directory when none is set: the user's data folder."""
    return platformdirs.user_data_path("castore", appauthor=False).absolute()


def default_cache_dir() -> Path:
    """The cache directory when none is set: the user's cache folder."""
    return platformdirs.user_cache_path("castore", appauthor=False).absolute()


def find_config(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file that decides, absolute, or None for the defaults.

    In this order: `path` (`--config`), `$CASTORE_CONFIG`, the user's file if it exists, `SYSTEM_CONFIG_PATH` if it
    exists. Never a file of the working directory: what a command does should not depend on where it is called.
    """
    if path is not None:
        return path.expanduser().absolute()
    if environ.get(CONFIG_VARIABLE):
        return Path(environ[CONFIG_VARIABLE]).expanduser().absolute()
    for candidate in (user_config_path(), SYSTEM_CONFIG_PATH):
        # lexists: a file that is there but cannot be read is an error later, not a silent default.
        if os.path.lexists(candidate):
            return candidate.absolute()
    return None


def load_config(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration that `find_config` finds, else the defaults.

    Raises ConfigError, one line that names the key, the value, the file and what is allowed, when a file cannot be
    read, has an unknown key or a bad value, or when settings contradict each other. Secrets are not resolved.
    """
    source = find_config(path, os.environ if environ is None else environ)
    if source is None:
        return parse_config(_default_values(), source=None)
    try:
        with source.open("rb") as stream:
            values = tomllib.load(stream)
    except OSError as exc:
        raise ConfigError(f"{source}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source}: is not TOML: {exc}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is not a configuration: values are nested too deeply") from None
    return parse_config(values, source=source)


def _default_values() -> dict[str, Any]:
    return {"backends": {"local": {"type": "local", "path": str(default_state_dir() / "objects")}}}


def parse_config(values: Mapping[str, Any], *, source: Path | None) -> Config:
    """The configuration that the parsed TOML `values` mean. Raises ConfigError as `load_config` does."""
    file = source if source is not None else Path("built-in defaults")
    top = Table(values, name="", file=file, known=_TABLES)
    store = top.table("store", ("state_dir",))
    cache = top.table(
        "cache", ("dir", "max_bytes", "same_disk", "seed", "tiny_bytes", "tiny_max_bytes", "prefetch_siblings")
    )
    backends = parse_backends(top)
    config = Config(
        store=StoreSettings(store.path("state_dir", default_state_dir())),
        cache=CacheSettings(
            cache.path("dir", default_cache_dir()),
            cache.size("max_bytes", 20 * _GIB),
            cache.boolean("same_disk", False),
            cache.boolean("seed", True),
            cache.size("tiny_bytes", 8 * _KIB, maximum=_TINY_MAX),
            cache.size("tiny_max_bytes", _GIB),
            cache.boolean("prefetch_siblings", True),
        ),
        ingest=_ingest(top),
        backends=MappingProxyType(backends),
        routing=_routing(top, tuple(backends)),
        verify=_verify(top, tuple(backends)),
        retention=parse_retention(top),
        http=_http(top),
        events=parse_events(top),
        follow=FollowSettings(*key_references(top.table("follow", KEY_REFERENCES, secret=True))),
        source=source,
    )
    _check_places(config, file)
    return config


def _ingest(top: Table) -> IngestSettings:
    table = top.table(
        "ingest",
        (
            "default_retention_class",
            "publish_wait",
            "sync_wait",
            "staging_max_bytes",
            "max_bytes_per_user",
            "keep_owner",
            "expire_after",
            "sweep_after",
        ),
    )
    return IngestSettings(
        default_retention_class=table.text(
            "default_retention_class",
            "standard",
            allowed="1 to 128 letters, digits or ._+:@~-",
            pattern=r"[A-Za-z0-9._+:@~-]{1,128}",
        ),
        # A rename waits this long with the kernel's locks held, hence the low bound.
        publish_wait_seconds=table.duration("publish_wait", "5s", maximum="60s"),
        sync_wait_seconds=table.duration("sync_wait", "10min", maximum="24h"),
        staging_max_bytes=table.size("staging_max_bytes", 100 * _GIB, minimum=1),
        max_bytes_per_user=table.size("max_bytes_per_user", 0),
        keep_owner=table.boolean("keep_owner", False),
        expire_after_seconds=table.duration("expire_after", "0s", maximum="87600h"),
        # Who waited for the mount reads from it in the first minute, and a sweep takes a fifth of a second of one core.
        sweep_after_seconds=table.duration("sweep_after", "60s", maximum="1h"),
    )


def _routing(top: Table, backend_ids: tuple[str, ...]) -> RoutingSettings:
    table = top.table("routing", ("default", "function", "rules"))
    if "default" not in table and len(backend_ids) > 1:
        raise table.missing("default", f"one of {', '.join(backend_ids)}")
    default = _backend_id(table, "default", table.text("default", backend_ids[0], allowed="a backend id"), backend_ids)
    function = None
    if "function" in table:
        function = table.text(
            "function",
            None,
            allowed='"MODULE:NAME"',
            pattern=r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*",
        )
        if "rules" in table:
            raise table.refuse("function", "either function or [[routing.rules]], not both")
    rules = tuple(
        _rule(rule, backend_ids) for rule in table.tables("rules", ("retention_class", "producer", "backend", "copies"))
    )
    return RoutingSettings(default, function, rules)


def _rule(table: Table, backend_ids: tuple[str, ...]) -> RoutingRule:
    backend = _backend_id(table, "backend", table.text("backend", None, allowed="a backend id"), backend_ids)
    copies = table.texts("copies")
    for copy in copies:
        _backend_id(table, "copies", copy, backend_ids)
    if backend in copies or len(set(copies)) < len(copies):
        raise table.refuse("copies", f"other backends than {backend}, each once")
    return RoutingRule(
        retention_class=table.text("retention_class", "*", allowed="a shell-style pattern"),
        producer=table.text("producer", "*", allowed="a shell-style pattern"),
        backend=backend,
        copies=copies,
    )


def _backend_id(table: Table, key: str, backend_id: str, backend_ids: tuple[str, ...]) -> str:
    if backend_id not in backend_ids:
        allowed = f"configured backends ({', '.join(backend_ids)})"
        raise table.refuse(key, allowed + suggestion(backend_id, backend_ids))
    return backend_id


def _verify(top: Table, backend_ids: tuple[str, ...]) -> VerifySettings:
    table = top.table("verify", ("every", "rate", "backends"))
    backends = table.texts("backends")
    for backend in backends:
        _backend_id(table, "backends", backend, backend_ids)
    return VerifySettings(
        every_seconds=table.duration("every", "0s", maximum="87600h"),
        bytes_per_s=table.rate("rate", 20 * _MIB),
        backends=backends,
    )


def _http(top: Table) -> HttpSettings:
    table = top.table("http", ("listen",))
    listen = table.text("listen", "127.0.0.1:8750", allowed=LISTEN_RULE)
    try:
        return parse_listen(listen)
    except ValueError:
        raise table.refuse("listen", LISTEN_RULE) from None


def parse_listen(text: str) -> HttpSettings:
    """The address that a text such as `127.0.0.1:8750` means. Raises ValueError for what LISTEN_RULE does not allow."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[2]) > 65535:
        raise ValueError("not an address")
    return HttpSettings(match[1].strip("[]"), int(match[2]))


def _check_places(config: Config, file: Path) -> None:
    """No two settings share a place: a backend would count as a copy of itself, a cache would evict stored objects."""
    places = [("store.state_dir", str(config.store.state_dir)), ("cache.dir", str(config.cache.dir))]
    places += [(f"backends.{backend_id}", settings.place) for backend_id, settings in config.backends.items()]
    taken: dict[str, str] = {}
    for key, place in places:
        if place in taken:
            raise ConfigError(f"{file}: {key} = {place!r}: expected another place than that of {taken[place]}")
        taken[place] = key
