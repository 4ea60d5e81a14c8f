"""Pixels and tokens: round trips and the odd cases."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.collate import pack_documents
from fusiontrain.data.errors import BadSample
from fusiontrain.data.modalities.image import decode_image, image_segment, patchify
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.models.modalities.patches import patchify as torch_patchify
from fusiontrain.models.modalities.patches import unpatchify
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import png
from fusiontrain.types import Document, Segment, SourceRef
from fusiontrain.utils.errors import UserError

CONFIG = ImageDataConfig(size=8, patch_size=4)


def test_pixels_come_back_from_patches():
    data = png(3)
    values, grid = decode_image("png", data, CONFIG)
    assert values.shape == (4, 48)
    assert grid == (2, 2)
    maps = unpatchify(torch.from_numpy(values)[None], grid, 3)[0]
    pixels = ((maps + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))
    assert torch.equal(torch_patchify(maps[None], 4)[0], torch.from_numpy(values))


def test_a_patch_is_channel_row_column():
    maps = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    patches = patchify(maps, 2)
    assert patches.shape == (6, 8)
    assert patches[4].tolist() == [14, 15, 20, 21, 38, 39, 44, 45]  # second row of patches, second column


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "CMYK"])
def test_any_mode_becomes_rgb(mode):
    values, _ = decode_image("x", png(0, mode=mode, format="TIFF" if mode == "CMYK" else "PNG"), CONFIG)
    assert values.shape == (4, 48)
    assert np.abs(values).max() <= 1


def test_transparent_pixels_are_white_and_sixteen_bits_are_scaled():
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(buffer, format="PNG")
    assert (decode_image("png", buffer.getvalue(), CONFIG)[0] == 1).all()
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(buffer, format="PNG")
    assert np.allclose(decode_image("png", buffer.getvalue(), CONFIG)[0], 128 / 127.5 - 1, atol=1e-6)


def test_wide_images_are_cropped_in_the_middle():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    assert (decode_image("png", buffer.getvalue(), CONFIG)[0] == 1).all()


@pytest.mark.parametrize("data", [b"", b"nonsense", png(0)[:60]])
def test_what_is_no_image_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="not an image that can be read"):
        decode_image("png", data, CONFIG)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_patches_see_all_of_their_image_or_those_before_them(attention):
    segment = image_segment("png", png(3), CONFIG.model_copy(update={"attention": attention}), 1.0)
    document = Document((Segment("text", token_ids=np.array([1, 2])), segment), SourceRef("s", "s", 0, "k"))
    batch = pack_documents([document], tiny_config())
    seen = [[hi - lo for lo, hi in ranges] for ranges in batch.key_ranges[batch.modality_bounds[1] :][:4].tolist()]
    assert seen == ([[2, 4]] * 4 if attention == "bidirectional" else [[2, 1], [2, 2], [2, 3], [2, 4]])


def test_latents_are_taken_as_stored():
    latent = np.random.default_rng(0).normal(size=(4, 6, 4)).astype(np.float32)
    buffer = io.BytesIO()
    np.save(buffer, latent)
    config = ImageDataConfig(size=64, patch_size=2, representation="latents", channels=4)
    values, grid = decode_image("0.latent.npy", buffer.getvalue(), config)
    assert grid == (3, 2)
    assert torch.equal(unpatchify(torch.from_numpy(values)[None], grid, 4)[0], torch.from_numpy(latent))
    with pytest.raises(BadSample, match="has 4 channels"):
        decode_image("0.latent.npy", buffer.getvalue(), config.model_copy(update={"channels": 8}))


def test_bytes_go_there_and_back():
    tokenizer = load_tokenizer(tiny_config())
    text = "héllo <|image|> \x00 你好"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([256, *ids, 258, 259, 257]) == text
    assert tokenizer.vocab_size == 260


MARKERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|/image|>"]


@pytest.mark.parametrize("kind", ["special", "added", "ordinary"])
def test_a_marker_spelled_out_in_a_text_is_text(tmp_path, kind):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {"a": 0, "b": 1, "?": 2, **({name: 10 + i for i, name in enumerate(MARKERS)} if kind == "ordinary" else {})}
    built = Tokenizer(models.WordLevel(words, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind != "ordinary":
        built.add_tokens([AddedToken(name, special=kind == "special") for name in MARKERS])
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tiny_config({"data.tokenizer.path": str(tmp_path)}))
    ids = tokenizer.encode("a <|image|> b <|end_of_text|>")
    markers = {tokenizer.begin_text_id, tokenizer.end_text_id, tokenizer.begin_image_id, tokenizer.end_image_id}
    assert not markers & set(ids)
    assert [token for token in ids if token < 2] == [0, 1]
    assert tokenizer.vocab_size == (14 if kind == "ordinary" else 7)


def test_a_model_with_too_few_tokens_is_refused_by_key():
    with pytest.raises(UserError, match=r"model\.vocab_size=100: the tokenizer bytes has 260 tokens"):
        load_tokenizer(tiny_config({"model.vocab_size": 100}))


def test_a_tokenizer_file_without_the_markers_is_refused_by_key(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "<|end_of_text|>": 1}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match=r"data\.tokenizer\.begin_image_token='<\|image\|>': .*has no such token"):
        load_tokenizer(tiny_config({"data.tokenizer.path": str(path)}))
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tiny_config({"data.tokenizer.path": str(tmp_path / "missing")}))
