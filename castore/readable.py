"""Sizes, durations and names as people read them, on a terminal and on a page. No styles, no columns."""

from __future__ import annotations

from typing import Final

_IEC_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def format_bytes(size_bytes: int) -> str:
    """A size in IEC units with three digits or so: `0 B`, `1023 B`, `1.5 KiB`, `12 GiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in _IEC_UNITS:
        size /= 1024
        # 1023.5 would be written as 1024.
        if size < 1023.5 or unit == _IEC_UNITS[-1]:
            break
    return f"{size:.1f} {unit}" if size < 99.95 else f"{size:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: `8 s`, `2 min 5 s`, `3 h 20 min`, `7 d`, `2 d 3 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    days, hours = divmod(whole // 3600, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def printable(text: str | bytes) -> str:
    """The text with everything escaped that a terminal might act on, and bytes that are not UTF-8 as `\\xNN`."""
    if isinstance(text, bytes):
        text = text.decode(errors="surrogateescape")
    return "".join(char if char.isprintable() and char != "\\" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
