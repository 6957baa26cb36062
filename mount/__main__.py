"""`python -m mount`: one FUSE daemon in the foreground. `castore mount` starts it; people use that."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from castore.config import load_config
from castore.errors import CastoreError
from mount.daemon import Daemon, parse_options
from mount.service import READY, STOPPING, tell

_LEVELS = ("debug", "info", "warning", "error")


def main() -> int:
    """Run until unmounted or told to end; 0 after a clean end, 2 when it could not start or failed."""
    parser = argparse.ArgumentParser(prog="castore mount", description=__doc__)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("-o", dest="options", default="")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--follow", metavar="URL")
    parser.add_argument("--log-level", choices=_LEVELS, default="info")
    parser.add_argument("--ready-fd", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        config = load_config(arguments.config)
        follow: str | None = arguments.follow
        options = parse_options(arguments.options, allow_other=arguments.allow_other, follow=follow is not None)
        with Daemon(config, arguments.mountpoint, options, follow) as daemon:
            if arguments.ready_fd is not None:
                os.chdir("/")  # in the background, it keeps nobody's directory busy
            try:
                return daemon.run(lambda: _tell_ready(arguments.ready_fd))
            finally:
                tell(STOPPING)
    except CastoreError as exc:
        if arguments.ready_fd is None:
            print(f"castore: error: {exc}", file=sys.stderr)
        else:
            _tell(arguments.ready_fd, {"error": str(exc)})
        return 2


def _tell_ready(descriptor: int | None) -> None:
    if descriptor is not None and os.getpgrp() != os.getpid():
        # Not before: autofs lets nobody see the mountpoint yet but the process group of its own daemon.
        os.setsid()
    tell(READY)
    _tell(descriptor, {"ready": True, "pid": os.getpid()})


def _tell(descriptor: int | None, message: dict[str, object]) -> None:
    if descriptor is None:
        return
    try:
        with os.fdopen(descriptor, "w") as pipe:
            pipe.write(json.dumps(message) + "\n")
    except BrokenPipeError:
        logging.getLogger("mount").warning("whoever started this daemon did not wait for it")


if __name__ == "__main__":
    sys.exit(main())
