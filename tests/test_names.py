"""The rule for NAME, VERSION and references to packages."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import InvalidName
from castore.registry.names import is_valid_name, is_valid_version, parse_ref

FIRST = string.ascii_letters + string.digits + "@"
NAMES = st.builds(
    str.__add__, st.sampled_from(FIRST), st.text(string.ascii_letters + string.digits + "._-+:@~", max_size=127)
)


@given(NAMES)
def test_names_by_the_rule(name: str) -> None:
    assert is_valid_name(name.encode())
    assert is_valid_version(name.encode()) == (name != "latest")


@given(st.binary(max_size=140))
def test_other_names(name: bytes) -> None:
    allowed = FIRST.encode() + b"._+:~-"
    by_the_rule = 0 < len(name) <= 128 and name[0] in FIRST.encode() and all(char in allowed for char in name)
    assert is_valid_name(name) == by_the_rule


@pytest.mark.parametrize("name", [b"", b".", b"..", b".git", b"-v", b"_x", b"a/b", b"a b", b"a\n", b"a\x00", b"\xff"])
def test_names_that_are_refused(name: bytes) -> None:
    assert not is_valid_name(name)
    assert not is_valid_version(name)


def test_length() -> None:
    assert is_valid_name(b"a" * 128)
    assert not is_valid_name(b"a" * 129)


def test_latest_is_a_name_but_no_version() -> None:
    assert is_valid_name(b"latest")
    assert not is_valid_version(b"latest")
    assert is_valid_version(b"latest2")


@given(NAMES, NAMES)
def test_references(name: str, version: str) -> None:
    assert parse_ref(f"{name}/{version}", allow_latest=True) == (name, version)
    if version != "latest":
        assert parse_ref(f"{name}/{version}") == (name, version)


@given(st.text(max_size=20))
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    name, _, version = text.partition("/")
    if is_valid_name(name.encode(errors="surrogatepass")) and is_valid_version(version.encode(errors="surrogatepass")):
        assert parse_ref(text) == (name, version)
        return
    with pytest.raises(InvalidName, match="expected") as caught:
        parse_ref(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zlib", "expected NAME/VERSION"),
        ("", "expected NAME/VERSION"),
        ("zlib/", "'' is not a VERSION"),
        ("/1.3", "'' is not a NAME"),
        ("zlib/1.3/x", "'1.3/x' is not a VERSION"),
        ("zlib/latest", "latest is the link"),
        ("zlib/1\udcff", "is not a VERSION"),
        (f"{'a' * 129}/1", "is not a NAME: expected 1 to 128"),
    ],
)
def test_references_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidName) as caught:
        parse_ref(text)
    assert words in str(caught.value)
