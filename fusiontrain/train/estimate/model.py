"""The config of a model as it can be traced here: a base by its shape alone, images as the blocks see them, kernels as a GPU has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fusiontrain.config.schema import Config, ParallelConfig
from fusiontrain.config.validate import uses_images
from fusiontrain.models.base import base_shape
from fusiontrain.models.shape import ModelShape, shape_from_config
from fusiontrain.utils.errors import UserError
from fusiontrain_kernels._launch import has_triton

LLAMA_SHAPES = {
    r"llama-3(\.1)?-8b": ModelShape(128256, 4096, 32, 32, 8, 128, 14336),
    r"llama-3(\.[13])?-70b": ModelShape(128256, 8192, 80, 64, 8, 128, 28672),
    r"llama-3\.2-1b": ModelShape(128256, 2048, 16, 32, 8, 64, 8192, tie_embeddings=True),
    r"llama-3\.2-3b": ModelShape(128256, 3072, 28, 24, 8, 128, 8192, tie_embeddings=True),
}
"""By name of the folder, for machines that do not have it."""

GPU_KERNELS = {"attention": ("flex", "flash"), "gemm": (), "norm": (), "rope": (), "swiglu": (), "cross_entropy": ()}
"""Implementations that cannot be traced without a GPU; Triton's, which keep the same tensors, stand for them, as they do for "auto"."""

VAE_CHANNELS, VAE_DOWNSAMPLING, VAE_BYTES = 4, 8, 334_615_000
"""Stable Diffusion's autoencoder: the papers', and what a VAE that is not here is taken for."""


def shape_of(config: Config) -> tuple[ModelShape, str | None]:
    """The shape of the config's model, and a sentence where it was not read but known by name. Raises UserError where it is neither."""
    base = config.model.base
    if base is None:
        return shape_from_config(config.model), None
    if not Path(base, "config.json").is_file():
        for pattern, shape in LLAMA_SHAPES.items():
            if re.search(pattern + "$", Path(base).name.lower()):
                return shape, f"model.base={base} is not here: the published shape of that name is taken"
    return base_shape(base), None


def without_codec(config: Config) -> tuple[Config, str | None]:
    """The config as if images were stored as the latents that its VAE makes of them, and a sentence about what the VAE takes."""
    image = config.data.image
    if config.model.image.vae is None or not uses_images(config) or image.representation != "pixels":
        return config, None
    channels, factor, size = _codec(Path(config.model.image.vae))
    smaller = {"representation": "latents", "channels": channels, "patch_size": image.patch_size // factor, "size": image.size // factor}
    data = config.data.model_copy(update={"image": image.model_copy(update=smaller)})
    model = config.model.model_copy(update={"image": config.model.image.model_copy(update={"vae": None})})
    sentence = f"the VAE is left out: its weights add about {size / 2**30:.2f} GiB on every rank, and encoding takes time and memory of its own"
    return config.model_copy(update={"data": data, "model": model}), sentence


def _codec(folder: Path) -> tuple[int, int, int]:
    """Channels of the latents, how much smaller their sides are, and bytes of the weights."""
    if not (folder / "config.json").is_file():
        return VAE_CHANNELS, VAE_DOWNSAMPLING, VAE_BYTES
    settings = json.loads((folder / "config.json").read_text())
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return settings["latent_channels"], 2 ** (len(settings["block_out_channels"]) - 1), size or VAE_BYTES


def traceable(config: Config, on_gpu: bool) -> tuple[Config, list[str]]:
    """The config under FSDP2 with compilation off and, for a GPU, its kernels named; and sentences on what differs from a run. Raises UserError for
    an engine that FSDP2 does not stand for."""
    notes = ["parallel.compile is not looked at: compiled blocks keep as much or less"] if config.parallel.compile else []
    notes += _notes_on_engine(config.parallel)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"compile": False, "engine": "fsdp2"})})
    if not on_gpu:
        return config, notes
    if not has_triton():
        return config, [*notes, "Triton is not installed here: memory is that of the kernels for a CPU, whose attention needs more"]
    asked = {key: getattr(config.kernels, key) or config.kernels.impl for key in GPU_KERNELS}
    named = {key: "triton" if name == "auto" or name in GPU_KERNELS[key] else name for key, name in asked.items()}
    return config.model_copy(update={"kernels": config.kernels.model_copy(update=named)}), notes


def _notes_on_engine(parallel: ParallelConfig) -> list[str]:
    if parallel.engine == "fsdp2":
        return []
    if parallel.zero_stage < 3:
        raise UserError(
            f"parallel.zero_stage={parallel.zero_stage}: FSDP2 is estimated, and ZeRO 3, which holds the same; this stage keeps "
            "more on every rank: set parallel.zero_stage=3 or parallel.engine=fsdp2 to see those"
        )
    return [
        "parallel.engine=deepspeed: the estimate is of FSDP2, which holds and moves what ZeRO 3 does but for DeepSpeed's own buffers; with several "
        "micro-batches ZeRO 3 reduces gradients with each of them, and so holds shards of them alone"
    ]
