"""What `export=` asks for at the end of a run: folders for other libraries beside result.json."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from recombine import results
from recombine.core.checkpoint import load
from recombine.errors import UsageError
from recombine.export.folder import export, require_format
from recombine.result_schema import Result


def require_possible(formats: Sequence[str], model: nn.Module, bits: int | str | None) -> None:
    """Refuses, before the run, a format that cannot hold what it will make.

    Args:
        model: the pretrained one.
        bits: of `quantize`.

    Raises:
        UsageError: names the format, and why.
    """
    for to in formats:
        require_format(model, to)
    if "lora" in formats:
        fix = "say export=hf"
        if model.recombine_weights is None:
            raise UsageError(f"export=lora: is the difference to pretrained weights, and there are none; {fix}")
        if bits is not None:
            raise UsageError(f"export=lora: cannot hold how quantize.bits={bits} rounds; {fix}, or quantize.bits=null")


def write(formats: Sequence[str], model: nn.Module, out: Path, result: Result) -> None:
    """Writes a folder of each format into the run's, and names them in result.json, which is there already.

    Raises:
        UsageError: the model cannot be written so. The result stays, without that folder.
    """
    for name in formats:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off here
        export(model, folder, name, run=result)
        result["exports"] = result.get("exports", {}) | {name: str(folder)}
        results.write(out / "result.json", result)
        print(f"{folder}: the model as {name}", flush=True)


def make_up(formats: Sequence[str], out: Path, result: Result) -> None:
    """Writes the folders of a run that finished without them, from its checkpoint.

    Raises:
        UsageError: as in `write`, or the run left no checkpoint.
    """
    if not (missing := results.missing_exports(formats, result)):
        return
    if (file := results.checkpoint_file(out, result)) is None:
        raise UsageError(
            f"export={','.join(missing)}: {out} holds no checkpoint to write it from; start another folder"
        )
    with results.lock_folder(out):
        write(missing, load(file).eval(), out, result)
