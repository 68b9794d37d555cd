"""What `export=` asks for at the end of a run: folders for other libraries beside result.json."""

import shutil

from recombine import results
from recombine.export.folder import export
from recombine.result_schema import Result
from recombine.stages.context import RunContext


def write(formats: tuple[str, ...], run: RunContext, result: Result) -> None:
    """Writes a folder of each format into the run's, and names them in result.json, which is there already.

    Raises:
        UsageError: the model cannot be written so. The result stays, without that folder.
    """
    for name in formats:
        folder = run.out / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off here
        export(run.model, folder, name, run=result)
        result["exports"] = result.get("exports", {}) | {name: str(folder)}
        results.write(run.out / "result.json", result)
        print(f"{folder}: the model as {name}", flush=True)
