"""Every published size has the number of parameters that its paper's name says, counted without memory for weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontrain.config.load import load
from fusiontrain.models.build import declare_model
from fusiontrain.models.fusion import FusionModel

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rope_theta": 5e5,
}


def count(model: FusionModel, image_side: bool) -> int:
    """Parameters of the patcher alone, or of all the rest."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("image.") == image_side)


@pytest.mark.parametrize(
    ("name", "transformer", "unet"),
    [
        ("0_16b", 162.4e6, 0.17e9),  # Table 7's percentages imply a smaller U-Net for this size
        ("0_37b", 373.8e6, 0.27e9),
        ("0_76b", 777.8e6, 0.27e9),  # the name says less; tied embeddings would give 728.6M
        ("1_4b", 1364e6, 0.27e9),
        ("7b", 6738e6, 0.27e9),
    ],
)
def test_transfusion(name: str, transformer: float, unet: float) -> None:
    """Transfusion, Table 2, with its 32,000 words: the configs have room for the two marks of an image."""
    config = load(CONFIGS / f"transfusion_{name}.yaml", ["model.vocab_size=32000"])
    model = declare_model(config)
    assert count(model, False) == pytest.approx(transformer, rel=1e-3)
    assert count(model, True) == pytest.approx(unet, rel=0.02)
    if name != "0_76b":
        assert count(model, False) == pytest.approx(float(name.removesuffix("b").replace("_", ".")) * 1e9, rel=0.04)


@pytest.mark.parametrize(("name", "share"), [("0_16b", 0.006), ("0_37b", 0.005), ("0_76b", 0.005), ("1_4b", 0.005), ("7b", 0.005)])
def test_the_linear_patcher_is_next_to_nothing(name: str, share: float) -> None:
    """Transfusion 4.1: below half a per cent. Ours has two more layers on the timestep, which tell in the smallest."""
    model = declare_model(load(CONFIGS / f"transfusion_{name}.yaml", ["model.image.patcher=linear"]))
    assert count(model, True) < share * count(model, False)


@pytest.mark.parametrize("latents", ["lmfusion_8b", "lmfusion_8b_latents"])
@pytest.mark.parametrize(("separation", "trunk"), [("deep", 6.979e9), ("shallow", 5.637e9), ("dense", 0)])
def test_lmfusion(tmp_path: Path, latents: str, separation: str, trunk: float) -> None:
    """Llama-3 8B and, per modality, copies of its blocks without embeddings; two U-Nets of 0.27B."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    settings = [f"model.base={tmp_path}", f"model.separation={separation}", "model.image.vae=null", "data.image.representation=latents"]
    channels = 4 if latents == "lmfusion_8b" else 8
    model = declare_model(load(CONFIGS / f"{latents}.yaml", [*settings, f"data.image.channels={channels}", "data.image.patch_size=2"]))
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count(model, True) == pytest.approx(0.27e9, rel=0.02)
    assert count(model, False) == pytest.approx(8.030e9 + trunk, rel=1e-3)
    assert trains == pytest.approx(trunk + count(model, True), rel=1e-3)
