"""Two hosts of one run: network namespaces with an address and a name each (skipped where they are not allowed)."""

import os
import shutil
import subprocess
import sys

import pytest

import tiny
from dino.run.checkpoint import checkpoints, read

HOSTS = {"host-a": "10.77.77.1", "host-b": "10.77.77.2"}
NAMES = {host: f"dino-{os.getpid()}-{host[-1]}" for host in HOSTS}


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts():
    if any(shutil.which(tool) is None for tool in ("ip", "unshare", "hostname")):
        pytest.skip("ip, unshare and hostname are needed")
    ends = {host: f"d{os.getpid() % 100000}{host[-1]}" for host in HOSTS}
    try:
        for name in NAMES.values():
            ip("netns", "add", name)
        a, b = ends.values()
        ip("link", "add", a, "type", "veth", "peer", "name", b)
        for host, address in HOSTS.items():
            ip("link", "set", ends[host], "netns", NAMES[host])
            ip("-n", NAMES[host], "addr", "add", f"{address}/24", "dev", ends[host])
            for device in (ends[host], "lo"):
                ip("-n", NAMES[host], "link", "set", device, "up")
        yield ends
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed: {error.stderr.strip()}")
    finally:
        for name in NAMES.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def train_on(ends, folders, out):
    """Exit code and output of each host's torchrun, started in a folder of its own."""
    started = []
    for rank, host in enumerate(HOSTS):
        meeting = ["--master-addr", HOSTS["host-a"], "--master-port", "29517"]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), *meeting]
        command = [*torchrun, "-m", "dino", "pretrain", "shapes:40x32", "--out", out, "--quiet", *tiny.FLAGS]
        named = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": ends[host], "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", NAMES[host], *named, sys.executable, *command],
                cwd=folders[rank],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], outputs


def test_two_hosts_train_as_one(hosts, tmp_path):
    codes, outputs = train_on(hosts, [tmp_path, tmp_path], "two")
    assert codes == [0, 0], outputs
    command = ["-m", "dino", "pretrain", "shapes:40x32", "--out", "one", "--quiet", *tiny.FLAGS]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    losses = [[line["loss"] for line in tiny.metrics(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert read(checkpoints(tmp_path / "two" / "checkpoints")[-1])["circumstances"]["processes"] == 2


def test_without_a_common_folder_it_is_said_which_host_lacks_it(hosts, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    codes, outputs = train_on(hosts, folders, "run")
    assert 0 not in codes
    assert all("host-b" in output and "--out" in output for output in outputs), outputs
    assert not any((folder / "run" / "checkpoints").exists() for folder in folders)
