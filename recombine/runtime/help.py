"""`python run.py --help`, written from the comments in conf/. It takes no torch, so it comes at once."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf

from recombine.errors import UsageError
from recombine.runtime.conf import CONF, parts

WIDTH = 80
FLAGS = ("--help", "-h")
HEAD = """recombine: compress a pretrained transformer, adapt it, or both at once.

  python run.py [group=choice ...] [key=value ...]
"""
EXAMPLES = """Examples
  CRISP halves DINOv2 ViT-S and adapts it:
    python run.py experiment=start
  CRISP adapts it at its exact size:
    python run.py
  another method, another task:
    python run.py method=lora data.task=emoji
  compress to half, distil, adapt:
    python run.py stage=joint budget=retained_50 method=crisp
  rewrite and count, without training:
    python run.py stage=retrofit method=cersa method.alpha=0.9
  a sweep, one folder a run:
    python run.py -m method=crisp,cersa,lora seed=0,1,2

Results: a table, and a folder outputs/<date>/<time>-<overrides>/ that holds
result.json and best.safetensors.

Hydra's flags: --cfg job prints the composed configuration, -m sweeps,
--hydra-help lists all of them.
"""


def text(arguments: Iterable[str] = ()) -> str:
    """The text that --help prints.

    Args:
        arguments: the rest of the command line. `method=crisp` among them asks for the keys of that choice.

    Raises:
        UsageError: one of them names no choice of a group.
    """
    asked = [argument for argument in arguments if not argument.startswith("-")]
    return "\n".join(map(about, asked)) if asked else overview()


def overview() -> str:
    """The groups with their choices, the keys of conf/config.yaml, and examples."""
    lines = [HEAD, "Groups: take one of each with group=choice. This shows the keys of a choice:"]
    lines += ["  python run.py --help method=crisp", ""]
    for group, default in groups().items():
        others = [choice for choice in choices(group) if choice != default]
        names = ", ".join([f"{default} (the default)", *others] if default else others)
        lines.append(textwrap.fill(f"  {group}: {names}", WIDTH, subsequent_indent="    ", **WHOLE))
    for group, comment in optional_groups().items():
        lines.append(textwrap.fill(f"  {group}: {comment}", WIDTH, subsequent_indent="    ", **WHOLE))
    lines += ["", "Keys: set any with key=value, for example method.chunk=16 or trainer.epochs=20", ""]
    body = (CONF / "config.yaml").read_text().partition("\nbudget:")[2].partition("\nhydra:")[0]
    lines += [f"  {line}" for line in wrapped(f"budget:{body}".splitlines(), WIDTH - 2)]
    return "\n".join([*lines, "", EXAMPLES])


WHOLE = {"break_long_words": False, "break_on_hyphens": False}  # names of choices and keys stay whole


def groups() -> dict[str, str | None]:
    """Each group that conf/config.yaml takes a choice of, with the default."""
    defaults: dict[str, str | None] = {}
    for entry in OmegaConf.load(CONF / "config.yaml").defaults:
        if not isinstance(entry, str):
            ((group, choice),) = entry.items()
            defaults.setdefault(group.removeprefix("override ").partition("@")[0], choice)
    return {group: choice for group, choice in defaults.items() if (CONF / group).is_dir()}  # others are Hydra's own


def optional_groups() -> dict[str, str]:
    """Each slot of conf/config.yaml that may stay empty, such as method@compressor, and what it is for."""
    return dict(re.findall(r"  - (\S+@\S+): null # (.*)", (CONF / "config.yaml").read_text()))


def choices(group: str) -> list[str]:
    """The names of a group's files without those that only serve others: what begins with _, what experiments share."""
    names = [str(path.relative_to(CONF / group))[:-5] for path in sorted((CONF / group).rglob("*.yaml"))]
    served = shared_experiments() if group == "experiment" else set()
    return [name for name in names if not name.rpartition("/")[2].startswith("_") and name not in served]


def shared_experiments() -> set[str]:
    """The experiments that others build on. By itself such a one is no table."""
    texts = [path.read_text() for path in (CONF / "experiment").rglob("*.yaml")]
    texts += [path.read_text() for path in (CONF / "shared").rglob("*.yaml")]
    return {name for text in texts for name in re.findall(r"[\[ ]/experiment/([\w/]+)", text)}


def about(argument: str) -> str:
    """The keys of one choice with their comments, those of the files that it builds on first."""
    group, _, choice = argument.partition("=")
    group = group.partition("@")[0]
    if group not in groups():
        raise UsageError(f"--help {argument}: no such group; say for example --help method=crisp, or --help alone")
    if not (files := parts(group, choice)):
        raise UsageError(f"--help {argument}: no such choice; {group} has {', '.join(choices(group))}")
    prefix = "" if group == "experiment" else group.replace("/", ".") + "."
    first = f"{argument} holds these keys. Set one with {prefix}<key>=<value>."
    lines = [textwrap.fill(first, WIDTH, **WHOLE), ""]
    for path in files:
        lines += [f"conf/{path.relative_to(CONF)}", *(f"  {line}".rstrip() for line in shown(path)), ""]
    return "\n".join(lines)


def shown(path: Path) -> list[str]:
    """A file's lines without what only Hydra reads."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    kept = re.sub(r"^defaults:.*\n(  - .*\n)*\n?", "", "\n".join(lines) + "\n", flags=re.MULTILINE)
    return wrapped(kept.splitlines(), WIDTH - 2)


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    """The lines of a YAML file, none longer than `width`: a comment that does not fit goes above its key."""
    fitted: list[str] = []
    for line in lines:
        start = " " * (len(line) - len(line.lstrip()))
        key, mark, comment = line.partition(" # ")
        if len(line) <= width:
            fitted.append(line)
        elif line.lstrip().startswith("#"):
            fitted += fill(line.lstrip("# "), f"{start}# ", width)
        else:
            fitted += fill(comment, f"{start}# ", width) if mark else []
            fitted += textwrap.wrap(key, width, subsequent_indent=f"{start}  ", **WHOLE)
    return fitted


def fill(comment: str, start: str, width: int) -> list[str]:
    """A comment as lines, each of which begins with `start`."""
    return textwrap.wrap(comment, width, initial_indent=start, subsequent_indent=start, **WHOLE)
