"""What `apply` refuses, and that a refusal changes nothing."""

import numpy as np
import pytest
import torch

import recombine
from helpers import ALL, QKV, VBLORA
from helpers.rows import peft
from recombine import (
    Asvd,
    Balf,
    BasisSharing,
    Cersa,
    Crisp,
    Dfjr,
    Dgmr,
    DobiSvd,
    Fwsvd,
    Isomorphic,
    Jactus,
    PcLora,
    Peft,
    PruneNet,
    Recast,
    Rosa,
    Ssf,
    Svd,
    SvdLlm,
    Svfit,
    Svft,
    WeCoLora,
)
from zoo import batch, build

BAD = {
    "alpha=1.2": (Cersa(alpha=1.2), "alpha=1.2"),
    "beta>alpha": (Cersa(alpha=0.8, beta=0.9), "at most"),
    "beta=0": (Cersa(beta=0.0), "beta=0.0"),
    "basis_rank=0": (Crisp(chunk=8, basis_rank=0), "basis_rank=0"),
    "basis_rank large": (Crisp(chunk=8, basis_rank=17), "16"),
    "chunk": (Crisp(chunk=7), "divide"),
    "chunk=0": (Crisp(chunk=0), "chunk=0"),
    "group_size=0": (Crisp(group_size=0), "group_size=0"),
    "gate": (Crisp(chunk=8, gate="tanh"), "silu"),
    "gauge": (Crisp(chunk=8, gauge="left"), "balanced"),
    "relu closed": (Crisp(chunk=8, gate="relu"), "mimicry"),
    "placement": (Crisp(chunk=8, placement="post"), "mimicry"),
    "fit": (Crisp(chunk=8, fit="svd"), "closed"),
    "mimicry": (Crisp(chunk=8, mimicry={"loss": "l3"}), "huber"),
    "cluster": (Crisp(chunk=8, cluster={"teacher": "svd"}), "closed"),
    "regulariser": (Crisp(chunk=8, regulariser="l1"), "spectral"),
    "strength": (Crisp(chunk=8, strength=-1), "negative"),
    "recast chunk": (Recast(chunk=8), "method=crisp"),
    "recast rank": (Recast(basis_rank=3), "2"),
    "ratio": (Svd(ratio=0), "ratio=0"),
    "rank": (Svd(rank=999), "rank=999"),
    "lora rank": (Peft(rank=0), "rank=0"),
    "fwsvd losses": (Fwsvd(), "losses="),
    "asvd alpha": (Asvd(alpha=-0.5), "alpha=-0.5"),
    "svd_llm ratio": (SvdLlm(ratio=1.5), "ratio=1.5"),
    "basis_sharing group": (BasisSharing(group_size=0), "group_size=0"),
    "basis_sharing rank": (BasisSharing(rank=49), "48"),
    "dfjr ratio": (Dfjr(ratio=0.0), "ratio=0.0"),
    "balf ratio": (Balf(ratio=0.01), "ratio=0.01"),
    "dobi_svd beta": (DobiSvd(beta=0.0), "beta=0.0"),
    "dobi_svd steps": (DobiSvd(steps=-1), "steps=-1"),
    "dobi_svd step": (DobiSvd(step_size=0.0), "step_size=0.0"),
    "dobi_svd weight": (DobiSvd(weight=-1.0), "weight=-1.0"),
    "peft class": (Peft(config="LoraConfg"), "LoraConfig"),
    "peft option": (Peft(options={"lora_alpa": 3}), "lora_alpha"),
    "peft no linear": (peft("PromptTuningConfig", QKV), "LoraConfig"),
    "peft no rank": (Peft(config="IA3Config"), "rank=null"),
    "ia3 role": (peft("IA3Config", ("k", "v"), feedforward_modules=["down"]), "down"),
    "boft block": (peft("BOFTConfig", QKV, boft_block_size=5), "divisible"),
    "road variant": (peft("RoadConfig", QKV, variant="road_3", group_size=8), "road_1"),
    "road group": (peft("RoadConfig", QKV), "group_size"),
    "vblora length": (Peft(config="VBLoRAConfig", options=VBLORA | {"vector_length": 10}), "divisible"),
    "vblora topk": (Peft(config="VBLoRAConfig", options=VBLORA | {"topk": 7}), "k"),
    "svfit rank": (Svfit(rank=0), "rank=0"),
    "svft pattern": (Svft(pattern="dense"), "banded"),
    "svft band": (Svft(band=48), "47"),
    "svft band<0": (Svft(band=-1), "band=-1"),
    "svft top_k": (Svft(targets=("up",), pattern="top_k"), "192 x 48"),
    "rosa rank": (Rosa(rank=-1), "rank=-1"),
    "rosa density": (Rosa(density=1.5), "density=1.5"),
    "rosa nothing": (Rosa(rank=0, density=0.0), "nothing"),
    "rosa warm-up": (Rosa(density=0.0, warmup=3), "warmup=3"),
    "rosa warm-up losses": (Rosa(warmup=3), "losses="),
    "svft start": (Svft(start="random"), "kaiming"),
    "ssf start": (Ssf(start="zero"), "identity"),
    "jactus sensitivity": (Jactus(sensitivity="loss"), "gradient"),
    "dobi_svd unit": (DobiSvd(unit="share"), "rank"),
    "dobi_svd loss": (DobiSvd(loss="ppl"), "exp"),
    "dobi_svd stands still": (DobiSvd(unit="rank", basis="batch", beta=10.0), "step_size=0.02"),
    "dobi_svd basis": (DobiSvd(basis="layer"), "pooled"),
    "prunenet estimator": (PruneNet(estimator="reinforce"), "exact"),
    "isomorphic round_to": (Isomorphic(round_to=0), "round_to=0"),
    "mimicry basis": (Crisp(chunk=8, mimicry={"basis": "zero"}), "kaiming"),
    "refit losses": (BasisSharing(whiten=False, refit=True), "losses="),
    "anchored losses": (SvdLlm(refit="anchored"), "losses="),
    "rosa losses": (Rosa(), "losses="),
    "role": (Svd(targets=("gate",)), "gate"),
    "no role": (Svd(targets=()), "targets"),
    "prune ratio=0": (Dgmr(ratio=0.0), "ratio=0.0"),
    "prune ratio too small": (Dgmr(targets=ALL, ratio=0.3), "at least 0.337"),
    "prune up alone": (Dgmr(targets=("up",)), "down"),
    "episodes=0": (PruneNet(episodes=0), "episodes=0"),
    "policy_lr=0": (PruneNet(policy_lr=0.0), "policy_lr=0"),
    "isomorphic share": (Isomorphic(heads=1.0), "heads=1.0"),
    "isomorphic nothing": (Isomorphic(channels=0.0, heads=0.0, head_dims=0.0), "more than 0"),
    "isomorphic targets": (Isomorphic(targets=("up", "down")), "qkv, o, up and down"),
    "isomorphic without losses": (Isomorphic(), "losses="),
    "keep_every=0": (WeCoLora(keep_every=0), "keep_every=0"),
    "wecolora rank=0": (WeCoLora(rank=0), "rank=0"),
    "pc_lora ratio": (PcLora(ratio=1.5), "ratio=1.5"),
    "pc_lora rank": (PcLora(rank=99), "rank=99"),
    "decay": (PcLora(decay=0.0), "decay=0.0"),
    "fade": (PcLora(schedule="step"), "sine"),
}


@pytest.mark.parametrize("method, word", BAD.values(), ids=BAD)
def test_bad_knobs_are_refused_in_one_line_and_change_nothing(method, word):
    model = build("tiny_vit")
    x = batch(model)
    before = model(x)
    with pytest.raises(recombine.UsageError) as error:
        recombine.apply(model, method)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert torch.allclose(model(x), before, atol=1e-6) and all(p.requires_grad for p in model.parameters())


def test_one_method_object_serves_two_models():
    method = Cersa(alpha=1.0)
    for seed in (0, 1):
        model = build("tiny_vit", seed)
        before = model(batch(model))
        assert torch.allclose(recombine.apply(model, method)(batch(model)), before, atol=2e-5)
    assert not method.kept.groups  # and keeps none of their factors


def test_twice_and_not_at_all():
    model = recombine.apply(build("tiny_vit"), Svd())
    with pytest.raises(recombine.UsageError, match="already rewritten"):
        recombine.apply(model, Svd())
    with pytest.raises(recombine.UsageError, match="nothing to merge"):
        recombine.merge(build("tiny_vit"))


@pytest.mark.parametrize(
    "method",
    [
        recombine.Peft(targets={"q"}), recombine.Peft(targets=(3,)), recombine.Peft(targets=np.array(["q", "v"])),
        recombine.Peft(targets=("nope?",)), recombine.Svd(targets=("nope?",)), recombine.Cersa(rank=np.int64(4)),
        recombine.Cersa(alpha=np.float32(0.9)), recombine.Crisp(chunk=np.int64(8)),
    ],
)  # fmt: skip
def test_fields_that_no_file_can_hold_are_refused_before_anything_happens(method):
    vit = build("tiny_vit")
    with pytest.raises(recombine.UsageError, match="^method"):
        recombine.apply(vit, method, "retained_50" if isinstance(method, recombine.Svd) else None)
    assert not hasattr(vit, "recombined")


def test_train_only_takes_a_list():
    vit = build("tiny_vit")
    recombine.apply(vit, recombine.Peft(rank=2))
    recombine.train_only(vit, ["head.weight"])
    assert [n for n, p in vit.named_parameters() if p.requires_grad] == ["head.weight"]
