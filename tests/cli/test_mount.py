"""`castore mount`: how it starts a daemon, and what it says of one that does not start."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from tests.cli.conftest import ROOT, WAIT_SECONDS, Cli
from tests.mount.store import MountedStore, wait_until

BAD_DAEMON = """
import json, os, signal, sys, time
from pathlib import Path
kind = os.environ["BAD_DAEMON"]
if kind == "arguments":
    print(json.dumps(sys.argv[1:]))
    sys.exit(7)
Path(os.environ["BAD_DAEMON_PID"]).write_text(f"{os.getpid()}\\n")
ready = int(sys.argv[sys.argv.index("--ready-fd") + 1])
if kind == "error":
    print("a line for the log", flush=True)
    os.write(ready, json.dumps({"error": "MNT: is not empty"}).encode() + b"\\n")
    sys.exit(2)
if kind == "dies":
    print("Traceback (most recent call last):\\nImportError: no \\x1b[31mlibfuse3\\n", file=sys.stderr)
    sys.exit(3)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "babbles":
    os.write(ready, b"ready!\\n")
    sys.exit(0)
if kind == "half":
    os.write(ready, b'{"ready": true, ')
if kind == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(ready, b'{"error": "and yet it runs"}\\n')
while True:
    time.sleep(60)
"""


class BadDaemon:
    """A module `mount` that is found before the real one and behaves as `BAD_DAEMON` says."""

    def __init__(self, cli: Cli, folder: Path) -> None:
        self.cli = cli
        self.folder = folder
        self.pid_file = folder / "pid"
        self.mnt = folder / "mnt"
        self.mnt.mkdir()
        package = folder / "modules/mount"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(BAD_DAEMON)
        cli("init", "--state-dir", folder / "state")
        self.log = folder / "state/log/mount.log"

    def environ(self, kind: str) -> dict[str, str]:
        path = f"{self.folder}/modules:{ROOT}"
        return {
            **self.cli.environ,
            "PYTHONPATH": path,
            "BAD_DAEMON": kind,
            "BAD_DAEMON_PID": str(self.pid_file),
        }

    def has_ended(self) -> bool:
        pid = int(self.pid_file.read_text().split()[0])
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True


@pytest.fixture
def bad(cli: Cli, tmp_path: Path) -> BadDaemon:
    return BadDaemon(cli, tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("error", "MNT: is not empty"),
        (
            "dies",
            "the daemon ended before it was ready, with exit status 3: ImportError: no \\x1b[31mlibfuse3; its log",
        ),
        ("killed", "the daemon ended before it was ready, with exit status -9: it wrote nothing; its log is "),
        ("babbles", "the daemon ended before it was ready, with exit status 0: it wrote nothing; its log is "),
        ("stubborn", "and yet it runs"),
    ],
)
def test_daemons_that_do_not_start(bad: BadDaemon, kind: str, expected: str) -> None:
    line = bad.cli.error("mount", bad.mnt, "--background", env=bad.environ(kind))
    assert line.startswith(expected)
    assert bad.has_ended()


@pytest.mark.parametrize("kind", ["hangs", "half"])
def test_a_daemon_that_hangs_is_stopped(bad: BadDaemon, kind: str) -> None:
    begin = time.monotonic()
    line = bad.cli.error("mount", bad.mnt, "--background", "--wait", "2", env=bad.environ(kind))
    assert line == f"the daemon was not ready within 2 seconds and was stopped; its log is {bad.log}"
    assert 2 <= time.monotonic() - begin < 30
    assert bad.has_ended()


def test_interrupted_while_it_waits(bad: BadDaemon) -> None:
    with bad.cli.start("mount", bad.mnt, "--background", env=bad.environ("hangs"), stderr=subprocess.PIPE) as process:
        wait_until(lambda: bad.pid_file.exists() and bad.pid_file.read_text().endswith("\n"), "the daemon runs")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stderr.strip()) == (130, "")
    assert bad.has_ended()


def test_the_log_is_private_and_grows(bad: BadDaemon) -> None:
    for count in (1, 2):
        bad.cli.error("mount", bad.mnt, "--background", env=bad.environ("error"))
        assert bad.log.read_text() == "a line for the log\n" * count
    assert stat.S_IMODE(bad.log.stat().st_mode) == 0o600
    assert stat.S_IMODE(bad.log.parent.stat().st_mode) == 0o700


def test_the_foreground_is_the_daemon_itself(bad: BadDaemon) -> None:
    """Its arguments, its output and its exit code."""
    environ = bad.environ("arguments")
    config = str(bad.cli.home / ".config/castore/castore.toml")
    done = bad.cli("mount", "../mnt", code=7, env=environ)
    assert json.loads(done.stdout) == ["--config", config, f"{bad.cli.home}/../mnt"]
    options = ("-o", "nosuid,nodev", "-o", "noexec", "--allow-other", "--log-level", "debug")
    done = bad.cli("mount", *options, "--", "-mnt", code=7, env=environ)
    assert json.loads(done.stdout) == [
        "--config",
        config,
        f"{bad.cli.home}/-mnt",
        "-o",
        "nosuid,nodev,noexec",
        "--allow-other",
        "--log-level",
        "debug",
    ]


def test_without_a_store(cli: Cli, tmp_path: Path) -> None:
    """Only who configured nothing gets one made: another's may be on a disk that is not mounted."""
    line = cli.error("mount", cli.home / "store", "--background", "-o", "nodev,ro")
    assert line == f"{cli.home}/.local/share/castore: there is no store; run `castore init`"
    config = tmp_path / "castore.toml"
    config.write_text('[store]\nstate_dir = "gone"\n[backends.local]\ntype = "local"\npath = "objects"\n')
    line = cli.error("mount", cli.home / "store", "--background", "--config", config)
    assert line == f"{tmp_path}/gone: there is no store; run `castore init`"
    assert list(cli.home.iterdir()) == []


def test_a_module_of_the_working_directory_is_not_run(cli: Cli, tmp_path: Path) -> None:
    """Root may mount from anywhere, also from where somebody else put a file."""
    cli("init", "--state-dir", tmp_path / "state")
    (cli.home / "mount.py").write_text("open('harm', 'w')\n")
    line = cli.error("mount", "missing", "--background")
    assert line.startswith(f"{cli.home}/missing: ")
    assert not (cli.home / "harm").exists()


def test_the_first_mount_below_a_folder_that_is_not_there(cli: Cli) -> None:
    said = cli.error("mount", "not/there", "--background")
    assert said == f"{cli.home}/not/there: cannot be made, {cli.home}/not is no directory; make that with `mkdir -p`"
    assert list(cli.home.iterdir()) == []


def test_the_real_daemon(cli: Cli, tmp_path: Path) -> None:
    store = MountedStore(tmp_path)
    try:
        done = cli("mount", "../mnt", "--background", "--config", store.config)
        there = mount_at(store.mnt)
        assert there is not None
        assert there.state_dir == store.state
        store.pid = int(done.stdout.removeprefix(f"mounted {cli.home}/../mnt (pid ").removesuffix(")\n"))
        assert os.path.samefile(f"/proc/{store.pid}/exe", sys.executable)
        assert os.getsid(store.pid) == store.pid, "no terminal's"
        assert done.stderr == ""
        # A second one is refused, and the first one lives on.
        other = tmp_path / "other"
        other.mkdir()
        assert "another daemon" in cli.error("mount", other, "--background", "--config", store.config)
        assert (store.mnt / "packages").is_dir()
    finally:
        store.close()
