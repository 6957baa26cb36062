"""Values in a configuration file: sizes, durations, paths, secret references, and a reader of one table.

Knows nothing of which settings exist: that is `castore.config`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from castore.errors import ConfigError

_SIZE_UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_DURATION_UNITS: Final = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", re.ASCII)

SIZE_RULE: Final = 'an integer of bytes, or a size such as "20GiB" (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)'
RATE_RULE: Final = 'a size in a second such as "50MiB/s" (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)'
DURATION_RULE: Final = 'a duration such as "5s" (ms, s, min, h, d)'
REFERENCE_RULE: Final = '"env:NAME" or "file:PATH": a reference to the secret, never the secret itself'

MAX_SIZE_BYTES: Final = 2**63 - 1
"""The largest size that SQLite and the kernel can hold."""

_SECRET_FILE_MAX_BYTES: Final = 64 * 1024
"""A secret is a line, not a disk image: this bounds what a wrong path makes us read."""
_SHOWN_CHARACTERS: Final = 100
_SECRETIVE = re.compile(r"key|secret|token|pass|auth|credential", re.IGNORECASE)
"""Unknown keys with such names may hold a secret by mistake: their values are not shown."""
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes that a text such as `20GiB` or `1.5 MB` means. Raises ValueError for anything else.

    The result is a whole number from 0 to `MAX_SIZE_BYTES`; units are case-sensitive.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in _SIZE_UNITS:
        raise ValueError("not a size")
    size = Fraction(match[1]) * _SIZE_UNITS[match[2]]
    if size.denominator != 1 or size > MAX_SIZE_BYTES:
        raise ValueError("not a whole number of bytes below 2**63")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds that a text such as `500ms` or `10min` means. Raises ValueError for anything else."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in _DURATION_UNITS:
        raise ValueError("not a duration")
    return float(Fraction(match[1]) * _DURATION_UNITS[match[2]])


def parse_rate(text: str) -> int:
    """Bytes in a second that a text such as `50MiB/s` means, 1 at least. Raises ValueError for anything else."""
    rate = parse_size(text.removesuffix("/s"))
    if not text.endswith("/s") or not rate:
        raise ValueError("not a rate")
    return rate


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean "X"?` for a near miss, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


@dataclass(frozen=True, slots=True)
class SecretRef:
    """A reference to a secret, `env:NAME` or `file:PATH`. Holds no secret, so its `repr` and `str` are safe.

    `key` is the dotted key it was set under; `file` is the file to read, None for an `env:` reference.
    """

    reference: str
    key: str
    file: Path | None = None

    def resolve(self, environ: Mapping[str, str] | None = None) -> str:
        """The secret, read anew at each call; the caller neither logs nor keeps it.

        One line break at the end of a file is dropped. Raises ConfigError, which names the key and the reference
        and never the content, when the variable or the file is missing, empty, unreadable or not a line of text.
        """
        if self.file is None:
            variables = os.environ if environ is None else environ
            name = self.reference.removeprefix("env:")
            if not variables.get(name):
                raise self._unresolvable(f"the environment variable is {'empty' if name in variables else 'not set'}")
            return variables[name]
        try:
            with self.file.open("rb") as stream:
                raw = stream.read(_SECRET_FILE_MAX_BYTES + 1)
        except OSError as exc:
            raise self._unresolvable(str(exc.strerror).lower()) from exc
        if len(raw) > _SECRET_FILE_MAX_BYTES:
            raise self._unresolvable(f"the file is longer than {_SECRET_FILE_MAX_BYTES} bytes")
        try:
            secret = raw.decode()
        except UnicodeDecodeError:
            # `from None`: the exception would carry the bytes.
            raise self._unresolvable("the file is not UTF-8 text") from None
        secret = secret.removesuffix("\n").removesuffix("\r")
        if not secret or "\n" in secret:
            raise self._unresolvable("the file is empty" if not secret else "the file has more than one line")
        return secret

    def _unresolvable(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.key}: cannot resolve {self.reference}: {reason}")

    def __str__(self) -> str:
        return self.reference


class Table:
    """One table of a configuration file, read key by key. Every refusal is a ConfigError of one line.

    `name` is the table's dotted key, empty for the top; `file` is where the values come from, and what relative
    paths are relative to. Keys outside `known` are refused at once, without their value where that may be a secret.
    """

    def __init__(
        self, values: Mapping[str, Any], *, name: str, file: Path, known: Sequence[str], secret: bool = False
    ) -> None:
        self._values = values
        self._name = name
        self._file = file
        for key, value in values.items():
            if key not in known:
                shown = "" if secret or _SECRETIVE.search(key) else f" = {_show(value)}"
                raise ConfigError(
                    f"{file}: {self.dotted(key)}{shown}: unknown key{suggestion(key, known)}; "
                    f"allowed: {', '.join(known)}"
                )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def dotted(self, key: str) -> str:
        """The full name of a key, as messages write it; what is not a bare key is quoted."""
        shown = key if re.fullmatch(r"[A-Za-z0-9_-]+", key, re.ASCII) else _show(key)
        return f"{self._name}.{shown}" if self._name else shown

    def refuse(self, key: str, allowed: str, *, hide: bool = False) -> ConfigError:
        """The error for a key's value that is not `allowed`; `hide` keeps the value out of it."""
        shown = "" if hide or key not in self._values else f" = {_show(self._values[key])}"
        return ConfigError(f"{self._file}: {self.dotted(key)}{shown}: expected {allowed}")

    def missing(self, key: str, allowed: str) -> ConfigError:
        """The error for a key that has to be there."""
        return ConfigError(f"{self._file}: {self.dotted(key)} is missing: expected {allowed}")

    def text(
        self,
        key: str,
        default: str | None,
        *,
        allowed: str,
        pattern: str = r"[^\x00-\x1f\x7f]+",
        hide_if: str | None = None,
    ) -> str:
        """A string that matches `pattern` as a whole; `allowed` says so in words. Without a default it is required.

        A refused value that contains `hide_if` is not shown; with an empty `hide_if` none is.
        """
        if key not in self._values:
            if default is None:
                raise self.missing(key, allowed)
            return default
        value = self._values[key]
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise self.refuse(key, allowed, hide=hide_if is not None and hide_if in str(value))
        return value

    def choice(self, key: str, default: str | None, choices: Sequence[str]) -> str:
        """One of a few words."""
        allowed = "one of " + ", ".join(f'"{choice}"' for choice in choices)
        value = self.text(key, default, allowed=allowed)
        if value not in choices:
            raise self.refuse(key, allowed + suggestion(value, choices))
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """`true` or `false`."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def size(self, key: str, default: int, *, minimum: int = 0, maximum: int = MAX_SIZE_BYTES) -> int:
        """Bytes from `minimum` to `maximum`."""
        value = self._values.get(key, default)
        bounds = "" if (minimum, maximum) == (0, MAX_SIZE_BYTES) else f", from {minimum} to {maximum} bytes"
        try:
            size = parse_size(value) if isinstance(value, str) else value
        except ValueError:
            size = None
        if not isinstance(size, int) or isinstance(size, bool) or not minimum <= size <= maximum:
            raise self.refuse(key, SIZE_RULE + bounds)
        return size

    def rate(self, key: str, default: int) -> int:
        """Bytes in a second, 1 at least."""
        if key not in self._values:
            return default
        value = self._values[key]
        try:
            if isinstance(value, str):
                return parse_rate(value)
        except ValueError:
            pass  # as any other value that is none
        raise self.refuse(key, RATE_RULE)

    def duration(self, key: str, default: str, *, minimum: str = "0s", maximum: str) -> float:
        """Seconds from `minimum` to `maximum`, themselves written as durations."""
        value = self._values.get(key, default)
        try:
            seconds = parse_duration(value) if isinstance(value, str) else None
        except ValueError:
            seconds = None
        least = parse_duration(minimum)
        if seconds is None or not least <= seconds <= parse_duration(maximum):
            at_least = f', at least "{minimum}"' if least else ""
            raise self.refuse(key, f'{DURATION_RULE}{at_least}, at most "{maximum}"')
        return seconds

    def count(self, key: str, default: int, *, minimum: int, maximum: int) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.refuse(key, f"an integer from {minimum} to {maximum}")
        return value

    def path(self, key: str, default: Path | None) -> Path:
        """An absolute path; a relative one starts at the folder of the file, `~` is the home directory."""
        if key not in self._values and default is not None:
            return default
        value = self.text(key, None, allowed="a path")
        return self._absolute(key, value)

    def reference(self, key: str) -> SecretRef:
        """A reference to a secret. A value of any other form is refused without being shown: it may be the secret."""
        value = self.text(key, None, allowed=REFERENCE_RULE, hide_if="")
        kind, _, target = value.partition(":")
        if kind == "env" and _ENVIRONMENT_NAME.fullmatch(target):
            return SecretRef(value, self.dotted(key))
        if kind == "file" and target:
            return SecretRef(value, self.dotted(key), self._absolute(key, target, hide=True))
        raise self.refuse(key, REFERENCE_RULE, hide=True)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, by default empty."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refuse(key, "a list of strings")
        return tuple(value)

    def table(self, key: str, known: Sequence[str] | None = None, *, secret: bool = False) -> Table:
        """The table below `key`, by default empty. Without `known` its keys are names of the user's own."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, f"a table, [{self.dotted(key)}]", hide=secret)
        names = tuple(value) if known is None else known
        return Table(value, name=self.dotted(key), file=self._file, known=names, secret=secret)

    def tables(self, key: str, known: Sequence[str]) -> tuple[Table, ...]:
        """The tables written `[[key]]`, by default none. The first is named `key[0]`."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.refuse(key, f"tables, each written [[{self.dotted(key)}]]")
        return tuple(
            Table(item, name=f"{self.dotted(key)}[{index}]", file=self._file, known=known)
            for index, item in enumerate(value)
        )

    def names(self) -> tuple[str, ...]:
        """The keys that are set, in the order of the file."""
        return tuple(self._values)

    def _absolute(self, key: str, value: str, *, hide: bool = False) -> Path:
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise self.refuse(key, "a path; the home directory that ~ stands for is not known", hide=hide) from None
        return self._file.parent / path


def _show(value: object) -> str:
    """A value as one short line, as TOML would write it or nearly so."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "(a table)"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "(a list of lists or tables)"
    text = repr(value) if isinstance(value, str | int | float | list) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
