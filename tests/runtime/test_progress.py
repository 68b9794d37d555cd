"""Progress: a bar on a terminal, few lines in a file."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from helpers import ROOT
from helpers.command import execute
from helpers.watched import SVD
from recombine.runtime import progress

pytestmark = pytest.mark.usefixtures("no_wandb_account")

PROGRAM = """
import sys
from tqdm import std
from recombine.runtime import progress

now = [0.0]  # the clock that tqdm reads: a loaded machine has no say
std.time = lambda: now[0]
with progress.display(sys.argv[1] == "true"):
    for _ in progress.of(range(30), "factors", "layers"):
        now[0] += 5
    for _ in progress.of(range(3), "short"):
        now[0] += 0.1
"""


def said(shown: str, terminal: bool) -> str:
    """What the program above writes to stderr."""
    command = [sys.executable, "-c", PROGRAM, shown]
    if not terminal:
        return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True).stderr
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, stderr=its)
    os.close(its)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # it has closed its end
        assert process.wait() == 0
    return text.decode()


def test_progress_is_a_bar_on_a_terminal_and_few_lines_in_a_file():
    lines = said("true", terminal=False).splitlines()  # a layer takes 5 seconds, a line comes every 30
    assert [line.split(",")[0] for line in lines] == [f"factors: {n} of 30 layers" for n in (6, 12, 18, 24, 30)]
    bar = said("true", terminal=True)
    assert "\rfactors:" in bar and "/30" in bar and "short" not in bar
    assert said("false", terminal=True) == said("false", terminal=False) == ""


def test_a_fit_in_a_file_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    execute(tmp_path, "trainer.progress=true", *SVD)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: epoch ")]
    assert len(lines) == 2 and "epoch 2 of 2" in lines[1] and "val/acc" in lines[1]
