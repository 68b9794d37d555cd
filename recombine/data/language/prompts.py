"""How language models are asked: in training and in testing alike, so that the two cannot come apart."""

from __future__ import annotations

INDENT = " " * 16
CHOICES = {  # task of `recombine.data.language.choices` -> what stands before an option; {} is the question
    "wiki_description": "Title: {}\nDescription:",
    "wordnet_definition": "The word {} means",
    "capital_of": "The capital of {} is",
}
ANSWERS = {  # LLM-Adapters' eight test sets -> what an answer may be, a regular expression
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": "answer[1-5]",
    "hellaswag": "ending[1-4]",
    "winogrande": "option1|option2",
    "ARC-Easy": "answer[1-5]",
    "ARC-Challenge": "answer[1-5]",
    "openbookqa": "answer[1-5]",
}
COMMONSENSE = (  # the same eight as lm-eval calls them
    "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
)  # fmt: skip


def alpaca(instruction: str) -> str:
    """commonsense_170k as DoRA's public code asks it, 16 spaces before every line.

    Paper: its test prompt has other blanks than its training prompt and ends in 16 spaces, which a training text merges
    with the response. Here: one prompt, that of training, up to the line break; the response begins with the blanks.
    """
    asked = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  "
    )
    lines = ["### Instruction:", instruction, "", "### Response:"]
    return f"{asked}\n\n" + "\n".join(INDENT + line for line in lines) + "\n"


def metamath(query: str) -> str:
    """MetaMath's prompt (arXiv 2309.12284), in training as in testing."""
    asked = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    return f"{asked}\n\n### Instruction:\n{query}\n\n### Response: Let's think step by step."
