"""The table [events]: what it means, and that each bad one is refused in one line that shows no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from castore.config import Config, load_config
from castore.errors import ConfigError

WEBHOOK = '[events.webhook]\nurl = "https://hooks.example/in/T0PS3CRET"\nsecret_ref = "env:HOOK"\n'


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "castore.toml"
    path.write_text(f'[backends.local]\ntype = "local"\npath = "objects"\n{text}')
    return load_config(path, {})


def test_without_it(tmp_path: Path) -> None:
    events = load(tmp_path, "").events
    assert (events.keep_seconds, events.sinks) == (90 * 86_400, {})


def test_what_may_be_set(tmp_path: Path) -> None:
    events = load(
        tmp_path,
        f"""
        [events]
        keep = "7d"
        [events.file]
        path = "events.jsonl"
        rotate_bytes = "1MiB"
        rotate_keep = 3
        types = ["v1.package.*"]
        begin = "newest"
        {WEBHOOK}
        timeout = "2s"
        retry_max = "1min"
        batch_events = 7
        ca_bundle = "authorities.pem"
        """,
    ).events
    assert events.keep_seconds == 7 * 86_400
    assert list(events.sinks) == ["file", "webhook"]
    assert events.file is not None
    assert (events.file.path, events.file.rotate_bytes, events.file.rotate_keep) == (
        tmp_path / "events.jsonl",
        1 << 20,
        3,
    )
    assert (events.file.begin, events.file.wants("v1.package.published")) == ("newest", True)
    assert not events.file.wants("v1.storage.location_failed")
    webhook = events.webhook
    assert webhook is not None
    assert (webhook.timeout_seconds, webhook.retry_max_seconds, webhook.batch_events) == (2, 60, 7)
    assert (webhook.ca_bundle, str(webhook.secret)) == (tmp_path / "authorities.pem", "env:HOOK")
    assert (webhook.url, webhook.origin) == ("https://hooks.example/in/T0PS3CRET", "https://hooks.example")
    assert (webhook.begin, webhook.wants("v1.storage.location_failed")) == ("oldest", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[events]\nkeep = "59min"', "events.keep = '59min'"),
        ('[events]\nkept = "90d"', "events.kept = '90d': unknown key; did you mean \"keep\"?"),
        ("[events.file]", "events.file.path is missing"),
        ('[events.file]\npath = "e"\nrotate_bytes = 10', "events.file.rotate_bytes = 10"),
        ('[events.file]\npath = "e"\nrotate_keep = 0', "events.file.rotate_keep = 0"),
        ('[events.file]\npath = "e"\ntypes = []', "events.file.types = []"),
        ('[events.file]\npath = "e"\nbegin = "now"', 'expected one of "oldest", "newest"'),
        ('[events.webhook]\nurl = "https://h/T0PS3CRET"', "events.webhook.secret_ref is missing"),
        (WEBHOOK.replace("env:HOOK", "T0PS3CRET"), "events.webhook.secret_ref: expected"),
        (WEBHOOK.replace("https://", "ftp://"), "events.webhook.url: expected http:// or https://"),
        (WEBHOOK.replace("hooks.example", "me:T0PS3CRET@hooks.example"), "events.webhook.url: expected"),
        (WEBHOOK.replace("hooks.example", "hooks.example:x"), "events.webhook.url: expected"),
        (WEBHOOK.replace("hooks.example", ""), "events.webhook.url: expected"),
        (WEBHOOK.replace("T0PS3CRET", "T0PS3CRET#part"), "events.webhook.url: expected"),
        (WEBHOOK.replace("T0PS3CRET", "T0PS3CRET\\r\\nX: y"), "events.webhook.url: expected"),
        (f'{WEBHOOK}timeout = "61s"', "events.webhook.timeout = '61s'"),
        (f'{WEBHOOK}retry_max = "2h"', "events.webhook.retry_max = '2h'"),
        (f"{WEBHOOK}batch_events = 1001", "events.webhook.batch_events = 1001"),
        (f'{WEBHOOK}secret = "T0PS3CRET"', "events.webhook.secret: unknown key"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert said in message
    assert "T0PS3CRET" not in message
    assert "\n" not in message
