"""Pruning and distilling compressors: oracles, what their checkpoints hold, and what can be put on what is left."""

import copy

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import timm
import torch
import torch_pruning
from torch import nn
from zoo import ARCHS, batch, build, losses, outputs, train

import recombine
from recombine import Dgmr, Isomorphic, PcLora, Peft, PruneNet, Ssf, Svft, WeCoLora
from recombine.core.account import layer_report
from recombine.core.rewrite import find_sites, finish, train_only
from recombine.layers import DeltaLinear, FactoredLinear
from recombine.methods.pruning.dgmr import gram_schmidt
from recombine.methods.pruning.isomorphic_graph import best, gradients
from recombine.methods.pruning.mlp import rows
from recombine.methods.pruning.prunenet_policy import ks_distance, search, spectrum
from recombine.models import roles

ALL = ("qkv", "o", "up", "down", "gate?")
CUTTERS = [Dgmr(ratio=0.4), PruneNet(ratio=0.4, episodes=2), Isomorphic(), WeCoLora(rank=4)]
LORA = Peft(rank=3, options={"lora_alpha": 3})


def ids(methods):
    return [type(method).__name__ for method in methods]


def pruned(arch, method):
    return recombine.apply(model := build(arch), method, losses=losses(model))


def reload(model, arch, path):
    recombine.save(model, path / "model.safetensors")
    return recombine.load(path / "model.safetensors", build(arch))


# DGMR


def pivots(w, count):
    """Greedy Gram-Schmidt with rounds, as the paper has it: the residual of every row, written out."""
    picked = []
    while len(picked) < count:
        left = [i for i in range(len(w)) if i not in picked]
        residual = {i: w[i].copy() for i in left}
        for _ in range(w.shape[1]):
            new = {i: np.linalg.norm(r) for i, r in residual.items()}
            lengths = {i: size for i, size in new.items() if size > 1e-8 * np.linalg.norm(w[i])}
            if not lengths:
                break
            pick = max(lengths, key=lengths.get)
            q = residual.pop(pick) / lengths[pick]
            residual = {i: r - q * (q @ r) for i, r in residual.items()}
            picked.append(pick)
        if not np.any(w[[i for i in range(len(w)) if i not in picked]]):
            break
    picked += [i for i in range(len(w)) if i not in picked]
    return picked[:count]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)])
def test_gram_schmidt_is_qr_with_column_pivoting(shape):
    w = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -3, shape[1])
    order = scipy.linalg.qr(w.T.numpy(), mode="r", pivoting=True)[1]
    assert gram_schmidt(w, min(shape)).tolist() == order[: min(shape)].tolist()


@pytest.mark.parametrize("count", [1, 9, 12, 13, 31, 40])
def test_gram_schmidt_goes_on_in_rounds(count):
    w = torch.randn(40, 12, dtype=torch.float64)
    assert gram_schmidt(w, count).tolist() == pivots(w.numpy(), count)


def test_gram_schmidt_of_duplicate_parallel_and_zero_rows():
    w = torch.randn(6, 10, dtype=torch.float64)
    both = torch.cat([w, w, 1e-3 * w, torch.zeros(3, 10)])
    assert sorted(gram_schmidt(both, 6) % 6) == list(range(6))  # every direction once before any twice
    for count in range(1, 22):
        picked = gram_schmidt(both, count)
        assert len(set(picked.tolist())) == count
        assert torch.allclose(both[picked].norm(dim=1), both[pivots(both.numpy(), count)].norm(dim=1))
    low = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)  # rank 3: rounds of 3
    assert gram_schmidt(low, 20).tolist() == pivots(low.numpy(), 20)
    assert gram_schmidt(torch.zeros(5, 4, dtype=torch.float64), 3).tolist() == [0, 1, 2]


def test_dgmr_at_half_of_a_vit_b_leaves_a_quarter_of_its_neurons():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = Dgmr(targets=ALL, ratio=0.5)
    sites = find_sites(model, method)
    assert method.counts(sites) == [768] * 12 and method.sizes(sites)[0] == 28_311_552 + 14_155_776


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", CUTTERS[:2], ids=ids(CUTTERS[:2]))
def test_a_pruned_mlp_is_the_mlp_without_those_neurons(method, arch):
    model, x = build(arch), batch(build(arch))
    masked = copy.deepcopy(model)
    recombine.apply(model, method)
    with torch.no_grad():
        for name in roles.find(masked, ("down",)):
            whole, left = masked.get_submodule(name), model.get_submodule(name)
            gone = ~(whole.weight[:, :, None] == left.weight[:, None]).all(0).any(1)
            assert int(gone.sum()) == whole.in_features - left.in_features
            whole.weight[:, gone] = 0
        assert torch.allclose(outputs(model, x), outputs(masked, x), atol=1e-5)


def test_a_gated_neuron_is_a_row_of_gate_and_up():
    model = build("tiny_llama")
    method = Dgmr(ratio=0.5)
    mlp = method.mlps(find_sites(model, method))[0]
    both = torch.cat([mlp.gate.weight, mlp.up.weight], 1).detach().double()
    assert torch.equal(rows(mlp), both)
    order = scipy.linalg.qr(both.T.numpy(), mode="r", pivoting=True)[1][:40]
    up = mlp.up.weight.detach()[sorted(order)]
    recombine.apply(model, method)
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").weight, up)


@pytest.mark.parametrize("targets", [("up", "down"), ("up", "down", "q")])
def test_a_gate_must_be_named(targets):
    with pytest.raises(recombine.UsageError, match="gate"):
        recombine.apply(build("tiny_llama"), Dgmr(targets=targets, ratio=0.8))


def test_a_pruned_llama_is_an_ordinary_one_again(tmp_path):
    """Its config says how wide it is, so Hugging Face's own loader takes it; other models keep the old config."""
    from transformers import LlamaForCausalLM

    model = build("tiny_llama")
    other = LlamaForCausalLM(model.config)
    recombine.merge(recombine.apply(model, Dgmr(ratio=0.5)))
    model.save_pretrained(tmp_path)
    again, x = LlamaForCausalLM.from_pretrained(tmp_path), batch(model)
    assert torch.allclose(outputs(again.eval(), x), outputs(model, x), atol=1e-6)
    assert (model.config.intermediate_size, other.config.intermediate_size) == (40, 80)


# PruneNet


def test_spectrum_and_distance():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 12, generator=generator)
    b = torch.cat([a[:20], a[:3]])
    assert torch.allclose(spectrum(a), torch.linalg.svdvals(a.double()).flip(0), atol=1e-7)
    for x, y in ((a, b), (a, 0.5 * b), (a, a[:5]), (a.new_zeros(4, 4), b)):
        want = scipy.stats.ks_2samp(spectrum(x).numpy(), spectrum(y).numpy()).statistic
        assert ks_distance(spectrum(x), spectrum(y)) == pytest.approx(want, abs=1e-12)
    assert (spectrum(torch.ones(30, 20)) == 0).sum() == 19  # a singular value that is 0 is no rounding error


@pytest.mark.parametrize("h, d, k", [(60, 20, 24), (1536, 384, 768)])
def test_the_learnt_slice_is_no_worse_than_a_random_one(h, d, k):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(h, d, generator=generator) * torch.logspace(0, -1, d)
    w = w * torch.logspace(0, -1, h)[torch.randperm(h, generator=generator), None]
    whole = spectrum(w)
    kept = search([w], k, episodes=20, lr=1e-3, seed=0)[0]
    random = [torch.randperm(h, generator=generator)[:k] for _ in range(20)]
    mean = sum(ks_distance(whole, spectrum(w[r])) for r in random) / len(random)
    assert ks_distance(whole, spectrum(w[kept])) <= mean
    assert len(kept.unique()) == k and kept.equal(kept.sort().values)


def test_prunenet_as_the_paper_has_it():
    """The authors' algorithm written out: noisy keep probabilities, sum(log o) times the bare discounted reward."""
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(30, 12, generator=generator) * torch.logspace(0, -1, 12) for _ in range(3)]
    kept = search(states, 14, episodes=5, lr=5e-3, seed=0, estimator="paper")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        project, importance = nn.Linear(12, 30), nn.Parameter(torch.rand(30))
    rng, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW([importance, *project.parameters()], 5e-3)

    def keep_probabilities(w):
        alpha = torch.sigmoid(project(w) @ importance)
        eps = torch.rand(30, generator=rng)
        return torch.sigmoid(torch.log(eps) - torch.log(1 - eps) + torch.log(alpha) - torch.log(1 - alpha))

    def draw(w):
        return torch.multinomial(keep_probabilities(w).detach(), 14, generator=rng).sort().values

    def reward(w, action):
        both = (np.linalg.svd(x.double().numpy(), compute_uv=False) for x in (w, w[action]))
        return 1 / scipy.stats.ks_2samp(*both).statistic

    for _ in range(5):
        actions = [draw(w) for w in states]
        rewards = [0.99**i * reward(w, action) for i, (w, action) in enumerate(zip(states, actions, strict=True))]
        for w, action, gain in zip(states, actions, rewards, strict=True):
            optimizer.zero_grad()
            (-torch.gather(torch.log(keep_probabilities(w)), 0, action).sum() * gain).backward()
            optimizer.step()
    assert [rows.tolist() for rows in kept] == [draw(w).tolist() for w in states]
    assert [rows.tolist() for rows in kept] != [x.tolist() for x in search(states, 14, 5, 5e-3, 0)]


def test_prunenet_depends_on_its_seed_alone():
    def widths(seed):
        torch.manual_seed(torch.seed())  # whatever torch's own state is
        model = recombine.apply(build("tiny_swin"), PruneNet(seed=seed, episodes=3))
        return torch.cat([model.get_submodule(name).weight.flatten() for name in roles.find(model, ("up",))])

    assert torch.equal(widths(0), widths(0)) and not torch.equal(widths(0), widths(1))


@pytest.mark.parametrize("method", CUTTERS[:2], ids=ids(CUTTERS[:2]))
def test_zero_and_duplicate_weights_make_no_nan(method):
    model = build("tiny_vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
        model.blocks[1].mlp.fc1.weight.fill_(0.1)
    recombine.apply(model, method)
    assert outputs(model, batch(model)).isfinite().all()
    assert {block.mlp.fc1.out_features for block in model.blocks} == {76}


# Isomorphic


@pytest.mark.parametrize("round_to", [1, 2, 4])
def test_ranking_is_torch_prunings(round_to):
    """Its own pruner, with its isomorphic groups, keeps the same weights; the embedding stays, then it goes too."""
    for width in (False, True):
        model, theirs = build("tiny_vit"), build("tiny_vit")
        method = Isomorphic(heads=0.5, head_dims=0.25, width=width, round_to=round_to)
        recombine.apply(model, method, losses=losses(model))
        with gradients(theirs, losses(theirs)):
            pruner = torch_pruning.pruner.BasePruner(
                theirs,
                batch(theirs, 1),
                torch_pruning.importance.GroupTaylorImportance(),
                global_pruning=True,
                isomorphic=True,
                pruning_ratio=0.5,
                pruning_ratio_dict={tuple(block.attn.qkv for block in theirs.blocks): 0.25},
                head_pruning_ratio=0.5,
                prune_num_heads=True,
                prune_head_dims=True,
                num_heads={block.attn.qkv: 3 for block in theirs.blocks},
                ignored_layers=[theirs.head] if width else [theirs.head, theirs.patch_embed],
                unwrapped_parameters=None,
                round_to=None if round_to == 1 else round_to,
            )
            for group in pruner.step(interactive=True):
                if width or len(group) < 15:  # the embedding's group is by far the longest
                    group.prune()
        for ours, block in zip(model.blocks, theirs.blocks, strict=True):
            assert ours.attn.num_heads == pruner.num_heads[block.attn.qkv]
            for name, p in ours.named_parameters():
                assert torch.equal(p, block.get_parameter(name)), (width, name)


def test_cutting_heads_is_masking_them():
    model, x = build("tiny_vit"), batch(build("tiny_vit"))
    masked = copy.deepcopy(model)
    recombine.apply(model, Isomorphic(channels=0.0, head_dims=0.0, heads=0.4), losses=losses(model))
    gone = 0
    with torch.no_grad():
        for block, left in zip(masked.blocks, model.blocks, strict=True):
            weights = left.attn.qkv.weight.view(3, -1, 16, 48)[0]  # (heads, 16, d): q of those that stay
            for head, q in enumerate(block.attn.qkv.weight.view(3, 3, 16, 48)[0]):
                if not any(torch.equal(q, other) for other in weights):
                    block.attn.proj.weight[:, 16 * head : 16 * head + 16] = 0
                    gone += 1
        assert gone == 5 and all(len(b.attn.qkv.weight) == 48 * b.attn.num_heads for b in model.blocks)
        assert torch.allclose(outputs(model, x), outputs(masked, x), atol=1e-5)


@pytest.mark.parametrize("width", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_isomorphic_meets_its_budget(share, width):
    model = build("tiny_vit")
    recombine.apply(model, Isomorphic(width=width), f"retained_{100 * share:g}", losses(model))
    assert share - 0.05 < recombine.count(model).retained <= share
    assert outputs(model, batch(model)).isfinite().all()


def test_isomorphic_says_what_it_can_reach():
    model = build("tiny_vit")
    for arguments in ((Isomorphic(ratio=1e-4), None), (Isomorphic(), "retained_0.01")):
        with pytest.raises(recombine.UsageError, match="at least|nearest"):
            recombine.apply(model, *arguments, losses=losses(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_best_keeps_one_of_each():
    scores = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 6.0])]
    assert [k.tolist() for k in best(scores, 0.0)] == [[0, 1, 2], [0, 1]]
    assert [k.tolist() for k in best(scores, 0.6)] == [[2], [0, 1]]
    assert [k.tolist() for k in best(scores, 1.0)] == [[2], [1]]
    assert [k.tolist() for k in best(scores, 0.0, 2)] == [[1, 2], [0, 1]]
    assert [k.tolist() for k in best(scores, 0.9, 2)] == [[2], [1]]  # fewer than a multiple of it are left


def test_isomorphic_without_a_gradient_makes_no_nan():
    model = build("tiny_vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.zero_()
        model.blocks[1].mlp.fc2.weight.zero_()
    recombine.apply(model, Isomorphic(), losses=losses(model))
    assert outputs(model, batch(model)).isfinite().all() and model.blocks[1].mlp.fc1.out_features == 1


@pytest.mark.parametrize("name, options", [
    ("vit_small_patch14_dinov2", {"init_values": 1e-5}), ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}), ("vit_tiny_patch16_224", {"pre_norm": True}),
])  # fmt: skip
def test_isomorphic_on_other_vits(name, options, tmp_path):
    model, fresh = other_vit(name, options), other_vit(name, options)
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    recombine.apply(model, Isomorphic(), losses=lambda: (model(x).square().sum(),))
    assert model(x).isfinite().all() and recombine.count(model).retained < 0.3
    recombine.save(model, tmp_path / "m")
    assert torch.equal(recombine.load(tmp_path / "m", fresh)(x), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"global_pool": "map"}])
def test_isomorphic_refuses_what_it_cannot_cut(options):
    model = other_vit("vit_tiny_patch16_224", options)
    with pytest.raises(recombine.UsageError, match="plain ViT"):
        recombine.apply(model, Isomorphic(), losses=losses(model))


@pytest.mark.parametrize("method", [Dgmr(), PruneNet(), Isomorphic()], ids=["Dgmr", "PruneNet", "Isomorphic"])
@pytest.mark.parametrize("mlp", ["SwiGLUPacked", "GluMlp"])
def test_a_packed_gate_is_refused(mlp, method):
    model = other_vit("vit_tiny_patch16_224", {"mlp_layer": getattr(timm.layers, mlp)})
    with pytest.raises(recombine.UsageError, match="wide"):
        recombine.apply(model, method, losses=losses(model))


@pytest.mark.parametrize("method", [Dgmr(), PruneNet()], ids=["Dgmr", "PruneNet"])
def test_a_norm_inside_an_mlp_is_refused(method):
    model = other_vit("vit_tiny_patch16_224", {"scale_mlp_norm": True})
    with pytest.raises(recombine.UsageError, match="hold more"):
        recombine.apply(model, method)


def other_vit(name, options):
    torch.manual_seed(0)
    size = 28 if "14" in name else 32
    return timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=5, img_size=size, **options).eval()


# what all that cut share


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("second", [LORA, Ssf(), Svft()], ids=ids([LORA, Ssf(), Svft()]))
@pytest.mark.parametrize("method", CUTTERS, ids=ids(CUTTERS))
def test_any_method_adapts_what_is_left(method, second, arch, tmp_path):
    if isinstance(method, Isomorphic) and arch != "tiny_vit":
        pytest.skip("a ViT only")
    model = pruned(arch, method)
    dense = model.recombined.dense
    finish(model, method, alone=False)
    with torch.no_grad():
        before = outputs(model, batch(model))
        recombine.apply(model, second, losses=losses(model))
        assert torch.allclose(outputs(model, batch(model)), before, atol=2e-5)
    assert model.recombined.dense >= dense and recombine.count(model).retained < 1
    train(model.train(), 2)
    with torch.no_grad():
        final = outputs(model.eval(), batch(model))
        loaded = reload(model, arch, tmp_path)
        assert torch.equal(outputs(loaded, batch(model)), final)
        assert recombine.count(loaded) == recombine.count(model) and layer_report(loaded) == layer_report(model)
        assert loaded.recombined.blocks == model.recombined.blocks
        assert torch.allclose(outputs(recombine.merge(model), batch(model)), final, atol=2e-5)


@pytest.mark.parametrize("qkv", [("qkv",), ("q", "k", "v")], ids=["fused", "split"])
def test_weights_are_counted_once_when_qkv_splits_later(qkv):
    model = pruned("tiny_vit", Isomorphic(targets=(*qkv, "o", "up", "down")))
    alone = recombine.count(model).retained
    recombine.apply(model, Peft(rank=2, options={"lora_alpha": 2}))
    added = recombine.count(model).trained_without_head
    assert model.recombined.dense == 4 * 12 * 48 * 48
    assert recombine.count(model).retained == pytest.approx(alone + added / model.recombined.dense)


@pytest.mark.parametrize("method", CUTTERS, ids=ids(CUTTERS))
def test_loading_prunes_nothing_again(method, tmp_path, monkeypatch):
    model = pruned("tiny_vit", method)
    monkeypatch.setattr(type(method), "prune", None)
    monkeypatch.setattr(type(method), "rewrite", None)
    loaded = reload(model, "tiny_vit", tmp_path)
    for name, module in model.named_modules():
        other = loaded.get_submodule(name)
        assert type(module) is type(other) and str(module) == str(other)
        for key in ("in_features", "num_heads", "head_dim", "attn_dim", "scale", "normalized_shape", "embed_dim"):
            assert getattr(module, key, None) == getattr(other, key, None)


@pytest.mark.parametrize("method", CUTTERS, ids=ids(CUTTERS))
def test_distillation_trains(method):
    model = pruned("tiny_vit", method)
    head = {"head.weight", "head.bias"}
    if isinstance(method, WeCoLora):
        assert {name.rpartition(".")[2] for name in method.distillation_parameters(model)} == {"left", "right"}
    else:
        assert method.distillation_parameters(model) == {name for name, _ in model.named_parameters()} - head


@pytest.mark.parametrize("method", CUTTERS[2:], ids=ids(CUTTERS[2:]))
def test_whole_blocks_are_cut_first(method):
    model = recombine.apply(build("tiny_vit"), Svft())
    with pytest.raises(recombine.UsageError, match="first|rewritten"):
        recombine.apply(model, method, losses=losses(model))


# WeCoLoRA


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("every, left", [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_wecolora_copies_every_other_block(every, left, arch):
    model, teacher = build(arch), build(arch)
    recombine.apply(model, WeCoLora(keep_every=every, rank=2))
    if arch == "tiny_swin" and every == 3:
        left = [0, 2]  # the first of each stage
    assert model.recombined.blocks == left and len(roles.blocks(model)) == len(left)
    finish(model, WeCoLora(keep_every=every), alone=False)
    assert not any(isinstance(m, DeltaLinear) for m in model.modules())
    recombine.merge(model)
    blocks = roles.blocks(teacher)
    for i, block in zip(left, roles.blocks(model), strict=True):
        ours, theirs = block.state_dict(), blocks[i].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("alone", [True, False])
def test_wecolora_is_distilled_and_folded(alone, arch, tmp_path):
    method = WeCoLora(rank=4)
    model, teacher = recombine.apply(build(arch), method), build(arch)
    x = batch(model)
    train_only(model, method.distillation_parameters(model))
    history = distil(model, teacher, method, 12)
    assert history[-1] < history[0]
    with torch.no_grad():
        distilled = outputs(model.eval(), x)
        finish(model, method, alone)
        assert torch.allclose(outputs(model, x), distilled, atol=2e-5)
        deltas = [name for name in model.recombined.targets if isinstance(model.get_submodule(name), DeltaLinear)]
        assert len(deltas) == (len(model.recombined.targets) if alone else 0)
        assert any(name.endswith("left") for name in model.recombined.trainable) == alone
        assert torch.allclose(outputs(reload(model, arch, tmp_path), x), outputs(model, x), atol=1e-6)
    assert (recombine.count(model).retained > 0.5) == alone and recombine.count(model).retained >= 0.5


def test_a_shallower_llama_generates_and_leaves_others_alone(tmp_path):
    from transformers import LlamaForCausalLM

    model = build("tiny_llama")
    other = LlamaForCausalLM(model.config).eval()
    x = batch(other)
    before = outputs(other, x)
    method = WeCoLora(rank=2)
    recombine.merge(recombine.apply(model, method))
    assert torch.equal(outputs(other, x), before) and other.config.num_hidden_layers == 4
    prompt = torch.arange(1, 6)[None]
    told = [model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*told)
    model.save_pretrained(tmp_path)
    assert torch.allclose(outputs(LlamaForCausalLM.from_pretrained(tmp_path).eval(), x), outputs(model, x), atol=1e-6)


def distil(model, teacher, method, steps):
    """A distillation as the stages run it: the method's schedule moves before every step."""
    x = batch(model)
    with torch.no_grad():
        target = outputs(teacher, x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0)
    history = []
    for step in range(steps):
        method.on_distillation_step(model, step / (steps - 1))
        loss = (outputs(model.train(), x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


# PC-LoRA


@pytest.mark.parametrize("schedule, half", [("sine", 1 - 0.5**0.5), ("linear", 0.5), ("cosine", 0.5**0.5)])
def test_the_pretrained_weights_fade_out(schedule, half):
    method = PcLora(schedule=schedule, decay=0.6, rank=3)
    model, teacher = recombine.apply(build("tiny_vit"), method), build("tiny_vit")
    x = batch(model)
    with torch.no_grad():
        assert not method.on_distillation_step(model, 0.0) and torch.allclose(model(x), teacher(x), atol=2e-5)
        assert not method.on_distillation_step(model, 0.3)
        for module, theirs in ((model.get_submodule(n), teacher.get_submodule(n)) for n in model.recombined.targets):
            module.left.normal_()
            want = half * theirs.weight + module.left @ module.right
            assert torch.allclose(module.dense_weight(), want, atol=1e-5)
        middle = model(x)
        assert method.on_distillation_step(model, 0.6) and not torch.allclose(
            model(x), middle
        )  # what eval kept is built again
        for name in model.recombined.targets:
            module = model.get_submodule(name)
            assert torch.equal(module.dense_weight(), module.left @ module.right)
        assert method.on_distillation_step(model, 1.0)


def test_a_fading_bias_is_the_papers_two():
    """y = f (W x + b) + left right x + b' with b' from 0, trained apart: the same model after every step."""
    model, reference = build("tiny_vit").double(), build("tiny_vit").double()
    method = PcLora(targets=ALL, decay=0.7, schedule="linear", fade_bias=True)
    recombine.apply(model, method)
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    train_only(model, {f"{name}.{part}" for name in layers for part in ("left", "right", "bias")})
    known = {name: (reference.get_submodule(name).weight.detach(), reference.get_submodule(name).bias.detach())
             for name in layers}  # fmt: skip
    parts = {name: [x.left.detach().clone(), x.right.detach().clone(), 0 * x.bias.detach()]
             for name, x in layers.items()}  # fmt: skip
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    theirs = torch.optim.SGD([t.requires_grad_() for trio in parts.values() for t in trio], 0.1)
    x = batch(model).double()
    for step in range(6):
        method.on_distillation_step(model, step / 5)
        f = max(0.0, 1 - step / 5 / 0.7)
        values = {}
        for name, (left, right, bias) in parts.items():
            weight, old = known[name]
            values |= {f"{name}.weight": f * weight + left @ right, f"{name}.bias": f * old + bias}
        expected, got = torch.func.functional_call(reference, values, x), model(x)
        assert torch.allclose(got, expected, atol=1e-9)
        for optimizer, y in ((ours, got), (theirs, expected)):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    assert all(torch.allclose(layers[name].bias, bias) for name, (_, _, bias) in parts.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_pc_lora_leaves_the_low_rank_pair_alone(arch, tmp_path):
    method = PcLora(decay=0.5)
    model, teacher = build(arch), build(arch)
    recombine.apply(model, method, "retained_40")
    method = PcLora(**model.recombined.steps[0].fields)
    assert recombine.count(model).retained > 1  # the pretrained weights are still there
    names = method.distillation_parameters(model)
    kinds = {name.rpartition(".")[2] for name in names}
    assert "base" not in kinds and kinds >= {"left", "right", "weight"}
    assert ("bias" in kinds) == (arch != "tiny_llama")
    train_only(model, names)
    history = distil(model, teacher, method, 30)
    assert history[-1] < max(history)
    x = batch(model)
    with torch.no_grad():
        distilled = outputs(model.eval(), x)
        pairs = {name: model.get_submodule(name) for name in model.recombined.targets}
        products = {name: layer.left @ layer.right for name, layer in pairs.items()}
        finish(model, method, alone=True)
        assert torch.allclose(outputs(model, x), distilled, atol=1e-5)
        for name, product in products.items():
            layer = model.get_submodule(name)
            assert type(layer) is FactoredLinear and torch.equal(layer.dense_weight(), product)
        assert 0.35 < recombine.count(model).retained <= 0.4
        assert model.recombined.trainable >= {f"{name}.left" for name in products}
        train_only(model, model.recombined.trainable)
        loaded = reload(model, arch, tmp_path)
        assert torch.equal(outputs(loaded, x), outputs(model, x)) and recombine.count(loaded) == recombine.count(model)
        assert torch.allclose(outputs(recombine.merge(model), x), outputs(loaded, x), atol=2e-5)


@pytest.mark.parametrize("fade_bias", [False, True])
def test_pc_lora_resumes_while_it_fades(fade_bias, tmp_path):
    method = PcLora(rank=4, fade_bias=fade_bias)
    model = recombine.apply(build("tiny_vit"), method)
    train_only(model, method.distillation_parameters(model))
    distil(model, build("tiny_vit"), method, 3)
    method.on_distillation_step(model, 0.4)
    loaded = reload(model, "tiny_vit", tmp_path)
    x = batch(model)
    assert torch.equal(loaded.eval()(x), model.eval()(x)) and not method.on_distillation_step(loaded, 0.5)
    method.on_distillation_step(model, 0.5)
    assert torch.equal(loaded(x), model(x))


def test_pc_lora_without_distillation_is_refused():
    method = PcLora(rank=4)
    model = recombine.apply(build("tiny_vit"), method)
    method.on_distillation_step(model, 1.0)
    with pytest.raises(recombine.UsageError, match="distil"):
        finish(model, method, alone=True)


@pytest.mark.parametrize("second", [LORA, Ssf()], ids=ids([LORA, Ssf()]))
def test_pc_lora_is_adapted(second, tmp_path):
    method = PcLora(targets=("up", "down"), rank=4)
    model = recombine.apply(build("tiny_vit"), method)
    train_only(model, method.distillation_parameters(model))
    distil(model, build("tiny_vit"), method, 4)
    finish(model, method, alone=False)
    recombine.apply(model.eval(), second)
    train(model.train(), 2)
    x = batch(model)
    assert torch.equal(reload(model.eval(), "tiny_vit", tmp_path)(x), model(x))
