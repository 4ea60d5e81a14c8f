"""Between uint8 pictures and the patches of a model, and sheets of pictures for people to look at."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.modalities.decoders import to_rgb
from fusiontrain.data.modalities.policy import resized
from fusiontrain.generate.guidance import Grid
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.modalities.patches import patchify
from fusiontrain.utils.errors import UserError

SHEET_CELL = 160  # pixels; a sheet shows small pictures enlarged to about this side
SHEET_FONT = 12
SHEET_MARGIN = 8
SHEET_LINES = 4


def grid_of(model: FusionModel, image: ImageDataConfig) -> Grid:
    """(rows, columns) of this model's pictures in patches. Raises UserError for a model that has none or cannot show them."""
    if model.image is None and image.representation == "codes":
        raise UserError("data.image.representation=codes: nothing here makes codes of a picture, or a picture of codes: give text prompts, or codes")
    if model.image is None:
        raise UserError("this model reads and writes text only: painting and captioning need one trained with data.modalities=[text,image]")
    if image.representation == "latents":
        raise UserError(
            "data.image.representation=latents: this model has no autoencoder, so no pictures: `sample --latents CELLS` writes .latent.npy files, "
            "for the autoencoder that made the data to decode"
        )
    side = image.size // image.patch_size
    return side, side


def patch_numbers(model: FusionModel, image: ImageDataConfig) -> int:
    """C, the numbers of one patch: of pixels, or of latents where the model encodes its pixels."""
    numbers = image.channels * image.patch_size**2
    return numbers if model.codec is None else model.codec.latent_patch_dim(numbers)


def to_pictures(model: FusionModel, values: torch.Tensor, grid: Grid) -> list[np.ndarray]:
    """Clean patches [B, N, C] -> B pictures [H, W, 3] uint8."""
    pixels = model.to_pixels(values, grid)  # [B, 3, H, W] in [-1, 1]
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def from_pictures(model: FusionModel, pictures: Sequence[np.ndarray], image: ImageDataConfig) -> torch.Tensor:
    """B pictures [H, W, 3] uint8 of any size -> clean patches [B, N, C] float32 on the model's device: cropped and resized as for training."""
    resized = np.stack([_fit(picture, image) for picture in pictures])
    device = model.device
    pixels = torch.from_numpy(resized).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    patches = patchify(pixels, image.patch_size)
    if model.codec is None:
        return patches
    batch, num_patches, _ = patches.shape
    latents = model.codec.encode(patches.flatten(0, 1), (grid_of(model, image),) * batch)
    return latents.unflatten(0, (batch, num_patches))


def _fit(picture: np.ndarray, image: ImageDataConfig) -> np.ndarray:
    """A square as the data path makes one, cropped also where training keeps a picture's own shape: [size, size, 3] uint8."""
    return np.asarray(resized(Image.fromarray(picture), image.size, image.size, crop=image.resize != "stretch"))


def load_picture(path: str) -> np.ndarray:
    """Any image file -> [H, W, 3] uint8, upright and over white as in training. Raises UserError when it is missing or not an image."""
    try:
        with Image.open(path) as opened:
            return np.asarray(to_rgb(ImageOps.exif_transpose(opened)))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that can be read ({error})") from error


def tile(pictures: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Equal pictures [H, W, 3] side by side, row by row, one white pixel between them -> [rows * (H + 1) - 1, columns * (W + 1) - 1, 3]."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    height, width, _ = pictures[0].shape
    rows = math.ceil(len(pictures) / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """One sheet of pictures with the text under each. Small pictures are enlarged by whole factors, without smoothing."""
    columns = columns or min(len(pictures), math.ceil(math.sqrt(2 * len(pictures))))
    shown = [_enlarged(picture) for picture in pictures]
    cell = max(max(picture.size) for picture in shown)
    font = ImageFont.load_default(SHEET_FONT)
    letters = max(8, int(cell / font.getlength("n")))
    texts = ["\n".join(textwrap.wrap(text, letters, max_lines=SHEET_LINES, placeholder=" ...")) for text in captions]
    text_height = (SHEET_FONT + 4) * max(text.count("\n") + 1 for text in texts)
    step_x, step_y = cell + SHEET_MARGIN, cell + text_height + 2 * SHEET_MARGIN
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * step_x + SHEET_MARGIN, rows * step_y + SHEET_MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(zip(shown, texts, strict=True)):
        left, top = SHEET_MARGIN + (number % columns) * step_x, SHEET_MARGIN + (number // columns) * step_y
        sheet.paste(picture, (left, top))
        draw.multiline_text((left, top + picture.height + 4), text, fill="black", font=font, spacing=2)
    return sheet


def _enlarged(picture: np.ndarray) -> Image.Image:
    factor = max(1, SHEET_CELL // max(picture.shape[:2]))
    shown = Image.fromarray(picture)
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
