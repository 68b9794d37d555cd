"""Two machines, as far as one can be two: torchrun on both, each in a network of its own where root may make them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from helpers import ROOT
from helpers.ranked import TINY, execute, same
from helpers.waiting import LIMIT

WORDS = ["method=crisp", "method.chunk=16", "probe=false"]
SUBNET = "10.213.77"


@dataclass
class Node:
    """prefix: of commands that run there. address: by which the other reaches it. device: of its network."""

    prefix: list[str]
    address: str
    device: str


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two networks joined by a cable; without root, or without `ip`, this machine's own twice."""
    names = [f"node{os.getpid()}{letter}" for letter in "ab"]
    made = [shutil.which("ip") is not None and ip("netns", "add", name) for name in names]
    if not all(made):
        yield [Node([], "127.0.0.1", "lo")] * 2
        return
    devices = [f"v{os.getpid()}{letter}" for letter in "ab"]
    try:
        assert ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", devices[1], "netns", names[1])
        for number, (name, device) in enumerate(zip(names, devices, strict=True), 1):
            assert ip("-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", device)
            assert ip("-n", name, "link", "set", device, "up") and ip("-n", name, "link", "set", "lo", "up")
        yield [
            Node(["ip", "netns", "exec", name], f"{SUBNET}.{number}", device)
            for number, (name, device) in enumerate(zip(names, devices, strict=True), 1)
        ]
    finally:
        for name in names:
            ip("netns", "del", name)


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


def agent(nodes: list[Node], number: int, port: int, *words: str) -> subprocess.Popen:
    """torchrun on that node, with one rank."""
    node = nodes[number]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += [f"--node-rank={number}", f"--master-addr={nodes[0].address}", f"--master-port={port}"]
    command = [*node.prefix, *torchrun, f"--local-addr={node.address}", str(ROOT / "run.py"), *words]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": node.device, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_torchrun_on_two_nodes_is_one_process(nodes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*TINY, *WORDS, "trainer.num_nodes=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path}/two"]
    agents = [agent(nodes, number, port, *words) for number in range(2)]
    execute(tmp_path / "one", *WORDS)
    said = [process.communicate(timeout=LIMIT)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], "\n".join(said)
    same(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["config"]["trainer"]["num_nodes"] == 2
