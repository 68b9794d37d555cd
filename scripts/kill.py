"""Interruptions at random: a run that is killed and started again has to end as one that nothing interrupted.

    python scripts/kill.py [--trials 100] [--seed 0] [--kinds adapt,joint,ranks,sweep] [--jobs 2]

A trial is one run, with the default interval between training states or a short one. It gets one to three signals
(SIGKILL or SIGTERM), each at a random time or as soon as the state of an epoch's end is there, and is started again by
the same command until it finishes. Of two ranks and of sweeps, one process or all of them get the signal. Then its
scores, the sha256 of its best.safetensors, its curves and the rest of its result.json are compared with those of a run
that was left alone. A table says what was hit and what differed. The exit code is 1 where anything differed or failed.

Imports take longer than these runs. So this process imports torch and forks the runs, and where a run starts
interpreters (its ranks, the workers of a sweep) it forks those too. What is forked is killed for real.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tiny tensors, and threads do not survive a fork
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import forked

import run
from recombine.runner import pool, ranks

STEPS = 14  # an epoch of TINY; several ranks look for a signal every ten
TINY = ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "data.batch_size=4", f"data.limit={4 * STEPS}"]
LORA = ["method=lora", "method.rank=4", "probe=false"]
KINDS = {
    "adapt": [*LORA, "data.augment=crop", "trainer.epochs=4"],
    "joint": ["method=svd", "stage=joint", "budget=retained_50", "stage.distil.epochs=2", "trainer.epochs=2"],
    "ranks": [*LORA, "trainer.devices=2", "trainer.strategy=ddp", "trainer.epochs=3"],
    "sweep": [*LORA, "seed=0,1", "retry=true", "trainer.epochs=2"],
}
MINUTES = (None, 0.002, 0)  # between states; None: the default, 0: after every step, or every tenth of several ranks
VOLATILE = ("seconds", "images_per_second", "environment", "command", "checkpoint")
SCORES = ("val", "test", "linear_probe", "best_epoch")
PATIENCE = 300.0  # seconds for a run, or for what it leaves behind


def start(kind: str, folder: Path, minutes: float | None) -> forked.Child:
    """Starts the run of a trial in a process group of its own; its output goes to log.txt beside the folder."""
    where, flags = ("sweep", ["-m"]) if kind == "sweep" else ("run", [])
    short = [] if minutes is None else [f"trainer.checkpoint_minutes={minutes}"]

    def work() -> int:
        os.setsid()
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        ranks.start_rank, pool.hire = forked.fork_rank, forked.fork_worker
        sys.argv = ["run.py", *flags, *TINY, *KINDS[kind], *short, f"hydra.{where}.dir={folder}"]
        return run.cli()

    return forked.Child(work)


def group(leader: int) -> list[int]:
    """The living processes of a group."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of_group) == leader and state != "Z":
            alive.append(int(stat.parent.name))
    return sorted(alive)


def ends_of_epochs(folder: Path) -> set[tuple[str, str, int]]:
    """The (folder, fit, step) of the states below the folder that are of an epoch's end."""
    found = set()
    with suppress(FileNotFoundError):  # the state of a run goes when it ends
        for path in folder.rglob("*.ckpt"):
            fit, step, _ = path.name.split("-")
            found |= {(str(path.parent), fit, int(step))} if int(step) % STEPS == 0 else set()
    return found


def outcome(folder: Path) -> dict[int, dict]:
    """seed -> what must not depend on interruptions, in parts."""
    found = {}
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        for key in VOLATILE:
            result.pop(key, None)
        del result["config"]["trainer"]["checkpoint_minutes"]
        distil = result.pop("distil", {})
        parts = {"curves": [result.pop("curves"), distil.pop("curves", None)]}
        parts["scores"] = [distil, *(result.pop(key, None) for key in SCORES)]
        parts["sha256"] = hashlib.sha256((path.parent / "best.safetensors").read_bytes()).hexdigest()
        found[result["seed"]] = parts | {"rest": result}
    return found


def differences(whole: Path, broken: Path) -> list[str]:
    """The parts in which the results below two folders differ: curves, scores, sha256, rest, or the runs themselves."""
    one, other = outcome(whole), outcome(broken)
    if not one or one.keys() != other.keys():
        return [f"results of the seeds {sorted(one)} and {sorted(other)}"]
    return sorted({part for seed in one for part in one[seed] if one[seed][part] != other[seed][part]})


def finish(child: forked.Child) -> int:
    """The exit code of a run, once nothing of it lives.

    Raises:
        TimeoutError: it does not end.
    """
    deadline = time.monotonic() + PATIENCE
    while child.poll() is None or group(child.pid):
        if time.monotonic() > deadline:
            for pid in group(child.pid):
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"processes lived on for {PATIENCE:g} s")
        time.sleep(0.02)
    return child.exitcode


@dataclass
class Trial:
    """One trial: how it is interrupted, and what came of it.

    signals: (name of the signal, "random" or "epoch end", whether it came while the run worked), in order.
    wrong: what differs from the run that was left alone, or what failed; empty where nothing does.
    """

    kind: str
    number: int
    seed: int
    minutes: float | None = None
    signals: list[tuple[str, str, bool]] = field(default_factory=list)
    wrong: str = ""

    def work(self, root: Path, seconds: float) -> "Trial":
        """Interrupts a run and compares it. seconds: how long one takes that is left alone."""
        draw = random.Random(f"{self.seed} {self.kind} {self.number}")
        folder, self.minutes = root / f"{self.kind}-{self.number}", draw.choice(MINUTES)
        try:
            for _ in range(draw.randint(1, 3)):
                if not self.interrupt(draw, folder, seconds):
                    break
            if code := finish(start(self.kind, folder, self.minutes)):
                raise RuntimeError(f"exit code {code}")
            self.wrong = ", ".join(differences(root / self.kind, folder))
        except Exception as error:
            self.wrong = f"failed: {type(error).__name__}: {error}"
        return self

    def interrupt(self, draw: random.Random, folder: Path, seconds: float) -> bool:
        """Starts the run and sends one signal. False: it finished before."""
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        how, target = draw.choice(("random", "epoch end")), draw.choice(("run", "part", "all"))
        delay, wanted = draw.uniform(0, 0.9 * seconds), draw.choice((1, 1, 2))
        before, began, seen = ends_of_epochs(folder), time.monotonic(), set()
        child = start(self.kind, folder, self.minutes)
        while child.poll() is None:
            if how == "epoch end":
                seen |= ends_of_epochs(folder) - before
            if len(seen) >= wanted or how == "random" and time.monotonic() - began > delay:
                break
            time.sleep(0.004)
        victims = group(child.pid) or [child.pid]
        victims = {"run": [child.pid], "part": victims[-1:], "all": victims}[target]
        if hit := child.poll() is None:
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.signals.append((number.name, how, hit))
        code = finish(child)
        if code and not hit:
            raise RuntimeError(f"exit code {code} before any signal")
        if not code and len(outcome(folder)) < len(outcome(folder.parent / self.kind)):
            raise RuntimeError(f"{number.name}: exit code 0 without a result")
        return code != 0


def reference(kind: str, root: Path) -> float:
    """A run that is left alone; its seconds."""
    began = time.monotonic()
    if code := finish(start(kind, root / kind, None)):
        raise RuntimeError(f"{kind}: exit code {code}, see {root / kind}.log")
    return time.monotonic() - began


def main() -> int:
    """Runs the trials and prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="in all; the kinds take turns")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds {unknown[0]}: choose from {', '.join(KINDS)}")
    root = Path(tempfile.mkdtemp(prefix="recombine-kill-"))
    trials = [Trial(kinds[i % len(kinds)], i, asked.seed) for i in range(asked.trials)]
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("fork")) as executor:
        seconds = dict(zip(kinds, executor.map(reference, kinds, [root] * len(kinds)), strict=True))
        done = []
        for future in as_completed([executor.submit(trial.work, root, seconds[trial.kind]) for trial in trials]):
            done.append(trial := future.result())
            if trial.wrong:
                print(
                    f"{trial.kind}-{trial.number}: {trial.wrong} (minutes {trial.minutes}, {trial.signals})", flush=True
                )
    print(table(done))
    if wrong := [trial for trial in done if trial.wrong]:
        print(f"{len(wrong)} of {len(done)} differ or failed; their folders and logs are in {root}")
        return 1
    shutil.rmtree(root)
    return 0


def table(done: list[Trial]) -> str:
    """A line a kind: its trials, those that a signal hit, the signals that hit by name and time, what was identical."""
    heads = ["kind", "trials", "hit", "SIGKILL", "SIGTERM", "random", "epoch end", "identical", "not"]
    rows = [heads]
    for kind in [*dict.fromkeys(trial.kind for trial in done), "all"]:
        mine = [trial for trial in done if kind in (trial.kind, "all")]
        hits = [[(name, how) for name, how, hit in trial.signals if hit] for trial in mine]
        counts = Counter(word for signals in hits for pair in signals for word in pair)
        wrong = sum(bool(trial.wrong) for trial in mine)
        rows.append(
            [kind, len(mine), sum(map(bool, hits)), *(counts[head] for head in heads[3:7]), len(mine) - wrong, wrong]
        )
    return "\n".join(f"{row[0]:<8}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
