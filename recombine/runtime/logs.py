"""Keeps the libraries' own log lines out of a run's output: stdout, log.txt and the ranks' logs.

Hydra prints every record from INFO up. At that level httpx names each address it asks, and those of the hub's downloads
are signed: they must not land in a log. The hub's client names them in warnings too, which lose what follows a "?".
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = (
    "alembic", "datasets", "filelock", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub",
    "onnx_ir", "onnxscript", "timm", "urllib3",
)  # fmt: skip
ASKING = ("huggingface_hub.file_download", "huggingface_hub.utils._http")  # whose warnings name addresses
KERNELS = ("torchao", "torch.utils._pytree")  # which tell what this machine has no kernels for, at their import
LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def quiet_libraries() -> None:
    """Lets only warnings and errors of the libraries through. Call it in every process that runs something.

    A warning of Python's is a line of its own words, without the file and the line of code that gave it.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in KERNELS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ASKING:
        logging.getLogger(name).addFilter(unsigned)
    silence_lightning()


@contextmanager
def quiet() -> Iterator[None]:
    """Lets only errors through while the block runs: for an import that tells which kernels it did not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def unsigned(record: logging.LogRecord) -> bool:
    """A filter that takes the queries of addresses, which sign them, out of a record, and lets it pass."""
    record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?[^\s'\"]*", r"\1", record.getMessage()), ()
    return True


def silence_lightning() -> None:
    """Silences Lightning's hints about loaders and loggers, which say nothing about a run."""
    for name in LIGHTNING:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
