"""Import and export of Llama folders, against Hugging Face's own forward."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fusiontrain.models.hf import from_llama, to_llama
from fusiontrain.models.llama_weights import read_llama_shape
from fusiontrain.testing.batches import text_batch
from fusiontrain.testing.models import LLAMA3_ROPE, write_tiny_llama
from fusiontrain.utils.errors import UserError

VARIANTS = {
    "untied, grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "one key head per query head": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "llama 3.1 rotary scaling": {"rope_parameters": LLAMA3_ROPE},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("recipe", ["dense", "lmfusion", "transfusion"])
def test_text_logits_equal_hugging_face(tmp_path, settings, recipe):
    folder = write_tiny_llama(tmp_path, **settings)
    token_ids = torch.randint(0, 256, (1, 61), generator=torch.Generator().manual_seed(1))
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(token_ids).logits[0]
    model = from_llama(folder, recipe)
    actual = model.text_logits(text_batch(token_ids[0].tolist()))
    torch.testing.assert_close(actual[:61], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_export_gives_back_the_same_llama(tmp_path, settings):
    folder = write_tiny_llama(tmp_path, **settings)
    original = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exported = to_llama(from_llama(original, "lmfusion"))
    assert exported.config.rope_parameters == original.config.rope_parameters
    for (name, expected), (other, actual) in zip(original.state_dict().items(), exported.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(expected, actual), name
    token_ids = torch.arange(40)[None]
    assert torch.equal(original(token_ids).logits, exported(token_ids).logits)


def test_image_side_starts_as_a_copy_of_the_text_side(tmp_path):
    model = from_llama(write_tiny_llama(tmp_path), "lmfusion")
    pairs = [(name, name.replace(".image.", ".text.")) for name, _ in model.named_parameters() if ".image." in name]
    assert len(pairs) == 2 * 9 + 1
    assert all(torch.equal(model.get_parameter(image), model.get_parameter(text)) for image, text in pairs)


def test_sharded_safetensors_are_read(tmp_path):
    folder = write_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = from_llama(folder, "dense").state_dict()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = from_llama(folder, "dense").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def _set(key, value):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not a Hugging Face Llama folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (_set("model_type", "mistral"), "model_type is 'mistral'"),
        (_set("attention_bias", True), "attention_bias=true is not supported"),
        (_set("hidden_size", 64), "has shape"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights must be safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "cannot be read as safetensors"),
        (_set("num_hidden_layers", 3), "no tensor for"),
        (_set("rope_parameters", {"rope_type": "yarn"}), "rotary scaling 'yarn' is not supported"),
    ],
)
def test_a_folder_that_is_no_llama_is_refused_in_one_sentence(tmp_path, damage, message):
    write_tiny_llama(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        from_llama(str(tmp_path), "lmfusion")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_shape_of_a_missing_folder_is_refused():
    with pytest.raises(UserError, match=r"no config\.json"):
        read_llama_shape("nowhere")
