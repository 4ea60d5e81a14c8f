"""The two decoders of JPEGs against Pillow's full decode and the same resize, and what a resumed run is told about them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.modalities import decoders
from fusiontrain.data.modalities.decoders import dct_scale, decode_path, decode_pixels
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.modalities.policy import grid_of
from fusiontrain.testing.configs import tiny_config
from fusiontrain.utils.errors import UserError

DECODERS = ["pillow", "simplejpeg"]
LEAST_DECIBELS = 40
"""How close a picture from a DCT-scaled decode comes to one from a full decode."""


def policy(decoder="auto", size=32, **others) -> ImageDataConfig:
    return ImageDataConfig(size=size, patch_size=4, decoder=decoder, **others)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft waves, a hard edge and a little noise."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * rows + 3 * columns), np.cos(7 * columns), np.sin(5 * rows * columns)], -1) * 90 + 128
    waves[height // 3 : height // 2, width // 4 :] -= 50
    noise = np.random.default_rng(0).normal(0, 3, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def turned(number: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = number
    return {"exif": exif}


def full(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def fitted(image: Image.Image, size: int = 32) -> np.ndarray:
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio."""
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9))


KINDS = {
    "4:2:0": jpeg(picture(61, 48)),
    "4:4:4": jpeg(picture(61, 48), subsampling=0),
    "at size": jpeg(picture(32, 32)),
    "enlarged": jpeg(picture(20, 11)),
    "progressive": jpeg(picture(61, 48), progressive=True),
    "grey": jpeg(picture(61, 48, "L")),
    "CMYK": jpeg(picture(61, 48, "CMYK")),
    "stored as RGB": jpeg(picture(61, 48), keep_rgb=True),
    **{f"turned {number}": jpeg(picture(61, 48), **turned(number)) for number in range(1, 9)},
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS.keys())
def test_pixels_are_those_of_a_full_decode(data, decoder):
    assert np.array_equal(decode_pixels("jpg", data, policy(decoder)), fitted(full(data)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
def test_much_larger_pictures_are_decoded_smaller_and_stay_the_same_pictures(kind, orientation, decoder):
    data = jpeg(picture(640, 400, kind), **turned(orientation))
    found = decode_pixels("jpg", data, policy(decoder))
    assert decibels(found, fitted(full(data))) > LEAST_DECIBELS
    with Image.open(io.BytesIO(data)) as image:
        image.draft(image.mode, (640 // 8, 400 // 8))
        assert image.size == (80, 50), "an eighth: half of it again is more than is needed"
        assert np.array_equal(found, fitted(ImageOps.exif_transpose(image).convert("RGB")))
    assert not np.array_equal(found, fitted(full(data)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stretched_picture_is_all_of_it(decoder):
    data = jpeg(picture(90, 40), **turned(6))
    expected = full(data).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_pixels("jpg", data, policy(decoder, resize="stretch")), np.asarray(expected))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("size", [(90, 40), (640, 150)])
def test_a_turned_picture_has_the_native_grid_of_the_upright_one_which_the_index_knows(size, orientation, decoder):
    data = jpeg(picture(*size), **turned(orientation))
    config = policy(decoder, resize="native", min_tokens=4, max_tokens=64)
    rows, columns = grid_of(*image_size("jpg", data), config)
    assert (rows > columns) == (orientation >= 5)
    found = decode_pixels("jpg", data, config)
    assert found.shape == (4 * rows, 4 * columns, 3)
    assert decibels(found, np.asarray(full(data).resize((4 * columns, 4 * rows), Image.Resampling.BICUBIC))) > LEAST_DECIBELS


@pytest.mark.parametrize("turn", [1, 6])
def test_the_scale_is_the_largest_that_leaves_half_more_than_is_needed(turn):
    random = np.random.default_rng(0)
    for height, width, *target in random.integers(1, 3000, (300, 4)).tolist():
        shown = (width, height) if turn == 6 else (height, width)
        enough = [s for s in (1, 2, 4, 8) if all(have / s >= 1.5 * need for have, need in zip(shown, target, strict=True))]
        assert dct_scale(height, width, turn, tuple(target)) == max(enough, default=1)


def test_simplejpeg_decodes_what_it_can_and_pillow_the_rest(monkeypatch):
    seen = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data, *args, **kwargs: seen.append(data) or decode(data, *args, **kwargs))
    for name, data in KINDS.items():
        decode_pixels("jpg", data, policy("auto"))
        assert (data in seen) == (name not in ("grey", "CMYK", "stored as RGB")), name
    seen.clear()
    decode_pixels("jpg", KINDS["4:2:0"], policy("pillow"))
    assert not seen


@pytest.mark.parametrize("decoder", DECODERS)
def test_another_process_finds_the_same_bytes(decoder, tmp_path):
    data = jpeg(picture(333, 250))
    (tmp_path / "x.jpg").write_bytes(data)
    code = (
        "import hashlib, sys; from fusiontrain.config.schema import ImageDataConfig; from fusiontrain.data.modalities.decoders import decode_pixels\n"
        f"config = ImageDataConfig(size=32, patch_size=4, decoder={decoder!r})\n"
        "print(hashlib.sha256(decode_pixels('jpg', open(sys.argv[1], 'rb').read(), config).tobytes()).hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.jpg")], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert result.stdout.strip() == hashlib.sha256(decode_pixels("jpg", data, policy(decoder)).tobytes()).hexdigest(), result.stderr


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_jpeg_cut_anywhere_is_a_bad_sample(decoder):
    data = jpeg(picture(61, 48))
    for length in range(2, len(data) - 2, 97):
        with pytest.raises(BadSample, match="not an image that can be read"):
            decode_pixels("jpg", data[:length], policy(decoder))


def test_damage_that_simplejpeg_mends_is_refused():
    """Strict: bytes that do not belong to the picture would else be passed over, with pixels that belong to none."""
    data = jpeg(picture(61, 48))
    middle = len(data) * 3 // 4
    damaged = data[:middle] + b"\xff\xd0\xff\xd5" + data[middle + 4 :]
    assert simplejpeg.decode_jpeg(damaged, strict=False).shape == (48, 61, 3)
    with pytest.raises(BadSample):
        decode_pixels("jpg", damaged, policy("simplejpeg"))


def test_the_decode_path_names_libraries_and_versions():
    assert decode_path(policy("auto")) == decode_path(policy("simplejpeg"))
    assert simplejpeg.__version__ in decode_path(policy("auto"))
    assert Image.__version__ in decode_path(policy("pillow"))
    assert "simplejpeg" not in decode_path(policy("pillow"))
    assert decode_path(policy("auto", representation="latents")) == decode_path(policy("pillow", representation="latents"))


def test_without_simplejpeg_auto_is_pillow_and_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setattr(decoders, "simplejpeg", None)
    assert decode_path(policy("auto")) == decode_path(policy("pillow"))
    assert np.array_equal(decode_pixels("jpg", KINDS["4:2:0"], policy("auto")), fitted(full(KINDS["4:2:0"])))
    for use in (decode_path, lambda config: decode_pixels("jpg", KINDS["4:2:0"], config)):
        with pytest.raises(UserError, match=r"^data\.image\.decoder=simplejpeg: .* is not installed"):
            use(policy("simplejpeg"))


def test_a_resume_with_another_decoder_is_refused_by_name(monkeypatch):
    from fusiontrain.data.plan.fields import plan_fields
    from fusiontrain.data.tokenizer import load_tokenizer
    from fusiontrain.train.build import require_same_data

    def fields(decoder: str) -> dict[str, str]:
        config = tiny_config({"data.image.decoder": decoder})
        return plan_fields(config, (), load_tokenizer(config))

    require_same_data({"fields": fields("auto")}, fields("simplejpeg"), "step-1")
    with pytest.raises(UserError, match=r"data\.image\.decoder differs"):
        require_same_data({"fields": fields("simplejpeg")}, fields("pillow"), "step-1")
    saved = fields("auto")
    monkeypatch.setattr(simplejpeg, "__version__", "0.1")
    with pytest.raises(UserError, match=r"data\.image\.decoder differs"):
        require_same_data({"fields": saved}, fields("auto"), "step-1")


def test_machines_with_different_decoders_are_no_run():
    from fusiontrain.train.build import require_same_data_on_ranks

    here, there = ({"data.image.decoder": decode_path(policy(decoder)), "seed": "0"} for decoder in DECODERS)
    require_same_data_on_ranks([here, here])
    with pytest.raises(UserError, match=r"^rank 2 has data\.image\.decoder: simplejpeg .*, rank 0 has pillow"):
        require_same_data_on_ranks([here, here, there])
