"""Lightning's Trainer, as the configuration asks for it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recombine.errors import UsageError, did_you_mean
from recombine.runtime.kinds import shown
from recombine.runtime.user_code import load_class
from recombine.training import distributed, engine, resume
from recombine.training.settings import TrainerSettings


def require_possible(settings: TrainerSettings) -> None:
    """Refuses what no strategy, list of devices or backend of torch.compile is.

    Raises:
        UsageError: names the key, and what to say instead.
    """
    devices, strategy = settings.devices, settings.strategy
    if settings.compile:
        engine.backend(settings)
    if isinstance(devices, list) and (settings.accelerator == "cpu" or len({*devices}) != len(devices) or not devices):
        why = "a list names different GPUs; say how many devices, for example trainer.devices=2"
        raise UsageError(f"trainer.devices={shown(devices)}: {why}")
    if isinstance(strategy, str) and strategy.startswith("fsdp"):
        raise UsageError(f"trainer.strategy={strategy}: is torch's first FSDP, by its second is trainer=fsdp; say that")
    if not isinstance(strategy, str):
        load_class(strategy.get("_target_"), Strategy, "trainer.strategy._target_")
    elif strategy not in (known := ["auto", *StrategyRegistry.available_strategies()]):
        hint = did_you_mean(strategy, known) or f"choose from {', '.join(known)}"
        raise UsageError(f"trainer.strategy={strategy}: there is no such strategy; {hint.strip()}")


def build_trainer(settings: TrainerSettings, **arguments) -> L.Trainer:
    """A Trainer on the devices that the settings name; further arguments are Lightning's.

    Raises:
        UsageError: Lightning refuses a key, or there is no such device.
    """
    strategy = settings.strategy
    try:
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy if isinstance(strategy, str) else instantiate(strategy),
            precision=precision(settings.precision, settings.accelerator),
            plugins=[distributed.cluster(), resume.StateFile()],
            use_distributed_sampler=False,  # recombine/data/batch_sampler.py divides, and pads nothing
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **arguments,
        )
    except (HydraException, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split()).rstrip('.')}; correct that key of trainer") from error
    # Lightning's own has ranks wait for each other, and ends with exit code 0: recombine/training/resume.py has ours
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C while a Trainer works is a KeyboardInterrupt again: Lightning makes it an exit with code 1, and then no
    other is heard.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def precision(wanted: str, accelerator: str) -> str:
    """Lightning's word for it. auto: bf16 where the GPU has it, fp16 on older ones, float32 on a CPU."""
    if wanted != "auto":
        return wanted
    if accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
