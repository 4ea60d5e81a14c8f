"""The files of a Hugging Face Llama folder (`config.json` and safetensors), read and written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusiontrain.models.plan import ReadRows
from fusiontrain.models.shape import ModelShape, RopeScaling
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

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


def read_llama_shape(folder: str) -> ModelShape:
    """The shape in `folder/config.json`. Raises UserError if the folder does not hold a Llama, naming what is in the way."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"model.base={folder}: not a Hugging Face Llama folder (no config.json in it)")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if config.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}, expected 'llama'")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{path}: {key}=true is not supported, Llama has no biases")
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
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from error


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path}: rotary scaling {kind!r} is not supported (default and llama3 are)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(**{name: rope[name] for name in names})


def weight_files(folder: str) -> list[Path]:
    """The safetensors files of a Llama folder, in a stable order. Raises UserError if there are none."""
    index, single = Path(folder) / INDEX_FILE, Path(folder) / SINGLE_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [Path(folder) / name for name in names]
    if single.is_file():
        return [single]
    raise UserError(f"model.base={folder}: no {SINGLE_FILE} or {INDEX_FILE} in it (weights must be safetensors)")


def parameter_names(model: FusionModel, llama_name: str) -> list[str]:
    """Every parameter of `model` that a tensor of a Llama checkpoint fills: one per group, or none for a tensor it has no place for."""
    top = {"model.embed_tokens.weight": "text.embedding", "lm_head.weight": "text.head"}
    if llama_name in top:
        return [f"{top[llama_name]}.weight"] if llama_name != "lm_head.weight" or model.text.head is not None else []
    if llama_name == "model.norm.weight":
        return [f"final_norm.{group}.weight" for group in model.final_norm]
    head, _, rest = llama_name.removeprefix("model.layers.").partition(".")
    part = BLOCK_PARTS.get(rest.removesuffix(".weight"))
    if part is None or not head.isdigit() or int(head) >= len(model.blocks):
        return []
    name = f"blocks.{head}.{part}"
    return [f"{name}.{group}.weight" for group in model.get_submodule(name)]


def llama_weights(model: FusionModel, folder: str, others: ReadRows) -> ReadRows:
    """Where `model` starts on top of a Llama folder: the text side and its copies (LMFusion 3.1: image norms, attention and FFN start as the
    text's) are read from the files, slice by slice; what the folder has nothing for is taken from `others`.

    Raises UserError for files that cannot be read, that do not fit config.json, or that lack a tensor of the text side.
    """
    slices = {name: piece for llama_name, piece in _open_tensors(folder) for name in parameter_names(model, llama_name)}
    _require_complete(model, slices, folder)

    def read_rows(name: str, shape: torch.Size, first: int, last: int) -> torch.Tensor:
        if name not in slices:
            return others(name, shape, first, last)
        try:
            return slices[name][first:last] if first < last else torch.empty(0, *shape[1:])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot be read as safetensors: {error}") from error

    return read_rows


def _open_tensors(folder: str) -> Iterator[tuple[str, Any]]:
    """Every tensor of a Llama folder by name, as a slice of its file of which nothing is read yet."""
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt")  # it maps the file, which its slices keep open
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def _require_complete(model: FusionModel, slices: Mapping[str, Any], where: str) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name, piece in slices.items():
        if list(piece.get_shape()) != shapes[name]:
            raise UserError(f"{where}: the tensor for {name} has shape {list(piece.get_shape())}, config.json says {shapes[name]}")
    missing = sorted(name for name in shapes.keys() - slices.keys() if not name.startswith("image."))
    if missing:
        raise UserError(f"{where}: no tensor for {missing[0]} (and {len(missing) - 1} more): the weights are incomplete")


def _llama_tensors(model: FusionModel) -> dict[str, torch.Tensor]:
    """The text side of a model under the names of a Llama checkpoint."""
    tensors = {"model.embed_tokens.weight": model.text.embedding.weight}
    if model.text.head is not None:
        tensors["lm_head.weight"] = model.text.head.weight
    tensors["model.norm.weight"] = model.final_norm[model.final_norm.groups[0]].weight
    for i in range(len(model.blocks)):
        for llama_part, part in BLOCK_PARTS.items():
            untied = model.get_submodule(f"blocks.{i}.{part}")
            tensors[f"model.layers.{i}.{llama_part}.weight"] = untied[untied.groups[0]].weight
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _llama_config(shape: ModelShape) -> dict[str, Any]:
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
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def export_llama(model: FusionModel, folder: str, tokenizer_json: str | None = None) -> None:
    """Write the text side as a Hugging Face Llama folder (`config.json`, `model.safetensors`, and `tokenizer.json` where given)."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(_llama_config(model.shape), indent=2) + "\n")
    save_file(_llama_tensors(model), path / SINGLE_FILE, metadata={"format": "pt"})
    if tokenizer_json is not None:
        (path / TOKENIZER_FILE).write_text(tokenizer_json)
