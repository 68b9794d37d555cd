"""The fixtures of this folder."""

from helpers.hub_pictures import empty_caches

__all__ = ["empty_caches"]
