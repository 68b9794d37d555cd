"""The fixtures of this folder."""

from helpers.hub_client import hub
from helpers.watched import no_wandb_account

__all__ = ["hub", "no_wandb_account"]
