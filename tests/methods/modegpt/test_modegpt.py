"""MoDeGPT on whole models: what it may cut for nothing, its budgets, its refusals, and its files."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers import refusal
from recombine import Dgmr, Modegpt
from recombine.core.rewrite import find_sites
from recombine.methods.modegpt.allocation import sparsities, turns
from recombine.models import roles
from zoo import batch, build, losses, outputs

ALL = ("qkv", "o", "up", "down", "gate?")
FAMILIES = ("tiny_vit", "tiny_swin", "tiny_bert", "tiny_llama", "tiny_qwen2")


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16, num_labels=5,
            initializer_range=0.15,
        )
    )  # fmt: skip


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=80, max_position_embeddings=32, initializer_range=0.15,
        )
    )  # fmt: skip


def made(arch):
    """As `zoo.build`, of two further families."""
    if arch not in ("tiny_bert", "tiny_qwen2"):
        return build(arch)
    torch.manual_seed(0)
    model = {"tiny_bert": bert, "tiny_qwen2": qwen2}[arch]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.logspace(0, -1, p.shape[-1]) * 2) if p.ndim == 2 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def inputs(model):
    x = batch(model)
    return x.double() if isinstance(x, torch.Tensor) else x


def feed(model):
    """Losses in float64."""

    def run():
        for seed in range(4):
            x = batch(model, seed=10 + seed)
            yield outputs(model, x.double() if isinstance(x, torch.Tensor) else x).square().mean()

    return run


def parts(model):
    """The attentions and MLPs, as the method sees them."""
    method = Modegpt()
    return method.parts(find_sites(model, method))


@torch.no_grad()
def with_redundancy(model, constants):
    """Half of a model is of no use: neurons that are 0, half of the dimensions of q and k, and combinations in v.

    Args:
        constants: the neurons are what their bias makes of them instead, where up has one and there is no gate.
    """
    for part in parts(model):
        if part.name == part.out.name:
            gone = torch.randperm(part.width)[: part.width // 2]
            for site in part.into:
                site.module.weight[gone] = 0
                if site.module.bias is not None:
                    site.module.bias[gone] *= constants
            continue
        tensors = [[getattr(site.module, key) for site in part.read] for key in ("weight", "bias")]
        tensors = [t if len(t) == 3 else [None] * 3 if t[0] is None else t[0].chunk(3) for t in tensors]
        heads, groups = part.heads, part.heads.queries // part.heads.keys
        for i in range(heads.keys):
            pairs = torch.randperm(heads.width // 2)[: heads.width // 4]
            gone = torch.cat([pairs, pairs + heads.width // 2])
            mix = torch.randn(heads.width // 2, heads.width // 2, dtype=tensors[0][0].dtype)
            for q, k, v in (found for found in tensors if found[0] is not None):
                q.unflatten(0, (heads.keys, groups, -1))[i, :, gone] = 0
                k.unflatten(0, (heads.keys, -1))[i, gone] = 0
                head = v.unflatten(0, (heads.keys, -1))[i]
                head[heads.width // 2 :] = mix @ head[: heads.width // 2]
    return model


@pytest.mark.parametrize("how", [{}, {"query_key": "select", "intercept": False}], ids=["corp", "modegpt"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_what_is_redundant_is_cut_for_nothing(arch, how):
    """Half of everything is gone: the scale is that of the old heads, biases are folded, frequencies are selected."""
    model = with_redundancy(made(arch).double(), constants=how == {})
    x, tables = inputs(model), {n: p.clone() for n, p in model.named_parameters() if "relative_position" in n}
    with torch.no_grad():
        before = outputs(model, x)
        recombine.apply(model, Modegpt(ratio=0.5, ridge=1e-12, **how), losses=feed(model))
        assert 0.45 < recombine.count(model).retained <= 0.5
        assert torch.allclose(outputs(model, x), before, rtol=1e-6, atol=1e-6 * before.abs().max())
    assert all(torch.equal(model.get_parameter(name), table) for name, table in tables.items())  # Swin's


@pytest.mark.parametrize("arch", FAMILIES)
def test_cutting_nothing_changes_no_weight(arch):
    model, before = made(arch), made(arch).state_dict()
    recombine.apply(model, Modegpt(ratio=1.0), losses=losses(model))
    assert recombine.count(model).retained == 1
    recombine.merge(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch", FAMILIES)
def test_files_of_cut_models(arch, tmp_path):
    model = made(arch)
    method = Modegpt(allocation="blocks", smoothing=0.05)
    recombine.apply(model, method, "retained_60", losses(model))
    assert 0.55 < recombine.count(model).retained <= 0.6
    widths = {model.get_submodule(name).in_features for name in roles.find(model, ("down",), nn.Module)}
    assert len(widths) > 1  # every block has its own
    with torch.no_grad():
        x = batch(model)
        after = outputs(model, x)
        for whole in (True, False):
            recombine.save(model, tmp_path / "m.safetensors", whole=whole)
            loaded = recombine.load(tmp_path / "m.safetensors", None if whole else made(arch)).eval()
            assert torch.equal(outputs(loaded, x), after)
        merged = recombine.merge(model)
        assert torch.allclose(outputs(merged, x), after, atol=1e-6)


@pytest.mark.parametrize("arch", FAMILIES)
def test_better_than_pruning_without_data(arch):
    """At half of the size, on the batches it was calibrated on."""
    errors = []
    for method in (Modegpt(targets=("up", "down", "gate?")), Dgmr()):
        model = made(arch).double()
        x = inputs(model)
        with torch.no_grad():
            before = outputs(model, x)
            recombine.apply(model, method, losses=feed(model))
            errors.append(float((outputs(model, x) - before).norm()))
    assert errors[0] < 0.9 * errors[1]


def test_a_cut_model_multiplies_less_and_keeps_its_cache():
    model = made("tiny_llama")
    ids = batch(model)["input_ids"][:2]
    before = recombine.count(model, {"input_ids": ids}).flops
    recombine.apply(model, Modegpt(ratio=0.5), losses=losses(model))
    account = recombine.count(model, {"input_ids": ids})
    assert account.flops < 0.6 * before
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
    assert first.past_key_values.layers[0].keys.shape == (2, 2, 7, 6)
    assert torch.allclose(torch.cat([first.logits, rest], 1), whole, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_selected_rotary_attention_is_the_classes_own(implementation):
    """With all pairs selected it gives what transformers' own forward gives."""
    from recombine.models import rotary

    for arch in ("tiny_llama", "tiny_qwen2"):
        model, x = made(arch), batch(made(arch))
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            before = outputs(model, x)
            for name in [n for n, m in model.named_modules() if n.endswith("self_attn")]:
                rotary.select(model, name, [list(range(12))] * 2)
            assert torch.allclose(outputs(model, x), before, atol=1e-6)
            order = [*range(3, 6), *range(3), *range(9, 12), *range(6, 9)]  # pairs may come in any order
            attention = model.model.layers[0].self_attn
            attention.turns.copy_(torch.tensor([order] * 2))
            for layer in (attention.q_proj, attention.k_proj):
                for p in layer.parameters():
                    p.copy_(p.unflatten(0, (-1, 12))[:, order].flatten(0, 1))
            assert torch.allclose(outputs(model, x), before, atol=1e-5)


def test_memory_and_passes_do_not_change_the_result():
    for allocation in ("uniform", "blocks"):
        results = []
        for memory in ("1gb", "320kb"):
            model = made("tiny_llama")
            calls = []

            def counted(model=model, calls=calls):
                calls.append(1)
                return losses(model)()

            recombine.apply(model, Modegpt(allocation=allocation, ratio=0.6), losses=counted, memory=memory)
            results.append((outputs(model, batch(model)), len(calls)))
        assert torch.equal(results[0][0], results[1][0]), allocation
        assert results[0][1] < results[1][1]  # several passes


@pytest.mark.parametrize("share", [0.15, 0.5, 0.83])
@pytest.mark.parametrize("allocation", ["uniform", "blocks"])
@pytest.mark.parametrize("arch", ["tiny_swin", "tiny_llama"])
def test_budgets_are_met_and_filled(arch, allocation, share):
    model = made(arch)
    recombine.apply(model, Modegpt(allocation=allocation), f"retained_{100 * share:g}", losses(model))
    assert share - 0.03 < recombine.count(model).retained <= share


def test_widths_are_multiples():
    model = made("tiny_vit")
    recombine.apply(model, Modegpt(ratio=0.7, round_to=8), losses=losses(model))
    assert {(b.attn.head_dim, b.attn.qkv.out_features, b.mlp.fc1.out_features % 8) for b in model.blocks} == {
        (8, 72, 0)
    }


# the blocks' shares


def test_sparsities_follow_the_softmax_up_to_a_limit():
    scores, weights = torch.tensor([0.1, 0.5, 0.2, 0.9]).double(), torch.ones(4).double()
    plain = 4 * 0.2 * (-scores / 0.5).softmax(0)
    assert torch.allclose(sparsities(scores, weights, 0.2, 0.5, 0.8), plain)
    limited = sparsities(scores, weights, 0.5, 0.05, 0.8)
    assert limited.mean() == pytest.approx(0.5) and limited.max() == 0.8
    free = limited < 0.8
    assert 0 < free.sum() < 4 and (limited[(-scores).argsort()].diff() >= 0).all()
    ratio = limited[free] / (-scores / 0.05).softmax(0)[free]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))  # the rest in the same proportion
    uneven = torch.tensor([1.0, 3.0, 2.0, 5.0]).double()
    assert (sparsities(scores, uneven, 0.5, 0.1, 0.8) * uneven).sum() / 11 == pytest.approx(0.5)
    assert torch.equal(sparsities(scores, weights, 0.9, 0.1, 0.8), torch.full((4,), 0.9, dtype=torch.float64))
    steep = sparsities(scores, weights, 0.5, 1e-4, 0.8)  # all but the first underflow in one softmax
    assert torch.allclose(steep, torch.tensor([0.8, 0.4, 0.8, 0.0]).double())


@pytest.mark.parametrize("arch", ["tiny_swin", "tiny_llama"])
def test_a_blocks_score_is_one_less_the_mean_cosine_of_its_tokens(arch):
    model = made(arch)
    x = batch(model, seed=10)
    seen = {}
    block = roles.blocks(model)[1]
    hook = block.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y[0] if isinstance(y, tuple) else y))
    outputs(model, x)
    hook.remove()
    cosine = F.cosine_similarity(seen["x"], seen["y"], dim=-1)
    if isinstance(x, dict):  # padding does not count
        cosine = cosine[x["attention_mask"].bool()]
    assert turns(model, lambda: [outputs(model, x).sum()])[1] == pytest.approx(1 - cosine.mean().item(), abs=1e-6)
    assert not any(m._forward_hooks for m in model.modules())


# what is refused


def test_heads_that_are_normalised_or_unknown_are_refused():
    normed = timm.create_model("vit_tiny_patch16_224", qk_norm=True, depth=2, img_size=32)
    assert "q_norm normalises what would be cut: give targets=[up,down,gate?]" in refusal(
        recombine.apply, normed, Modegpt(), losses=lambda: [normed(torch.randn(1, 3, 32, 32)).sum()]
    )
    for arch in ("swinv2_tiny_window8_256", "beit_base_patch16_224"):  # their classes have the plain ones' names
        other = timm.create_model(
            arch, embed_dim=24 if "swin" in arch else 48, num_heads=(2, 2, 2, 2) if "swin" in arch else 4
        )
        line = refusal(recombine.apply, other, Modegpt(), losses=lambda: [])
        assert "ttention, whose heads cannot be made narrower" in line
    deberta = made("tiny_deberta")
    line = refusal(recombine.apply, deberta, Modegpt(), losses=losses(deberta))
    assert "DisentangledSelfAttention, whose heads cannot be made narrower" in line
    recombine.apply(deberta, Modegpt(targets=("up", "down")), losses=losses(deberta))


def test_fields_are_refused():
    llama = made("tiny_llama")
    for method, why in (
        (Modegpt(ratio=0.0), "ratio=0.0"),
        (Modegpt(ratio=0.01), "ratio=0.01: must be at least"),
        (Modegpt(allocation="even"), "uniform or blocks"),
        (Modegpt(query_key="best"), "svd or select"),
        (Modegpt(smoothing=0.0), "smoothing"),
        (Modegpt(max_sparsity=0.0), "max_sparsity"),
        (Modegpt(leverage=0.0), "leverage"),
        (Modegpt(ridge=-1.0), "ridge"),
        (Modegpt(round_to=0), "round_to"),
        (Modegpt(targets=("q", "k", "up", "down", "gate")), "q, k, v and o"),
        (Modegpt(targets=("o",)), "q, k, v and o"),
        (Modegpt(targets=("up", "down")), "gate"),
    ):
        assert why in refusal(recombine.apply, llama, method, losses=losses(llama))
    assert "losses=" in refusal(recombine.apply, llama, Modegpt())
    recombine.apply(llama, recombine.Peft(targets=("q",), rank=2))
    assert "first" in refusal(recombine.apply, llama, Modegpt(targets=("up", "down", "gate")), losses=losses(llama))


def test_notes_say_what_does_not_fit():
    llama, vit = made("tiny_llama"), made("tiny_vit")
    notes = recombine.apply(llama, Modegpt(), losses=losses(llama)).recombined.notes
    assert "pairs are selected" in notes[0] and "has no bias" in notes[1]
    assert recombine.apply(vit, Modegpt(), losses=losses(vit)).recombined.notes == []
