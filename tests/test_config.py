"""Configuration files: what they mean, and that each bad one is refused in one line. Not a test of what settings do."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path

import platformdirs
import pytest

import castore
from castore.config import Config, LocalSettings, S3Settings, VerifySettings, load_config
from castore.config_values import SecretRef
from castore.errors import ConfigError

ROOT = str(Path(castore.__file__).parents[1])
LOCAL = '[backends.local]\ntype = "local"\npath = "objects"\n'
SECRET = "hunter2-WJalrXUtnFEMI/K7MDENG+bPxRfi"
S3 = """
[backends.rgw]
type = "s3"
endpoint_url = "https://rgw.example.internal:8080/"
bucket = "artifacts"
access_key_ref = "env:RGW_ACCESS_KEY"
secret_key_ref = "file:secrets/rgw"
"""


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "castore.toml"
    path.write_text(text)
    return load_config(path, {})


def refused(tmp_path: Path, text: str) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'castore.toml'}: ")
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path / 'castore.toml'}: ")


def test_every_key(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
[store]
state_dir = "/var/lib/castore"
[cache]
dir = "~/cache"
max_bytes = "1.5GiB"
[ingest]
default_retention_class = "short-lived"
publish_wait = "500ms"
sync_wait = "2h"
sweep_after = "0s"
staging_max_bytes = 1000
max_bytes_per_user = "10 MB"
keep_owner = true
[backends.local]
type = "local"
path = "sub/objects"
[backends.rgw]
type = "s3"
endpoint_url = "https://rgw.example:7480"
addressing_style = "virtual"
region = "default"
bucket = "artifacts"
key_prefix = "a/b"
access_key_ref = "env:RGW_ACCESS_KEY"
secret_key_ref = "file:secrets/rgw"
session_token_ref = "env:RGW_TOKEN"
storage_class = "COLD"
sse = "aws:kms"
sse_kms_key_id = "arn:aws:kms:eu-west-1:1:key/a-b"
multipart_threshold_bytes = 33554432
multipart_chunk_bytes = "8MiB"
ca_bundle = "authorities.pem"
connect_timeout = "1500ms"
read_timeout = "1min"
max_connections = 7
transfer = "aioboto3"
block_digest = "sha256"
[routing]
default = "local"
[[routing.rules]]
retention_class = "release"
producer = "ci-*"
backend = "rgw"
copies = ["local"]
[[routing.rules]]
backend = "local"
[verify]
every = "30d"
rate = "1.5MB/s"
backends = ["rgw"]
[http]
listen = "[::]:0"
""",
    )
    assert config.source == tmp_path / "castore.toml"
    assert config.store.state_dir == Path("/var/lib/castore")
    assert config.store.catalog_path == Path("/var/lib/castore/catalog.db")
    assert config.store.control_path == Path("/var/lib/castore/run/control.sock")
    assert (config.cache.dir, config.cache.max_bytes) == (Path.home() / "cache", 3 * 2**29)
    assert config.ingest.default_retention_class == "short-lived"
    assert (config.ingest.publish_wait_seconds, config.ingest.sync_wait_seconds) == (0.5, 7200.0)
    assert (config.ingest.staging_max_bytes, config.ingest.max_bytes_per_user) == (1000, 10_000_000)
    assert config.ingest.keep_owner is True
    assert config.ingest.sweep_after_seconds == 0
    assert config.block_digest == "sha256", "one of the backends wants it"
    assert list(config.backends) == ["local", "rgw"]
    assert config.backends["local"] == LocalSettings("local", tmp_path / "sub/objects")
    assert config.backends["rgw"] == S3Settings(
        backend_id="rgw",
        endpoint_url="https://rgw.example:7480",
        addressing_style="virtual",
        region="default",
        bucket="artifacts",
        key_prefix="a/b",
        access_key_ref=SecretRef("env:RGW_ACCESS_KEY", "backends.rgw.access_key_ref"),
        secret_key_ref=SecretRef("file:secrets/rgw", "backends.rgw.secret_key_ref", tmp_path / "secrets/rgw"),
        session_token_ref=SecretRef("env:RGW_TOKEN", "backends.rgw.session_token_ref"),
        storage_class="COLD",
        sse="aws:kms",
        sse_kms_key_id="arn:aws:kms:eu-west-1:1:key/a-b",
        multipart_threshold_bytes=2**25,
        multipart_chunk_bytes=2**23,
        ca_bundle=tmp_path / "authorities.pem",
        connect_timeout_seconds=1.5,
        read_timeout_seconds=60.0,
        max_connections=7,
        transfer="aioboto3",
        block_digest="sha256",
    )
    assert [settings.backend_type for settings in config.backends.values()] == ["local", "s3"]
    assert config.routing.default == "local"
    assert config.routing.function is None
    first, second = config.routing.rules
    assert (first.retention_class, first.producer, first.backend, first.copies) == (
        "release",
        "ci-*",
        "rgw",
        ("local",),
    )
    assert (second.retention_class, second.producer, second.backend, second.copies) == ("*", "*", "local", ())
    assert config.verify == VerifySettings(30 * 86400.0, 1_500_000, ("rgw",))
    assert (config.http.host, config.http.port) == ("::", 0)


def test_defaults_of_a_file(tmp_path: Path) -> None:
    config = load(tmp_path, LOCAL)
    data = platformdirs.user_data_path("castore", appauthor=False)
    assert config.store.state_dir == data
    assert config.cache.dir == platformdirs.user_cache_path("castore", appauthor=False)
    assert config.cache.max_bytes == 20 * 2**30
    assert config.ingest.default_retention_class == "standard"
    assert (config.ingest.publish_wait_seconds, config.ingest.sync_wait_seconds) == (5.0, 600.0)
    assert (config.ingest.staging_max_bytes, config.ingest.max_bytes_per_user) == (100 * 2**30, 0)
    assert config.ingest.keep_owner is False
    assert config.ingest.sweep_after_seconds == 60
    assert (config.routing.default, config.routing.function, config.routing.rules) == ("local", None, ())
    assert (config.verify.every_seconds, config.verify.bytes_per_s, config.verify.backends) == (0, 20 * 2**20, ())
    assert (config.http.host, config.http.port) == ("127.0.0.1", 8750)


def test_defaults_of_an_s3_backend(tmp_path: Path) -> None:
    settings = load(tmp_path, S3).backends["rgw"]
    assert isinstance(settings, S3Settings)
    assert settings.endpoint_url == "https://rgw.example.internal:8080"
    assert (settings.region, settings.key_prefix, settings.storage_class) == ("us-east-1", "castore", "STANDARD")
    assert (settings.sse, settings.sse_kms_key_id, settings.session_token_ref, settings.ca_bundle) == (None,) * 4
    assert (settings.addressing_style, settings.transfer) == ("path", "native")
    assert settings.block_digest == "xxh3-64"
    assert (settings.connect_timeout_seconds, settings.read_timeout_seconds, settings.max_connections) == (
        5.0,
        30.0,
        64,
    )
    assert (settings.multipart_threshold_bytes, settings.multipart_chunk_bytes) == (2**24, 2**24)


def test_an_s3_backend_without_references_leaves_its_keys_to_the_standard_chain(tmp_path: Path) -> None:
    text = "\n".join(line for line in S3.splitlines() if "_ref" not in line)
    config = load(tmp_path, text)
    settings = config.backends["rgw"]
    assert isinstance(settings, S3Settings)
    assert (settings.access_key_ref, settings.secret_key_ref, settings.references) == (None, None, ())
    config.check_references({})


@pytest.mark.parametrize("host", ["[::1]", "10.1.2.3", "rgw.example.internal", "rgw"])
def test_endpoints(tmp_path: Path, host: str) -> None:
    for place in (f"http://{host}", f"https://{host}:7480"):
        settings = load(tmp_path, S3.replace("https://rgw.example.internal:8080/", place)).backends["rgw"]
        assert isinstance(settings, S3Settings)
        assert settings.endpoint_url == place


def test_values_are_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, LOCAL)
    with pytest.raises(FrozenInstanceError):
        config.store.state_dir = tmp_path  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.backends["other"] = config.backends["local"]  # type: ignore[index]


# (the file, the dotted key in the message, the value in it or "", words that say what is allowed)
BAD = {
    "unknown key": ('[cache]\nmax_byte = "1GiB"\n' + LOCAL, "cache.max_byte", "'1GiB'", 'did you mean "max_bytes"?'),
    "unknown table": ("[stores]\n" + LOCAL, "stores", "(a table)", 'did you mean "store"?'),
    "unknown key, nothing alike": ("[http]\nzzz = 1\n" + LOCAL, "http.zzz", "1", "allowed: listen"),
    "key that needs quotes": ('"a b\\n" = 1\n' + LOCAL, "'a b\\n'", "1", "unknown key"),
    "key of another type": (LOCAL + 'bucket = "b"\n', "backends.local.bucket", "", "allowed: type, path"),
    "table as a value": ('store = "/var"\n' + LOCAL, "store", "'/var'", "a table, [store]"),
    "path that is a number": ("[store]\nstate_dir = 7\n" + LOCAL, "store.state_dir", "7", "a path"),
    "empty path": ('[store]\nstate_dir = ""\n' + LOCAL, "store.state_dir", "''", "a path"),
    "path with a NUL": ('[store]\nstate_dir = "a\\u0000"\n' + LOCAL, "store.state_dir", "'a\\x00'", "a path"),
    "home of nobody": ('[store]\nstate_dir = "~no-such-user/x"\n' + LOCAL, "store.state_dir", "'~no-such", "~ stands"),
    "size without a number": ('[cache]\nmax_bytes = "GiB"\n' + LOCAL, "cache.max_bytes", "'GiB'", '"20GiB"'),
    "size with an unknown unit": ('[cache]\nmax_bytes = "20G"\n' + LOCAL, "cache.max_bytes", "'20G'", "GiB, TiB"),
    "size with a part of a byte": ('[cache]\nmax_bytes = "0.5B"\n' + LOCAL, "cache.max_bytes", "'0.5B'", "of bytes"),
    "negative size": ("[cache]\nmax_bytes = -1\n" + LOCAL, "cache.max_bytes", "-1", "an integer of bytes"),
    "size that is true": ("[cache]\nmax_bytes = true\n" + LOCAL, "cache.max_bytes", "true", "an integer of bytes"),
    "size that is a fraction": ("[cache]\nmax_bytes = 1.5\n" + LOCAL, "cache.max_bytes", "1.5", "an integer of bytes"),
    "size beyond 64 bits": ('[cache]\nmax_bytes = "9000000TiB"\n' + LOCAL, "cache.max_bytes", "'9000000TiB'", "size"),
    "no staging": ("[ingest]\nstaging_max_bytes = 0\n" + LOCAL, "ingest.staging_max_bytes", "0", "from 1 to"),
    "duration without a unit": ("[ingest]\npublish_wait = 5\n" + LOCAL, "ingest.publish_wait", "5", '"5s"'),
    "duration of years": ('[ingest]\nsync_wait = "1y"\n' + LOCAL, "ingest.sync_wait", "'1y'", "ms, s, min, h, d"),
    "publish that waits long": ('[ingest]\npublish_wait = "2min"\n' + LOCAL, "ingest.publish_wait", "'2min'", '"60s"'),
    "flag in words": ('[ingest]\nkeep_owner = "yes"\n' + LOCAL, "ingest.keep_owner", "'yes'", "true or false"),
    "class with a space": (
        '[ingest]\ndefault_retention_class = "a b"\n' + LOCAL,
        "ingest.default_retention_class",
        "'a b'",
        "letters, digits",
    ),
    "no backend": ('[cache]\nmax_bytes = "1GiB"\n', "backends", "is missing", "[backends.local]"),
    "empty backends": ("[backends]\n", "backends", "", "at least one backend"),
    "backend without a type": ('[backends.a]\npath = "/a"\n', "backends.a.type", "is missing", '"local", "s3"'),
    "unknown type": ('[backends.a]\ntype = "locale"\n', "backends.a.type", "'locale'", 'did you mean "local"?'),
    "backend without a path": ('[backends.a]\ntype = "local"\n', "backends.a.path", "is missing", "a path"),
    "backend that is no table": ('[backends]\na = "local"\n', "backends.a", "", "a table, [backends.a]"),
    "list of backends": ('[[backends]]\ntype = "s3"\n', "backends", "", "a table, [backends]"),
    "backend id": ('[backends."a b"]\ntype = "local"\npath = "/a"\n', "backends.'a b'", "", "1 to 64 letters"),
    "endpoint": (S3.replace("https://", "ftp://"), "backends.rgw.endpoint_url", "'ftp://rgw", "https://HOST[:PORT]"),
    "bucket": (S3.replace('"artifacts"', '"a/b"'), "backends.rgw.bucket", "'a/b'", "3 to 63"),
    "key prefix": (S3 + 'key_prefix = "/a"\n', "backends.rgw.key_prefix", "'/a'", "without a slash"),
    "long key prefix": (S3 + f'key_prefix = "{"a" * 513}"\n', "backends.rgw.key_prefix", "aaa...", "up to 512"),
    "sse": (S3 + 'sse = "aes256"\n', "backends.rgw.sse", "'aes256'", '"AES256", "aws:kms"'),
    "key without its id": (
        S3.replace("access_key_ref", "# "),
        "backends.rgw.access_key_ref",
        "is missing",
        "a reference, as secret_key_ref is one",
    ),
    "id without its key": (S3.replace("secret_key_ref", "# "), "backends.rgw.secret_key_ref", "is missing", "AWS"),
    "token alone": (
        S3.replace("access_key_ref", "session_token_ref").replace("secret_key_ref", "# "),
        "backends.rgw.access_key_ref",
        "is missing",
        "as session_token_ref is one",
    ),
    "addressing": (S3 + 'addressing_style = "auto"\n', "backends.rgw.addressing_style", "'auto'", '"path", "virtual"'),
    "address as a host": (
        S3.replace("rgw.example.internal", "10.1.2.3") + 'addressing_style = "virtual"\n',
        "backends.rgw.addressing_style",
        "'virtual'",
        '"path": endpoint_url = "https://10.1.2.3:8080" has an address',
    ),
    "v6 address as a host": (
        S3.replace("rgw.example.internal", "[::1]") + 'addressing_style = "virtual"\n',
        "backends.rgw.addressing_style",
        "'virtual'",
        "has an address, not a name",
    ),
    "bucket that is no host": (
        S3.replace('"artifacts"', '"The.artifacts"') + 'addressing_style = "virtual"\n',
        "backends.rgw.addressing_style",
        "'virtual'",
        'cannot begin with bucket = "The.artifacts"',
    ),
    "kms key without kms": (
        S3 + 'sse = "AES256"\nsse_kms_key_id = "a"\n',
        "backends.rgw.sse_kms_key_id",
        "'a'",
        'sse = "aws:kms" beside it',
    ),
    "kms key": (
        S3 + 'sse = "aws:kms"\nsse_kms_key_id = "a b"\n',
        "backends.rgw.sse_kms_key_id",
        "'a b'",
        "up to 2048 letters",
    ),
    "authorities over http": (
        S3.replace("https://", "http://") + 'ca_bundle = "a.pem"\n',
        "backends.rgw.ca_bundle",
        "'a.pem'",
        "https in endpoint_url",
    ),
    "no time to connect": (S3 + 'connect_timeout = "0s"\n', "backends.rgw.connect_timeout", "'0s'", 'least "100ms"'),
    "long time to connect": (S3 + 'connect_timeout = "31s"\n', "backends.rgw.connect_timeout", "'31s'", 'most "30s"'),
    "bare number of seconds": (S3 + "read_timeout = 5\n", "backends.rgw.read_timeout", "= 5", "a duration such as"),
    "long silence": (S3 + 'read_timeout = "1h"\n', "backends.rgw.read_timeout", "'1h'", 'at most "10min"'),
    "unknown block_digest": (
        '[backends.local]\ntype = "local"\npath = "o"\nblock_digest = "md5"\n',
        "backends.local.block_digest",
        "'md5'",
        'one of "xxh3-64", "sha256"',
    ),
    "unknown transfer": (S3 + 'transfer = "curl"\n', "backends.rgw.transfer", "'curl'", 'one of "native", "aioboto3"'),
    "no connections": (S3 + "max_connections = 0\n", "backends.rgw.max_connections", "= 0", "an integer from 1 to 512"),
    "connections as text": (S3 + 'max_connections = "7"\n', "backends.rgw.max_connections", "'7'", "an integer"),
    "small parts": (S3 + 'multipart_chunk_bytes = "1MiB"\n', "backends.rgw.multipart_chunk_bytes", "'1MiB'", "5242880"),
    "two backends, no default": (LOCAL + S3, "routing.default", "is missing", "one of local, rgw"),
    "unknown default": (
        LOCAL + '[routing]\ndefault = "lokal"\n',
        "routing.default",
        "'lokal'",
        'did you mean "local"?',
    ),
    "rule without a backend": (LOCAL + '[[routing.rules]]\nproducer = "x"\n', "routing.rules[0].backend", "", "id"),
    "unknown backend of a rule": (
        LOCAL + '[[routing.rules]]\nbackend = "local"\n[[routing.rules]]\nbackend = "x"\n',
        "routing.rules[1].backend",
        "'x'",
        "configured backends (local)",
    ),
    "unknown copy": (
        LOCAL + '[[routing.rules]]\nbackend = "local"\ncopies = ["x"]\n',
        "routing.rules[0].copies",
        "['x']",
        "configured backends (local)",
    ),
    "copy of itself": (
        LOCAL + '[[routing.rules]]\nbackend = "local"\ncopies = ["local"]\n',
        "routing.rules[0].copies",
        "['local']",
        "other backends than local",
    ),
    "copies twice": (
        LOCAL + S3 + '[routing]\ndefault = "local"\nrules = [{backend = "local", copies = ["rgw", "rgw"]}]\n',
        "routing.rules[0].copies",
        "['rgw', 'rgw']",
        "each once",
    ),
    "copies in a string": (
        LOCAL + '[[routing.rules]]\nbackend = "local"\ncopies = "local"\n',
        "routing.rules[0].copies",
        "'local'",
        "a list of strings",
    ),
    "unknown key of a rule": (
        LOCAL + '[[routing.rules]]\nbackends = "local"\n',
        "routing.rules[0].backends",
        "'local'",
        'did you mean "backend"?',
    ),
    "rules that are one table": (LOCAL + "[routing.rules]\n", "routing.rules", "(a table)", "[[routing.rules]]"),
    "function": (LOCAL + '[routing]\nfunction = "choose"\n', "routing.function", "'choose'", '"MODULE:NAME"'),
    "function and rules": (
        LOCAL + '[routing]\nfunction = "a:b"\nrules = []\n',
        "routing.function",
        "'a:b'",
        "not both",
    ),
    "schedule without a unit": ('[verify]\nevery = "30"\n' + LOCAL, "verify.every", "'30'", 'such as "5s"'),
    "rate that is a size": ('[verify]\nrate = "20MiB"\n' + LOCAL, "verify.rate", "'20MiB'", '"50MiB/s"'),
    "rate of nothing": ('[verify]\nrate = "0B/s"\n' + LOCAL, "verify.rate", "'0B/s'", '"50MiB/s"'),
    "rate that is a number": ("[verify]\nrate = 20\n" + LOCAL, "verify.rate", "20", '"50MiB/s"'),
    "backend that nobody verifies": ('[verify]\nbackends = ["loca"]\n' + LOCAL, "verify.backends", "loca", "(local)"),
    "listen without a port": ('[http]\nlisten = "localhost"\n' + LOCAL, "http.listen", "'localhost'", '"HOST:PORT"'),
    "port": ('[http]\nlisten = "localhost:65536"\n' + LOCAL, "http.listen", "'localhost:65536'", "0 to 65535"),
    "a date": ("[cache]\nmax_bytes = 2020-01-02\n" + LOCAL, "cache.max_bytes", "2020-01-02", "an integer of bytes"),
    "one place for cache and objects": (
        LOCAL + '[cache]\ndir = "objects"\n',
        "backends.local",
        "objects'",
        "another place than that of cache.dir",
    ),
    "one bucket twice": (
        S3 + S3.replace("backends.rgw", "backends.two") + '[routing]\ndefault = "two"\n',
        "backends.two",
        "artifacts",
        "another place than that of backends.rgw",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_name_key_value_and_what_is_allowed(tmp_path: Path, case: str) -> None:
    text, key, value, allowed = BAD[case]
    message = refused(tmp_path, text)
    assert message.startswith(key)
    assert value in message
    assert allowed in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[store\n", "is not TOML: "),
        (b"[store]\n[store]\n", "is not TOML: "),
        (b"a = '\xff'\n", "is not UTF-8 text"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_not_toml(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "castore.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        S3.replace("env:RGW_ACCESS_KEY", SECRET),
        S3.replace("file:secrets/rgw", SECRET),
        S3.replace("env:RGW_ACCESS_KEY", f"env:{SECRET}"),
        S3.replace('"env:RGW_ACCESS_KEY"', f'["{SECRET}"]'),
        S3.replace('"env:RGW_ACCESS_KEY"', f'{{value = "{SECRET}"}}'),
        S3.replace("env:RGW_ACCESS_KEY", f"file:~{SECRET}"),
        S3.replace("secret_key_ref", "secret_key").replace("file:secrets/rgw", SECRET),
        S3 + f'note = "{SECRET}"\n',
        S3.replace("https://", f"https://user:{SECRET}@"),
        S3.replace('type = "s3"', f'type = "s3"\ncredentials = ["{SECRET}"]'),
        S3.replace("[backends.rgw]", "[[backends]]").replace("env:RGW_ACCESS_KEY", SECRET),
        f'[backends]\nrgw = "{SECRET}"\n',
        f'[http]\ntoken = "{SECRET}"\n' + LOCAL,
        f'secret_key = "{SECRET}"\n' + LOCAL,
        f'[backend.rgw]\nsecret_key = "{SECRET}"\n' + LOCAL,
        f'[[backend]]\nsecret_key = "{SECRET}"\n' + LOCAL,
    ],
)
def test_what_may_be_a_secret_is_never_shown(tmp_path: Path, text: str) -> None:
    assert SECRET in text
    message = refused(tmp_path, text)
    assert SECRET not in message
    assert "hunter2" not in message


def test_references_resolve_at_use(tmp_path: Path) -> None:
    config = load(tmp_path, S3)
    settings = config.backends["rgw"]
    assert isinstance(settings, S3Settings)
    assert settings.access_key_ref is not None
    assert settings.secret_key_ref is not None
    (tmp_path / "secrets").mkdir()
    for line_break in ("", "\n", "\r\n"):
        (tmp_path / "secrets/rgw").write_bytes(f"{SECRET}{line_break}".encode())
        assert settings.secret_key_ref.resolve({}) == SECRET
    assert settings.access_key_ref.resolve({"RGW_ACCESS_KEY": SECRET}) == SECRET
    config.check_references({"RGW_ACCESS_KEY": SECRET})
    for text in (repr(config), str(config), str(settings.access_key_ref), f"{settings.secret_key_ref}"):
        assert SECRET not in text
    assert str(settings.access_key_ref) == "env:RGW_ACCESS_KEY"


@pytest.mark.parametrize(
    ("content", "environ", "words"),
    [
        (
            b"x",
            {},
            "backends.rgw.access_key_ref: cannot resolve env:RGW_ACCESS_KEY: the environment variable is not set",
        ),
        (b"x", {"RGW_ACCESS_KEY": ""}, "the environment variable is empty"),
        (None, {"RGW_ACCESS_KEY": "x"}, "backends.rgw.secret_key_ref: cannot resolve file:secrets/rgw: no such file"),
        (b"", {"RGW_ACCESS_KEY": "x"}, "the file is empty"),
        (b"\n", {"RGW_ACCESS_KEY": "x"}, "the file is empty"),
        (f"{SECRET}\n{SECRET}\n".encode(), {"RGW_ACCESS_KEY": "x"}, "the file has more than one line"),
        (SECRET.encode() + b"\xff", {"RGW_ACCESS_KEY": "x"}, "the file is not UTF-8 text"),
        (SECRET.encode() * 4096, {"RGW_ACCESS_KEY": "x"}, "the file is longer than 65536 bytes"),
    ],
)
def test_references_that_do_not_resolve(
    tmp_path: Path, content: bytes | None, environ: dict[str, str], words: str
) -> None:
    config = load(tmp_path, S3)
    if content is not None:
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets/rgw").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.check_references(environ)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    # Nothing that a traceback could print holds it either.
    link: BaseException | None = caught.value
    while link is not None:
        assert SECRET not in repr(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def test_order_of_files(tmp_path: Path) -> None:
    """Explicit, then the variable, then the user's file; never the working directory's."""
    for name in ("explicit", "variable", "home/castore/castore", "work/castore"):
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'[store]\nstate_dir = "/{name}"\n{LOCAL}')

    def state_dir(arguments: list[str], **environ: str) -> str:
        code = (
            "import sys; from pathlib import Path; from castore.config import load_config\n"
            "print(load_config(*map(Path, sys.argv[1:])).store.state_dir)"
        )
        child = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path / "work",
            env={**os.environ, "PYTHONPATH": ROOT, "XDG_DATA_HOME": str(tmp_path / "data"), **environ},
            capture_output=True,
            text=True,
            check=True,
        )
        return child.stdout.strip()

    home, variable = str(tmp_path / "home"), str(tmp_path / "variable.toml")
    assert state_dir(["../explicit.toml"], CASTORE_CONFIG=variable, XDG_CONFIG_HOME=home) == "/explicit"
    assert state_dir([], CASTORE_CONFIG=variable, XDG_CONFIG_HOME=home) == "/variable"
    assert state_dir([], CASTORE_CONFIG="", XDG_CONFIG_HOME=home) == "/home/castore/castore"


def test_without_a_file(tmp_path: Path) -> None:
    code = (
        "from castore.config import load_config\n"
        "c = load_config()\n"
        "print(c.source, c.store.state_dir, c.cache.dir, c.backends['local'].path, c.routing.default)"
    )
    homes = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("CONFIG", "DATA", "CACHE")}
    environ = (
        {key: value for key, value in os.environ.items() if key != "CASTORE_CONFIG"} | homes | {"PYTHONPATH": ROOT}
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    data, cache = tmp_path / "DATA/castore", tmp_path / "CACHE/castore"
    assert child.stdout == f"None {data} {cache} {data}/objects local\n"
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read: No such file or directory"):
        load_config(missing, {})
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read"):
        load_config(None, {"CASTORE_CONFIG": str(missing)})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path, {})


def test_home_of_another_user(tmp_path: Path) -> None:
    config = load(tmp_path, '[store]\nstate_dir = "~root/x"\n' + LOCAL)
    assert config.store.state_dir == Path(pwd.getpwnam("root").pw_dir) / "x"


def test_the_example_of_a_message(tmp_path: Path) -> None:
    assert refused(tmp_path, '[cache]\nmax_bytes = "20G"\n' + LOCAL) == (
        "cache.max_bytes = '20G': expected an integer of bytes, or a size such as \"20GiB\" "
        "(B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)"
    )


def test_tomllib_is_what_reads_the_cases() -> None:
    """A case that is not TOML would prove nothing."""
    for text, *_ in BAD.values():
        tomllib.loads(text)
