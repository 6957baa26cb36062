"""Names that would act on a terminal: no command lets them, whatever it says of them."""

from __future__ import annotations

import os

from tests.cli.conftest import Cli
from tests.mount.store import MountedStore

HOSTILE = b"clear\x1b[2J\r\x07\nfake line \xe2\x80\xaegnp\xff \xc2\x9b31m"
SHOWN = "clear\\x1b[2J\\r\\x07\\nfake line \\u202egnp\\xff \\x9b31m"


def test_no_command_lets_a_name_act(cli: Cli, store: MountedStore) -> None:
    cli.environ["CASTORE_CONFIG"] = str(store.config)
    folder = store.ingest("demo/1")
    (folder / os.fsdecode(HOSTILE)).mkdir()
    (folder / os.fsdecode(HOSTILE) / os.fsdecode(HOSTILE)).write_bytes(b"bytes")
    store.publish("demo/1")
    (damaged,) = (path for path in store.objects.rglob("*") if path.is_file() and path.stat().st_size == 5)
    damaged.chmod(0o600)
    damaged.write_bytes(b"wrong")
    said = {
        command: cli(*command.split(), code=code)
        for command, code in {
            "storage verify": 1,
            "package list": 0,
            "package show demo/1 --files": 0,
            "events": 0,
            "status": 1,
            "storage backends": 0,
        }.items()
    }
    for command, done in said.items():
        text = done.stdout + done.stderr
        assert {char for char in text if not char.isprintable()} <= {"\n"}, command
        assert not any(line.startswith("fake line") for line in text.splitlines()), command
    assert f"{SHOWN}/{SHOWN}" in said["storage verify"].stdout + said["storage verify"].stderr
    assert SHOWN in said["package show demo/1 --files"].stdout
