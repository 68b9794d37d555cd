"""A few pictures of one subject, whose name becomes a word (DreamBooth, arXiv 2208.12242).

The folder holds the pictures. Each is cut to a square around its middle and resized. Beside every picture of the
subject stands one that the model itself drew for the prompt of the class, before anything was rewritten: prior
preservation. Those are drawn once and kept in the cache, by the model's weights, the prompt and how they were drawn.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from recombine.data.base import exclusive_build
from recombine.data.prompted.base import Asked, Prompted, PromptedData, at_once
from recombine.data.prompted.pictures import Repeated, alone, digest, fingerprint, said, square
from recombine.data.vision.folder import SUFFIXES
from recombine.data.vision.source import decode
from recombine.errors import UsageError
from recombine.runtime import progress
from recombine.runtime.assets import cache_dir, writing
from recombine.runtime.atomic import atomic_write
from recombine.runtime.kinds import Count, Name, Place, Weight, Whole

DRAWS = 8  # noises of each picture, in the test's loss
APART = 2**40  # between the seeds of the subject's noise and those of the prior's


class WithPrior(Dataset):
    """Each row is one of the subject, and one of those that the model drew before."""

    def __init__(self, subject: Prompted, prior: Prompted):
        self.subject, self.prior = subject, prior

    def __len__(self) -> int:
        return len(self.subject)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch of twice as many rows, those of the subject first."""
        own = self.subject.__getitems__(indices)
        before = self.prior.__getitems__([i % len(self.prior) for i in indices])
        before["draw"] = own["draw"] + APART
        return {key: torch.cat([own[key], before[key]]) for key in own}


class DreamBooth(PromptedData):
    """Pictures of one subject; further arguments are those of `PromptedData`.

    Args:
        root: the folder of its pictures.
        noun: what it is, for example "dog"; None: the folder's name.
        token: the word that stands for this one.
        prompt: of the subject, with {token} and {noun} in it.
        class_prompt: of what the model drew before, with {noun} in it.
        repeats: how often an epoch shows each picture.
        prior: how many pictures the model draws before, at most one for each row; 0: no prior preservation.
        prior_weight: of their loss.
        prior_steps: of the scheduler, for each of them.
        prior_guidance: see `recombine.models.drawing`.

    Raises:
        UsageError: there are no pictures or one, or a prompt lacks its word.
    """

    name = group = "dreambooth"
    label = "DreamBooth"

    def __init__(
        self,
        *,
        root: Place | None = None,
        noun: Name | None = None,
        token: Name = "sks",
        prompt: Name = "a photo of {token} {noun}",
        class_prompt: Name = "a photo of {noun}",
        repeats: Count = 20,
        prior: Whole = 100,
        prior_weight: Weight = 1.0,
        prior_steps: Count = 30,
        prior_guidance: Weight = 3.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.root, self.repeats, self.prior_weight = root, repeats, prior_weight
        self.files = self.found()[: self.limit]
        self.prior_count = min(prior, repeats * len(self.files))
        self.prior_how = {"steps": prior_steps, "guidance": prior_guidance}
        self.noun, self.token = noun or self.noun_of_folder(), token
        self.prompt = self.filled("data.prompt", prompt, "token")
        self.class_prompt = self.filled("data.class_prompt", class_prompt)
        self.subject: Tensor | None = None  # its pictures
        self.before: Tensor | None = None  # what the model drew

    @property
    def title(self) -> str:
        return f"{self.token} {self.noun} (DreamBooth)"

    @property
    def foreseen(self) -> dict[str, int]:
        return {"train": self.repeats * len(self.files), "test": DRAWS * len(self.files)}

    def noun_of_folder(self) -> str:
        """What the subject is by its folder's name: backpack_dog of ``backpack_dog2`` is "backpack dog"."""
        return " ".join(re.findall(r"[A-Za-z]+", Path(self.root).expanduser().resolve().name)) or "thing"

    def filled(self, key: str, prompt: str, *needed: str) -> str:
        """A prompt with its words in.

        Raises:
            UsageError: it lacks one of those that it needs, or names another.
        """
        words = {"token": self.token, "noun": self.noun}
        for word in needed:
            if f"{{{word}}}" not in prompt and not said(words[word], prompt):
                why = f"the subject's word {words[word]!r} is not in it"
                raise UsageError(f"{key}={prompt}: {why}; write {{{word}}} where it belongs")
        try:
            return prompt.format(**words)
        except (KeyError, IndexError, ValueError) as error:
            raise UsageError(f"{key}={prompt}: only {{token}} and {{noun}} can stand in braces") from error

    def asked(self, prompts: Sequence[str] | None) -> list[Asked]:
        """The prompts of the subject and of its class; or those that are given, one of them with the subject's word.

        Raises:
            UsageError: none has the subject's word, or one has other words in braces.
        """
        given = [self.prompt, self.class_prompt] if prompts is None else prompts
        given = [self.filled("sample.prompts", prompt) for prompt in given]
        kinds = {prompt: self.kind(prompt) for prompt in given}
        if "subject" not in kinds.values():
            why = f"the subject's word {self.token!r} is in none of them"
            raise UsageError(f"sample.prompts=[{','.join(given)}]: {why}; write {{token}} into one")
        own = {"subject": self.subject, "class": self.before, "other": None}
        return [Asked(p, kind, own[kind], self.subject, self.plain(p)) for p, kind in kinds.items()]

    def kind(self, prompt: str) -> str:
        """Whether a prompt asks for the subject, its class, or something else."""
        return "subject" if said(self.token, prompt) else "class" if prompt == self.class_prompt else "other"

    def plain(self, prompt: str) -> str:
        """A prompt without the subject's word, which other models do not know."""
        return " ".join(re.sub(alone(self.token), "", prompt).split())

    def found(self) -> list[Path]:
        """The pictures in the folder.

        Raises:
            UsageError: there are none, or one.
        """
        folder = Path(self.root).expanduser()
        if not folder.is_dir():
            raise UsageError(f"data.root={self.root}: there is no such folder; set it to the subject's pictures")
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if len(files[: self.limit]) < 2:
            count, kinds = ("one picture" if files else "no pictures"), " ".join(sorted(SUFFIXES))
            if len(files) > 1:
                raise UsageError(f"data.limit={self.limit}: a subject needs two pictures or more; take 2 or more")
            raise UsageError(f"data.root={self.root}: holds {count}; a subject needs two or more, best five ({kinds})")
        return files

    def pictures(self) -> Tensor:
        """The subject's pictures, uint8 (N, 3, S, S)."""
        return torch.stack([square(decode(path, upright=True), self.image_size) for path in self.files])

    def prepare_data(self) -> None:
        """Nothing: the pictures are few, and the model draws the others."""

    def setup(self, stage: str | None = None) -> None:
        """Reads the pictures."""
        self.subject = self.pictures()
        tokens, count = self.tokens([self.prompt, self.class_prompt]), len(self.subject)
        first = Prompted(Repeated(self.subject), np.zeros(self.repeats * count, np.int64), tokens)
        self.train, self.val = first, None
        self.test = Prompted(Repeated(self.subject), np.zeros(DRAWS * count, np.int64), tokens)
        if self.before is not None:
            second = Prompted(Repeated(self.before), np.ones(len(self.before), np.int64), tokens, label=0)
            self.train = WithPrior(first, second)

    def ask(self, model: nn.Module) -> None:
        """Has the model draw what it makes of the class, where no earlier run has."""
        if not self.prior_count:
            return
        key = [fingerprint(model), self.class_prompt, self.prior_count, self.image_size, *self.prior_how.values()]
        key += [sorted(model.schedule.config.items()), sorted(map(str, model.recombine_source.items()))]
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        path = cache_dir() / "prior" / f"{name}.npy"
        if not path.is_file():
            with exclusive_build(f"prior-{name}"):
                if not path.is_file():
                    drawn = self.drawn(model)
                    with writing(path.parent), atomic_write(path) as temporary:
                        np.save(content := io.BytesIO(), drawn.numpy())
                        temporary.write_bytes(content.getvalue())
        self.before = torch.from_numpy(np.load(path))
        self.setup()

    def drawn(self, model: nn.Module) -> Tensor:
        """The model's pictures of the class, uint8 (prior, 3, S, S)."""
        tokens, found = self.tokens([self.class_prompt]), []
        size = at_once(self.image_size)
        for start in progress.of(range(0, self.prior_count, size), "pictures of the class", "batches"):
            seeds = range(start, min(start + size, self.prior_count))
            prompts = {key: value.expand(len(seeds), -1) for key, value in tokens.items()}
            found.append(model.draw(prompts, self.empty, [APART + seed for seed in seeds], **self.prior_how))
        return torch.cat(found)

    @property
    def info(self) -> dict:
        count = len(self.subject)
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "licence": "the user's own",
            "note": f"a loss over {DRAWS} noises of each training picture is the test",
            "sizes": self.sizes,
            "sha256": {"train": digest(self.subject)} | ({} if self.before is None else {"prior": digest(self.before)}),
            "protocol": f"{count} pictures of {self.prompt!r}, {self.prior_count} of {self.class_prompt!r}, last epoch",
            "image_size": self.image_size,
            "resize": "bicubic, a square around the middle",
            "seed": self.seed,
            "limit": self.limit,
        }
