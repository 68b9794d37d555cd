"""What `trainer` says of how a model computes changes its speed and memory, not what it learns."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor

import recombine
from helpers import refusal
from helpers.command import execute, line
from recombine.models import roles
from recombine.training import engine
from recombine.training.settings import TrainerSettings
from zoo import ARCHS, batch, build

SHORT = ["trainer.epochs=1", "data.limit=32", "data.batch_size=8"]
LORA = ["method=lora", "method.rank=4", "trainer.epochs=1"]


def gradients(model, x) -> dict[str, torch.Tensor]:
    model.zero_grad()
    y = model(**x) if isinstance(x, dict) else model(x)
    (y if isinstance(y, torch.Tensor) else y.logits).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_gives_the_same_gradients(arch):
    model = build(arch)
    recombine.apply(model, recombine.Cersa(targets=("q", "k", "v")))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    calls, x = [], batch(model)
    for block in roles.blocks(model):  # transformers computes a block's forward again, without the block's own hooks
        leaf = next(module for module in block.modules() if not [*module.children()])
        leaf.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, once = gradients(model, x), len(calls)
    with engine.engaged(model, TrainerSettings(gradient_checkpointing=True)):
        found = gradients(model, x)
    assert len(calls) == 3 * once and found.keys() == expected.keys() and expected  # twice in the second run
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    gradients(model, x)
    assert len(calls) == 4 * once  # it ended with the training


def test_a_model_that_cannot_compute_its_blocks_again_is_named():
    message = refusal(engine.engaged(torch.nn.Linear(2, 2), TrainerSettings(gradient_checkpointing=True)).__enter__)
    assert "gradient_checkpointing=true: Linear cannot" in message


def test_every_block_is_compiled_though_all_have_other_shapes():
    """torch gives up on a function after eight kinds of input, and goes on uncompiled without a word."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 10, "num_heads": 3, "image_size": 32, "num_classes": 4}
    model = recombine.models.build("ten", arch="vit_tiny_patch16_224", pretrained=False, **sizes)
    for rank, block in enumerate(roles.blocks(model), 1):
        block.mlp.fc1 = recombine.layers.FactoredLinear(torch.randn(192, rank), torch.randn(rank, 48), torch.eye(rank))
        block.mlp.fc1.core.requires_grad_()
    x, names, counter = torch.randn(2, 3, 32, 32), list(model.state_dict()), CompileCounter()
    model.train()
    expected = gradients(model, x)
    with engine.compiled(model, counter):
        found = gradients(model, x)
        assert counter.frame_count == 10
        model.eval()(x)
        assert counter.frame_count == 10 and list(model.state_dict()) == names
        copy.deepcopy(model)
    assert not [block for block in roles.blocks(model) if "forward" in vars(block)]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("true", marks=pytest.mark.full)])
def test_a_compiled_run_learns_the_same(backend, tmp_path):
    joint = ["stage=joint", "budget=retained_50", "method=crisp", "method.chunk=16", "stage.distil.epochs=1"]
    one, two = (execute(tmp_path / w, *joint, *SHORT, f"trainer.compile={w}") for w in ("false", backend))
    rel = 1e-4 if backend == "true" else 1e-5  # Inductor fuses sums: it rounds otherwise
    assert one["curves"]["train/loss"] == pytest.approx(two["curves"]["train/loss"], rel=rel)
    assert one["distil"]["val_loss"] == pytest.approx(two["distil"]["val_loss"], rel=rel)
    same_weights(tmp_path / "false", tmp_path / backend)


def same_weights(one: Path, two: Path, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    a, b = (load_file(folder / "best.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("words", [["data.limit=44"], ["model=tiny_llama", "data=text", "data.max_length=32"]])
def test_several_batches_make_the_step_of_one_large_batch(words, tmp_path):
    """44 = 32 + 8 + 4: the last step is of two batches, of different sizes. Texts have different numbers of tokens."""
    words = [*LORA, "optim=sgd", *words, *(["data.limit=44"] if len(words) > 1 else [])]
    one = execute(tmp_path / "one", *words, "data.batch_size=32")
    two = execute(tmp_path / "two", *words, "data.batch_size=8", "trainer.accumulate=4")
    assert one["val"] == pytest.approx(two["val"], rel=1e-5)
    same_weights(tmp_path / "one", tmp_path / "two")


def test_products_are_fast_while_it_trains_only(tmp_path, monkeypatch):
    seen, products = [], engine.products
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(engine, "products", lambda precision: seen.append(precision) or products(precision))
    execute(tmp_path, *LORA, "trainer.matmul=high", "data.limit=32")
    assert seen == ["high", "high"] and torch.get_float32_matmul_precision() == "highest"  # in training and in the test
    with pytest.raises(ZeroDivisionError), engine.engaged(model, TrainerSettings(matmul="medium")):
        assert torch.get_float32_matmul_precision() == "medium"
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_backend_that_torch_lacks_is_one_line(capsys, monkeypatch, tmp_path):
    message = line(capsys, monkeypatch, tmp_path, *LORA, "trainer.compile=inducto")
    assert "trainer.compile=inducto: torch has no such backend; did you mean inductor?" in message


def test_without_a_compiler_it_is_one_line(monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    message = refusal(engine.backend, TrainerSettings(compile=True, accelerator="cpu"))
    assert "there is no C++ compiler" in message
