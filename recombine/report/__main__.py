"""python -m recombine.report <experiment> [key=value ...]: the experiment's table, from what has been run so far.

Results are read from outputs/<experiment>, or else from the committed experiments/<experiment>/runs.jsonl. Give the
same key=value as the runs were started with (trainer.epochs=1, only=...).
"""

import argparse
import shutil
import sys
from pathlib import Path

from recombine.errors import EXPECTED, UsageError, one_line
from recombine.report import load, save
from recombine.report.render import FORMATS, text
from recombine.runner import arguments
from recombine.runtime.conf import need_clone


def main(typed: list[str] | None = None) -> int:
    """The command line; typed: None for the process's own. Returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        "python -m recombine.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", help="the name of a file in conf/experiment, for example cersa/tab09")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as the runs were started with")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the table (default: %(default)s)")
    parser.add_argument(
        "--save",
        action="store_true",
        help="also write experiments/<experiment>/: runs.jsonl, the table as .md, .tex and .csv, and the plots",
    )
    parser.add_argument(
        "--page",
        nargs="?",
        const="outputs/report.html",
        metavar="FILE",
        help="write one HTML page over all experiments instead (default: %(const)s)",
    )
    given = parser.parse_intermixed_args(typed)
    try:
        if given.page:
            need_clone("--page")
            return write_page(given)
        if not given.experiment:
            raise UsageError(
                "no experiment is named; name a file of conf/experiment, for example cersa/tab09, or give --page"
            )
        _, overrides = arguments.prepared(given.overrides)
        if moved := [line for line in given.overrides if line.startswith(("hydra.sweep.dir=", "hydra.run.dir="))]:
            raise UsageError(f"{moved[0]}: results are read from outputs/{given.experiment}; leave it out")
        report = load(given.experiment, [line for line in overrides if not line.startswith("hydra")])
        if given.format == "text":
            width = shutil.get_terminal_size((160, 0)).columns
            print(text(report.table, sys.stdout.isatty(), width), end="")
        else:
            print(FORMATS[given.format](report.table), end="")
        if given.save:
            print(*(f"wrote {path}" for path in save(report)), sep="\n", file=sys.stderr)
    except EXPECTED as error:
        print(f"report: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def write_page(given: argparse.Namespace) -> int:
    """Writes the page over all experiments; 1 if one of them could not be read."""
    from recombine.report.page import write

    if given.experiment or given.save:
        raise UsageError(f"--page: covers all experiments; leave out {given.experiment or '--save'}")
    unread = write(Path(given.page))
    print(*(f"report: {name}: {why}" for name, why in unread), sep="\n", end="\n" if unread else "", file=sys.stderr)
    print(f"wrote {given.page}")
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
