"""What a person sees of a run on a terminal of 80 columns, and what stays out of it."""

import fcntl
import http.server
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import threading

import httpx
import httpx2
import pytest

from helpers import ROOT
from recombine.runtime import logs, progress, threads

TINY = ["model=tiny_vit", "trainer=cpu", "trainer.epochs=2", "data.limit=64", "probe=false", "method.chunk=16"]
JOINT = [*TINY, "stage=joint", "stage.distil.epochs=1", "budget=retained_50"]


def on_terminal(arguments: list[str], columns: int = 80) -> str:
    """What run.py writes to a terminal."""
    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "run.py", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=below, stdout=below, stderr=below
    ) as process:
        os.close(below)
        text = b""
        while chunk := read(above):
            text += chunk
    os.close(above)
    assert process.returncode == 0, text.decode()
    return text.decode()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that nobody is at the other end
        return b""


def test_a_joint_run_on_a_terminal():
    with tempfile.TemporaryDirectory() as folder:  # a short path: one that is too long for a line is not cut
        text = on_terminal([*JOINT, f"hydra.run.dir={folder}/out"])
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", text) if line.strip()]
    assert lines[0].startswith("recombine: crisp on tiny_vit, data offline (dsprites_loc), stage joint: loading")
    assert lines[1].strip() == "torch ..."
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    epochs = dict.fromkeys(re.findall(r"(\w+), epoch (\d+) of (\d+)", text))
    assert list(epochs) == [("distillation", "1", "1"), ("training", "1", "2"), ("training", "2", "2")]
    assert any(line.startswith("validation:") for line in lines) and any(line.startswith("test:") for line in lines)
    assert re.search(r"training, epoch 2 of 2: \|.*\| 2/2, 00:\d\d left, loss=\S+, val/acc=\S+", text)
    command = re.search(r"again with +(python run\.py .*)", text, re.DOTALL)[1]
    assert set(command.replace("\\\r\n", " ").split()) >= {*JOINT}


def test_the_first_line_is_there_before_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['run.py', *sys.argv[1:]]\n"
        "import run\n"
        "from recombine.runtime import progress\n"
        "say = run.say_what_loads\n"
        "run.say_what_loads = lambda *given: (say(*given), sys.exit('torch' in sys.modules))\n"
        "run.cli()"
    )
    line = "recombine: lora after svd on tiny_vit, data offline (dsprites_loc), stage adapt: loading torch ...\n"
    command = [sys.executable, "-c", code, "model=tiny_vit", "method@compressor=svd", "method=lora"]
    for more, rank, said in (([], "0", line), ([], "1", ""), (["trainer.progress=false"], "0", "")):
        arguments = [*command, f"hydra.run.dir={tmp_path}", *more]
        done = subprocess.run(
            arguments, cwd=ROOT, env=os.environ | {"RANK": rank, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, said, "")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def levels():
    """The levels of the libraries' loggers, put back afterwards."""
    loggers = [logging.getLogger(name) for name in (*logs.LIBRARIES, *logs.LIGHTNING)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("client", [httpx, httpx2])
def test_addresses_stay_out_of_the_logs(client, levels, caplog):
    """A real request: httpx, and httpx2 of the hub, name the signed address until they are told not to."""
    caplog.set_level(logging.INFO)  # of the root logger, as Hydra sets it
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/file?signature=secret"
        assert client.get(address, trust_env=False).status_code == 200
        assert "signature=secret" in caplog.text
        caplog.clear()
        logs.quiet_libraries()
        assert client.get(address, trust_env=False).status_code == 200
        server.shutdown()
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["timm.models._builder", "huggingface_hub.file_download", "alembic.runtime.migration"])
def test_warnings_pass_and_news_does_not(name, levels, caplog):
    caplog.set_level(logging.INFO)
    logs.quiet_libraries()
    logging.getLogger(name).info("news")
    logging.getLogger(name).warning("trouble")
    assert [record.message for record in caplog.records] == ["trouble"]


def test_bars_of_libraries_follow_the_progress_key(capsys):
    from lm_eval.models.huggingface import tqdm  # as lm-eval draws them

    for shown in (False, True):
        with progress.display(shown), progress.bars_as_wanted():
            list(tqdm(range(3), desc="Running requests", disable=False))
        assert ("Running requests" in capsys.readouterr().err) == shown
    list(tqdm(range(3), desc="afterwards"))
    assert "afterwards" in capsys.readouterr().err


CHOICE = """
import os, json
from recombine.runtime import threads
words = threads.settle()
print(json.dumps([words, {name: os.environ[name] for name in threads.ANSWERED if name in os.environ}]))
"""


def settled(given: dict[str, str], busy: int) -> list:
    """What a new process chooses beside `busy` others that each burn a core: [words, variables]."""
    clean = {key: value for key, value in os.environ.items() if key not in threads.ANSWERED}
    burn = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(burn, stdout=subprocess.PIPE) for _ in range(busy)]
    try:
        assert all(process.stdout.readline() for process in others)  # they burn
        done = subprocess.run(
            [sys.executable, "-c", CHOICE], cwd=ROOT, env=clean | given, capture_output=True, text=True
        )
    finally:
        for process in others:
            process.kill()
            process.communicate()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/loadavg")
def test_a_busy_machine_gets_fewer_threads_which_sleep():
    cores = len(os.sched_getaffinity(0))
    words, variables = settled({}, busy=os.cpu_count() + 1)
    assert variables == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} or cores == 1 and not variables
    assert cores == 1 or words == f"1 of {cores} cores, as other work runs"


@pytest.mark.parametrize("given", [{"OMP_NUM_THREADS": "2"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_user_says_of_threads_holds(given):
    assert settled(given, busy=os.cpu_count() + 1) == [None, given]
