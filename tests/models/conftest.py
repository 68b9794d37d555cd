"""The fixtures of this folder."""

from helpers.hub_client import hub
from helpers.llamas import byte_tokenizer, offline, tiny_llama
from helpers.texts import bert, deberta, packages, tokenizer
from helpers.vision_models import tiny

__all__ = ["bert", "byte_tokenizer", "deberta", "hub", "offline", "packages", "tiny", "tiny_llama", "tokenizer"]
