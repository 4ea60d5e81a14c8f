"""The autoencoder adapter, with a small random `AutoencoderKL` of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

import fusiontrain
from fusiontrain.config.load import to_yaml
from fusiontrain.models.build import build_model
from fusiontrain.models.modalities.patches import patchify, unpatchify
from fusiontrain.models.modalities.vae import LatentCodec
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.train.checkpoint import save_checkpoint
from fusiontrain.train.export import export_model
from fusiontrain.train.identity import model_identity
from fusiontrain.train.retention import Retention
from fusiontrain.train.sources import open_source
from fusiontrain.train.state import TrainState, model_tensors
from fusiontrain.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(path)
    return str(path)


def test_latents_are_the_scaled_mean_of_the_posterior(folder):
    codec = LatentCodec(folder)
    pixels = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = codec.encode(patchify(pixels, 4).flatten(0, 1), ((2, 4), (2, 4)))
    vae = AutoencoderKL.from_pretrained(folder)
    expected = vae.encode(pixels).latent_dist.mean * 0.5
    assert (codec.channels, codec.downsampling) == (4, 2)
    torch.testing.assert_close(unpatchify(latents.unflatten(0, (2, 8)), (2, 4), 4), expected)
    torch.testing.assert_close(codec.decode(expected), vae.decode(expected / 0.5).sample.clamp(-1, 1))


def test_a_model_trains_on_latents_and_shows_pixels(folder):
    config = tiny_config({"model.image.vae": folder, "model.image.patcher": "linear"})
    model = build_model(config)
    assert not any("vae" in name for name, _ in model.named_parameters())
    assert model.image.input.in_features == 4 * 2 * 2
    terms = model(batch_of([document([256, 258], ("image", 2, 2), [259])], config))
    assert terms["image"].count == 1
    terms["image"].sum.backward()
    assert model.image.output.weight.grad.any()
    assert model.to_pixels(torch.zeros(1, 4, 16), (2, 2)).shape == (1, 3, 8, 8)
    assert model(batch_of([document([1, 2])], config))["image"].count == 0


def test_what_is_no_autoencoder_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="not a diffusers AutoencoderKL folder"):
        LatentCodec(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="cannot be loaded as an AutoencoderKL"):
        LatentCodec(str(tmp_path))
    with pytest.raises(UserError, match="multiple of the VAE's downsampling factor 2"):
        LatentCodec(folder).latent_patch_dim(3 * 3 * 3)


def test_an_exported_model_brings_its_autoencoder(tmp_path, folder):
    config = tiny_config({"model.image.vae": folder, "model.image.patcher": "linear"})
    model = build_model(config)
    stored = model_tensors(model, dict(model.named_parameters()), include_frozen=True)
    tensors = {"model": stored, "optimizer": {}}
    save_checkpoint(tmp_path, TrainState(step=1), tensors, model_identity(config, stored), to_yaml(config), Ranks(), Retention(last=1), {})
    export_model(open_source(tmp_path), tmp_path / "out", "fusiontrain")
    loaded = fusiontrain.load(tmp_path / "out")
    assert loaded.config.model.image.vae == str(tmp_path / "out" / "vae")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.model.codec.decode(latents), model.codec.decode(latents))
