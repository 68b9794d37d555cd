"""Progress of long work: a bar on a terminal, a plain line every half a minute where stderr is a file.

Nothing shows in the first seconds, so short work stays silent, as do other ranks than the first.
`trainer.progress=false` silences it all.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event, Thread

EVERY = 30.0  # seconds between lines in a file
_shown = ContextVar("progress is shown", default=True)


def is_shown() -> bool:
    """Whether anything is to be shown here: what `display` says, and of several ranks the first alone."""
    dist = sys.modules.get("torch.distributed")  # who has not imported it has one process
    return _shown.get() and (dist is None or not dist.is_initialized() or dist.get_rank() == 0)


@contextmanager
def display(shown: bool) -> Iterator[None]:
    """Shows the progress of what runs in the block, or does not."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def bar(what: str, total: int | None = None, unit: str = "it"):
    """A tqdm bar: `update(n)` it, and close it or use it as a context."""
    from tqdm import tqdm

    options = {"desc": what, "total": total, "unit": unit, "leave": False, "disable": not is_shown()}
    if sys.stderr.isatty():
        return tqdm(**options, delay=1)
    line = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} passed, {remaining} left"
    if total is None:
        line = "{desc}: {n_fmt} {unit}, {elapsed} passed"
    return tqdm(**options, delay=EVERY, mininterval=EVERY, maxinterval=EVERY, file=Lines(), bar_format=line)


def of(items: Iterable, what: str, unit: str = "it") -> Iterator:
    """The items, one after the other, with a bar. A bar lives as long as the loop, also where that ends early."""
    with bar(what, len(items) if hasattr(items, "__len__") else None, unit) as shows:
        for item in items:
            yield item
            shows.update()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows the seconds that pass while the block waits for another process. what: the name of the work."""
    done = Event()

    def tick() -> None:
        with bar(what, unit="s") as shows:
            while not done.wait(1):
                shows.update()

    thread = Thread(target=copy_context().run, args=(tick,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def bars_as_wanted() -> Iterator[None]:
    """Silences bars that a library draws with tqdm, where `trainer.progress=false`."""
    from tqdm import tqdm

    start = tqdm.__init__
    if not _shown.get():
        tqdm.__init__ = lambda self, *args, **kwargs: start(self, *args, **kwargs | {"disable": True})
    try:
        yield
    finally:
        tqdm.__init__ = start


def wrapped(text: str, indent: int, stream) -> str:
    """Wraps a text at the terminal's width and indents the lines after the first; for a file it stays one line.

    A command line ends its lines with a backslash, so that it can be copied into a shell as it stands.
    """
    if not stream.isatty():
        return text
    width, command = shutil.get_terminal_size().columns, text.startswith("python ")
    lines = textwrap.wrap(
        " " * indent + text,
        width - 2 * command,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return (" \\\n" if command else "\n").join(lines).lstrip()


class Lines:
    """Stderr for tqdm: what it writes over and over becomes lines."""

    def write(self, text: str) -> None:
        """Writes one line."""
        if text := text.strip("\r\n "):
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        """Flushes stderr."""
        sys.stderr.flush()
