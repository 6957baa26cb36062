"""The rule for NAME, VERSION and the reference NAME/VERSION. Looks nothing up."""

from __future__ import annotations

import re
from typing import Final

from castore.errors import InvalidName

NAME_RULE: Final = "1 to 128 of A-Z a-z 0-9 . _ + : @ ~ -, the first a letter, a digit or @"
LATEST: Final = "latest"
"""Below `packages/NAME` the link to the version published last, hence no VERSION."""

_NAME = re.compile(rb"[A-Za-z0-9@][A-Za-z0-9._+:@~-]{0,127}")


def is_valid_name(name: bytes) -> bool:
    """Whether a directory below `ingest/` may be so named."""
    return _NAME.fullmatch(name) is not None


def is_valid_version(version: bytes) -> bool:
    """Whether a directory below `ingest/NAME/` may be so named: as a NAME, but not `latest`."""
    return version != LATEST.encode() and is_valid_name(version)


def parse_ref(text: str, *, allow_latest: bool = False) -> tuple[str, str]:
    """The NAME and the VERSION of a reference; `allow_latest` lets `latest` stand for a version.

    Raises InvalidName, which says what is allowed.
    """
    name, slash, version = text.partition("/")
    if not slash:
        raise InvalidName(f"{text!r} is not a package reference: expected NAME/VERSION, for example zlib/1.3")
    # surrogatepass: an argument that is not UTF-8 is refused by the rule below, not by the codec.
    if not is_valid_name(name.encode(errors="surrogatepass")):
        raise InvalidName(f"{text!r}: {name!r} is not a NAME: expected {NAME_RULE}")
    if version == LATEST and not allow_latest:
        raise InvalidName(f"{text!r}: {LATEST} is the link to the version published last: expected a VERSION")
    if not is_valid_name(version.encode(errors="surrogatepass")):
        raise InvalidName(f"{text!r}: {version!r} is not a VERSION: expected {NAME_RULE}")
    return name, version
