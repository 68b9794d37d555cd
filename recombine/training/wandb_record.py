"""The rows of a W&B run, and the file in which W&B's own process keeps them.

That process writes by its own clock, and offers no call that waits for it. So the file is read: it is LevelDB's log
format around protobuf messages.
"""

import struct
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recombine.errors import UsageError

EVERY = 50  # rows
INTERVAL = 0.05  # seconds between two writes of W&B's process, while there is something to write
PATIENCE = 120  # seconds in which it must have written; a full disk keeps it from it
START, BLOCK = 7, 32768  # bytes
CHUNK = struct.Struct("<IHB")  # the header of a chunk: checksum, size, kind
WHOLE, LAST = 1, 4  # kinds of chunks that end a message


class RecordFile:
    """A run-*.wandb file, which may still grow."""

    def __init__(self, path: Path):
        self.path, self.at, self.part = path, START, b""

    def read(self) -> list:
        """The messages, `wandb.proto.wandb_internal_pb2.Record`, that have come whole since the last call."""
        from wandb.proto.wandb_internal_pb2 import Record

        with self.path.open("rb") as file:
            file.seek(self.at)
            data, begin, found = file.read(), self.at, []
        while True:
            if (left := BLOCK - self.at % BLOCK) < CHUNK.size:  # too little for a header
                self.at += left
            here = self.at - begin
            if len(data) < here + CHUNK.size:
                return found
            _, size, kind = CHUNK.unpack_from(data, here)
            if len(data) < here + CHUNK.size + size:
                return found
            self.part += data[here + CHUNK.size : here + CHUNK.size + size]
            self.at += CHUNK.size + size
            if kind in (WHOLE, LAST):
                found.append(Record.FromString(self.part))
                self.part = b""


class Rows:
    """Logs the rows of a run. Every EVERY-th call returns when all rows are in the file."""

    def __init__(self, run: Any):
        self.run, self.file = run, RecordFile(Path(run.settings.sync_file))
        self.logged = self.written = 0
        self.waits = True

    def log(self, row: dict[str, Any]) -> None:
        """Logs one row."""
        self.run.log(row)
        self.logged += 1
        if self.waits and self.logged % EVERY == 0:
            self.wait()

    def wait(self) -> None:
        """Returns when the file holds every row. Where it stops growing, it says so and waits no more."""
        end = time.monotonic() + PATIENCE
        while (written := self.count()) < self.logged:
            if time.monotonic() > end:
                self.waits = False
                print(f"W&B: {self.file.path} stays at {written} of {self.logged} rows", file=sys.stderr, flush=True)
                return
            time.sleep(INTERVAL / 2)

    def count(self) -> int:
        """How many rows the file holds."""
        self.written += sum(message.WhichOneof("record_type") == "history" for message in self.file.read())
        return self.written


def set_up() -> None:
    """Starts W&B's own part of this process, without a word.

    Raises:
        UsageError: a WANDB_ variable of the environment has a value that W&B does not know.
    """
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
    except ValidationError as error:
        wrong = error.errors()[0]
        key = f"WANDB_{wrong['loc'][0]}".upper()
        raise UsageError(f"logger=wandb: {key}={wrong['input']}: {wrong['msg']}; unset {key}") from None
