"""The settings of events: how long they are kept, and where they are delivered to. Opens nothing, holds no secret."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from castore.config_values import SecretRef, Table

BATCH_EVENTS_MAX: Final = 1000
"""Events in one request to a webhook; BATCH_BYTES of `castore.api.deliveries` bounds it, too."""

_MIB: Final = 2**20
_URL_RULE: Final = "http:// or https://, a host, and neither a user nor a fragment"
_SINK_KEYS: Final = ("types", "begin")


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkSettings:
    """What goes to a sink. `types` are shell-style patterns; `begin` says where one that is new begins."""

    types: tuple[str, ...] = ("*",)
    begin: str = "oldest"

    def wants(self, event_type: str) -> bool:
        """Whether events of that type go there."""
        return any(fnmatchcase(event_type, pattern) for pattern in self.types)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFileSettings(SinkSettings):
    """A file of JSON lines; beyond `rotate_bytes` it is set aside, and the last `rotate_keep` of those are kept."""

    path: Path
    rotate_bytes: int = 64 * _MIB
    rotate_keep: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSettings(SinkSettings):
    """An HTTP receiver. Its URL may hold a secret, so nothing shows more of it than `origin`.

    An attempt takes `timeout_seconds` at most, the wait between two `retry_max_seconds`.
    """

    url: str
    secret: SecretRef
    timeout_seconds: float = 10.0
    retry_max_seconds: float = 300.0
    batch_events: int = 100
    ca_bundle: Path | None = None

    @property
    def origin(self) -> str:
        """The URL's scheme, host and port."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def __repr__(self) -> str:
        return f"WebhookSettings({self.origin})"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSettings:
    """How long events are kept in the catalog, and where they are delivered to."""

    keep_seconds: float
    file: EventFileSettings | None = None
    webhook: WebhookSettings | None = None

    @property
    def sinks(self) -> dict[str, SinkSettings]:
        """What is configured, by the name that the catalog knows it by."""
        named: dict[str, SinkSettings | None] = {"file": self.file, "webhook": self.webhook}
        return {name: settings for name, settings in named.items() if settings is not None}


def parse_events(top: Table) -> EventSettings:
    """The table `[events]`. Raises ConfigError."""
    table = top.table("events", ("keep", "file", "webhook"))
    return EventSettings(
        # A follower that is away for less misses nothing.
        keep_seconds=table.duration("keep", "90d", minimum="1h", maximum="3650d"),
        file=_file(table) if "file" in table else None,
        webhook=_webhook(table) if "webhook" in table else None,
    )


def _file(events: Table) -> EventFileSettings:
    table = events.table("file", ("path", "rotate_bytes", "rotate_keep", *_SINK_KEYS))
    return EventFileSettings(
        path=table.path("path", None),
        rotate_bytes=table.size("rotate_bytes", 64 * _MIB, minimum=1024),
        rotate_keep=table.count("rotate_keep", 8, minimum=1, maximum=1000),
        types=_types(table),
        begin=table.choice("begin", "oldest", ("oldest", "newest")),
    )


def _webhook(events: Table) -> WebhookSettings:
    table = events.table(
        "webhook",
        ("url", "secret_ref", "timeout", "retry_max", "batch_events", "ca_bundle", *_SINK_KEYS),
    )
    return WebhookSettings(
        url=_url(table),
        secret=table.reference("secret_ref"),
        timeout_seconds=table.duration("timeout", "10s", minimum="100ms", maximum="60s"),
        retry_max_seconds=table.duration("retry_max", "5min", minimum="100ms", maximum="1h"),
        batch_events=table.count("batch_events", 100, minimum=1, maximum=BATCH_EVENTS_MAX),
        ca_bundle=table.path("ca_bundle", None) if "ca_bundle" in table else None,
        types=_types(table),
        begin=table.choice("begin", "oldest", ("oldest", "newest")),
    )


def _url(table: Table) -> str:
    # Never shown: such a URL is often a secret itself.
    url = table.text("url", None, allowed=_URL_RULE, pattern=r"https?://[!-~]+", hide_if="")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and not parts.fragment and "@" not in parts.netloc
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[A-Za-z0-9._\-:\[\]]+", parts.netloc):
        raise table.refuse("url", _URL_RULE, hide=True)
    return url


def _types(table: Table) -> tuple[str, ...]:
    types = table.texts("types") if "types" in table else ("*",)
    if not types or not all(types):
        raise table.refuse("types", 'a list of types, or of shell-style patterns such as "v1.package.*"')
    return types
