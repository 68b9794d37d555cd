"""The rows of the contract matrix: every method with the sizes that it must have."""

from dataclasses import dataclass

import recombine
from helpers import ALL, QKV, SPLIT, VBLORA
from recombine import (
    Asvd,
    Balf,
    BasisSharing,
    Cersa,
    Crisp,
    Dfjr,
    Dgmr,
    DobiSvd,
    Full,
    Fwsvd,
    Isomorphic,
    Jactus,
    KfacSvd,
    LinearProbe,
    Modegpt,
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
from recombine.linalg import energy_rank
from zoo import ARCHS


@dataclass
class Row:
    method: recombine.Method
    exact: bool  # equals the pretrained output at init
    sizes: object  # [(out, in, role, s)] -> (stored, trained) in the target layers, written out again; None: by data
    where: tuple[str, ...] = ARCHS  # the families it is defined on; refused in one line elsewhere
    same_shape: bool = True  # merging gives back the modules of the pretrained model


def crisp_sizes(r, s, g):
    def sizes(layers):
        alike = {}
        for m, n, role, _ in layers:
            alike.setdefault((m, n, role), []).append(m * n)
        groups = [run[i : i + g] for run in alike.values() for i in range(0, len(run), g)]
        rank = [min(r, len(group) * s) for group in groups]
        mixers = sum(len(group) * k * s for group, k in zip(groups, rank, strict=True))
        return sum(group[0] * k // s for group, k in zip(groups, rank, strict=True)) + mixers, mixers

    return sizes


def dense(layers):
    return sum(m * n for m, n, *_ in layers)


def svd_sizes(rank, core=0, pivot=False):
    def sizes(layers):
        ranks = [rank(m, n, s) for m, n, _, s in layers]
        outer = sum(k * (m + n - pivot * k) for k, (m, n, *_) in zip(ranks, layers, strict=True))
        return outer + core * sum(ranks), core * sum(ranks)

    return sizes


def half_pivoted(m, n, s):
    """The largest rank k with k (m + n - k) at most half of m n."""
    return max(k for k in range(1, min(m, n)) if 2 * k * (m + n - k) <= m * n)


def cersa_sizes(alpha, beta):
    def sizes(layers):
        ranks = [
            tuple(share(s) if callable(share) else energy_rank(s, share) for share in (alpha, beta)) for *_, s in layers
        ]
        outer = sum(ka * (m + n) + ka - kb for (ka, kb), (m, n, *_) in zip(ranks, layers, strict=True))
        trained = sum(kb * kb for _, kb in ranks)
        return outer + trained, trained

    return sizes


def lora_sizes(r, magnitude):
    def sizes(layers):
        added = sum(r * (m + n) + magnitude * m for m, n, *_ in layers)
        return dense(layers) + added, added

    return sizes


def added_sizes(weights, shared=0):
    """An adapter that stores and trains so many weights a layer beside it, and `shared` ones for all layers."""

    def sizes(layers):
        added = shared + sum(weights(m, n, role) for m, n, role, _ in layers)
        return dense(layers) + added, added

    return sizes


def svfit_sizes(rank):
    def sizes(layers):
        return sum(min(m, n) * (m + n + 1) for m, n, *_ in layers), sum(min(rank, m, n) for m, n, *_ in layers)

    return sizes


def svft_sizes(d):
    def sizes(layers):
        trained = sum(min(m, n) * (2 * d + 1) - d * (d + 1) + 1 for m, n, *_ in layers)
        return sum(min(m, n) * (m + n + 1) for m, n, *_ in layers) + trained, trained

    return sizes


def ssf_sizes(layers):
    rms = any(role == "gate" for *_, role, _ in layers)  # Llama: its norms have no bias and get no shift
    trained = sum(m if rms and role == "norm" else 2 * m for m, _, role, _ in layers)
    return dense(layers) + trained, trained


def mlp_sizes(ratio):
    def sizes(layers):
        mlp = sum(m * n for m, n, role, _ in layers if role in ("up", "down", "gate"))
        share = (ratio * dense(layers) - dense(layers) + mlp) / mlp
        into = sum(int(m * share) * n for m, n, role, _ in layers if role in ("up", "gate"))
        return dense(layers) - mlp + into + sum(m * int(n * share) for m, n, role, _ in layers if role == "down"), 0

    return sizes


def isomorphic_sizes(width):
    """Of the tiny ViT, 4 blocks of 3 heads of 16 and 192 neurons: half of the neurons and the heads."""
    return lambda layers: (width * (2 * 4 * 192 // 2 + 4 * 4 * 3 * 16 // 2), 0)


def wecolora_sizes(r):
    def sizes(layers):
        seen, left = {}, []
        for m, n, role, _ in layers:
            seen[role] = seen.get(role, -1) + 1
            left += [(m, n)] * (seen[role] % 2 == 0)
        trained = sum(r * (m + n) for m, n in left)
        return sum(m * n for m, n in left) + trained, trained

    return sizes


def pc_lora_sizes(ratio):
    def sizes(layers):
        added = sum(max(1, int(ratio * m * n / (m + n))) * (m + n) for m, n, *_ in layers)
        return dense(layers) + added, added

    return sizes


def group_sizes(key, size):
    """Half of the weights, in groups of `size` layers that follow each other among those of one key(shape, role)."""

    def sizes(layers):
        alike = {}
        for m, n, role, _ in layers:
            alike.setdefault(key(m, n, role), []).append((m, n))
        runs = [run[i : i + size(k)] for k, run in alike.items() for i in range(0, len(run), size(k))]
        shapes = [(sum(m for m, _ in run), run[0][1]) for run in runs]
        return sum(int(0.5 * m * n / (m + n)) * (m + n) for m, n in shapes), 0

    return sizes


def dfjr_sizes(layers):
    """Half of the weights of q with k, of gate with up, and of the rest alone."""
    shapes = {}
    for i, (m, n, role, _) in enumerate(layers):
        before = sum(r == role for *_, r, _ in layers[:i])
        shapes.setdefault((role.replace("k", "q").replace("up", "gate"), before), []).append((m, n))
    stacks = [(sum(m for m, _ in group), group[0][1]) for group in shapes.values()]
    return sum(int(0.5 * m * n / (m + n)) * (m + n) for m, n in stacks), 0


def factor_pair(width):
    """The two factors of a width that are closest to each other, the smaller first."""
    small = max(a for a in range(1, int(width**0.5) + 1) if width % a == 0)
    return small, width // small


def lokr_size(rank):
    """A Kronecker product (a, c) x (b, d) for W (m, n), a b = m and c d = n; the larger factor of low rank."""

    def size(m, n, role):
        (a, b), (c, d) = factor_pair(m), factor_pair(n)
        return a * c + (rank * (b + d) if 2 * rank < max(b, d) else b * d)

    return size


def randlora_size(rank):
    return lambda m, n, role: -(-min(m, n) // rank) * (rank + min(m, n))


LORA = {"lora_alpha": 8}
CLASSIFIERS = ARCHS[:3]


def peft(config, targets, rank=None, **options):
    return Peft(config=config, targets=targets, rank=rank, options=options)


ROWS = {
    "crisp": Row(Crisp(chunk=8), True, crisp_sizes(16, 8, 2)),
    "crisp alone": Row(Crisp(chunk=8, group_size=1), True, crisp_sizes(8, 8, 1)),
    "crisp balanced": Row(Crisp(chunk=4, group_size=4, gauge="balanced"), True, crisp_sizes(16, 4, 4)),
    "crisp ungated": Row(Crisp(chunk=8, gate="none"), True, crisp_sizes(16, 8, 2)),
    "crisp small": Row(Crisp(chunk=8, basis_rank=5), False, crisp_sizes(5, 8, 2)),
    "crisp split": Row(Crisp(targets=SPLIT, chunk=8), True, crisp_sizes(16, 8, 2)),
    "crisp gelu": Row(Crisp(chunk=8, gate="gelu"), True, crisp_sizes(16, 8, 2)),
    "crisp aware": Row(Crisp(chunk=8, group_size=1, basis_rank=4, fit="aware"), False, crisp_sizes(4, 8, 1)),
    "crisp cluster": Row(Crisp(chunk=8, basis_rank=5, fit="cluster", refine={"steps": 3}), False, crisp_sizes(5, 8, 2)),
    "crisp random": Row(Crisp(chunk=8, basis_rank=5, fit="random"), False, crisp_sizes(5, 8, 2)),
    "crisp post": Row(
        Crisp(chunk=8, placement="post", fit="mimicry", mimicry={"steps": 20}), False, crisp_sizes(16, 8, 2)
    ),
    "crisp temp": Row(
        Crisp(chunk=8, placement="temp", gate="relu", fit="mimicry", mimicry={"steps": 20}),
        False,
        crisp_sizes(16, 8, 2),
    ),
    "recast": Row(Recast(), True, crisp_sizes(2, 1, 2)),
    "recast small": Row(Recast(basis_rank=1), False, crisp_sizes(1, 1, 2)),
    "cersa": Row(Cersa(targets=SPLIT, alpha=0.9, beta=0.7), False, cersa_sizes(0.9, 0.7)),
    "cersa whole": Row(Cersa(targets=QKV, alpha=1.0), True, cersa_sizes(1, 1)),
    "cersa bottom": Row(
        Cersa(targets=SPLIT, alpha=0.9, trained_share=0.5, part="bottom"),
        False,
        cersa_sizes(0.9, lambda s: max(1, energy_rank(s, 0.9) // 2)),
    ),
    "cersa array": Row(
        Cersa(targets=SPLIT, alpha=0.9, core="array"), False, svd_sizes(lambda m, n, s: energy_rank(s, 0.9), core=1)
    ),
    "cersa uniform": Row(Cersa(targets=SPLIT, rank=9), False, cersa_sizes(lambda s: 9, lambda s: 9)),
    "jactus": Row(Jactus(ratio=0.6, top_k=4), False, None),
    "jactus paper": Row(Jactus(ratio=0.6, dense="none", gain="weight+grad"), False, None),
    "jactus blind": Row(Jactus(ratio=0.6, sensitivity="none", relative=True, allocation="lagrangian"), False, None),
    "svd": Row(Svd(targets=ALL, ratio=0.5), False, svd_sizes(lambda m, n, s: max(1, int(0.5 * m * n / (m + n))))),
    "svd pivot": Row(Svd(targets=ALL, factor="pivot"), False, svd_sizes(half_pivoted, pivot=True)),
    "svd pivot energy": Row(
        Svd(targets=ALL, energy=0.8, factor="pivot"), False, svd_sizes(lambda m, n, s: energy_rank(s, 0.8), pivot=True)
    ),
    "svd energy": Row(Svd(targets=ALL, energy=0.8), False, svd_sizes(lambda m, n, s: energy_rank(s, 0.8))),
    "svd core": Row(Svd(targets=SPLIT, rank=7, train_core=True), False, svd_sizes(lambda m, n, s: 7, core=1)),
    "fwsvd": Row(Fwsvd(targets=ALL), False, svd_sizes(lambda m, n, s: max(1, int(0.5 * m * n / (m + n))))),
    "asvd": Row(Asvd(targets=ALL, rank=7), False, svd_sizes(lambda m, n, s: 7)),
    "svd_llm": Row(SvdLlm(targets=SPLIT, rank=7), False, svd_sizes(lambda m, n, s: 7)),
    "kfac_svd": Row(KfacSvd(targets=ALL, rank=7), False, svd_sizes(lambda m, n, s: 7)),
    "kfac_svd refit": Row(KfacSvd(targets=SPLIT, rank=7, refit=True, clip=False), False, svd_sizes(lambda m, n, s: 7)),
    "kfac_svd error": Row(KfacSvd(targets=ALL, allocation="error", left="chol_as_released"), False, None),
    "svd lems": Row(Svd(targets=ALL, allocation="lems", multiple_of=4), False, None),
    "kfac_svd atp": Row(KfacSvd(targets=SPLIT, allocation="atp", factor="pivot"), False, None),
    "svd share": Row(Svd(targets=ALL, allocation="share"), False, None),
    "basis_sharing": Row(
        BasisSharing(), False, group_sizes(lambda m, n, role: (m, n, role), lambda k: 1 if k[2] in ("o", "down") else 2)
    ),
    "basis_sharing blind": Row(
        BasisSharing(targets=ALL, whiten=False, group_size=3, shared=("qkv", "up")),
        False,
        group_sizes(lambda m, n, role: (m, n, role), lambda k: 3 if k[2] in ("qkv", "up") else 1),
    ),
    "svd_llm refit": Row(SvdLlm(targets=SPLIT, rank=7, refit=True), False, svd_sizes(lambda m, n, s: 7)),
    "svd_llm anchored": Row(SvdLlm(targets=SPLIT, rank=7, refit="anchored"), False, svd_sizes(lambda m, n, s: 7)),
    "kfac_svd saes": Row(
        KfacSvd(targets=SPLIT, rank=7, refit="anchored", anchor=(0.25, 0.75), factor="pivot"),
        False,
        svd_sizes(lambda m, n, s: 7, pivot=True),
    ),
    "basis_sharing refit": Row(
        BasisSharing(refit=True),
        False,
        group_sizes(lambda m, n, role: (m, n, role), lambda k: 1 if k[2] in ("o", "down") else 2),
    ),
    "dfjr": Row(Dfjr(), False, dfjr_sizes),
    "kfac_svd pivot": Row(
        KfacSvd(targets=SPLIT, rank=7, refit=True, factor="pivot"), False, svd_sizes(lambda m, n, s: 7, pivot=True)
    ),
    "basis_sharing pivot": Row(BasisSharing(factor="pivot", refit=True), False, None),
    "dfjr pivot": Row(Dfjr(factor="pivot"), False, None),
    "balf pivot": Row(Balf(targets=ALL, factor="pivot"), False, None),
    "dobi_svd pivot": Row(DobiSvd(targets=ALL, steps=6, factor="pivot"), False, None),
    "balf": Row(Balf(targets=ALL), False, None),
    "balf whole": Row(Balf(targets=SPLIT, ratio=1.0), True, lambda layers: (dense(layers), 0)),
    "dobi_svd": Row(DobiSvd(targets=ALL, steps=6), False, None),
    "dobi_svd paper": Row(
        DobiSvd(targets=ALL, steps=2, basis="batch", unit="rank", beta=10.0, step_size=5.0, weight=200.0, loss="exp"),
        False,
        None,
    ),
    "lora": Row(Peft(targets=QKV, rank=4, options=LORA), True, lora_sizes(4, 0)),
    "lora all": Row(Peft(targets=SPLIT, rank=2, options=LORA), True, lora_sizes(2, 0)),
    "dora": Row(Peft(targets=QKV, rank=4, options=LORA | {"use_dora": True}), True, lora_sizes(4, 1)),
    "pissa": Row(Peft(targets=QKV, rank=4, options=LORA | {"init_lora_weights": "pissa"}), True, lora_sizes(4, 0)),
    "boft": Row(peft("BOFTConfig", QKV, boft_block_size=4), True, added_sizes(lambda m, n, role: 4 * n + m)),
    "ia3": Row(
        peft("IA3Config", ("k", "v", "down"), feedforward_modules=["down"]),
        True,
        added_sizes(lambda m, n, role: n if role == "down" else m),
    ),
    "road_1": Row(peft("RoadConfig", ALL, variant="road_1", group_size=8), True, added_sizes(lambda m, n, role: m)),
    "road_2": Row(peft("RoadConfig", ALL, variant="road_2", group_size=8), True, added_sizes(lambda m, n, role: 2 * m)),
    "road_4": Row(peft("RoadConfig", ALL, variant="road_4", group_size=8), True, added_sizes(lambda m, n, role: 4 * m)),
    "vblora": Row(
        Peft(config="VBLoRAConfig", targets=QKV, rank=2, options=VBLORA),
        False,
        added_sizes(lambda m, n, role: 2 * 6 * (m + n) // 12, shared=6 * 12),
    ),
    "hira": Row(Peft(config="HiraConfig", targets=QKV, rank=4), True, lora_sizes(4, 0)),
    "rslora": Row(peft("LoraConfig", QKV, 4, use_rslora=True, **LORA), True, lora_sizes(4, 0)),
    "eva": Row(peft("LoraConfig", SPLIT, 4, init_lora_weights="eva", **LORA), True, None),
    "eva dora": Row(
        peft("LoraConfig", SPLIT, 4, init_lora_weights="eva", eva_config={"rho": 1}, use_dora=True, **LORA),
        True,
        lora_sizes(4, 1),
    ),
    "corda": Row(peft("LoraConfig", SPLIT, 4, init_lora_weights="corda", **LORA), True, lora_sizes(4, 0)),
    "corda kpm": Row(
        peft("LoraConfig", QKV, 4, init_lora_weights="corda", corda_config={"corda_method": "kpm"}, **LORA),
        True,
        lora_sizes(4, 0),
    ),
    "miss": Row(peft("MissConfig", SPLIT, 7), True, added_sizes(lambda m, n, role: 7 * m)),
    "miss bat": Row(peft("MissConfig", QKV, 4, init_weights="bat"), True, added_sizes(lambda m, n, role: 4 * m)),
    "randlora": Row(peft("RandLoraConfig", SPLIT, 5, randlora_alpha=100), True, added_sizes(randlora_size(5))),
    "vera": Row(peft("VeraConfig", SPLIT, 16), True, added_sizes(lambda m, n, role: m + 16)),
    "delora": Row(peft("DeloraConfig", SPLIT, 4), True, added_sizes(lambda m, n, role: 4 * (m + n) + 1)),
    "gralora": Row(peft("GraloraConfig", SPLIT, 4), True, lora_sizes(4, 0)),
    "psoft": Row(peft("PsoftConfig", SPLIT, 6), True, added_sizes(lambda m, n, role: 6 * 5 // 2 + 2 * 6)),
    "oft": Row(peft("OFTConfig", SPLIT, oft_block_size=8), True, added_sizes(lambda m, n, role: n * 7 // 2)),
    "fourierft": Row(
        peft("FourierFTConfig", QKV, n_frequency=50, init_weights=True), True, added_sizes(lambda m, n, role: 50)
    ),
    "c3a": Row(
        peft("C3AConfig", SPLIT, block_size=8, init_weights=True), True, added_sizes(lambda m, n, role: m * n // 8)
    ),
    "loha": Row(peft("LoHaConfig", SPLIT, 4), True, added_sizes(lambda m, n, role: 2 * 4 * (m + n))),
    "lokr": Row(peft("LoKrConfig", SPLIT, 2), True, added_sizes(lokr_size(2))),
    "tinylora": Row(peft("TinyLoraConfig", QKV, 2, u=8), True, added_sizes(lambda m, n, role: 8)),
    "tinylora tied": Row(
        peft("TinyLoraConfig", SPLIT, 2, u=8, weight_tying=1.0), True, added_sizes(lambda m, n, role: 0, shared=8)
    ),
    "unilora": Row(
        peft("UniLoraConfig", SPLIT, 4, theta_d_length=64, init_theta_d_bound=1.0),
        False,
        added_sizes(lambda m, n, role: 0, shared=64),
    ),
    "hra": Row(peft("HRAConfig", SPLIT, 4), True, added_sizes(lambda m, n, role: 4 * n)),
    "shira": Row(peft("ShiraConfig", QKV, 4), True, lora_sizes(4, 0)),
    "waveft": Row(peft("WaveFTConfig", QKV, n_frequency=50), True, added_sizes(lambda m, n, role: 50)),
    "svfit": Row(Svfit(rank=7), True, svfit_sizes(7)),
    "svfit whole": Row(Svfit(targets=ALL), True, svfit_sizes(768)),
    "svft": Row(Svft(), True, svft_sizes(3)),
    "svft plain": Row(Svft(pattern="plain"), True, svft_sizes(0)),
    "svft random": Row(Svft(targets=SPLIT, pattern="random", band=2), True, svft_sizes(2)),
    "svft top_k": Row(Svft(pattern="top_k"), True, svft_sizes(3), CLASSIFIERS),  # Llama's v is not square
    "svft kaiming": Row(Svft(start="kaiming"), False, svft_sizes(3)),
    "ssf normal": Row(Ssf(start="normal"), False, ssf_sizes, same_shape=False),
    "ssf": Row(Ssf(), True, ssf_sizes, same_shape=False),  # layers without a bias get one
    "rosa": Row(Rosa(rank=4, density=0.01), True, added_sizes(lambda m, n, role: 4 * (m + n) + round(0.01 * m * n))),
    "rosa low-rank": Row(Rosa(rank=4, density=0.0), True, lora_sizes(4, 0)),
    "rosa warm": Row(
        Rosa(rank=4, density=0.01, warmup=3), True, added_sizes(lambda m, n, role: 4 * (m + n) + round(0.01 * m * n))
    ),
    "rosa sparse": Row(Rosa(rank=0, density=0.05), True, added_sizes(lambda m, n, role: round(0.05 * m * n))),
    "linear_probe": Row(LinearProbe(targets=ALL), True, lambda layers: (dense(layers), 0), CLASSIFIERS),
    "dgmr": Row(Dgmr(), False, mlp_sizes(0.5)),
    "dgmr beside attention": Row(Dgmr(targets=ALL, ratio=0.6), False, mlp_sizes(0.6)),
    "dgmr ridge": Row(Dgmr(compensate="ridge", ratio=0.2), False, mlp_sizes(0.2)),
    "prunenet": Row(PruneNet(ratio=0.3, episodes=2), False, mlp_sizes(0.3)),
    "prunenet paper": Row(PruneNet(ratio=0.3, episodes=2, estimator="paper"), False, mlp_sizes(0.3)),
    "isomorphic": Row(Isomorphic(head_dims=0.0), False, isomorphic_sizes(24), ("tiny_vit",)),
    "isomorphic split": Row(
        Isomorphic(targets=SPLIT, head_dims=0.0, width=False), False, isomorphic_sizes(48), ("tiny_vit",)
    ),
    "modegpt": Row(Modegpt(), False, None, ("tiny_vit", "tiny_swin", "tiny_llama"), same_shape=False),
    "modegpt split": Row(
        Modegpt(targets=SPLIT, ratio=0.7, allocation="blocks", query_key="select", intercept=False),
        False,
        None,
        ("tiny_vit", "tiny_swin", "tiny_llama"),
        same_shape=False,
    ),
    "modegpt neurons": Row(Modegpt(targets=("up", "down", "gate?"), ratio=0.2), False, mlp_sizes(0.2)),
    "wecolora": Row(WeCoLora(rank=5), False, wecolora_sizes(5), same_shape=False),
    "pc_lora": Row(PcLora(ratio=0.4), True, pc_lora_sizes(0.4)),
    "full": Row(Full(targets=ALL), True, lambda layers: (dense(layers), dense(layers))),
}
