"""Tries random configurations, good and bad ones, and looks at what comes of each.

    python scripts/fuzz.py                      200 configurations, seed 0
    python scripts/fuzz.py --runs 2000 --seed 7
    python scripts/fuzz.py --replay 17          configuration 17 of that seed again, with its output

Every key of every node is drawn from its schema (recombine/runtime/schema.py), so that a new key is tried as soon as it
is there. What is drawn is a small run with one to three changes: values in range and at its ends, values out of range
or of another kind, misspelt keys, other choices of the groups, budgets, and combinations of these.

A configuration has to end in one of two ways: in one line on stderr with exit code 2, or in a result of finite numbers.
A value out of its range must not be accepted. Runs are forked from one process that has imported everything.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from scripts.fuzz_cases import Case, case  # noqa: E402

CPU_SECONDS = 20  # that a small run may take
IMPORTS = 20  # more for each rank of several: they are processes of their own, which import everything again
GRAPH = 60  # more for a graph: it is traced, and for ONNX traced again
WALL_SECONDS = 300  # after which it is taken to wait for something


def run(found: Case, folder: Path) -> tuple[int | str, str, float]:
    """Runs a configuration in a forked process. Returns (exit code or "hang", its output, CPU seconds)."""
    log = folder / "log.txt"
    if (pid := os.fork()) == 0:
        child(found, folder, log)
    end = time.monotonic() + WALL_SECONDS
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    seconds = usage.ru_utime + usage.ru_stime
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    code = "hang" if killed else os.waitstatus_to_exitcode(status)
    return code, log.read_text(errors="replace"), seconds


def child(found: Case, folder: Path, log: Path) -> None:
    """The life of the forked process."""
    code = 99
    try:
        seconds = CPU_SECONDS + (IMPORTS if any("trainer.devices=" in word for word in found.arguments) else 0)
        seconds += GRAPH if {"export=torch", "export=onnx", "export=openvino"} & {*found.arguments} else 0
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.setsid()
        os.chdir(folder)
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.argv = ["run.py", "trainer.progress=false", f"hydra.run.dir={folder}/out", *found.arguments]
        import run as program

        code = program.cli()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def verdict(found: Case, code: int | str, output: str, folder: Path) -> tuple[str, str]:
    """(what became of a configuration, what is wrong with that; empty: nothing)"""
    if code == "hang":
        return "hang", f"took more than {CPU_SECONDS} seconds"
    if "Traceback" in output:
        return "trace", output.strip().splitlines()[-1]
    lines = [line for line in output.splitlines() if line.startswith("run.py: ")]
    path = folder / "out" / ("plan.json" if "stage=plan" in found.arguments else "result.json")
    if code == 2 and path.is_file() and any(line.startswith("export=") for line in found.arguments) and not found.bad:
        return "ran", ""  # and its model cannot be written in that format; the result is there
    if code == 2:
        rest = [line for line in output.splitlines() if line and line not in lines and not allowed(line)]
        if len(lines) != 1:
            return "refused", f"{len(lines)} lines: {lines[:2]}"
        if rest:
            return "refused", f"other lines beside it: {rest[:2]}"
        return "refused", ""
    if code != 0:
        return "ended", f"exit code {code}: {output.strip().splitlines()[-1:]}"
    if found.bad:
        return "accepted", f"nonsense: {' '.join(found.bad)}"
    if not path.is_file():
        return "ended", f"no {path.name}"
    if strange := not_finite(json.loads(path.read_text())):
        return "accepted", f"not finite: {strange}"
    return "ran", ""


def allowed(line: str) -> bool:
    """Whether a line may stand beside a refusal: what loads, notes, and lines of progress."""
    return (
        line.startswith(("loading ", "note: ", "data=", "W&B: ")) or ": " in line and line.split(": ")[0].isidentifier()
    )


def not_finite(result: dict) -> str:
    """A score or a loss of a result that is no finite number."""
    for part in ("val", "test"):
        for key, value in (result.get(part) or {}).items():
            if isinstance(value, float) and not math.isfinite(value) or value is None:
                return f"{part}.{key}={value}"
    return ""


def main() -> int:
    """Runs the configurations and prints what became of them. Exit code 1: one of them did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, help="only this configuration, with its output")
    options = parser.parse_args()
    counts, faults = Counter(), 0
    warm()
    for number in range(options.runs) if options.replay is None else [options.replay]:
        found = case(random.Random(f"{options.seed} {number}"))
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        code, output, seconds = run(found, folder)
        what, why = verdict(found, code, output, folder)
        shutil.rmtree(folder, ignore_errors=True)
        counts[what] += 1
        if why:
            faults += 1
            print(f"{number} {what}: {why}\n    python run.py {' '.join(found.arguments)}", flush=True)
        if options.replay is not None:
            print(f"python run.py {' '.join(found.arguments)}\n{output}\n{what}, {seconds:.1f} s {why}")
    print(f"{sum(counts.values())} configurations: {dict(counts)}, {faults} not as they should be")
    return 1 if faults else 0


def warm() -> None:
    """Imports what runs import, so that each starts at once."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import recombine.report  # noqa: F401
    import run as program  # noqa: F401
    from recombine.runner import ranks  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
