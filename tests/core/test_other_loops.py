"""Recombined models in the loops of other libraries: transformers, accelerate, peft, a plain DDP loop."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import recombine
from recombine import BasisSharing, Cersa, Crisp, Dfjr
from zoo import batch, build, outputs

SHARED = {
    "crisp": Crisp(chunk=8, basis_rank=4),
    "basis_sharing": BasisSharing(whiten=False),
    "dfjr": Dfjr(),
}


class Rows(torch.utils.data.Dataset):
    """Eight sentences of seven tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.randint(1, 40, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def compressed(method) -> nn.Module:
    model = recombine.apply(build("tiny_llama"), copy.deepcopy(method))
    recombine.train_only(model, method.distillation_parameters(model))
    return model


def trained(model: nn.Module, folder, resume=None) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("method", SHARED.values(), ids=SHARED)
def test_transformers_trainer_saves_and_resumes(method, tmp_path):
    start = compressed(method)
    whole = trained(copy.deepcopy(start), tmp_path / "whole")
    resumed = trained(copy.deepcopy(start), tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    found, expected = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(value, start.state_dict()[name]) for name, value in expected.items())
    names = dict(whole.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in names.values()}) < len(names)  # still shared
    again = recombine.merge(whole)
    again.save_pretrained(tmp_path / "plain")
    plain = type(again).from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(outputs(plain, batch(plain)), outputs(again.eval(), batch(plain)), atol=1e-5)
    assert set(again._tied_weights_keys) == {"lm_head.weight"}


def test_a_loaded_model_saves_in_transformers_too(tmp_path):
    from transformers import AutoModelForCausalLM

    file = recombine.save(compressed(SHARED["crisp"]), tmp_path / "crisp.safetensors")
    model = recombine.load(file, build("tiny_llama")).eval()
    model.save_pretrained(tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True).eval()
    assert torch.equal(outputs(again, batch(model)), outputs(model, batch(model)))


def test_accelerate_saves_and_loads(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = compressed(SHARED["crisp"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = batch(model)
    accelerator.backward(outputs(model, x).square().mean())
    optimizer.step()
    after = outputs(model, x).detach()
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(outputs(model, x), after)


def ddp(rank: int, file: str, out) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(compressed(SHARED["crisp"]))
    with pytest.raises(recombine.UsageError, match="DistributedDataParallel"):
        recombine.apply(model, Cersa())
    steps(model, lambda step: slice(rank + 2 * step, rank + 2 * step + 1))
    recombine.count(model)
    recombine.save(model, f"{out}/{rank}.safetensors")
    dist.destroy_process_group()


def steps(model: nn.Module, rows) -> None:
    """Two steps of a plain loop. rows(step): the samples that it takes of those of that step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    x = batch(build("tiny_llama"), count=4)
    for step in range(2):
        logits = model(input_ids=x["input_ids"][rows(step)]).logits
        optimizer.zero_grad()
        logits.square().mean().backward()
        optimizer.step()


def test_a_plain_ddp_loop_is_one_process(tmp_path):
    names = str(tmp_path / "rendezvous"), str(tmp_path)
    other = torch.multiprocessing.get_context("spawn").Process(target=ddp, args=(1, *names))
    other.start()
    ddp(0, *names)
    other.join()
    alone = compressed(SHARED["crisp"])
    steps(alone, lambda step: slice(2 * step, 2 * step + 2))
    for rank in range(2):
        found = recombine.load(tmp_path / f"{rank}.safetensors", build("tiny_llama")).state_dict()
        for name, value in alone.state_dict().items():
            assert torch.allclose(found[name], value, atol=1e-6), name


@pytest.mark.parametrize("method", [SHARED["crisp"], Cersa()], ids=["crisp", "cersa"])
def test_peft_adapts_a_compressed_model(method, tmp_path):
    from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

    plain = recombine.apply(build("tiny_llama"), method)
    x = batch(plain)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(plain), recombine.peft_config(LoraConfig(**options)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = outputs(model, x)
    before.square().mean().backward()
    optimizer.step()
    after = outputs(model.eval(), x)
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path)
    config = recombine.peft_config(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, config=config).eval()
    assert torch.equal(outputs(again, x), after)
    merged = model.merge_and_unload()
    assert torch.allclose(outputs(merged, x), after, atol=1e-4)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    for given in (IA3Config(), LoraConfig):
        with pytest.raises(recombine.UsageError, match="cannot be taught"):
            recombine.peft_config(given)


@pytest.mark.parametrize("method", [None, recombine.Svd(targets=("up", "down"))], ids=["packed", "packed factors"])
def test_peft_adapts_a_packed_model(method):
    """A packed layer is an nn.Linear, whose weight peft's own layer would change in vain."""
    from peft import LoraConfig, get_peft_model

    model = build("tiny_llama").eval()
    if method is not None:
        recombine.apply(model, method)
    x = batch(recombine.quantize(model, 8, 16))
    before = outputs(model, x)
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    adapted = get_peft_model(model, recombine.peft_config(LoraConfig(**options))).eval()
    after = outputs(adapted, x)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(outputs(adapted.merge_and_unload(), x), after, atol=1e-5)


def test_torch_compile_around_the_model(tmp_path):
    """What was compiled before the rewriting runs the rewritten model, and is saved, counted and merged through."""
    model = build("tiny_vit")
    model.blocks = model.blocks[:1]
    x, compiled = batch(model), torch.compile(model, backend="eager")
    before = compiled(x)
    assert recombine.apply(compiled, Crisp(chunk=8, basis_rank=2)) is compiled
    after = compiled(x)
    assert not torch.allclose(after, before) and torch.allclose(after, model(x), atol=1e-5)
    assert recombine.count(compiled) == recombine.count(model)
    recombine.save(compiled, tmp_path / "crisp.safetensors")
    fresh = build("tiny_vit")
    fresh.blocks = fresh.blocks[:1]
    recombine.load(tmp_path / "crisp.safetensors", fresh)
    assert torch.equal(fresh(x), model(x))
    assert torch.allclose(recombine.merge(compiled)(x), after, atol=1e-5)
