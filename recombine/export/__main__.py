"""python -m recombine.export RUN_FOLDER_OR_FILE [--to hf] [--out FOLDER]: a compressed model for other libraries.

The folder of a run says in its result.json which checkpoint is meant; the command and the scores go into the model
card. --to hf: its own code, for transformers; dense: merged; lora: the difference to the pretrained weights, for peft;
torch, onnx, openvino: one graph for every batch size.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import recombine
from recombine.errors import EXPECTED, UsageError, one_line
from recombine.export.folder import FORMATS, check, export
from recombine.results import checkpoint_file


def main(arguments: list[str] | None = None) -> int:
    """The command line; arguments: None for the process's own. Returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        "python -m recombine.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN_FOLDER_OR_FILE", help="the folder of a run, or a file that save wrote")
    parser.add_argument("--to", default="hf", metavar="FORMAT", help=f"{', '.join(FORMATS)} (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="a new folder (default: the format's name, beside the file)")
    parser.add_argument("--rank", type=int, help="of --to lora: at most so many directions a layer")
    parser.add_argument("--energy", type=float, help="of --to lora: the share of the difference that is kept")
    given = parser.parse_args(arguments)
    try:
        file, run = found(Path(given.source).expanduser())
        out = check(given.out or file.parent / given.to, given.to)
        options = {key: value for key in ("rank", "energy") if (value := getattr(given, key)) is not None}
        print(f"wrote {export(recombine.load(file).eval(), out, given.to, run=run, **options)}")
    except EXPECTED as error:
        print(f"export: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def found(source: Path) -> tuple[Path, dict[str, Any] | None]:
    """(the checkpoint, the result.json of its run or None) of a run's folder or a file.

    Raises:
        UsageError: there is no such run, or it names no checkpoint.
    """
    if source.is_file():
        run = result(source.parent)
        return source, run if run and Path(run.get("checkpoint") or "").name == source.name else None
    if not source.is_dir():
        raise UsageError(f"{source}: no such file or folder; name a run's folder, or a file that recombine.save wrote")
    run = result(source)
    if run is None or not run.get("checkpoint"):
        raise UsageError(f"{source}: holds no result.json that names a checkpoint; name the folder of a finished run")
    if (file := checkpoint_file(source, run)) is None:
        where = f"{run['checkpoint']} is not there, or not in the bits of the run"
        raise UsageError(f"{source}: no file holds its model ({where}); run it in a new folder with export=FORMAT")
    return file, run


def result(folder: Path) -> dict[str, Any] | None:
    """The result.json of a folder; None: it has none that can be read."""
    try:
        run = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return run if isinstance(run, dict) else None


if __name__ == "__main__":
    sys.exit(main())
