"""A Slurm of one node on loopback, as root: Debian's munged, slurmctld, slurmd. Keeps no accounts, limits nothing."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.mount.store import WAIT_SECONDS, run_tool, wait_until

CONF: Final = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/node
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# The node is what is said here, whatever the host has.
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 TmpDisk=64000
PartitionName=all Nodes=ALL Default=YES
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """What the environment of its commands needs, while it runs. Everything of it is in `folder`, which is made."""
    for name in ("controller", "node"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    controller_port, node_port = _free_ports(2)
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(host=host, folder=folder, controller_port=controller_port, node_port=node_port))
    files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{option}={folder}/{name}" for option, name in files.items())]
    environ = {"SLURM_CONF": str(conf)}
    with ExitStack() as running, (folder / "log").open("wb") as log:
        for command in ([*munged, f"--log-file={folder}/munged.log"], ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            process = running.enter_context(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environ))
            running.callback(process.terminate)
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists, "munged listens")
        wait_until(
            lambda: "idle" in run_tool("sinfo", "--noheader", env=os.environ | environ),
            f"the node is there: {folder}/log",
        )
        yield environ


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for_jobs(environ: dict[str, str]) -> None:
    """Until none waits or runs."""
    command = ("squeue", "--noheader", "--states=PENDING,RUNNING,COMPLETING")
    wait_until(lambda: not run_tool(*command, env=os.environ | environ).strip(), "every job has ended", WAIT_SECONDS)
