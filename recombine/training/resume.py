"""What an interrupted run goes on from: the state folder, `<run>/.state/<hash of the configuration>`.

- probe.safetensors, rewritten.safetensors, adapted.safetensors: what a phase left; its sha256 is in a .json beside it.
- distilled-<step>-<sha256>.ckpt, best-<step>-<sha256>.ckpt: the two newest training states of a fit: the weights that
  train, optimizer, schedule, position in the data and the best weights so far.

Files appear whole, are checked before they are used, and are never unpickled: safetensors, JSON, and torch.load with
weights_only. A damaged one is named, and the one before it is used. Everything random is drawn from (seed, phase) or
(seed, step), so nothing else has to be kept. result.json ends a run; then its state goes.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from recombine import results
from recombine.runtime.atomic import atomic_write
from recombine.runtime.digest import file_digest
from recombine.training import distributed

FOLDER = ".state"
KEEP = 2  # training states of a fit
SHARE = 20  # an epoch's end writes a state if that takes less than a 20th of the time since the last one
EVERY = 10  # batches between two agreements of several ranks


def state_folder(out: Path, config: dict, read: Mapping[str, str] | None = None) -> Path:
    """Where the run of that configuration, as plain values, keeps its state.

    Args:
        read: the sha256 of the files of weights that the user named, since their bytes may change.
    """
    same = {k: v for k, v in results.canonical(config).items() if k not in results.ELSEWHERE}
    same |= {"read": dict(read)} if read else {}
    return out / FOLDER / hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:16]


def clear(out: Path) -> None:
    """At the end of a run: its state, and what a kill in the middle of a checkpoint left."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    for left in out.glob(".*.safetensors.*"):
        left.unlink()


def write_manifest(path: Path, **facts) -> None:
    """Writes the .json beside a phase's file: its sha256, and the facts to keep with it."""
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"sha256": file_digest(path), **facts}))


def verified_manifest(path: Path) -> dict | None:
    """The facts of a phase whose file is whole, or None."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        if file_digest(path) == facts["sha256"]:
            return facts
    except FileNotFoundError:
        return None
    except (KeyError, OSError, TypeError, ValueError):
        pass
    damaged(path, "that phase runs again")
    return None


def damaged(path: Path, then: str) -> None:
    """Says on stderr that a file is damaged. then: what happens instead."""
    print(f"{path}: damaged (not what its checksum says), {then}", file=sys.stderr, flush=True)


class TrainingState(Checkpoint):
    """Writes a fit's training state: at the ends of epochs, every `minutes` within one, and before the process stops.

    SIGTERM stops it, and Ctrl-C, of which a second one ends the process at once. So does SIGUSR2, with which Slurm
    announces the end; submitit then queues the job again.

    Args:
        folder: the run's state folder.
        name: of the fit: "distilled" or "best".
    """

    def __init__(self, folder: Path, name: str, minutes: float):
        self.folder, self.name, self.minutes = folder, name, minutes
        self.told: int | None = None  # the signal
        self.stopped = False  # early
        self.handlers: dict[int, object] = {}
        self.began = self.saved = time.monotonic()
        self.before = self.cost = 0.0  # seconds in earlier processes; seconds that the last state took

    def find(self) -> Path | None:
        """The newest training state that is whole."""
        for path in sorted(self.folder.glob(f"{self.name}-*.ckpt"), reverse=True):
            if file_digest(path) == path.stem.split("-")[-1]:
                return path
            damaged(path, "the state before it is used")
        return None

    def state_dict(self) -> dict:
        """What a training state says of itself: the seconds so far, and whether training stopped early."""
        return {"seconds": self.before + time.monotonic() - self.began, "stopped": self.stopped}

    def load_state_dict(self, state: dict) -> None:
        """Goes on with the seconds of earlier processes."""
        self.before, self.stopped = state["seconds"], state["stopped"]

    def on_fit_start(self, trainer, lit) -> None:
        """Takes the signals, and remembers the handlers that were there before."""
        trainer.should_stop = self.stopped
        if threading.current_thread() is threading.main_thread():
            stops = [signal.SIGTERM, signal.SIGUSR2]
            stops += [signal.SIGINT] * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)  # nohup ignores it
            self.handlers = {number: signal.signal(number, self.note) for number in stops}

    def note(self, number: int, _) -> None:
        """The signal handler: the end of the next batch acts on it."""
        self.told = number
        if number == signal.SIGINT:
            signal.signal(number, self.handlers[number])

    def on_train_batch_end(self, trainer, lit, outputs, batch, index) -> None:
        """Writes a state where one is due within an epoch, or where a signal came."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        every = trainer.accumulate_grad_batches * (EVERY if trainer.world_size > 1 else 1)
        if progress.is_last_batch or (index + 1) % every:
            return  # the end of the epoch comes after validation, and gradients without a step are not kept
        self.act(trainer, time.monotonic() - self.saved > 60 * self.minutes)

    def on_train_epoch_end(self, trainer, lit) -> None:
        """Writes a state at the end of an epoch, where that is cheap or the last chance."""
        self.stopped = trainer.should_stop
        last = self.stopped or trainer.current_epoch + 1 == trainer.max_epochs
        self.act(trainer, last or time.monotonic() - self.saved > SHARE * self.cost)

    def act(self, trainer, due: bool) -> None:
        """Saves, or saves and stops, on every rank as soon as one rank has to."""
        told = distributed.all_reduce_max(self.told or 0, trainer.strategy.root_device)
        if told or distributed.all_reduce_max(int(due), trainer.strategy.root_device):
            self.save(trainer)
        if told:
            self.told = told
            self.leave(trainer)

    def save(self, trainer) -> None:
        """Writes a training state and removes all but the newest KEEP."""
        start = time.monotonic()
        temporary = self.folder / f".{self.name}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(temporary)  # of several ranks, every one takes part
        if trainer.is_global_zero:
            os.replace(temporary, self.folder / f"{self.name}-{trainer.global_step:08}-{file_digest(temporary)}.ckpt")
            for old in sorted(self.folder.glob(f"{self.name}-*.ckpt"), reverse=True)[KEEP:]:
                old.unlink()
        distributed.wait()
        self.saved = time.monotonic()
        self.cost = self.saved - start

    def leave(self, trainer) -> None:
        """Ends the process: 128 + signal. submitit's own handler has the job queued again."""
        name = signal.Signals(self.told).name
        if trainer.is_global_zero:
            step = f"step {trainer.global_step} of {self.name}"
            print(f"stopped by {name} at {step}: started again, it goes on from there", file=sys.stderr, flush=True)
        then = self.handlers.get(self.told)
        if self.told == signal.SIGUSR2 and callable(then):
            if trainer.is_global_zero:
                then(self.told, None)  # raises SystemExit
            time.sleep(60)  # Slurm ends the other ranks
        raise SystemExit(128 + self.told)

    def on_fit_end(self, trainer, lit) -> None:
        """Gives the signals back, and sends itself the one that came too late to act on."""
        self.restore()
        if self.told:  # while the last state was written
            os.kill(os.getpid(), self.told)

    def on_exception(self, trainer, lit, exception) -> None:
        """Gives the signals back."""
        self.restore()

    def restore(self) -> None:
        """Puts the earlier signal handlers back."""
        if threading.current_thread() is threading.main_thread():
            while self.handlers:
                signal.signal(*self.handlers.popitem())


class StateFile(TorchCheckpointIO):
    """Writes training states beside their place. Lightning's own goes through TMPDIR, which may be small."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Writes a state whole or not at all.

        Raises:
            UsageError: the file cannot be written.
        """
        with atomic_write(Path(path)) as file, file.open("wb") as out:
            try:
                torch.save(checkpoint, out)
            except RuntimeError as error:  # torch does not say why it cannot write
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def loop_position(path: Path) -> tuple[int, int]:
    """Where a training state goes on: (epoch, batch), both from 0."""
    return position(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def position(state: dict) -> tuple[int, int]:
    """The same of a state that is loaded."""
    loops = state["loops"]
    epoch, batch = loops["fit_loop"]["epoch_progress"]["current"], loops["fit_loop"]["epoch_loop.batch_progress"]
    if epoch["processed"] == epoch["started"]:  # at the end of an epoch
        return epoch["processed"], 0
    return epoch["processed"], batch["current"]["processed"]
