"""The fixtures of this folder."""

from helpers.watched import no_wandb_account

__all__ = ["no_wandb_account"]
