"""The control socket: a real server in a thread of its own, real clients, bad ones among them."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import castore
from castore import errors
from castore.api.control import MAX_CALLERS, Report, serve_control
from castore.api.control_client import REQUEST_MAX_BYTES, ControlClient, socket_address
from castore.errors import (
    CastoreError,
    DeadlineExceeded,
    InvalidName,
    PublishBusy,
    StateError,
)

ROOT = str(Path(castore.__file__).parents[1])
WAIT_SECONDS = 20.0


class Daemon:
    """The handlers under test, and what they saw. `gate` and `entered` let a test decide what happens when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entered = threading.Semaphore(0)
        self.cancelled = threading.Event()
        self.params: dict[str, Any] = {}
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._gate = trio.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(WAIT_SECONDS)
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    def open_gate(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._gate.set)

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as exc:
            self.failure = exc
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        handlers = {
            "echo": self._echo,
            "count": self._count,
            "wait": self._wait,
            "busy": self._busy,
            "broken": self._broken,
            "unwritable": self._unwritable,
            "large": self._large,
            "last": self._last,
        }
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_control, self.path, handlers)
                self._ready.set()

    async def _echo(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        self.params = params
        return {"params": params}

    async def _count(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        await report({"stored_files": 1})
        self.entered.release()
        await self._gate.wait()
        await report({"stored_files": 2})
        # More reports than anybody takes: none may hold the command up.
        for number in range(3, 1003):
            await report({"stored_files": number})
        return {"stored_files": 1003}

    async def _wait(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        self.entered.release()
        try:
            await self._gate.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        return {}

    async def _busy(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        raise PublishBusy("3 files are open for writing")

    async def _broken(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fail)
        return {}

    async def _fail(self) -> None:
        raise RuntimeError("a defect")

    async def _unwritable(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        return {"path": Path("/")}

    async def _large(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        return {"text": "x" * 3_000_000}

    async def _last(self, params: dict[str, Any], report: Report) -> dict[str, Any]:
        self._scope.cancel()
        return {"staged_files": 0}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "state/run/control.sock")
    daemon.start()
    yield daemon
    daemon.stop()
    assert daemon.failure is None


@pytest.fixture
def client(daemon: Daemon) -> ControlClient:
    return ControlClient(daemon.path)


def send_raw(path: Path, data: bytes, *, end: bool = False) -> list[dict[str, Any]]:
    """All lines that a server answers to some bytes; `end` closes the sending side after them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(WAIT_SECONDS)
        with socket_address(path) as address:
            connection.connect(address)
        # The server may hang up in the midst of it.
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                received += data
    return [json.loads(line) for line in received.splitlines()]


def test_result(daemon: Daemon, client: ControlClient) -> None:
    result = client.call("echo", ref="zlib/1.3", force=True, timeout_seconds=1.5, name="caf\xe9\udcff")
    assert result == {"params": {"ref": "zlib/1.3", "force": True, "timeout_seconds": 1.5, "name": "caf\xe9\udcff"}}
    assert "command" not in daemon.params


def test_the_wire(daemon: Daemon) -> None:
    assert send_raw(daemon.path, b'{"command": "echo", "a": 1}\n') == [{"result": {"params": {"a": 1}}}]
    # A caller may close its sending side and still gets the answer.
    assert send_raw(daemon.path, b'{"command": "echo"}\n', end=True) == [{"result": {"params": {}}}]
    assert send_raw(daemon.path, b'{"command": "busy"}\n') == [
        {"error": {"type": "PublishBusy", "message": "3 files are open for writing", "temporary": True}}
    ]


def test_progress(daemon: Daemon, client: ControlClient) -> None:
    seen: list[dict[str, Any]] = []

    def on_progress(progress: dict[str, Any]) -> None:
        seen.append(progress)
        if progress == {"stored_files": 1}:
            daemon.open_gate()

    assert client.call("count", on_progress) == {"stored_files": 1003}
    assert seen[0] == {"stored_files": 1}
    numbers = [progress["stored_files"] for progress in seen]
    assert numbers == sorted(numbers)


def test_the_last_progress_is_repeated(daemon: Daemon, client: ControlClient) -> None:
    """So that silence means a daemon that hangs: this call lasts longer than its timeout."""
    seen: list[dict[str, Any]] = []

    def on_progress(progress: dict[str, Any]) -> None:
        seen.append(progress)
        if len(seen) == 5:
            daemon.open_gate()

    assert client.call("count", on_progress, timeout=3.5) == {"stored_files": 1003}
    assert seen[:5] == [{"stored_files": 1}] * 5


def test_the_whole_call_can_be_bounded(daemon: Daemon, client: ControlClient) -> None:
    with pytest.raises(DeadlineExceeded, match="does not answer in time") as caught:
        client.call("wait", within=0.2)
    assert caught.value.temporary
    daemon.open_gate()


def test_large_answers(client: ControlClient) -> None:
    assert len(client.call("large")["text"]) == 3_000_000


def test_errors_become_their_class(client: ControlClient) -> None:
    with pytest.raises(PublishBusy, match=r"^3 files are open for writing$") as caught:
        client.call("busy")
    assert caught.value.temporary


ERROR_CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CastoreError)]


@pytest.mark.parametrize("kind", ERROR_CLASSES)
def test_every_error_class_travels(tmp_path: Path, kind: type[CastoreError]) -> None:
    async def fail(params: dict[str, Any], report: Report) -> dict[str, Any]:
        raise kind("why")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            path = tmp_path / "run/control.sock"
            await nursery.start(serve_control, path, {"fail": fail})
            with pytest.raises(CastoreError, match=r"^why$") as caught:
                await trio.to_thread.run_sync(ControlClient(path).call, "fail")
            assert type(caught.value) is kind
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("command", ["broken", "unwritable"])
def test_a_defect_of_a_handler_is_logged_and_harms_nobody(
    client: ControlClient, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    with pytest.raises(CastoreError, match="the daemon failed unexpectedly: its log says more") as caught:
        client.call(command)
    assert type(caught.value) is CastoreError
    assert [record.message for record in caplog.records] == ["a control command failed unexpectedly"]
    caplog.clear()
    assert client.call("echo") == {"params": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello\n", "the request is not a JSON object"),
        (b"\n", "the request is not a JSON object"),
        (b"[]\n", "the request is not a JSON object"),
        (b"\xff\xfe\n", "the request is not a JSON object"),
        (b"[" * 60_000 + b"\n", "the request is not a JSON object"),
        (b'{"n": ' + b"9" * 60_000 + b"}\n", "the request is not a JSON object"),
        (b"{}\n", "unknown command None; this daemon knows: broken, busy, "),
        (b'{"command": "rm"}\n', "unknown command 'rm'; this daemon knows: "),
        (b'{"command": ["echo"]}\n', "unknown command ['echo']; this daemon knows: "),
        (b'{"command": "' + b"x" * 1000 + b'"}\n', f"unknown command '{'x' * 99}; this daemon knows: "),
        (b"x" * (REQUEST_MAX_BYTES * 8), f"the request is longer than {REQUEST_MAX_BYTES} bytes"),
    ],
)
def test_bad_requests(daemon: Daemon, client: ControlClient, data: bytes, message: str) -> None:
    (answer,) = send_raw(daemon.path, data)
    assert answer["error"]["type"] == "CastoreError"
    assert answer["error"]["temporary"] is False
    assert answer["error"]["message"].startswith(message)
    assert client.call("echo") == {"params": {}}


def test_a_request_that_ends_early(daemon: Daemon) -> None:
    (answer,) = send_raw(daemon.path, b'{"command": "echo"}', end=True)
    assert answer["error"]["message"] == "the request is not a whole line"


def test_a_request_that_is_too_long_is_not_sent(client: ControlClient) -> None:
    with pytest.raises(CastoreError, match="the request 'echo' is longer than 65536 bytes"):
        client.call("echo", text="x" * REQUEST_MAX_BYTES)


def connect(path: Path, data: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(WAIT_SECONDS)
    with socket_address(path) as address:
        connection.connect(address)
    connection.sendall(data)
    return connection


def test_a_caller_that_goes_away_gives_the_command_up(daemon: Daemon, client: ControlClient) -> None:
    connection = connect(daemon.path, b'{"command": "wait"}\n')
    assert daemon.entered.acquire(timeout=WAIT_SECONDS)
    connection.close()
    assert daemon.cancelled.wait(WAIT_SECONDS)
    assert client.call("echo") == {"params": {}}


def test_callers_are_served_side_by_side_and_bounded(daemon: Daemon, client: ControlClient) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CALLERS):
            stack.callback(connect(daemon.path, b'{"command": "wait"}\n').close)
            assert daemon.entered.acquire(timeout=WAIT_SECONDS)
            if daemon.entered.acquire(blocking=False):
                raise AssertionError("entered twice")
        with pytest.raises(StateError, match=f"{MAX_CALLERS} calls are under way already: try again later"):
            client.call("echo")
        daemon.open_gate()


def test_a_caller_that_never_reads_holds_up_nobody(daemon: Daemon, client: ControlClient) -> None:
    with connect(daemon.path, b'{"command": "large"}\n'):
        assert client.call("echo") == {"params": {}}


def test_the_answer_arrives_although_the_daemon_ends(daemon: Daemon, client: ControlClient) -> None:
    assert client.call("last") == {"staged_files": 0}
    daemon.stop()
    assert not daemon.path.exists()


def test_a_daemon_that_ends_in_between(daemon: Daemon, client: ControlClient) -> None:
    with pytest.raises(StateError, match="ended before it answered"):
        client.call("wait", lambda _: daemon.stop())


def test_no_daemon(tmp_path: Path) -> None:
    client = ControlClient(tmp_path / "run/control.sock")
    with pytest.raises(StateError) as caught:
        client.call("status")
    assert str(caught.value) == f"no daemon is running for {tmp_path}"
    (tmp_path / "run").mkdir()
    with pytest.raises(StateError, match="no daemon is running for"):
        client.daemon_pid()


def leave_stale_socket(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead, socket_address(path) as address:
        dead.bind(address)


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "run/control.sock")
    leave_stale_socket(daemon.path)
    with pytest.raises(StateError, match="no daemon is running for"):
        ControlClient(daemon.path).call("echo")
    daemon.start()
    try:
        assert ControlClient(daemon.path).call("echo") == {"params": {}}
    finally:
        daemon.stop()


def test_a_long_path(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path.joinpath(*["long name" * 20] * 10, "run/control.sock"))
    assert len(str(daemon.path)) > 1800
    daemon.start()
    try:
        client = ControlClient(daemon.path)
        assert client.call("echo") == {"params": {}}
        assert client.daemon_pid() == os.getpid()
    finally:
        daemon.stop()
    assert not daemon.path.exists()


def test_no_descriptor_is_left(daemon: Daemon, client: ControlClient) -> None:
    client.call("echo")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        client.call("echo")
        with pytest.raises(PublishBusy):
            client.call("busy")
    daemon.stop()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_modes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o755)
    daemon = Daemon(run / "control.sock")
    daemon.start()
    try:
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        status = daemon.path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
    finally:
        daemon.stop()


def test_a_socket_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    daemon = Daemon(tmp_path / "run/control.sock")
    with pytest.raises(BaseException, match="nursery") as caught:
        daemon.start()
    assert caught.group_contains(StateError, match="cannot make the control socket: ")
    daemon.stop()


AS_NOBODY = """
import os, sys
from pathlib import Path
from castore.api.control_client import ControlClient
from castore.errors import CastoreError
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
try:
    print(ControlClient(Path(sys.argv[1])).call("echo"))
except CastoreError as exc:
    print(type(exc).__name__, exc)
"""


@pytest.fixture
def reachable_folder() -> Iterator[Path]:
    """A folder that other users can enter, which those of `tmp_path` are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_other_users_are_refused(reachable_folder: Path) -> None:
    daemon = Daemon(reachable_folder / "run/control.sock")
    daemon.start()
    try:

        def call_as_nobody() -> str:
            uid = str(pwd.getpwnam("nobody").pw_uid)
            child = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, str(daemon.path), uid],
                env={**os.environ, "PYTHONPATH": ROOT},
                capture_output=True,
                text=True,
                check=True,
            )
            return child.stdout.strip()

        refusal = f"AccessDenied {daemon.path}: only the user that runs the daemon, or root, may use it"
        assert call_as_nobody() == refusal
        daemon.path.parent.chmod(0o755)
        assert call_as_nobody() == refusal
        # Even where every mode lets them in, the kernel's word on who they are does not.
        daemon.path.chmod(0o666)
        assert call_as_nobody() == "AccessDenied only the user that runs the daemon, or root, may control it"
        assert daemon.params == {}
    finally:
        daemon.stop()


def serve_bytes(path: Path, answer: bytes) -> Callable[[], None]:
    """A stranger that answers each of its callers with the same bytes; returns what stops it."""
    path.parent.mkdir(parents=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket_address(path) as address:
        listening.bind(address)
    listening.listen()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()

    def stop() -> None:
        thread.join(WAIT_SECONDS)
        listening.close()

    return stop


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[]\n", b"{}\n", b'{"result": 1}\n', b'{"result": {}, "error": {}}\n'],
)
def test_strangers_are_not_believed(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "run/control.sock"
    stop = serve_bytes(path, answer)
    with pytest.raises(StateError, match="does not speak castore's control protocol"):
        ControlClient(path).call("echo")
    stop()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("InvalidName", InvalidName), ("NoSuchError", CastoreError), ("ClassVar", CastoreError), (None, CastoreError)],
)
def test_errors_of_other_versions(tmp_path: Path, name: str | None, kind: type[CastoreError]) -> None:
    path = tmp_path / "run/control.sock"
    stop = serve_bytes(path, json.dumps({"error": {"type": name, "message": "why"}}).encode() + b"\n")
    with pytest.raises(CastoreError, match=r"^why$") as caught:
        ControlClient(path).call("echo")
    assert type(caught.value) is kind
    stop()


def test_the_client_starts_fast() -> None:
    """It imports neither trio nor anything else outside the standard library."""
    code = (
        "import sys; import castore.api.control_client\n"
        "print([name for name in sys.modules if name.split('.')[0] in {'trio', 'click', 'rich', 'sqlite_utils'}])"
    )
    environ = {**os.environ, "PYTHONPATH": ROOT}
    child = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
