"""What the daemon tells the service manager that started it. It asks nothing of one, and needs none."""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"

_log = logging.getLogger(__name__)


def tell(state: str) -> None:
    """Send a state to `$NOTIFY_SOCKET`, if there is one (sd_notify(3)). What goes wrong is logged: the mount is there.

    The name of the socket is a path, or an abstract one where it begins with `@`.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.setblocking(False)
            to.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError as exc:
        _log.warning("the service manager at NOTIFY_SOCKET is not told %s: %s", state, exc.strerror)
