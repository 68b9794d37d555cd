"""python -m recombine.report <experiment> [key=value ...]: the experiment's table, from what has been run so far.

Results are read from outputs/<experiment>, or else from the committed experiments/<experiment>/runs.jsonl.
key=value are those that the runs were started with (trainer.epochs=1, only=...).
"""

import argparse
import shutil
import sys

from recombine.errors import EXPECTED, one_line
from recombine.report import load, save
from recombine.report.render import FORMATS, text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m recombine.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="the name of a file in conf/experiment, for example cersa/tab09")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument(
        "--save",
        action="store_true",
        help="also write experiments/<experiment>/: runs.jsonl, the table as .md, .tex and .csv, and the plots",
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        report = load(given.experiment, given.overrides)
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


if __name__ == "__main__":
    sys.exit(main())
