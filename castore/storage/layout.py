"""Digest <-> object key, alike for all backends. docs/FORMAT.md fixes it; a change here is a new format."""

from __future__ import annotations

import re

from castore.digest import Digest

_KEY = re.compile(r"([a-z0-9-]+)/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{64})")


def key_of(digest: Digest) -> str:
    """`<algorithm>/<hex[0:2]>/<hex[2:4]>/<hex>`, to be appended to the backend's own prefix."""
    text = digest.hex
    return f"{digest.algorithm}/{text[:2]}/{text[2:4]}/{text}"


def digest_of(key: str) -> Digest | None:
    """The digest that `key` names, or None when the key is not of this layout."""
    match = _KEY.fullmatch(key)
    if match is None or match[4][:4] != match[2] + match[3]:
        return None
    try:
        return Digest(match[1], bytes.fromhex(match[4]))
    except ValueError:
        return None
