"""The files of a Hugging Face Llama folder (`config.json` and safetensors), read and written tensor by tensor; those of a Chameleon, which is a
Llama with norms of its own, are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusiontrain.modality import MODALITY_NAMES, TEXT
from fusiontrain.models.shape import ModelShape, RopeScaling
from fusiontrain.models.tensor_files import Planned, Stored, open_tensors, write_tensors
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.models.fusion import FusionModel

BLOCK_PARTS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
"""Module of a Llama layer -> module of a block, which holds one weight per group."""

HEAD_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
"""The same of what Chameleon has beside it: a weight and a bias [H, Dh] each, which are [H * Dh] here."""

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Ends of the names of tensors that old folders hold and that config.json tells as well."""
CODE_MAKER = "model.vqmodel."
"""Beginning of the names of Chameleon's vector quantiser, which makes codes of pixels beforehand and is no part of the transformer."""


def read_llama_shape(folder: str) -> ModelShape:
    """The shape in `folder/config.json`. Raises UserError if the folder does not hold a Llama, naming what is in the way."""
    path, config = Path(folder) / CONFIG_FILE, read_config_json(folder)
    kind = config.get("model_type")
    if kind not in ("llama", "chameleon"):
        raise UserError(f"{path}: model_type is {kind!r}, expected 'llama' or 'chameleon'")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{path}: {key}=true is not supported, Llama has no biases")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act={config['hidden_act']!r} is not supported, Llama has 'silu'")
    if config.get("quantization_config"):
        raise UserError(f"{path}: quantised weights are not supported: give the folder that they were made from")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        return ModelShape(
            vocab_size=config["vocab_size"],
            dim=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            ffn_dim=config["intermediate_size"],
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
            rope_scaling=_rope_scaling(rope, path),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_position="post" if config.get("swin_norm") else "pre",
            qk_norm="layer" if kind == "chameleon" else "none",
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from error


def read_config_json(folder: str) -> dict[str, Any]:
    """`config.json` of a folder of weights. Raises UserError where there is none or it cannot be read."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"model.base={folder}: not a Hugging Face Llama folder (no config.json in it)")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object with the model's settings")
    return config


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path}: rotary scaling {kind!r} is not supported (default and llama3 are)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(**{name: rope[name] for name in names})


def parameter_names(model: FusionModel, llama_name: str) -> list[str]:
    """Every parameter of `model` that a tensor of a Llama checkpoint fills: one per group, or none for a tensor it has no place for."""
    top = {"model.embed_tokens.weight": "text.embedding", "lm_head.weight": "text.head"}
    if llama_name in top:
        return [f"{top[llama_name]}.weight"] if llama_name != "lm_head.weight" or model.text.head is not None else []
    if llama_name == "model.norm.weight":
        return [f"final_norm.{group}.weight" for group in model.final_norm]
    head, _, rest = llama_name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    part = (BLOCK_PARTS if kind == "weight" else {}).get(module) or (HEAD_NORMS if model.shape.qk_norm == "layer" else {}).get(module)
    if part is None or not head.isdigit() or int(head) >= len(model.blocks):
        return []
    name = f"blocks.{head}.{part}"
    return [f"{name}.{group}.{kind}" for group in model.get_submodule(name)]


def llama_slices(model: FusionModel, folder: str) -> dict[str, Stored]:
    """The tensor of a Llama folder that each parameter of `model` starts from: the text side, and its copies (LMFusion 3.1: image norms, attention
    and FFN start as the text's). What is not among the keys, the folder has nothing for.

    Raises UserError for files that cannot be read, that do not fit config.json, that lack a tensor of the text side or hold one too many.
    """
    slices: dict[str, Stored] = {}
    for llama_name, tensor in open_tensors(Path(folder)).items():
        names = parameter_names(model, llama_name)
        if not names and not _is_superfluous(model, llama_name):
            raise UserError(f"{tensor.file}: {llama_name} has no place in the Llama that config.json describes: the two do not belong together")
        slices.update(dict.fromkeys(names, _flat(tensor) if llama_name.rpartition(".")[0].endswith(tuple(HEAD_NORMS)) else tensor))
    _require_complete(model, slices, folder)
    return slices


def _flat(tensor: Stored) -> Stored:
    """The same bytes, as a tensor of a single dim."""
    return replace(tensor, shape=(math.prod(tensor.shape),))


def _is_superfluous(model: FusionModel, llama_name: str) -> bool:
    """Whether nothing is lost without a tensor: the head of a model that has the embedding for one, constants, and what makes codes of images."""
    if llama_name.startswith(CODE_MAKER):
        return True
    return (llama_name == "lm_head.weight" and model.text.head is None) or llama_name.endswith(NOT_WEIGHTS)


def _require_complete(model: FusionModel, slices: Mapping[str, Stored], where: str) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name, piece in slices.items():
        if list(piece.shape) != shapes[name]:
            raise UserError(f"{where}: the tensor for {name} has shape {list(piece.shape)}, config.json says {shapes[name]}")
    missing = sorted(name for name in shapes.keys() - slices.keys() if not name.startswith("image."))
    if missing:
        raise UserError(f"{where}: no tensor for {missing[0]} (and {len(missing) - 1} more): the weights are incomplete")


def is_plain_llama(shape: ModelShape) -> bool:
    """Whether a model of this shape has the norms of a Llama and no others."""
    return shape.norm_position == "pre" and shape.qk_norm == "none"


def llama_names(model: FusionModel) -> dict[str, str]:
    """The text side of a model: names of a Llama's tensors -> names of parameters. Raises UserError for a text side that no Llama has."""
    if not is_plain_llama(model.shape):
        raise UserError("this model norms behind its sublayers or its queries and keys, as no Llama does: export it with --format fusiontrain")
    names = {"model.embed_tokens.weight": "text.embedding.weight"}
    for i in range(len(model.blocks)):
        for llama_part, part in BLOCK_PARTS.items():
            names[f"model.layers.{i}.{llama_part}.weight"] = _of_text(model, f"blocks.{i}.{part}")
    names["model.norm.weight"] = _of_text(model, "final_norm")
    if model.text.head is not None:
        names["lm_head.weight"] = "text.head.weight"
    others = [name for name, _ in model.named_parameters() if name not in names.values() and not _is_of_others(name)]
    if others:
        raise UserError(f"{others[0]} has no place in a Llama, nor do {len(others) - 1} more: this recipe cannot be written as one")
    return names


def _of_text(model: FusionModel, part: str) -> str:
    try:
        return f"{part}.{model.get_submodule(part).groups[TEXT.id]}.weight"
    except AttributeError as error:
        raise UserError(f"the text side of this recipe has no {part} as a Llama has: it cannot be written as one") from error


def _is_of_others(name: str) -> bool:
    """Whether a parameter belongs to another modality than text."""
    return name.startswith("image.") or bool((set(MODALITY_NAMES) - {TEXT.name}) & set(name.split(".")))


def llama_config(shape: ModelShape, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `config.json` says of a Llama of this shape."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(shape.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": None if shape.rope_scaling is None else rope,  # what versions before 5 of transformers read
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def export_llama(model: FusionModel, folder: str, tokenizer_json: str | None = None) -> None:
    """Write the text side of a model in memory as a Hugging Face Llama folder (`config.json`, `model.safetensors`, and `tokenizer.json` where given)."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    names = llama_names(model)
    tensors = [Planned(name, tuple(model.get_parameter(parameter).shape), torch.float32) for name, parameter in names.items()]
    write_tensors(path, tensors, lambda name: model.get_parameter(names[name]))
    (path / CONFIG_FILE).write_text(json.dumps(llama_config(model.shape), indent=2) + "\n")
    if tokenizer_json is not None:
        (path / TOKENIZER_FILE).write_text(tokenizer_json)
