"""The fixtures of this folder."""

from helpers.texts import bert, cache, deberta, packages, tokenizer

__all__ = ["bert", "cache", "deberta", "packages", "tokenizer"]
