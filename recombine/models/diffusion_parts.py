"""The parts of a text-to-image model that never train: text encoder, tokenizer, autoencoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.errors import UsageError, first_line
from recombine.models import packaged
from recombine.models.allowed import config_values
from recombine.models.diffusion_folder import frozen, read_config
from recombine.models.encoders import byte_tokenizer
from recombine.models.hf_folder import UNREADABLE
from recombine.models.weights import silence

LONGEST = 24  # tokens of a prompt, where no folder says so
LIBRARYS_OWN = ("transformers_version", "architectures", "model_type", "dtype", "torch_dtype")
KEPT = 8192  # prompts whose states are kept


class Prompts:
    """Makes tokens of prompts. path: the model's folder; text: as for `diffusion.build`."""

    def __init__(self, path: Path | None, text: str):
        from transformers import AutoTokenizer

        self.whole = text == "folder"  # Stable Diffusion reads padding too, up to its longest prompt
        if text == "bytes":
            self.inner = byte_tokenizer(LONGEST)
            return
        if self.whole and path is None:
            raise UsageError("model.text=folder: a random model has no folder; set model.text=minilm or bytes")
        where = path / "tokenizer" if self.whole else packaged.minilm_folder()
        try:
            with silence():
                self.inner = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        except (*UNREADABLE, ImportError) as error:
            raise UsageError(f"no tokenizer in {where} ({first_line(error)}); complete the folder") from error

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids int64 (N, T), and attention_mask (N, T) where padding is left out."""
        longest = self.inner.model_max_length if self.whole else LONGEST
        found = self.inner(
            list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        return {key: found[key] for key in ("input_ids", *(() if self.whole else ("attention_mask",)))}


class Parts:
    """The text encoder, and what turns pixels into latents and back; each is built when it is first used.

    Args:
        path: the model's folder; None: there is none.
        text, fold: as for `diffusion.build`.
        width: of a random text encoder.
    """

    def __init__(self, path: Path | None, text: str, fold: int, width: int):
        self.path, self.text, self.fold, self.width = path, text, fold, width
        self.has_vae = path is not None and (path / "vae" / "config.json").is_file()
        self.factor = fold
        if self.has_vae:
            self.factor = 2 ** (len(read_config(path, "vae")["block_out_channels"]) - 1)
        self.encoder: nn.Module | None = None
        self.vae: nn.Module | None = None
        self.kept: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What the text encoder says of prompts (B, T): (B, T, d). Those of prompts that came before are kept."""
        keys = [tuple(row) for row in input_ids.tolist()]
        if new := [i for i, key in enumerate(keys) if key not in self.kept]:
            if len(self.kept) + len(new) > KEPT:
                self.kept.clear()
                new = range(len(keys))
            if self.encoder is None:
                self.encoder = text_encoder(self.path, self.text, self.width)
            encoder = self.encoder.to(input_ids.device)
            rows = torch.tensor(list(new), device=input_ids.device)
            mask = {} if attention_mask is None else {"attention_mask": attention_mask[rows]}
            found = encoder(input_ids=input_ids[rows], **mask)[0].float()
            self.kept |= {keys[i]: state for i, state in zip(new, found, strict=True)}
        return torch.stack([self.kept[key].to(input_ids.device) for key in keys])

    def fresh_encoder(self, config: Mapping[str, Any] | None) -> nn.Module:
        """A text encoder that trains. config: of a random one; None: with its weights."""
        if config is not None:
            return random_encoder(self.text, config)
        if self.text == "folder" and self.path is None:
            raise UsageError("model.train_text=true: a random model has no folder; set model.text_config or model.text")
        return text_encoder(self.path, self.text, self.width).requires_grad_(True)

    @torch.no_grad()
    def encode(self, pixels: Tensor, draw: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) as latents. An autoencoder's are drawn, by the seeds (B,)."""
        if not self.has_vae:
            return F.pixel_unshuffle(pixels, self.fold)
        given = self.autoencoder(pixels.device).encode(pixels).latent_dist
        shape = given.mean.shape[1:]
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)) for seed in draw.tolist()]
        return (given.mean + given.std * torch.stack(drawn).to(given.mean)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as pictures (B, 3, S, S) in [-1, 1]."""
        if not self.has_vae:
            return F.pixel_shuffle(latents, self.fold).clamp(-1, 1)
        vae = self.autoencoder(latents.device)
        return vae.decode(latents.float() / vae.config.scaling_factor).sample.clamp(-1, 1)

    def autoencoder(self, device: torch.device) -> nn.Module:
        """The autoencoder, on the device."""
        if self.vae is None:
            from diffusers import AutoencoderKL

            self.vae = frozen(self.path / "vae", AutoencoderKL.from_pretrained)
        return self.vae.to(device)


class Frozen:
    """Holds what is no part of a model. A copy of the model shares it.

    >>> import copy
    >>> one = Frozen([1])
    >>> copy.deepcopy(one).inner is one.inner
    True
    """

    def __init__(self, inner: Parts):
        self.inner = inner

    def __deepcopy__(self, memo: Mapping) -> "Frozen":
        return self


def text_encoder(path: Path | None, text: str, width: int) -> nn.Module:
    """A frozen text encoder, whose first output is the states of the tokens (B, T, d)."""
    from transformers import BertModel, CLIPTextModel

    if text == "folder":
        return frozen(path / "text_encoder", CLIPTextModel.from_pretrained)
    if text == "minilm":
        return frozen(packaged.minilm_folder(), lambda where, **more: BertModel.from_pretrained(
            where, add_pooling_layer=False, **more))  # fmt: skip
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes |= {"vocab_size": 260, "max_position_embeddings": LONGEST}
        return random_encoder(text, sizes).eval().requires_grad_(False)


def random_encoder(text: str, config: Mapping[str, Any]) -> nn.Module:
    """A random text encoder of the kind of that word, with these entries of its configuration.

    Raises:
        UsageError: its configuration has no such entry.
    """
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

    kind = CLIPTextConfig if text == "folder" else BertConfig
    config_values(kind, config)
    if text == "folder":
        return CLIPTextModel(kind(**config))
    return BertModel(kind(**config), add_pooling_layer=False)


def configured(encoder: nn.Module) -> dict[str, Any]:
    """What `random_encoder` builds a text encoder of these sizes from."""
    said = encoder.config.to_diff_dict()
    return {key: value for key, value in said.items() if key not in LIBRARYS_OWN and not key.startswith("_")}
