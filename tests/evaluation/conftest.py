"""The fixtures of this folder."""

from helpers.llamas import byte_tokenizer, offline, tiny_llama, toy_packages

__all__ = ["byte_tokenizer", "offline", "tiny_llama", "toy_packages"]
