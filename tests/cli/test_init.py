"""`castore init`: what it makes, and what it leaves alone."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.reader import CatalogReader
from castore.cli.init import template
from castore.config import Config, LocalSettings, load_config
from tests.cli.conftest import Cli


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_in_the_users_folders(cli: Cli) -> None:
    done = cli("init")
    config_path = cli.home / ".config/castore/castore.toml"
    state = cli.home / ".local/share/castore"
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"created  configuration    {config_path}",
        f"created  state directory  {state}",
        f"created  catalog          {state}/catalog.db",
        f"created  backend local    {state}/objects",
    ]
    assert mode(config_path) == 0o644
    assert [mode(path) for path in (state, state / "objects")] == [0o700, 0o700]
    config = load_config(config_path, {})
    assert config.store.state_dir == state
    assert config.cache.dir == cli.home / ".cache/castore"
    assert config.backends == {"local": LocalSettings("local", state / "objects")}
    with CatalogReader.open(config.store.catalog_path) as reader:
        assert reader.totals() == (0, 0)
    assert cli("package", "list").stdout == "no packages are published\n"


def test_again(cli: Cli, tmp_path: Path) -> None:
    config_path = tmp_path / "new/folder/castore.toml"
    cli("--config", config_path, "init", "--state-dir", "sub/state")
    state = cli.home / "sub/state"
    with CatalogReader.open(state / "catalog.db") as reader:
        catalog_id = reader.catalog_id()
    config_path.write_text(config_path.read_text() + "# mine\n")
    before_ns = config_path.stat().st_mtime_ns
    shutil.rmtree(state / "objects")
    done = cli("--config", config_path, "init", "--state-dir", "sub/state")
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == ["exists", "exists", "exists", "created"]
    assert config_path.read_text().endswith("# mine\n")
    assert config_path.stat().st_mtime_ns == before_ns
    with CatalogReader.open(state / "catalog.db") as reader:
        assert reader.catalog_id() == catalog_id
    assert list(config_path.parent.iterdir()) == [config_path]


def test_json(cli: Cli, tmp_path: Path) -> None:
    document = json.loads(cli("init", "--json", "--state-dir", tmp_path / "state").stdout)
    assert document["config"] == str(cli.home / ".config/castore/castore.toml")
    assert document["state_dir"] == str(tmp_path / "state")
    assert [step["what"] for step in document["steps"]] == [
        "configuration",
        "state directory",
        "catalog",
        "backend local",
    ]
    assert all(step["created"] for step in document["steps"])
    again = json.loads(cli("init", "--json").stdout)
    assert not any(step["created"] for step in again["steps"])


def test_everything_below_a_state_dir(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    config = load_config(cli.home / ".config/castore/castore.toml", {})
    assert config.cache.dir == tmp_path / "state/cache"
    assert config.backends["local"] == LocalSettings("local", tmp_path / "state/objects")


@pytest.mark.parametrize(
    "name", ["a 'b' \"c\"", "back\\slash", "caf\xe9 \u4e2d \U0001f600", "{state_dir}", "100%", "a#b"]
)
def test_any_path_can_be_written(cli: Cli, tmp_path: Path, name: str) -> None:
    cli("init", "--state-dir", tmp_path / name)
    assert load_config(cli.home / ".config/castore/castore.toml", {}).store.state_dir == tmp_path / name
    assert (tmp_path / name / "catalog.db").exists()


def test_a_path_that_toml_cannot_hold(cli: Cli, tmp_path: Path) -> None:
    line = cli.error("init", "--state-dir", f"{tmp_path}/\udcff")
    assert "a path that is not UTF-8" in line
    assert list(cli.home.iterdir()) == []


def test_a_path_that_the_configuration_refuses(cli: Cli, tmp_path: Path) -> None:
    line = cli.error("init", "--force", "--state-dir", tmp_path / "tab\t")
    assert "expected a path" in line
    assert list(cli.home.iterdir()) == []


def test_another_state_dir_than_that_of_the_file(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "one")
    config_path = cli.home / ".config/castore/castore.toml"
    line = cli.error("init", "--state-dir", tmp_path / "two")
    assert line.startswith(f"{config_path}: store.state_dir is {tmp_path}/one already")
    assert not (tmp_path / "two").exists()


def test_force_keeps_the_old_file(cli: Cli, tmp_path: Path) -> None:
    config_path = cli.home / ".config/castore/castore.toml"
    config_path.parent.mkdir(parents=True)
    config_path.write_text("first\n")
    done = cli("init", "--force", "--state-dir", tmp_path / "one")
    assert done.stdout.splitlines()[0] == f"created  former configuration  {config_path}.old"
    cli("init", "--force", "--state-dir", tmp_path / "two")
    assert load_config(config_path, {}).store.state_dir == tmp_path / "two"
    assert Path(f"{config_path}.old").read_text() == "first\n"
    assert load_config(Path(f"{config_path}.old1"), {}).store.state_dir == tmp_path / "one"


def test_a_file_that_is_wrong_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    config_path = tmp_path / "castore.toml"
    config_path.write_text(f'[store]\nstate_dir = "{tmp_path}/state"\n')
    line = cli.error("init", "--config", config_path)
    assert line.startswith(f"{config_path}: backends is missing")
    assert set(tmp_path.iterdir()) == {cli.home, config_path}


def test_what_is_in_the_way(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cli.error("init", "--state-dir", tmp_path / "file") == f"{tmp_path}/file: is not a directory"
    (cli.home / ".config/castore/castore.toml").unlink()
    line = cli.error("init", "--state-dir", tmp_path / "file/sub")
    assert line == f"{tmp_path}/file: is not a directory"
    line = cli.error("init", "--config", tmp_path / "file/castore.toml")
    assert line.startswith(f"{tmp_path}/file/castore.toml: ")


def test_a_catalog_of_a_newer_version(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    catalog = tmp_path / "state/catalog.db"
    connection = sqlite3.connect(str(catalog))
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for command in (["init"], ["package", "list"], ["package", "show", "a/1"], ["status"]):
        line = cli.error(*command)
        assert line.startswith(f"{catalog}: has format version 99")


def test_the_template_shows_every_key_with_its_default(tmp_path: Path) -> None:
    """All that is commented out can be taken in, and what shows a default is that default."""
    text = template(tmp_path)
    values = text.split("\n# [backends.remote]")[0] + "\n"
    plain = load(tmp_path, values)
    taken_in = load(tmp_path, re.sub(r"^# (?=[a-z_]+ = )", "", values, flags=re.MULTILINE))
    assert taken_in == plain

    everything = re.sub(r"^# (?=[a-z_]+ = |\[)", "", text.replace("# function", "# # function"), flags=re.MULTILINE)
    config = load(tmp_path, everything)
    assert list(config.backends) == ["local", "remote"]
    assert config.routing.rules[0].copies == ("local",)
    for settings in (config.store, config.cache, config.ingest, config.routing, config.routing.rules[0]):
        for field in type(settings).__slots__:
            assert field.removesuffix("_seconds") in text
    for field in type(config.backends["remote"]).__slots__:
        assert field == "backend_id" or f"# {field.removesuffix('_seconds')} = " in text


def load(folder: Path, text: str) -> Config:
    path = folder / "castore.toml"
    path.write_text(text)
    return load_config(path, {})
