"""The fixtures of this folder."""

from helpers.llamas import byte_tokenizer, offline, toy_packages

__all__ = ["byte_tokenizer", "offline", "toy_packages"]
