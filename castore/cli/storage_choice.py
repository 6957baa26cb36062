"""What a storage command is to look at, as its options say: backends, packages, paths, digests, parts. Reads nothing
but the catalog.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import click

from castore.cli.completing import BACKEND_OR_TYPE, REF
from castore.config_values import (
    DURATION_RULE,
    RATE_RULE,
    SIZE_RULE,
    parse_duration,
    parse_rate,
    parse_size,
)
from castore.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from castore.catalog.scrub import Choice, ScrubReader
    from castore.config import BackendSettings, Config
    from castore.verify.shard import Shard

T = TypeVar("T")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
_NS = 10**9


def choose_backends(config: Config, names: tuple[str, ...]) -> dict[str, BackendSettings]:
    """The backends that `--backend` names, by id or else by type; all when it is not given. Raises ConfigError."""
    if not names:
        return dict(config.backends)
    chosen: dict[str, BackendSettings] = {}
    for name in names:
        by_id = {key: settings for key, settings in config.backends.items() if key == name}
        by_type = {key: settings for key, settings in config.backends.items() if settings.backend_type == name}
        if not by_id and not by_type:
            known = ", ".join(f"{key} ({settings.backend_type})" for key, settings in config.backends.items())
            raise ConfigError(f"--backend {name}: no such backend is configured; there are {known}")
        chosen |= by_id or by_type
    return chosen


def backend_option(command: Decorated) -> Decorated:
    """`--backend`, as `names`."""
    return click.option(
        "--backend",
        "names",
        metavar="ID_OR_TYPE",
        type=BACKEND_OR_TYPE,
        multiple=True,
        help="Only this backend, or all backends of this type; may be repeated.  [default: all]",
    )(command)


def _parsed(parse: Callable[[str], T], rule: str) -> Callable[[click.Context, click.Parameter, str | None], T | None]:
    def callback(_context: click.Context, _parameter: click.Parameter, value: str | None) -> T | None:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as exc:
            raise click.BadParameter(f"{value!r}: expected {rule}") from exc

    return callback


def _parse_shard(context: click.Context, parameter: click.Parameter, value: str | None) -> Shard | None:
    from castore.verify.shard import SHARD_RULE, Shard

    return _parsed(Shard.parse, SHARD_RULE)(context, parameter, value)


def _parse_part(context: click.Context, parameter: click.Parameter, value: str | None) -> Fraction | None:
    from castore.verify.sample import SAMPLE_RULE, parse_part

    return _parsed(parse_part, SAMPLE_RULE)(context, parameter, value)


def _positive_size(text: str) -> int:
    # As in the configuration, where bytes are a bare integer.
    size = int(text) if text.isdecimal() else parse_size(text)
    if not size:
        raise ValueError("nothing")
    return size


def _positive_duration(text: str) -> float:
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError("no time")
    return seconds


def choice_options(command: Decorated) -> Decorated:
    """`--package`, `--path`, `--digest`, `--older-than`, `--sample` and `--shard`, for `Choosing`."""
    options = (
        click.option("--package", "refs", metavar="REF", type=REF, multiple=True, help="Only what this package needs."),
        click.option(
            "--path",
            "paths",
            metavar="NAME/VERSION/PATH",
            type=REF,
            multiple=True,
            help="Only this file, or the files below this directory.",
        ),
        click.option("--digest", "digests", metavar="DIGEST", multiple=True, help="Only this blob or manifest."),
        click.option(
            "--older-than",
            metavar="DURATION",
            callback=_parsed(_positive_duration, DURATION_RULE),
            help="Only what was not verified for so long, such as 30d.",
        ),
        click.option(
            "--sample",
            "part",
            metavar="PERCENT",
            callback=_parse_part,
            help="Only about so much of it, such as 1%, drawn anew in each run.",
        ),
        click.option(
            "--shard",
            metavar="I/N",
            callback=_parse_shard,
            help="Only part I of N equal parts, the first being 1/N: for N hosts that share the work.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def limit_options(command: Decorated) -> Decorated:
    """`--time-limit`, `--max-bytes` and `--rate`."""
    options = (
        click.option(
            "--time-limit",
            metavar="DURATION",
            callback=_parsed(_positive_duration, DURATION_RULE),
            help="Begin no object after so long, such as 5h.",
        ),
        click.option(
            "--max-bytes",
            metavar="SIZE",
            callback=_parsed(_positive_size, SIZE_RULE),
            help="Read no more than so much, such as 500GiB.",
        ),
        click.option(
            "--rate",
            metavar="SIZE/s",
            callback=_parsed(parse_rate, RATE_RULE),
            help="Read no faster than this, such as 50MiB/s.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def make_choice(
    reader: ScrubReader,
    *,
    refs: tuple[str, ...],
    paths: tuple[str, ...],
    digests: tuple[str, ...],
    older_than: float | None,
    part: Fraction | None,
    shard: Shard | None,
) -> Choice:
    """The locations that the options of `choice_options` mean.

    What `refs`, `paths` and `digests` name is looked at together; the others leave some of it out. Raises NotFound for
    what is not published or not known, and InvalidName for what no package is called.
    """
    from castore.catalog.scrub import EVERYTHING, Choice
    from castore.verify.sample import draw

    named: array[int] | None = None
    if refs or paths or digests:
        named = array("q")
        for ref in refs:
            named.extend(_blobs_of_package(reader, ref))
        for path in paths:
            named.extend(_blobs_of_path(reader, path))
        named.extend(_blob_of_digest(reader, digest) for digest in digests)
    return Choice(
        within=EVERYTHING.within if shard is None else shard.digests,
        drawn=EVERYTHING.drawn if part is None else draw(part),
        verified_before_ns=(
            # Never below 1: what was never verified, at 0, is older than any time.
            EVERYTHING.verified_before_ns if older_than is None else max(1, time.time_ns() - int(older_than * _NS))
        ),
        blob_ids=named,
    )


def _blobs_of_package(reader: ScrubReader, ref: str) -> array[int]:
    from castore.registry.names import parse_ref

    package = reader.package(*parse_ref(ref, allow_latest=True))
    if package is None:
        raise NotFound(f"--package {ref}: no such package is published")
    blob_ids = reader.blobs_below(package.root_id)
    manifest = reader.blob_by_digest(package.manifest_digest)
    if manifest is not None:
        blob_ids.append(manifest.blob_id)
    return blob_ids


def _blobs_of_path(reader: ScrubReader, path: str) -> array[int]:
    from castore.catalog.records import Kind
    from castore.registry.names import parse_ref

    name, _, rest = path.strip("/").partition("/")
    version, _, inside = rest.partition("/")
    package = reader.package(*parse_ref(f"{name}/{version}", allow_latest=True))
    if package is None:
        raise NotFound(f"--path {path}: {name}/{version} is not published")
    entry = reader.entry(package.root_id)
    for part in os.fsencode(inside).split(b"/"):
        if part and entry is not None:
            entry = reader.lookup(entry.inode, part)
    if entry is None:
        raise NotFound(f"--path {path}: no such file or directory in {package.ref}")
    if entry.kind is Kind.SYMLINK:
        raise NotFound(f"--path {path}: is a symbolic link; name what it leads to")
    return array("q", [entry.blob_id]) if entry.kind is Kind.FILE else reader.blobs_below(entry.inode)


def _blob_of_digest(reader: ScrubReader, text: str) -> int:
    from castore.digest import PRIMARY_ALGORITHM, Digest

    try:
        digest = Digest.parse(text if ":" in text else f"{PRIMARY_ALGORITHM}:{text}")
    except ValueError as exc:
        raise ConfigError(f"--digest {text}: expected a digest such as sha256: and 64 hexadecimal digits") from exc
    blob = reader.blob_by_digest(digest)
    if blob is None:
        raise NotFound(f"--digest {text}: the catalog knows no such blob")
    return blob.blob_id
