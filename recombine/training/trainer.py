"""Lightning's Trainer, as the configuration asks for it."""

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recombine.errors import UsageError
from recombine.training import distributed
from recombine.training.settings import TrainerSettings


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
            plugins=distributed.cluster(),
            use_distributed_sampler=False,  # recombine/data/batch_sampler.py divides, and pads nothing
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **arguments,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}; correct that key of trainer") from error
    # Lightning's own has ranks wait for each other, and ends with exit code 0: recombine/training/resume.py has ours
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def precision(wanted: str, accelerator: str) -> str:
    """Lightning's word for it. auto: bf16 where the GPU has it, fp16 on older ones, float32 on a CPU."""
    known = ("auto", "32-true", "bf16-mixed", "16-mixed")
    if wanted not in known:
        raise UsageError(f"trainer.precision={wanted}: must be one of {', '.join(known)}")
    if wanted != "auto":
        return wanted
    if accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
