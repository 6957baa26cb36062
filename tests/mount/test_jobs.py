"""The jobs that are shipped: a verify in parts, as Kubernetes and Slurm run it. A real Slurm; of Kubernetes its rules.

There is no cluster of Kubernetes here: its Job is checked against the published schemas of the API, and the command of
its container is run for every index, in the environment that the Job gives it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.mount.following import newest, replicating
from tests.mount.store import MountedStore, run_tool, wait_until
from tests.servers.slurm import slurm, wait_for_jobs

JOBS: Final = Path(__file__).parents[2] / "docs/jobs"
OLDEST, NEWEST = "1.29", ""
"""The first Kubernetes with all that the Job asks for, and the newest that is known here."""
PARTS: Final = 4
"""Instead of 16, so that it takes seconds."""


@pytest.fixture(scope="module")
def verifying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MountedStore, dict[str, str]]]:
    """A store with 40 objects whose catalog is replicated, and the environment that the jobs need."""
    root = tmp_path_factory.mktemp("jobs")
    store = MountedStore(root)
    source = root / "source"
    source.mkdir()
    for number in range(39):
        (source / f"{number}").write_text(f"{number}")
    store.castore("package", "import", str(source), "numbers/1")
    settings = root / "settings/castore.toml"
    settings.parent.mkdir()
    settings.write_text(store.config.read_text().replace(f'"{store.state}"', '"STATE_DIR"'))
    url = f"file://{root}/replica"
    with replicating(store, url):
        wait_until(lambda: newest(url), "the replica is there")
    (root / "bin").mkdir()
    (root / "bin/verify-shard").symlink_to(JOBS / "verify-shard")
    yield (
        store,
        {
            "PATH": f"{root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "REPLICA_URL": url,
            "CASTORE_SETTINGS": str(settings),
        },
    )
    store.close()


def digests(text: str) -> list[str]:
    return [line["digest"] for line in map(json.loads, text.splitlines()) if "digest" in line]


def assert_whole(store: MountedStore, parts: list[list[str]]) -> None:
    """Together they are everything, and no object is in two."""
    everything = digests(store.castore("storage", "verify", "--json"))
    assert len(everything) == 40
    assert sorted(digest for part in parts for digest in part) == sorted(everything)
    assert all(parts)


def job() -> Any:
    return yaml.safe_load((JOBS / "verify.kubernetes.yaml").read_text())


@pytest.mark.parametrize("version", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_kubernetes_knows_every_field(tmp_path: Path, version: str) -> None:
    """With unknown fields refused, as `kubectl apply --validate=strict` does."""
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", *(["-k", version] if version else [])]
    done = subprocess.run([*command, JOBS / "verify.kubernetes.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((JOBS / "verify.kubernetes.yaml").read_text().replace("parallelism", "parallel"))
    assert subprocess.run([*command, wrong], capture_output=True, check=False).returncode == 1


def test_each_index_of_kubernetes_verifies_its_part(verifying: tuple[MountedStore, dict[str, str]]) -> None:
    store, environ = verifying
    spec = job()["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert container["command"][-1] == str(spec["completions"])
    # What the API's rules ask of such a policy, beyond the schema.
    assert (pod["restartPolicy"], spec["maxFailedIndexes"] <= spec["completions"]) == ("Never", True)
    [settings] = container["env"]
    [volume], [mounted] = pod["volumes"], container["volumeMounts"]
    assert volume["name"] == mounted["name"]
    assert settings == {"name": "CASTORE_SETTINGS", "value": f"{mounted['mountPath']}/castore.toml"}

    def run(index: int) -> str:
        given = os.environ | environ | {"JOB_COMPLETION_INDEX": str(index)}
        words = [*container["command"][:-1], str(PARTS)]
        # As the kubelet does with $(NAME), before anything runs.
        return run_tool(*(re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], word) for word in words), env=given)

    with ThreadPoolExecutor(spec["parallelism"]) as pods:
        parts = [digests(said) for said in pods.map(run, range(PARTS))]
    assert_whole(store, parts)


def test_an_array_of_slurm_verifies_everything(verifying: tuple[MountedStore, dict[str, str]], tmp_path: Path) -> None:
    """The script that is shipped, submitted to a real Slurm of one node."""
    store, environ = verifying
    exports = "".join(f"export {name}='{environ[name]}'\n" for name in ("REPLICA_URL", "CASTORE_SETTINGS"))
    (tmp_path / "verify.env").write_text(exports)
    script = tmp_path / "verify.slurm"
    script.write_text((JOBS / "verify.slurm").read_text().replace("/etc/castore/", f"{tmp_path}/"))
    with slurm(tmp_path / "slurm") as cluster:
        given = os.environ | environ | cluster
        run_tool("sbatch", "--test-only", script, env=given, cwd=tmp_path)
        submitted = run_tool("sbatch", "--parsable", f"--array=0-{PARTS - 1}", script, env=given, cwd=tmp_path)
        wait_for_jobs(cluster)
        number = submitted.strip()
        outputs = [tmp_path / f"castore-verify-{number}_{index}.jsonl" for index in range(PARTS)]
        assert_whole(store, [digests(path.read_text()) for path in outputs])
