"""The command line before Hydra reads it: flags anywhere, and what a run cannot do without."""

import os
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString

from recombine.errors import UsageError, did_you_mean
from recombine.runner.quoting import parse, readable
from recombine.runtime import conf, help
from recombine.runtime.conf import CONF

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")


def prepared(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags and the overrides, as Hydra takes them.

    Args:
        arguments: as typed, without the program.

    Raises:
        UsageError: one of them can be no part of a run.
    """
    flags, overrides = split(arguments)
    overrides = planned([readable(override) for override in overrides])
    return flags, [checked(override, parse(override)) for override in overrides]


def planned(overrides: Sequence[str]) -> list[str]:
    """The overrides, with stage=plan beside the stage that is planned, which an experiment or its cells may choose.

    >>> planned(["stage=joint", "stage=plan", "stage.device=h100_80gb"])
    ['stage=joint', 'stage@plan=plan', 'plan.device=h100_80gb']
    """
    if "stage=plan" not in overrides:
        return list(overrides)
    own = tuple(f"stage.{key}=" for key in conf.load("stage", "plan"))
    return ["stage@plan=plan" if o == "stage=plan" else f"plan{o[5:]}" if o.startswith(own) else o for o in overrides]


def cell_by_cell(overrides: Sequence[str]) -> list[str]:
    """The overrides, with keys of a group that is swept over as sweeps of one value: `method.rank=choice(4)`.

    Hydra sets plain keys before it looks at the cells: `-m method=svd,lora method.rank=4` would set the rank of the
    default method, which has none.
    """
    parsed = [parse(override) for override in overrides]
    swept = [o.get_key_element() for o in parsed if o.is_sweep_override() and o.get_key_element() in help.groups()]
    return [
        f"{o.get_key_element()}=choice({o.input_line.partition('=')[2]})"
        if o.get_key_element().startswith(tuple(f"{group}." for group in swept)) and not o.is_sweep_override()
        else override
        for o, override in zip(parsed, overrides, strict=True)
    ]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, which may stand anywhere, and the overrides.

    Raises:
        UsageError: there is no such flag, or it lacks its value.
    """
    parser = get_args_parser()
    known = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> None:
        wrong = message.rpartition(": ")[2] if message.startswith("unrecognized") else ""
        raise UsageError(f"{message}; {did_you_mean(wrong, known)}--hydra-help lists the flags")

    parser.error = refuse
    given = parser.parse_intermixed_args(list(arguments))
    if given.resolve and given.cfg is None:
        raise UsageError("--resolve: goes with --cfg, which prints the configuration; say --cfg job --resolve")
    left, flags = list(given.overrides), []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            flags.append(argument)
    return flags, given.overrides


def checked(override: str, parsed: Override) -> str:
    """The override, if a run can have it. `group=null`, which Hydra cannot say, becomes `~group`.

    Raises:
        UsageError: it takes away what a run needs, or names no experiment, or a folder that cannot be one.
    """
    key = parsed.get_key_element().lstrip("+~")
    required = {group: choice is not None for group, choice in help.groups().items() if group != "experiment"}
    optional = {"experiment", *help.optional_groups()}
    if parsed.type is OverrideType.DEL:
        if key not in optional:
            known = f", which is one of {', '.join(help.choices(key))}" if key in required else ""
            raise UsageError(f"{override}: no key can be taken away; say {key}=VALUE{known}")
        return override
    for value in options(parsed):
        if key in required or key in optional:
            refuse_no_choice(key, value, key in optional)
        elif key in FOLDERS:
            refuse_no_folder(key, value)
        elif key == "budget" and value is None:
            raise UsageError(f"{override}: say budget=none, or for example budget=retained_50")
    return f"~{key}" if key in optional and parsed.value() is None else override


def options(parsed: Override) -> Iterator[Any]:
    """The value of an override, or each that it sweeps over."""
    if not parsed.is_sweep_override():
        yield parsed.value()
    elif parsed.is_discrete_sweep() and parsed.is_choice_sweep():
        yield from (value.text if isinstance(value, QuotedString) else value for value in parsed.value().list)


def refuse_no_choice(group: str, value: Any, optional: bool) -> None:
    """Refuses what can be no choice of a group. Of words Hydra knows more, as a user may have folders of his own.

    Raises:
        UsageError: the value is no word, or there is no such experiment.
    """
    known = help.choices(group.partition("@")[0])
    if value is None and optional:
        return
    if not isinstance(value, str) or not value:
        shown = "null" if value is None else value
        raise UsageError(f"{group}={shown}: must be one of {', '.join(known if group != 'experiment' else ['start'])}")
    if group == "experiment" and not (CONF / "experiment" / f"{value}.yaml").is_file():
        near = near_experiments(value, known)
        hint = f"did you mean {near[0]}?" if len(near) == 1 else f"choose from {', '.join(near or known)}"
        raise UsageError(f"experiment={value}: there is no such experiment; {hint}")


def near_experiments(wrong: str, known: Iterable[str]) -> list[str]:
    """The experiments that a wrong name may mean: those of that folder, that table or that figure, or the nearest.

    >>> near_experiments("fig08", ["start", "crisp/fig08", "crisp/fig07"])
    ['crisp/fig08']
    """
    known = list(known)
    folder = [name for name in known if name.startswith(f"{wrong}/")]
    inside = folder or [name for name in known if wrong in name]
    nearest = inside or get_close_matches(wrong, known, 5)
    return nearest or [name for name in known if did_you_mean(wrong, [name.rpartition("/")[2]])][:5]


def refuse_no_folder(key: str, value: Any) -> None:
    """Refuses a folder of results that is none, cannot be made, or is that of the project.

    Raises:
        UsageError: says why, and a folder to take instead.
    """
    shown = "null" if value is None else value
    fix = f"say {key}=FOLDER, for example outputs/mine"
    if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
        raise UsageError(f"{key}={shown}: must be the name of a folder; {fix}")
    path = Path(str(value)).absolute()
    if "${" in str(value):  # the configuration tells
        return
    if path.resolve() == CONF.parent.resolve():
        raise UsageError(f"{key}={shown}: is the project's own folder, which results would litter; {fix}")
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise UsageError(f"{key}={shown}: {there} is not a folder; {fix}")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{key}={shown}: nothing may be written into {there}; {fix}")
