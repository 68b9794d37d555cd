"""The fixtures of this folder."""

from helpers.hub_pictures import empty_caches
from helpers.pictures import cache

__all__ = ["cache", "empty_caches"]
