"""Adapters: files of what trained, several on one live model, and batches that mix them."""

import copy

import pytest
import torch

import recombine
from helpers import QKV, refusal
from recombine import Cersa, Crisp, Full, Isomorphic, LinearProbe, Peft, Rosa, Ssf, Svd
from recombine.core.adapters import become, file
from zoo import batch, build, loss, losses, outputs

LORA = Peft(targets=("q", "v"), rank=2, options={"lora_alpha": 4})
VBLORA = {"num_vectors": 6, "vector_length": 12, "init_vector_bank_bound": 0.3}
CASES = {  # what is done once, what each task adds (None: it trains what is there), architecture
    "crisp": (Crisp(chunk=8, basis_rank=5), None, "tiny_vit"),
    "crisp, windows": (Crisp(chunk=8, basis_rank=5), None, "tiny_swin"),
    "svd with cores": (Svd(targets=(*QKV, "o"), train_core=True), None, "tiny_llama"),
    "cersa": (Cersa(alpha=0.9), None, "tiny_vit"),
    "lora on the dense model": (None, LORA, "tiny_vit"),
    "lora on pivot": (Svd(targets=(*QKV, "o"), factor="pivot"), LORA, "tiny_swin"),
    "lora on svd": (Svd(targets=(*QKV, "o")), LORA, "tiny_swin"),
    "lora on a pruned model": (Isomorphic(ratio=0.6, head_dims=0.0), LORA, "tiny_vit"),
    "ssf": (None, Ssf(), "tiny_llama"),
    "rosa": (None, Rosa(rank=2, density=0.01), "tiny_vit"),
    "vblora": (None, Peft(config="VBLoRAConfig", targets=("q", "k"), rank=2, options=VBLORA), "tiny_vit"),
    "text": (Crisp(chunk=8, basis_rank=5), None, "tiny_deberta"),
    "full": (None, Full(), "tiny_vit"),
    "head alone": (Svd(targets=(*QKV, "o")), LinearProbe(), "tiny_vit"),
}
CLASSES = (5, 7, 5)


def moved(model, seed: int):
    """Trained: everything that trains has other values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tasks(case: str, folder):
    """(the base, outputs of each task's own model, its counts), the adapters lying in the folder."""
    once, each, arch = CASES[case]
    base = build(arch)
    if once is not None:
        recombine.apply(base, once, losses=losses(base))
    found, counts = [], []
    for i, classes in enumerate(CLASSES):
        model = copy.deepcopy(base)
        if arch != "tiny_llama":
            recombine.models.reset_head(model, classes)
        if each is not None:
            recombine.apply(model, each, losses=losses(model))
        moved(model, i)
        with torch.no_grad():
            found.append(outputs(model, batch(base)))
        counts.append(recombine.count(model))
        recombine.save_adapter(model, folder / f"{i}")
    return base.eval(), found, counts


@pytest.fixture(scope="module")
def crisp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crisp")
    return folder, *tasks("crisp", folder)


def held(base, folder):
    for i in range(len(CLASSES)):
        recombine.load_adapter(base, folder / f"{i}", f"task{i}")
    return base


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_several_on_one_model_are_the_separate_ones_bit_for_bit(case, tmp_path):
    model, alone, counts = tasks(case, tmp_path)
    x = batch(model)
    expected = outputs(model, x)
    before = {n: (id(p), p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()}
    modules = list(model.named_modules())
    held(model, tmp_path)
    assert torch.equal(outputs(model, x), expected)  # loading puts none on
    for i in (0, 1, 2, 0, None, 1):
        if i is None:
            recombine.disable_adapters(model)
            assert torch.equal(outputs(model, x), expected) and list(model.named_modules()) == modules
            assert before == {
                n: (id(p), p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()
            }
            continue
        recombine.set_adapter(model, f"task{i}")
        assert torch.equal(outputs(model, x), alone[i]) and recombine.count(model) == counts[i]
    names = ["task0", "task1", "__base__", "task2", "task1", "task0"]
    if case == "text":  # its positions are projected once for all samples
        with recombine.mixed(model, names):
            assert "cannot be told apart" in refusal(outputs, model, x)
        return
    if case == "full":
        assert "has its own cls_token, pos_embed, which is no layer" in refusal(recombine.mixed(model, names).__enter__)
        return
    with recombine.mixed(model, names):
        together = outputs(model, x)
    for sample, name in enumerate(names):
        own = (expected if name == "__base__" else alone[int(name[-1])])[sample]
        assert torch.allclose(together[sample][..., : own.shape[-1]], own, atol=1e-5)
        assert together[sample][..., own.shape[-1] :].eq(-torch.inf).all()
    assert torch.equal(outputs(model, x), alone[1])  # as it was before the block


def test_the_file_holds_what_trained_and_its_head(crisp):
    folder, base, _, counts = crisp
    meta, tensors = file.read(folder / "1")
    trained = sum(t.numel() for name, t in tensors.items() if name in meta["trains"])
    assert trained == counts[1].trained and "head.weight" in tensors and not any("basis" in name for name in tensors)
    assert meta["classes"] == 7 and meta["own"].keys() == dict(base.named_parameters()).keys() - tensors.keys()
    assert (folder / "1").stat().st_size < 0.2 * counts[1].bytes_weights
    model = recombine.load_adapter(copy.deepcopy(base), folder / "1", "flowers")
    named = recombine.save_adapter(recombine.set_adapter(model, "flowers"), folder / "named", labels=[*"abcdefg"])
    recombine.load_adapter(model, named, "named")
    found = recombine.adapters(model)
    assert [*found] == ["flowers", "named"] and found["named"].labels == tuple("abcdefg")
    assert found["flowers"].parameters == trained and found["flowers"].bytes == 4 * trained
    assert "there are 2 of them, and the head tells 7" in refusal(
        recombine.save_adapter, model, named, labels=["a", "b"]
    )
    recombine.delete_adapter(model, "flowers")
    assert [*recombine.adapters(model)] == ["named"] and model.num_classes == 5  # the base again


def test_an_adapter_can_be_trained_on(crisp):
    folder, base, alone, _ = crisp
    model = held(copy.deepcopy(base), folder)
    recombine.set_adapter(model, "task0")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    loss(model, batch(model)).backward()
    optimizer.step()
    with torch.no_grad():
        trained = outputs(model, batch(model))
        assert not torch.equal(trained, alone[0])
        assert torch.equal(outputs(recombine.set_adapter(model, "task1"), batch(model)), alone[1])
        twin = recombine.set_adapter(copy.deepcopy(model), "task0")
        assert torch.equal(outputs(twin, batch(model)), trained)
        assert torch.equal(outputs(model, batch(model)), alone[1])  # the copy holds its own


def test_the_model_with_an_adapter_on_is_saved_and_merged(crisp, tmp_path):
    folder, base, alone, counts = crisp
    model = recombine.set_adapter(held(copy.deepcopy(base), folder), "task1")
    x = batch(model)
    with torch.no_grad():
        loaded = recombine.load(recombine.save(model, tmp_path / "whole", whole=True)).eval()
        assert torch.equal(outputs(loaded, x), alone[1]) and recombine.count(loaded) == counts[1]
        assert torch.equal(outputs(become(recombine.disable_adapters(loaded), folder / "0"), x), alone[0])
        merged = recombine.merge(model)
        assert torch.allclose(outputs(merged, x), alone[1], atol=1e-5) and not recombine.adapters(merged)


def test_a_batch_of_several_tasks_trains_each(crisp):
    folder, base, *_ = crisp
    model = held(copy.deepcopy(base), folder)
    with recombine.mixed(model, ["task0", "task1", "task0"]):
        torch.logsumexp(model(batch(model, 3)), 1).sum().backward()
    for name, trains in (("task0", True), ("task1", True), ("task2", False)):
        mixer = recombine.set_adapter(model, name).blocks[0].mlp.fc1.mixer
        assert (mixer.grad is not None) == trains


def test_adapters_stay_where_they_are_while_a_batch_mixes_them(crisp):
    folder, base, *_ = crisp
    model = held(copy.deepcopy(base), folder)
    before = recombine.set_adapter(model, "task1")(batch(model))
    with recombine.mixed(model, ["task0", "task1"]):
        for said in (refusal(recombine.set_adapter, model, "task0"), refusal(recombine.disable_adapters, model)):
            assert "inside recombine.mixed" in said
    assert torch.equal(model(batch(model)), before)


def test_a_base_keeps_the_bits_of_its_layers_under_an_adapter(crisp):
    folder, base, *_ = crisp
    model = copy.deepcopy(base)
    model.recombined.bits["blocks.0.mlp.fc1"] = 8
    held(model, folder)
    assert recombine.set_adapter(model, "task1").recombined.bits == {"blocks.0.mlp.fc1": 8}


@pytest.mark.parametrize("method", [CASES["crisp"][0], LORA], ids=["crisp", "lora"])
def test_what_trained_and_was_frozen_again_is_in_the_file(method, tmp_path):
    base = build("tiny_vit")
    model = recombine.apply(copy.deepcopy(base), method)
    kept = copy.deepcopy(model) if method is not LORA else base  # the base that the adapter belongs to
    norm = moved(model, 0).blocks[1].norm1.weight
    norm.data.mul_(1.5)
    norm.requires_grad_(False)
    for _ in range(2):  # a file more changes nothing
        path = recombine.save_adapter(model, tmp_path / "adapter")
    x = batch(base)
    assert torch.equal(outputs(become(copy.deepcopy(kept), path), x), outputs(model, x))


@torch.no_grad()
def test_buffers_stay_the_newest_where_a_model_moves(tmp_path):
    """`Module.to` gives modules new buffers, but only those that are on."""
    base = build("tiny_vit")
    for block in base.blocks:
        block.norm1 = torch.nn.Sequential(block.norm1, Running())
    model = recombine.apply(copy.deepcopy(base), LORA)
    model.train()(batch(model))
    model = recombine.load_adapter(copy.deepcopy(base), recombine.save_adapter(moved(model, 0), tmp_path / "a"), "a")
    turn = {"a": lambda: recombine.set_adapter(model, "a"), None: lambda: recombine.disable_adapters(model)}
    for name, other in (("a", None), (None, "a"), ("a", None)):
        turn[name]()
        model._apply(torch.clone).train()(batch(model))  # what `to` does
        now = {key: b.clone() for key, b in model.eval().named_buffers()}
        turn[other]()
        turn[name]()
        assert all(torch.equal(b, now[key]) for key, b in model.named_buffers())


class Running(torch.nn.BatchNorm1d):
    """Keeps running means of tokens, as XCiT's convolutions do."""

    def __init__(self):
        super().__init__(48)

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def test_a_cast_base_takes_its_adapters(crisp):
    folder, base, alone, _ = crisp
    model = held(copy.deepcopy(base).to(torch.bfloat16), folder)
    logits = recombine.set_adapter(model, "task1")(batch(model).to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16 and torch.allclose(logits.float(), alone[1], atol=0.1)


def test_refusals(crisp, tmp_path):
    folder, base, *_ = crisp
    model = recombine.load_adapter(copy.deepcopy(base), folder / "0", "task0")
    state = {name: (id(p), p._version) for name, p in model.named_parameters()}
    other = build("tiny_vit", seed=1)
    recombine.apply(other, CASES["crisp"][0])
    whole = recombine.save(copy.deepcopy(base), tmp_path / "whole")
    damaged = tmp_path / "damaged"
    damaged.write_bytes((folder / "0").read_bytes()[:-3] + b"abc")
    own = recombine.save_adapter(moved(recombine.apply(build("tiny_vit"), Cersa()), 0), tmp_path / "cersa")
    load = recombine.load_adapter
    lines = {
        "belongs to another base: cls_token has other values": refusal(load, other, folder / "0"),
        "after Crisp, and this model is made by Cersa": refusal(
            load, recombine.apply(build("tiny_vit"), Cersa()), folder / "0"
        ),
        ".left is not there in this model": refusal(load, build("tiny_vit"), own),
        "is an adapter of a VisionTransformer, not of a SwinTransformer": refusal(
            load, build("tiny_swin"), folder / "0"
        ),
        "'task0': is taken": refusal(load, model, folder / "1", "task0"),
        "other than __base__": refusal(load, model, folder / "1", "__base__"),
        "no such file": refusal(load, model, tmp_path / "nothing"),
        "must be the path": refusal(load, model, 3),
        "holds no adapter; recombine.load": refusal(load, model, whole),
        "holds an adapter; load its base": refusal(recombine.load, folder / "0"),
        "truncated or corrupted": refusal(load, model, damaged),
        "did you mean task0?": refusal(recombine.set_adapter, model, "task9"),
        "adapter 'a' is not loaded; the model holds none": refusal(recombine.set_adapter, build("tiny_vit"), "a"),
        "give a list": refusal(recombine.mixed(model, "task0").__enter__),
        "model holds adapters (task0)": refusal(recombine.apply, model, LORA),
        "is not recombined": refusal(recombine.save_adapter, build("tiny_vit"), tmp_path / "x"),
    }
    assert all(part in line for part, line in lines.items()), lines
    with recombine.mixed(model, ["task0", "__base__"]):
        assert "(3, 17, 48) for 2 adapter_names" in refusal(model, batch(model, 3))
    assert state == {name: (id(p), p._version) for name, p in model.named_parameters()}
    assert [*recombine.adapters(model)] == ["task0"]


def test_what_would_be_undone_is_refused_on_a_model_with_adapters(crisp, tmp_path):
    folder, base, *_ = crisp
    model = recombine.load_adapter(copy.deepcopy(base), folder / "0")
    assert "model holds adapters (default)" in refusal(recombine.quantize, model, 8)
    whole = recombine.save(recombine.apply(build("tiny_vit"), Svd(), "retained_50"), tmp_path / "whole", whole=False)
    plain = build("tiny_vit")
    recombine.load_adapter(plain, recombine.save_adapter(recombine.apply(build("tiny_vit"), LORA), tmp_path / "lora"))
    assert "model holds adapters (default)" in refusal(recombine.load, whole, plain)
