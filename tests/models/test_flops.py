"""FLOPs of a step against torch's own counter, wherever that counts the same thing."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fusiontrain.models.build import build_model
from fusiontrain.models.flops import allowed_pairs, count_flops
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.models import write_tiny_llama

NO_SHAPE = dict.fromkeys(("model.vocab_size", "model.dim", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.ffn_dim"))
MATRIX_PRODUCTS = ("mm", "addmm", "segments_gemm", "segments_gemm_backward", "convolution", "convolution_backward", "linear_cross_entropy")


def full_batch(config):
    """One sequence without padding: text, two images, text."""
    image = ("image", 2, 2)
    text = config.data.sequence_length - 8 - 6
    return batch_of([document([256, 1, 2, 258], image, [259, 258], image, [3] * text)], config)


def config_of(recipe, tmp_path, **overrides):
    if recipe == "lmfusion":
        return tiny_config({**NO_SHAPE, "model.recipe": recipe, "model.base": write_tiny_llama(tmp_path), **overrides})
    return tiny_config({"model.recipe": recipe, **overrides})


@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
@pytest.mark.parametrize("patcher", ["linear", "unet"])
def test_matrix_products_equal_the_counter(recipe, patcher, tmp_path):
    config = config_of(recipe, tmp_path, **{"model.image.patcher": patcher, "model.image.unet_channels": 8})
    model, batch = build_model(config), full_batch(config)
    counter = FlopCounterMode(display=False)
    with counter:
        sum(term.sum for term in model(batch).values()).backward()
    by_name = {str(op).split(".")[-1]: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    measured = sum(by_name.get(name, 0) for name in MATRIX_PRODUCTS)
    counted = count_flops(model, batch)
    assert counted["text"] + counted["image"] == measured


def test_attention_is_billed_for_allowed_pairs_only(tmp_path):
    config = config_of("lmfusion", tmp_path)
    model = build_model(config)
    documents = [document([1, 2, 3]), document([4, 5, 258], ("image", 1, 2), [259], seed=1)]
    batch = batch_of(documents, config)
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 5 + 5 + 6)
    from_live_queries, to_live_keys = 5 + 5 + 6, 2 + 2 + 3
    assert allowed_pairs(batch) == pairs
    heads, head_dim, layers = 4, 8, 2
    products = 2 * pairs + 2 * from_live_queries + 2 * to_live_keys
    assert count_flops(model, batch)["attention"] == 2 * products * heads * head_dim * layers
    plain = batch_of(documents, config_of("lmfusion", tmp_path, **{"parallel.frozen_prefix": False}))
    assert count_flops(model, plain)["attention"] == 2 * 6 * pairs * heads * head_dim * layers


def test_padding_costs_nothing_and_frozen_weights_cost_less(tmp_path):
    config = config_of("lmfusion", tmp_path)
    model = build_model(config)
    documents = [document([256, 1, 2, 258], ("image", 2, 2), [259])]
    assert count_flops(model, batch_of(documents, config, 1)) == count_flops(model, batch_of(documents, config, 3))
    frozen = count_flops(model, full_batch(config))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert count_flops(model, full_batch(config))["text"] > frozen["text"]
