"""Pictures in and out: the same patches as in training, also through an autoencoder, and sheets on which every picture can be found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.modalities.image import decode_image
from fusiontrain.generate import paint as paint_module
from fusiontrain.generate.guidance import denoise
from fusiontrain.generate.paint import paint
from fusiontrain.generate.pictures import contact_sheet, from_pictures, load_picture, tile, to_pictures
from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.generation import TOKENIZER, lively_model
from fusiontrain.utils.errors import UserError

CONFIG = tiny_config()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def test_a_picture_survives_the_way_in_and_out() -> None:
    model = build_model(CONFIG)
    pictures = [noise(8, 8, 3, seed=1), noise(8, 8, 3, seed=2)]
    values = from_pictures(model, pictures, CONFIG.data.image)
    assert values.shape == (2, 4, 48) and values.dtype == torch.float32
    assert all(np.array_equal(a, b) for a, b in zip(pictures, to_pictures(model, values, (2, 2)), strict=True))


@pytest.mark.parametrize(("mode", "size"), [("RGB", (8, 8)), ("RGB", (23, 14)), ("RGBA", (9, 30)), ("L", (8, 8)), ("P", (12, 12))])
@pytest.mark.parametrize("resize", ["square", "stretch"])
def test_a_file_gives_the_patches_that_training_would_see(tmp_path, mode, size, resize) -> None:
    image = CONFIG.data.image.model_copy(update={"resize": resize})
    path = tmp_path / "picture.png"
    Image.fromarray(noise(size[1], size[0], 4), "RGBA").convert(mode).save(path)
    expected, _ = decode_image("png", path.read_bytes(), image)
    actual = from_pictures(build_model(CONFIG), [load_picture(str(path))], image)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_photograph_on_its_side_is_put_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(noise(8, 12, 3)).save(tmp_path / "turned.png", exif=exif)
    assert load_picture(str(tmp_path / "turned.png")).shape == (12, 8, 3)


def test_files_that_are_no_pictures_are_refused(tmp_path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for name, word in (("text.png", "not a picture"), ("cut.png", "not a picture"), ("none.png", "no such picture"), (".", "not a picture")):
        with pytest.raises(UserError, match=word):
            load_picture(str(tmp_path / name))


def test_tiles_stand_in_rows_with_a_line_between() -> None:
    pictures = [noise(4, 6, 3, seed=i) for i in range(5)]
    sheet = tile(pictures, columns=2)
    assert sheet.shape == (3 * 5 - 1, 2 * 7 - 1, 3)
    for number, picture in enumerate(pictures):
        top, left = number // 2 * 5, number % 2 * 7
        assert np.array_equal(sheet[top : top + 4, left : left + 6], picture)
    assert (sheet[4] == 255).all() and (sheet[:, 6] == 255).all()


def test_a_contact_sheet_shows_every_picture_enlarged_with_its_text_below() -> None:
    pictures = [np.full((32, 32, 3), (40 * i, 0, 200), dtype=np.uint8) for i in range(4)]
    sheet = np.asarray(contact_sheet(pictures, ["one", "", "three " * 40, "four"], columns=2))
    for number in range(4):
        rows, columns = np.nonzero((sheet == (40 * number, 0, 200)).all(axis=2))
        assert len(rows) == 160 * 160, "enlarged by a whole factor, nothing covered by a neighbour or by text"
        below = sheet[rows.max() + 1 : rows.max() + 70, columns.min() : columns.max() + 1]
        dark = (below < 128).any(axis=2).sum()
        assert (dark > 20) == (number != 1)


def test_one_large_picture_is_not_enlarged() -> None:
    sheet = contact_sheet([noise(256, 300, 3)], ["a picture"])
    assert sheet.width == 300 + 16


@pytest.fixture(scope="module")
def vae_config(tmp_path_factory):
    """A small random autoencoder: 16 x 16 pixels are 8 x 8 cells of 2 numbers."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(**blocks, latent_channels=2, norm_num_groups=4, sample_size=16).save_pretrained(folder)
    return tiny_config({"model.image": {"vae": str(folder), "patcher": "linear"}, "data.image": {"size": 16, "patch_size": 8}})


def test_pictures_go_through_the_autoencoder(vae_config, monkeypatch) -> None:
    model, image = lively_model(vae_config), vae_config.data.image
    pictures = [noise(16, 16, 3, seed=1), noise(20, 30, 3, seed=2)]
    values = from_pictures(model, pictures, image)
    assert values.shape == (2, 4, 2 * 4 * 4)
    pixels = torch.from_numpy(pictures[0]).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = model.codec.vae
    mean = vae.encode(pixels).latent_dist.mean * model.codec.scale
    assert torch.allclose(values[0, 1].view(2, 4, 4), mean[0, :, :4, 4:], atol=1e-5), "the second patch is the upper right"
    expected = ((vae.decode(mean / model.codec.scale).sample[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    shown = to_pictures(model, values, (2, 2))[0]
    assert np.abs(shown - expected.detach().numpy()).max() < 0.6

    seen = []
    monkeypatch.setattr(paint_module, "denoise", lambda *args, clip, **more: seen.append(clip) or denoise(*args, clip=clip, **more))
    (picture,) = paint(model, TOKENIZER, ["x"], image=image, steps=2, guidance=2.0, seed=0)
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    assert seen == [None], "latents have no largest value"
    pixel_model = lively_model(CONFIG)
    paint(pixel_model, TOKENIZER, ["x"], image=CONFIG.data.image, steps=2, guidance=2.0, seed=0)
    assert seen == [None, 1.0]


def test_the_image_section_decides_the_size() -> None:
    model = lively_model(CONFIG)
    (picture,) = paint(model, TOKENIZER, ["x"], image=ImageDataConfig(size=16, patch_size=4), steps=1, guidance=1.0, seed=0)
    assert picture.shape == (16, 16, 3)
