"""What starting the command line costs. Not what its commands do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from castore.catalog.connection import create_catalog

HELP_CPU_SECONDS = 0.3
"""What completion in a shell or a loop over `castore` can bear."""


def cpu_seconds(*arguments: str) -> float:
    """User and system time of one run of the command line."""
    process = subprocess.Popen([sys.executable, "-m", "castore.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_help_is_cheap() -> None:
    # The best of several: another process on the machine can only add.
    assert min(cpu_seconds("--help") for _ in range(5)) < HELP_CPU_SECONDS


def test_help_loads_neither_the_kernel_interface_nor_the_catalog() -> None:
    show = "import sys; from castore.cli.main import main; code = main(['--help']); print(*sys.modules); sys.exit(code)"
    run = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert {"pyfuse3", "pysqlite3", "sqlite_utils", "rich"}.isdisjoint(run.stdout.splitlines()[-1].split())


def test_a_command_that_reads_the_catalog_loads_no_more_than_that(tmp_path: Path) -> None:
    """What brings a catalog up to date takes a fifth of its start."""
    create_catalog(tmp_path / "catalog.db")
    config = tmp_path / "castore.toml"
    config.write_text(f'[store]\nstate_dir = "{tmp_path}"\n[backends.local]\ntype = "local"\npath = "objects"\n')
    arguments = ["--config", str(config), "package", "list"]
    show = (
        f"import sys; from castore.cli.main import main; code = main({arguments}); print(*sys.modules); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", show, *arguments], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "pysqlite3" in loaded
    assert {"pyfuse3", "sqlite_utils", "trio", "rich", "aioboto3"}.isdisjoint(loaded)
