"""`castore init`: make a configuration, a state directory, a catalog and the place of each backend. Mounts nothing.

What is there is kept, so it can be run again at any time; even `--force` sets a configuration aside, and deletes none.
"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.output import print_columns, print_json, printable
from castore.cli.progress import of_pages, progress
from castore.cli.session import Session, common_options, json_option
from castore.errors import CastoreError, ConfigError, StateError, StorageError

if TYPE_CHECKING:
    from castore.config import Config

_TEMPLATE: Final = """\
# The settings of a castore store. What is commented out shows the default.
# Sizes are integers of bytes or texts such as "20GiB", durations are texts such as "5s".
# Relative paths start at the folder of this file; ~ is the home directory.

[store]
state_dir = {state_dir}

[cache]
dir = {cache_dir}
# max_bytes = "20GiB"             # what the blocks of blobs kept there may take; 0: none are kept
# same_disk = false               # whether to keep blocks of local backends on the same file system, too
# seed = true                     # whether what is published goes there at once: small files, and those of up to 8 MiB
# tiny_bytes = "8KiB"             # blobs up to this size are kept in state_dir/tiny.db instead; 0: they are not
# tiny_max_bytes = "1GiB"         # what that may take
# prefetch_siblings = true        # whether small files are fetched ahead of who reads a directory file by file

[ingest]
# default_retention_class = "standard"
# publish_wait = "5s"             # how long a publish by rename waits for what is not stored yet
# sync_wait = "10min"             # how long fsync of an ingest directory waits for the same
# staging_max_bytes = "100GiB"    # what all users together may have staged
# max_bytes_per_user = 0          # what one user may have staged; 0: no bound of its own
# keep_owner = false              # whether published files keep the owner and group they had
# expire_after = "0s"             # report versions in which nothing changed for so long, such as "720h"; "0s": none
# sweep_after = "60s"             # how long after a mount what broken puts left is removed first; then every hour

[backends.local]
type = "local"
path = {objects_dir}
# block_digest = "xxh3-64"        # "sha256" for a backend that is not trusted: of any type, and for all that comes in

# [backends.remote]
# type = "s3"
# endpoint_url = "https://s3.example.internal"
# addressing_style = "path"                           # or "virtual": the bucket begins the host's name
# region = "us-east-1"
# bucket = "artifacts"
# key_prefix = "castore"
# access_key_ref = "env:CASTORE_ACCESS_KEY"            # env:NAME or file:PATH, never the key itself
# secret_key_ref = "file:/run/secrets/castore_secret_key"  # without both: the credential chain of the AWS tools
# session_token_ref = "file:/run/secrets/castore_token"    # for keys that come with one
# storage_class = "STANDARD"
# sse = "aws:kms"                                     # or "AES256"; by default none
# sse_kms_key_id = "alias/castore"                    # with "aws:kms" alone; by default the server's own
# multipart_threshold_bytes = "16MiB"
# multipart_chunk_bytes = "16MiB"
# ca_bundle = "/etc/castore/authorities.pem"          # to trust instead of the host's
# connect_timeout = "5s"
# read_timeout = "30s"                                # silence that ends a request
# max_connections = 64
# transfer = "native"                                 # or "aioboto3": everything by the client library
# block_digest = "xxh3-64"                            # or "sha256", as above

[routing]
default = "local"
# function = "site_rules:choose"  # (retention_class, producer) -> backend id, instead of rules
# [[routing.rules]]               # the first match wins; shell-style patterns
# retention_class = "release"
# producer = "ci-*"
# backend = "remote"
# copies = ["local"]              # further backends, put before publish returns

[verify]
# every = "0s"                    # the mount re-reads what was not verified for so long, such as "30d"; "0s": nothing
# rate = "20MiB/s"                # at most so much in a second, and after those who read
# backends = []                   # only these; none named: all

[retention]
# restore_within = "7d"           # a deleted package can be restored for so long; garbage collection removes it then
# orphans_after = "1d"            # objects that nothing needs are kept for so long after they were stored
# [[retention.rules]]             # for `castore retention apply`; the first match wins, without one all is kept
# retention_class = "nightly"     # shell-style patterns: retention_class, name, producer
# keep_for = "90d"
# keep_last = 5                   # of each NAME, whatever their age
# [[retention.rules]]
# retention_class = "release"
# keep = "forever"

[http]
# listen = "127.0.0.1:8750"

[events]
# keep = "90d"                    # how long events stay in the catalog

# [events.file]                   # deliver events to a file, one JSON document in a line
# path = "/var/log/castore/events.jsonl"
# rotate_bytes = "64MiB"          # then it is set aside as events.jsonl.1, and so on
# rotate_keep = 8                 # how many of those are kept
# types = ["*"]                   # shell-style patterns of the types wanted
# begin = "oldest"                # where a new one begins: with all that is kept, or "newest": with what comes

# [events.webhook]                # deliver events by HTTP
# url = "https://hooks.example.internal/castore"
# secret_ref = "file:/run/secrets/castore_webhook"     # env:NAME or file:PATH, never the secret itself
# types = ["v1.package.*", "v1.storage.location_failed"]
# begin = "oldest"
# timeout = "10s"                 # for one attempt
# retry_max = "5min"              # the longest wait between two attempts
# batch_events = 100              # events in one request, at most
# ca_bundle = "/etc/castore/authorities.pem"          # to trust instead of the host's

# [follow]                        # for `castore mount --follow URL`: the keys of a replica in S3
# access_key_ref = "env:CASTORE_REPLICA_KEY"           # env:NAME or file:PATH, never the key itself
# secret_key_ref = "file:/run/secrets/castore_replica_key"  # without both: the environment's, as litestream reads it
# session_token_ref = "file:/run/secrets/castore_replica_token"  # for keys that come with one
"""


@click.command("init")
@click.option(
    "--state-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep everything of a new store below DIR: catalog, cache and objects.",
)
@click.option(
    "--force", is_flag=True, help="Write a new configuration even if there is one; the old one is kept as .old."
)
@json_option
@common_options
@click.pass_obj
def command(session: Session, state_dir: Path | None, force: bool, as_json: bool) -> None:
    """Write a commented castore.toml and create the catalog.

    It makes the place of each backend, too: a folder or a bucket. Run again, it creates what is missing and says what
    is there. A backend that cannot be made keeps nothing else from being made.

    Example: castore init --state-dir ~/castore-demo
    """
    from castore.config import find_config, load_config, user_config_path

    steps: list[dict[str, Any]] = []
    config_path = find_config(session.config_path, os.environ) or user_config_path().absolute()
    fresh = force or not os.path.lexists(config_path)
    if fresh:
        data = _new_file(config_path, state_dir.expanduser().absolute() if state_dir else None)
        if os.path.lexists(config_path):
            steps.append(_step("former configuration", _set_aside(config_path), True))
        _write_new(config_path, data)
    steps.append(_step("configuration", config_path, fresh))
    config = load_config(config_path)
    if state_dir is not None:
        _check_state_dir(config, state_dir)

    made, errors = make_store(config)
    steps += made
    if as_json:
        print_json({"config": str(config_path), "state_dir": str(config.store.state_dir), "steps": steps})
    else:
        print_columns((_state_of(step), step["what"], printable(step["path"])) for step in steps)
    if errors:
        raise errors[0] if len(errors) == 1 else StorageError("; ".join(map(str, errors)))


def make_store(config: Config) -> tuple[list[dict[str, Any]], list[CastoreError]]:
    """Create what is missing of a store: its folder, the catalog and each backend's place; each step, and what failed.

    Raises StateError when the folder or the catalog cannot be made.
    """
    import trio

    from castore.catalog.connection import create_catalog
    from castore.storage.open import create_backend

    store = config.store
    steps = [_step("state directory", store.state_dir, _make_folder(store.state_dir))]
    steps.append(_step("catalog", store.catalog_path, not store.catalog_path.exists()))
    with progress("copying the catalog, to bring it up to date then") as show:
        before = create_catalog(store.catalog_path, of_pages(show))
    if before is not None:
        steps.append(_step("catalog as it was before its upgrade", before, True))
    errors: list[CastoreError] = []
    for backend_id, settings in config.backends.items():
        step = _step(f"backend {backend_id}", settings.place, False)
        steps.append(step)
        try:
            step["created"] = trio.run(create_backend, settings)
        except (StorageError, ConfigError) as exc:
            step["error"] = str(exc)
            errors.append(exc)
    return steps, errors


def _step(what: str, path: Path | str, created: bool) -> dict[str, Any]:
    return {"what": what, "path": str(path), "created": created, "error": None}


def _state_of(step: Mapping[str, Any]) -> str:
    if step["error"] is not None:
        return "failed"
    return "created" if step["created"] else "exists"


def template(state_dir: Path | None) -> str:
    """The text of a new castore.toml: with everything below `state_dir`, or in the user's folders when it is None."""
    from castore.config import default_cache_dir, default_state_dir

    state = state_dir or default_state_dir()
    cache = state_dir / "cache" if state_dir else default_cache_dir()
    paths: Mapping[str, Path] = {"state_dir": state, "cache_dir": cache, "objects_dir": state / "objects"}
    return _TEMPLATE.format_map({name: _toml_string(path) for name, path in paths.items()})


def _toml_string(path: Path) -> str:
    # A JSON string is a TOML basic string, except that TOML wants DEL escaped, too.
    return json.dumps(str(path), ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_state_dir(config: Config, wanted: Path) -> None:
    if config.store.state_dir != wanted.expanduser().absolute():
        raise ConfigError(
            f"{config.source}: store.state_dir is {config.store.state_dir} already; "
            "give another --config, or --force to replace that file"
        )


def _set_aside(path: Path) -> Path:
    """Rename a file to a name beside it that is free, and return that."""
    number = 0
    while os.path.lexists(kept := path.with_name(f"{path.name}.old{number or ''}")):
        number += 1
    path.rename(kept)
    return kept


def _new_file(path: Path, state_dir: Path | None) -> bytes:
    """What to write to `path`, proved to be right before anything changes. Raises ConfigError."""
    from castore.config import parse_config

    text = template(state_dir)
    try:
        data = text.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{path}: would hold a path that is not UTF-8, which TOML does not allow") from exc
    parse_config(tomllib.loads(text), source=path)
    return data


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet: whole or not at all, and durably."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(descriptor, 0o644)  # It holds references to secrets, no secrets.
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
            os.link(temporary, path)  # Unlike a rename, it never replaces a file that came meanwhile.
        finally:
            Path(temporary).unlink()
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be written: {exc.strerror}") from exc


def _make_folder(path: Path) -> bool:
    """Make a folder that only its owner may enter, and what is missing above it; whether it was not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except FileExistsError as exc:
        if not path.is_dir():
            raise StateError(f"{exc.filename}: is not a directory") from exc
        return False
    except OSError as exc:
        raise StateError(f"{path}: cannot be created: {exc.strerror}") from exc
    return True
