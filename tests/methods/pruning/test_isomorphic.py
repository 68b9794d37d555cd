"""Isomorphic pruning against torch-pruning, and what it cannot cut."""

import copy

import pytest
import timm
import torch
import torch_pruning

import recombine
from recombine import Dgmr, Isomorphic, PruneNet
from recombine.methods.pruning.isomorphic_graph import best, gradients
from recombine.models import roles
from zoo import batch, build, losses, outputs


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


@pytest.mark.parametrize("mlp", ["SwiGLUPacked", "GluMlp"])
def test_a_packed_gate_is_refused(mlp):
    model = other_vit("vit_tiny_patch16_224", {"mlp_layer": getattr(timm.layers, mlp)})
    with pytest.raises(recombine.UsageError, match="wide"):
        recombine.apply(model, Isomorphic(), losses=losses(model))


@pytest.mark.parametrize("method", [Dgmr(), Dgmr(compensate="ridge"), PruneNet()], ids=["Dgmr", "ridge", "PruneNet"])
@pytest.mark.parametrize("mlp", ["SwiGLUPacked", "GluMlp"])
def test_a_neuron_is_cut_out_of_both_halves_of_a_packed_gate(mlp, method, tmp_path):
    model = other_vit("vit_tiny_patch16_224", {"mlp_layer": getattr(timm.layers, mlp)})
    before, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    batches = torch.randn(3, 4, 3, 32, 32)
    recombine.apply(model, method, "retained_70", losses=lambda: (model(part).logsumexp(1).mean() for part in batches))
    assert 0.65 < recombine.count(model).retained <= 0.7
    for new, old in zip(roles.blocks(model), roles.blocks(before), strict=True):
        half, width = len(new.mlp.fc1.weight) // 2, old.mlp.fc2.in_features
        rows = {tuple(row.tolist()): i for i, row in enumerate(old.mlp.fc1.weight[:width])}
        kept = [rows[tuple(row.tolist())] for row in new.mlp.fc1.weight[:half]]
        assert torch.equal(new.mlp.fc1.weight[half:], old.mlp.fc1.weight[width:][kept])
        old.mlp.fc2.weight.data[:, [i for i in range(width) if i not in kept]] = 0
        if method.compensate == "ridge":
            old.mlp.fc2.weight.data[:, kept] = new.mlp.fc2.weight.data
            old.mlp.fc2.bias.data = new.mlp.fc2.bias.data
    with torch.no_grad():
        assert torch.allclose(model(x), before(x), atol=1e-5)
        assert torch.equal(
            recombine.load(
                recombine.save(model, tmp_path / "m", whole=False),
                other_vit("vit_tiny_patch16_224", {"mlp_layer": getattr(timm.layers, mlp)}),
            ).eval()(x),
            model.eval()(x),
        )


@pytest.mark.parametrize("method", [Dgmr(), PruneNet()], ids=["Dgmr", "PruneNet"])
def test_a_norm_inside_an_mlp_is_refused(method):
    model = other_vit("vit_tiny_patch16_224", {"scale_mlp_norm": True})
    with pytest.raises(recombine.UsageError, match="hold more"):
        recombine.apply(model, method)


def other_vit(name, options):
    torch.manual_seed(0)
    size = 28 if "14" in name else 32
    return timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=5, img_size=size, **options).eval()
