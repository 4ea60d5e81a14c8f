"""A trained model and the things one does with it: what `fusiontrain.load` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusiontrain.config.schema import Config
from fusiontrain.data.modalities.decoders import to_rgb
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.generate.caption import caption
from fusiontrain.generate.codes import caption_codes, code_space, paint_codes, write_document
from fusiontrain.generate.interleave import Piece, interleave
from fusiontrain.generate.paint import paint, paint_latents
from fusiontrain.generate.pictures import load_picture
from fusiontrain.generate.samplers import sampler_name
from fusiontrain.generate.speak import speak
from fusiontrain.generate.stream import Writing
from fusiontrain.generate.write import write
from fusiontrain.models.fusion import FusionModel

Picture = np.ndarray | Image.Image | str | Path
"""[H, W, 3] uint8, an image of Pillow, or a file."""


@dataclass(frozen=True)
class Sampling:
    """How pictures and texts are made. steps: of denoising. guidance: 1 = none. eta: of the sampler ddim. seed: of noise and of draws. temperature:
    0 = the likeliest token."""

    seed: int
    steps: int
    guidance: float
    sampler: str
    eta: float
    temperature: float
    max_new_tokens: int

    @property
    def denoising(self) -> dict[str, Any]:
        """As whoever paints takes it."""
        return {"steps": self.steps, "guidance": self.guidance, "sampler": self.sampler, "eta": self.eta}

    @property
    def writing(self) -> Writing:
        return Writing(self.max_new_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, the config it was trained with, its tokenizer, and the folder it came from."""

    model: FusionModel
    config: Config
    tokenizer: Tokenizer
    checkpoint: Path

    def sampling(
        self,
        *,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Sampling:
        """What is given, and for the rest what the config says. The sampler `auto` becomes the one that it stands for."""
        config = self.config.sample
        return Sampling(
            seed=self.config.seed if seed is None else seed,
            steps=config.steps if steps is None else steps,
            guidance=config.guidance if guidance is None else guidance,
            sampler=self._sampler_name(config.sampler if sampler is None else sampler),
            eta=config.ddim_eta if eta is None else eta,
            temperature=config.temperature if temperature is None else temperature,
            max_new_tokens=config.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )

    def _sampler_name(self, name: str) -> str:
        return name if self.model.image is None else sampler_name(name, self.model.image_objective)

    def sample(self, prompt: str, *, steps: int | None = None, guidance: float | None = None, seed: int | None = None) -> Image.Image:
        """A picture of `prompt`. Raises UserError for a model that cannot paint and a prompt that is too long."""
        return Image.fromarray(self.paint([prompt], self.sampling(steps=steps, guidance=guidance, seed=seed))[0])

    def caption(self, picture: Picture, *, max_new_tokens: int | None = None, temperature: float | None = None, seed: int | None = None) -> str:
        """What the model says of a picture of any size."""
        sampling = self.sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return self.captions([_pixels(picture)], sampling)[0]

    def paint(self, prompts: Sequence[str], sampling: Sampling) -> list[np.ndarray]:
        """A picture [H, W, 3] uint8 of each prompt; the noise of each is keyed by its number."""
        data = self.config.data
        return paint(
            self.model,
            self.tokenizer,
            prompts,
            image=data.image,
            **sampling.denoising,
            seed=sampling.seed,
            context=data.sequence_length,
        )

    def paint_latents(self, prompts: Sequence[str], sampling: Sampling, side: int) -> list[np.ndarray]:
        """A latent [C, side, side] float32 of each prompt. Raises UserError for a model that was not trained on latents."""
        return paint_latents(
            self.model,
            self.tokenizer,
            prompts,
            side,
            image=self.config.data.image,
            seed=sampling.seed,
            context=self.config.data.sequence_length,
            **sampling.denoising,
        )

    def write(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The text that follows each prompt."""
        return write(self.model, self.tokenizer, prompts, writing=sampling.writing, context=self.config.data.sequence_length)

    def speak(self, prompts: Sequence[str], sampling: Sampling) -> list[list[int]]:
        """The units of speech that follow each prompt. Raises UserError for a model without speech."""
        return speak(self.model, self.tokenizer, prompts, config=self.config, writing=sampling.writing)

    @property
    def has_images(self) -> bool:
        """Whether the model learnt images at all, as patches or as codes."""
        return "image" in self.config.data.modalities

    @property
    def writes_codes(self) -> bool:
        """Whether the model's images are codes, which it writes as it writes text."""
        return self.config.data.image.representation == "codes" and self.has_images

    def paint_codes(self, prompts: Sequence[str], sampling: Sampling) -> list[list[int]]:
        """The codes of an image of each prompt, in raster order. Raises UserError for a model of patches."""
        codes, context = code_space(self.config, self.tokenizer), self.config.data.sequence_length
        return paint_codes(self.model, self.tokenizer, prompts, codes=codes, writing=sampling.writing, context=context).tolist()

    def caption_codes(self, images: Sequence[np.ndarray], sampling: Sampling) -> list[str]:
        """A text for each image, given as its codes [n] in raster order. Raises UserError for a model of patches."""
        codes, context = code_space(self.config, self.tokenizer), self.config.data.sequence_length
        return caption_codes(self.model, self.tokenizer, images, codes=codes, writing=sampling.writing, context=context)

    def write_document(self, prompt: Sequence[str | np.ndarray], sampling: Sampling, max_images: int) -> list[str | list[int]]:
        """The document that begins with the texts and codes of `prompt`, continued: its new texts and the codes of its new images."""
        codes, context = code_space(self.config, self.tokenizer), self.config.data.sequence_length
        pieces = write_document(
            self.model, self.tokenizer, prompt, codes=codes, writing=sampling.writing, max_images=max_images, context=context
        )
        return [piece if isinstance(piece, str) else piece.tolist() for piece in pieces]

    def captions(self, pictures: Sequence[np.ndarray], sampling: Sampling) -> list[str]:
        """A text for each picture [H, W, 3] uint8."""
        data = self.config.data
        return caption(self.model, self.tokenizer, pictures, image=data.image, writing=sampling.writing, context=data.sequence_length)

    def interleave(self, prompt: Sequence[Piece], sampling: Sampling, max_images: int) -> list[Piece]:
        """The document that begins with the texts and pictures of `prompt`, continued: its new texts and pictures."""
        data = self.config.data
        return interleave(
            self.model,
            self.tokenizer,
            prompt,
            image=data.image,
            writing=sampling.writing,
            max_images=max_images,
            **sampling.denoising,
            context=data.sequence_length,
        )


def _pixels(picture: Picture) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    return np.asarray(to_rgb(picture)) if isinstance(picture, Image.Image) else load_picture(str(picture))
