"""The same on every device: on the CPU by default, on a GPU with -m gpu (make gpu)."""

import pytest
import torch
from safetensors.torch import load_file

import recombine
from helpers.command import execute
from recombine.core import account
from recombine.training.optimizers import fusible
from zoo import batch, build

METHODS = {
    "crisp": lambda: recombine.Crisp(chunk=16),
    "cersa": lambda: recombine.Cersa(targets=("q", "k", "v")),
    "lora": lambda: recombine.Peft(targets=("q", "v")),
    "ssf": lambda: recombine.Ssf(),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def words(device: str) -> list[str]:
    return ["trainer=auto", f"trainer.accelerator={device}", "trainer.epochs=1", "data.limit=32", "method=cersa"]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_weights_as_on_a_cpu(method, device):
    found = {}
    for where in ("cpu", device):
        model = build("tiny_vit").to(where)
        model = recombine.apply(model, METHODS[method]()).train()
        assert all(p.device.type == where for p in model.parameters())
        model(batch(model).to(where)).square().mean().backward()
        gradients = (p.grad.norm() if p.grad is not None else torch.zeros(()) for p in model.parameters())
        found[where] = torch.stack([norm.cpu() for norm in gradients])
    torch.testing.assert_close(found[device], found["cpu"], rtol=1e-3, atol=1e-5)


def test_the_account_is_what_training_takes(device):
    """Weights, gradients and AdamW's moments, as the account says; on a GPU as torch's allocator has them."""
    model = recombine.apply(build("tiny_vit").to(device), METHODS["cersa"]()).train()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fusible(torch.device(device), "32-true") or None)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    counted = account.count(model)
    state = [t for values in optimizer.state.values() for key, t in values.items() if key != "step"]
    held = sum(t.numel() * t.element_size() for t in (*state, *(p.grad for p in trained)))
    assert held == counted.bytes_gradients + counted.bytes_optimizer
    if device == "cuda":
        pages = 512 * (len(state) + 2 * len(trained))  # the allocator rounds up; a fused step counts on the device
        assert held <= torch.cuda.memory_allocated() - before <= held + pages
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights == counted.bytes_weights


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_in_each_precision(precision, device, tmp_path):
    result = execute(tmp_path, *words(device), f"trainer.precision={precision}")
    tensors = load_file(tmp_path / "best.safetensors")
    assert result["test"]["loss"] > 0 and all(t.isfinite().all() for t in tensors.values())
    assert {t.dtype for t in tensors.values()} <= {torch.float32, torch.int64}  # what trains stays float32


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu(tmp_path):
    plain, compiled = (
        execute(tmp_path / w, *words("cuda"), "trainer.precision=32-true", f"trainer.compile={w}")
        for w in ("false", "true")
    )
    assert plain["test"]["loss"] == pytest.approx(compiled["test"]["loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_gpus_are_one(trainer, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    exact = [*words("cuda"), "trainer.precision=32-true"]
    one = execute(tmp_path / "one", *exact)
    two = execute(tmp_path / "two", *exact, f"trainer={trainer}", "trainer.devices=2")
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], rel=1e-3)
