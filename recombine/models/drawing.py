"""Draws pictures with a text-to-image model: from noise to a picture, step by step, guided by the prompt.

Guidance (arXiv 2207.12598): prediction = without + guidance (with - without the prompt).
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


@torch.no_grad()
def draw(
    model: nn.Module,
    tokens: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    seeds: Sequence[int],
    *,
    steps: int = 30,
    guidance: float = 3.0,
    scheduler: str = "ddim",
) -> Tensor:
    """Pictures uint8 (N, 3, S, S) on the CPU; one seed gives the same noise for every model and device.

    Args:
        tokens: of the prompts, (N, T) each; empty: of the empty prompt, (1, T) each.
        seeds: of the noise that each picture starts from.
        steps: of the scheduler.
        guidance: 1 looks at the prompt alone, and takes half the time.
        scheduler: a key of SCHEDULERS.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with_prompt = {key: value.to(device) for key, value in tokens.items()}
    without = {key: value.to(device).expand(len(seeds), -1) for key, value in empty.items()}
    both = [with_prompt] if guidance == 1 else [without, with_prompt]
    given = {key: torch.cat([part[key] for part in both]) for key in with_prompt}
    mask = given.get("attention_mask")
    states = model.states(given["input_ids"], mask)
    walk = SCHEDULERS[scheduler].from_config(model.schedule.config)
    walk.set_timesteps(steps, device=device)
    noise = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * walk.init_noise_sigma
    for step in walk.timesteps:
        scaled = walk.scale_model_input(torch.cat([latents] * len(both)), step)
        said = model.predict(scaled, step.expand(len(scaled)), states, mask)
        if guidance != 1:
            off, on = said.chunk(2)
            said = off + guidance * (on - off)
        latents = walk.step(said, step, latents).prev_sample
    model.train(training)
    return (model.parts.inner.decode(latents) * 127.5 + 127.5).round().byte().cpu()
