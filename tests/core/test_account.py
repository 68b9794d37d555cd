"""The layer report and the FLOPs add up."""

import pytest

import recombine
from recombine import Crisp
from recombine.core.account import layer_report, stored_in_targets
from zoo import batch, build


def test_layer_report_adds_up():
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=8))
    rows = layer_report(model)
    held = sum(row["held"] * row["shape"][0] * row["shape"][1] for row in rows)
    assert held == pytest.approx(stored_in_targets(model))


def test_flops_count_attention_too():
    model = build("tiny_vit")
    n, d, depth = 17, 48, 4  # tokens, width, blocks
    linear = depth * n * 12 * d * d + 48 * 3 * 64 * 16 + d * 5
    attention = depth * 2 * n * n * d
    assert recombine.count(model, batch(model, 1)).flops == 2 * (linear + attention)
