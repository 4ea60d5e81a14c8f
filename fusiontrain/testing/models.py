"""Small Llama folders for tests, written by Hugging Face's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BYTES_VOCAB = 260
"""Size of the built-in byte tokenizer's vocabulary."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Llama 3.1's scaling of rotary positions, for sequences of a test's length."""


def write_tiny_llama(folder: str | Path, *, seed: int = 0, **settings: Any) -> str:
    """A random `LlamaForCausalLM` with grouped queries, saved in float32. `settings` override its config. Returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": BYTES_VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 256,
            "eos_token_id": 257,
            **settings,
        }
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    torch.random.set_rng_state(state)
    return str(folder)
