"""The fixtures of this folder."""

from helpers.hub_pictures import empty_caches
from helpers.llamas import byte_tokenizer, offline, toy_packages
from helpers.texts import bert, cache, packages, tokenizer

__all__ = ["bert", "byte_tokenizer", "cache", "empty_caches", "offline", "packages", "tokenizer", "toy_packages"]
