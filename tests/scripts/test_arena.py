"""The arena's numbers as published, and its retention."""

from itertools import product

import pytest

from scripts.arena import MODELS, SCORES, published, retention, table

CHOICES = ("BoolQ", "ARC-E", "ARC-C", "WinoG.", "PIQA", "HellaS.", "OBQA")


@pytest.mark.parametrize("model", MODELS.values())
def test_the_published_means_follow_from_the_published_scores(model):
    """To the last digit printed: the table was copied without a slip, and this is the arena's formula."""
    rows = published(model)
    methods = ("Dense FP", "ASVD", "SVD-LLM v1", "DoBi-SVD", "Basis Sharing", "MoDeGPT")
    assert set(rows) == set(product(("80", "60"), methods))
    for (keep, _), row in rows.items():
        assert sum(row[key] for key in CHOICES) / 7 == pytest.approx(row["MCQ Avg."], abs=1.1e-3)
        assert retention(rows[keep, "Dense FP"], row) == pytest.approx(row["Q. Ret."], abs=1.6e-3)


def test_the_table_ranks_by_what_is_kept():
    rows = published("Llama-3.1-8B")
    lines = table(rows, "published")
    assert len(lines) == len(rows) and lines[0].startswith("| 80 | Dense FP |") and "| 1.000 |" in lines[0]
    assert [line.split(" | ")[1] for line in lines[1:3]] == ["MoDeGPT", "Basis Sharing"]
    half = {key: 2 * value for key, value in rows["80", "Dense FP"].items()}
    assert retention(rows["80", "Dense FP"], half, SCORES[:1]) == pytest.approx((0.5 + 0.5 + 2) / 3)
