"""The packaged language model."""

import pytest
import torch
import torch.nn.functional as F

from helpers import config
from helpers.llamas import loaded
from recombine import models
from recombine.data.base import SPLITS
from recombine.data.language import choices, instructions
from recombine.evaluation import harness


@pytest.mark.full
def test_smollm2_and_its_data():
    model = models.build(**config("smollm2_135m")).eval()
    tokenizer = models.tokenizer(model.recombine_source)
    with torch.no_grad():
        word = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(word) == " Paris" and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert 12 < harness.perplexity(model, loaded("text", tokenizer, task="wiki").test, limit=8) < 20
    scores = harness.evaluate(model, tokenizer, choices.TASKS, limit=50)
    for task in choices.TASKS:
        assert scores[f"{task}/acc_norm"] > 0.35, task
    assert [len(choices.items("wiki_description", split)) for split in SPLITS] == [5011, 343, 1309]
    assert [len(choices.items("wordnet_definition", split)) for split in SPLITS] == [8000, 500, 2000]
    assert len(choices.items("capital_of", "test")) == 109 and len(instructions.gsm8k()) == 1319
    ids = torch.tensor(tokenizer(choices.articles()["test"][0]["extract"])["input_ids"])[None]
    assert F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item() < 4
