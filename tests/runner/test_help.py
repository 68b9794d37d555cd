"""Every key of conf/ has a comment, and `python run.py --help` shows it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import run
from recombine.errors import UsageError
from recombine.runtime import conf, help

ROOT = conf.CONF.parent
KEY = re.compile(r"( *)(?:- )?([\w.@/-]+):(?: |$)")
FILES = sorted(path.relative_to(conf.CONF) for path in conf.CONF.rglob("*.yaml"))
NESTED = ("experiment", "shared")  # whose keys are those of other files; what they add stands at the top


def uncommented(path: Path) -> list[str]:
    """The lines of keys with a comment neither beside nor above them."""
    lines = (conf.CONF / path).read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if not line.startswith("#"))  # whose comment is the file's
    known = {"defaults", *OmegaConf.load(conf.CONF / "config.yaml"), *help.groups()}
    found, top = [], ""
    for i, line in enumerate(lines[head:], head):
        key = KEY.match(line)
        if key is None or line.lstrip().startswith("#"):
            continue
        top = top if key[1] else key[2]
        told = " # " in line or (i > head and lines[i - 1].lstrip().startswith("#"))
        elsewhere = path.parts[0] in NESTED and (key[1] or key[2] in known)
        if top != "defaults" and not told and not elsewhere:
            found.append(line)
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_key_has_a_comment(path):
    text = (conf.CONF / path).read_text()
    assert text.startswith("#"), "a file begins with what it is for"
    assert not (missing := uncommented(path)), missing


def flat(text: str) -> str:
    """Words alone, so that a comment that was wrapped is found."""
    return " ".join(text.replace("#", " ").split())


def test_help_shows_the_comments_and_fits_a_terminal():
    out = help.text()
    assert max(map(len, out.splitlines())) <= help.WIDTH
    body = (conf.CONF / "config.yaml").read_text().partition("\nbudget:")[2].partition("\nhydra:")[0]
    comments = re.findall(r"# (.*)", body)
    assert len(comments) > 15 and all(flat(comment) in flat(out) for comment in comments)
    assert "vtab" in out and "_suite" not in out and "shared" not in out


@pytest.mark.parametrize("group", [group for group in help.groups() if group != "experiment"])
def test_help_of_a_choice_shows_its_keys_with_those_it_builds_on(group):
    for choice in help.choices(group):
        out = help.text([f"{group}={choice}"])
        assert max(map(len, out.splitlines())) <= help.WIDTH
        for path in conf.parts(group, choice):
            assert all(flat(comment) in flat(out) for comment in re.findall(r"# (.*)", path.read_text()))


def test_help_of_every_experiment_fits_a_terminal():
    for choice in help.choices("experiment"):
        assert max(map(len, help.text([f"experiment={choice}"]).splitlines())) <= help.WIDTH, choice


def test_help_refuses_what_there_is_not():
    with pytest.raises(UsageError, match="no such choice; method has asvd, balf"):
        help.text(["method=crips"])
    with pytest.raises(UsageError, match="no such group"):
        help.text(["seed=3"])


def test_the_command_line_prints_it_without_torch(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--help", "method=svd"])
    assert run.cli() == 0 and "train_core: false" in capsys.readouterr().out
    check = "import sys, run; sys.argv = ['run.py', '-h']; assert run.cli() == 0 and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)


def test_a_choice_is_read_with_what_it_builds_on():
    assert conf.load("method", "recast")["mimicry"] == conf.load("method", "crisp")["mimicry"]
    assert conf.load("data", "vtab")["normalize"] == "imagenet" and conf.load("data", "vtab")["batch_size"] == 32
    assert conf.load("data", "nothing") is None
