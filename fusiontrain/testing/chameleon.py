"""Small Chameleon folders for tests: weights as Hugging Face's own classes write them, and a tokenizer that names its codes as the released one does."""

from __future__ import annotations

from pathlib import Path

import torch

NUM_PLAIN = 260
"""Bytes, then BOS, EOS, BOI and EOI; the tokens of codes stand behind them here, in an order of their own."""
TOKEN_NAMES = {"begin_text_token": "<s>", "end_text_token": "</s>", "begin_image_token": "<racm3:break>", "end_image_token": "<eoss>"}


def code_names(num_codes: int) -> dict[str, int]:
    """Names of the codes 0, 1, ... -> their tokens. num_codes: no multiple of 7."""
    letters = [("".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)), code) for code in range(num_codes)]
    return {f"IMGIMG{name}Z": NUM_PLAIN + (code * 7 + 3) % num_codes for name, code in letters}


def write_tiny_chameleon(folder: str | Path, num_codes: int, swin_norm: bool = False) -> str:
    """A random `ChameleonForConditionalGeneration` of two layers in float32, with a tokenizer.json beside it. Returns the folder."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    maker = {"embed_dim": 8, "num_embeddings": num_codes, "base_channels": 32, "latent_channels": 8, "resolution": 32, "channel_multiplier": [1]}
    config = ChameleonConfig(
        vocab_size=NUM_PLAIN + num_codes, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        swin_norm=swin_norm, vocabulary_map={"<image>": 7, **code_names(num_codes)}, initializer_range=0.2,
        vq_config={**maker, "num_res_blocks": 1, "attn_resolutions": []},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    model = ChameleonForConditionalGeneration(config).float()
    with torch.no_grad():  # fresh norms are ones and zeros, which hide what is applied where
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    _write_tokenizer(Path(folder), num_codes)
    return str(folder)


def _write_tokenizer(folder: Path, num_codes: int) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    names = {number: chr(number) if 32 <= number < 127 else f"<{number}>" for number in range(256)}
    names |= dict(zip(range(256, NUM_PLAIN), TOKEN_NAMES.values(), strict=True)) | {number: name for name, number in code_names(num_codes).items()}
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in names.items()}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in TOKEN_NAMES.values()])
    tokenizer.add_tokens(list(code_names(num_codes)))
    tokenizer.save(str(folder / "tokenizer.json"))
