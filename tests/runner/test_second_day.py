"""The second day: what was downloaded yesterday runs without the hub, then with HF_HUB_OFFLINE=1, to the same scores.

run.py's commands, with everything that a user types, in processes of their own against a hub of our own.
"""

import json
import os
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers import hub_content as content
from helpers.hub_server import TOKEN, Hub
from recombine.data.vision.suites import Fgvc, Vision8
from recombine.errors import UsageError
from recombine.runtime import assets

LITERAL = ["method=crisp", "model=vit_s16", "data=vtab"]
TIMM = ["model=timm", "model.name=vit_tiny_patch16_224.augreg_in21k", "model.image_size=32", "probe=false"]
SHORT = ["trainer.epochs=1", "data.limit=8"]
WORDS = ["data.batch_size=4", "data.max_length=48", "harness.tasks=[]"]
COMMANDS = {
    "fgvc": ["method=crisp", "data=fgvc", "data.task=mit67", *TIMM, *SHORT],
    "vision8": ["method=lora", "data=vision8", "data.task=dtd", *TIMM, *SHORT],
    "commonsense": ["method=lora", "model=llama32_1b", "data=commonsense", *SHORT, *WORDS,
                    *content.SIZES["llama32_1b"]],
    "crisp": ["experiment=crisp/tab01", "only=[CRISP]", "data.task=kitti", "seed=42", "model.image_size=32", SHORT[0]],
    "cersa": ["experiment=cersa/tab08", "only=[CERSA]", "data.task=mrpc", "seed=0", *SHORT, *content.SIZES["deberta"]],
    "jactus": ["experiment=jactus/gsm8k", "only=[LoRA]", "seed=0", *SHORT, *WORDS, *content.SIZES["llama2_7b"]],
}  # fmt: skip
BRANCHES = ("literal", "fgvc", "commonsense", "crisp")  # what follows a branch, and asks where it is


class Machine:
    """Where runs are started: its caches, and a process that forks one for each command."""

    def __init__(self, folder, hub: Hub, **environment: str):
        self.folder, self.hub = folder, hub
        (folder / "cache").mkdir(exist_ok=True)
        if not (kept := folder / "cache" / "assets").exists():
            kept.symlink_to(assets.cache_dir() / "assets")  # packages
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "RECOMBINE_CACHE": str(folder / "cache"),
            "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1,127.0.0.2", **environment,
        }  # fmt: skip
        self.process = None

    def run(self, day: str, name: str, arguments: list[str]) -> dict:
        """The result of a command."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "helpers" / "hub_runs.py")],
                cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        log = self.folder / f"{day}_{name}.txt"
        print(json.dumps([[*arguments, *self.place(day, name)], str(log)]), file=self.process.stdin, flush=True)
        code = self.process.stdout.readline().strip()
        assert code == "0", f"{name}: exit code {code}\n{log.read_text()}"
        return self.result(day, name, log.read_text())

    def place(self, day: str, name: str) -> list[str]:
        folder = self.folder / day / name
        return [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "trainer.accelerator=cpu"]

    def result(self, day: str, name: str, said: str) -> dict:
        logs = [said, *(path.read_text() for path in (self.folder / day / name).rglob("log.txt"))]
        assert not [text for text in logs if "Signature" in text or "HTTP Request" in text]
        (found,) = (self.folder / day / name).rglob("result.json")
        return json.loads(found.read_text())

    def end(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


@pytest.fixture
def hub():
    hub = Hub()
    content.add_vit(hub, "vit_small_patch16_224.augreg_in21k_ft_in1k")
    content.add_vit(hub, "vit_tiny_patch16_224.augreg_in21k")
    content.add_deberta(hub)
    for name in ("llama32_1b", "llama2_7b"):
        content.add_llama(hub, name)
    content.add_vtab(hub)
    content.add_pictures(hub, Fgvc.rows["mit67"])
    content.add_pictures(hub, Vision8.rows["dtd"])
    content.add_glue(hub, "mrpc", "rte")
    content.add_commonsense(hub)
    content.add_metamath(hub)
    content.add_openbookqa(hub)
    hub.start()
    yield hub
    hub.stop()


def known(result: dict) -> dict:
    """What two runs have in common that computed the same from the same files."""
    return {key: result[key] for key in ("val", "test", "data", "weights", "model", "linear_probe")}


def literally(machine: Machine, day: str) -> dict:
    """The first command of a user, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *LITERAL, *machine.place(day, "literal")],
        cwd=machine.folder, env=machine.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "crisp on vit_s16, data VTAB-1K CIFAR-100" in done.stdout
    assert ("fetching XiN0919/VTAB-1k" in done.stderr) == (day == "first")
    return machine.result(day, "literal", done.stdout + done.stderr)


def count(machine: Machine, name: str, arguments: list[str], first: dict) -> None:
    """A command again, while the hub is there: it asks nothing, or where a branch is."""
    machine.hub.requests.clear()
    assert known(machine.run("again", name, arguments)) == known(first[name]), name
    assert len(machine.hub.requests) == (2 if name in BRANCHES else 0), (name, machine.hub.requests)


@pytest.fixture
def machines(hub, tmp_path):
    """The same caches: while a hub may be there, and with HF_HUB_OFFLINE."""
    try:
        assets.fetch("gsm8k")
    except UsageError as error:
        pytest.skip(str(error))
    online, offline = Machine(tmp_path, hub), Machine(tmp_path, hub, HF_HUB_OFFLINE="1")
    yield online, offline
    online.end()
    offline.end()


def test_the_second_day(hub, machines):
    online, offline = machines
    first = {"literal": literally(online, "first")}
    first |= {name: online.run("first", name, arguments) for name, arguments in COMMANDS.items()}
    for name, result in first.items():
        assert len(result["weights"]["commit"]) == len(result["data"]["commit"]) == 40, name
        assert all(len(digest) == 64 for digest in result["weights"]["sha256"].values()) and result["test"]
    for name in ("fgvc", "cersa"):
        count(online, name, COMMANDS[name], first)
    hub.stop()
    for name, arguments in (("literal", LITERAL), ("commonsense", COMMANDS["commonsense"])):
        assert known(online.run("stopped", name, arguments)) == known(first[name]), name
    assert known(literally(offline, "offline")) == known(first["literal"])


@pytest.mark.full
def test_every_command_on_every_day(hub, machines):
    """lm-eval's data among them, which the library `datasets` fetches: it asks the hub as long as there is one."""
    online, offline = machines
    everything = {"literal": LITERAL} | COMMANDS
    everything["jactus"] = [*everything["jactus"], "harness.tasks=null", "harness.limit=1"]
    first = {name: online.run("first", name, arguments) for name, arguments in everything.items()}
    for name, arguments in everything.items():
        count(online, name, arguments, first)
    asks = [*COMMANDS["commonsense"], "harness.tasks=[openbookqa]", "harness.limit=4"]
    first["openbookqa"] = online.run("first", "openbookqa", asks)
    assert "openbookqa/acc" in first["openbookqa"]["test"]
    hub.stop()
    for day, machine in (("stopped", online), ("offline", offline)):
        for name, arguments in (everything | {"openbookqa": asks}).items():
            assert known(machine.run(day, name, arguments)) == known(first[name]), (day, name)


@pytest.mark.full
def test_a_login_node_fills_the_cache(hub, machines):
    """A profile without rewriting fetches the model and the data, and decodes these."""
    online, offline = machines
    online.run("login", "fgvc", [*COMMANDS["fgvc"], "stage=profile", "stage.rewrite=false"])
    hub.stop()
    assert offline.run("node", "fgvc", COMMANDS["fgvc"])["test"]
