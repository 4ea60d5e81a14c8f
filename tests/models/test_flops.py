"""FLOPs of a step against torch's own counter, wherever that counts the same thing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fusiontrain.models.build import build_model
from fusiontrain.models.flops import (
    ATTENTION,
    FEED_FORWARD,
    HEAD,
    PATCHER,
    PROJECTIONS,
    Flops,
    Part,
    allowed_pairs,
    count_flops,
    flops_by_part,
    recomputed_by_part,
    six_nd,
)
from fusiontrain.parallel.apply import parallelize
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


FFN, VOCAB, PATCH, TIMESTEP = 56, 260, 48, 256
REFERENCE = {"kernels.impl": "reference"}


class ProductsByShape(TorchDispatchMode):
    """Counts what `mm`, `addmm` and `bmm` compute: whose product it is shows in its sizes, all of which differ here."""

    def __init__(self, image_rows, num_images):
        super().__init__()
        self.image_rows, self.num_images, self.phase = image_rows, num_images, "forward"
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in ("mm", "addmm", "bmm"):
            a, b = args[-2:]
            sizes = {*a.shape, *b.shape}
            self.found[self.part_of(name, sizes), self.phase] += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))

    def part_of(self, name, sizes):
        if name == "bmm":
            return Part(ATTENTION, "all")
        if VOCAB in sizes:
            return Part(HEAD, "text")
        if sizes & {PATCH, TIMESTEP, self.num_images}:
            return Part(PATCHER, "image")
        return Part(FEED_FORWARD if FFN in sizes else PROJECTIONS, "image" if self.image_rows in sizes else "text")


def by_shape(model, batch):
    counter = ProductsByShape(batch.token_counts["image"], batch.target_counts["image"])
    with counter:
        loss = sum(term.sum for term in model(batch).values())
        counter.phase = "backward"
        if loss.requires_grad:
            loss.backward()
    parts = {part for part, _ in counter.found}
    return {part: Flops(counter.found[part, "forward"], counter.found[part, "backward"]) for part in parts}


def part_config(recipe, tmp_path, **overrides):
    settings = {"model.image.patcher": "linear", **REFERENCE, **overrides}
    if recipe == "transfusion":
        return tiny_config({"model.ffn_dim": FFN, **settings})
    freeze = recipe == "lmfusion"
    base = write_tiny_llama(tmp_path, intermediate_size=FFN)
    return tiny_config({**NO_SHAPE, "model.recipe": "lmfusion", "model.base": base, "model.freeze_text": freeze, **settings})


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("recipe", ["lmfusion", "lmfusion that trains its text", "transfusion"])
def test_every_part_is_what_its_products_are(recipe, prefix, tmp_path):
    """Frozen weights without a gradient of their own, the prefix without a backward, the head on labelled rows, each modality for itself."""
    config = part_config(recipe, tmp_path, **{"parallel.frozen_prefix": prefix})
    model, image = build_model(config), ("image", 2, 2)
    parallelize(model, model.plan(), config.parallel, None, torch.device("cpu"))
    batch = batch_of([document([256, 1, 2, 7, 8, 258], image, [259, 258], image, [259, 258], image, [3] * (96 - 12 - 10))], config)
    assert batch.num_prefix_rows == (6 if prefix and recipe == "lmfusion" else 0)
    counted = {part: flops for part, flops in flops_by_part(model, batch).items() if part.group != ATTENTION}
    measured = {part: flops for part, flops in by_shape(model, batch).items() if part.group != ATTENTION}
    if recipe == "transfusion":  # one weight for both modalities: one product, which shapes do not tell apart
        counted, measured = (
            {group: sum(f.total for p, f in parts.items() if p.group == group) for group in (PROJECTIONS, FEED_FORWARD, HEAD, PATCHER)}
            for parts in (counted, measured)
        )
    assert counted == measured


def test_attention_forward_and_backward_where_every_pair_is_allowed(tmp_path):
    """One picture that fills the sequence: there the dense matrix of scores, which the counter sees, is the area of the mask."""
    config = part_config("transfusion", tmp_path)
    model, batch = build_model(config), batch_of([document(("image", 8, 12))], config)
    measured = by_shape(model, batch)[Part(ATTENTION, "all")]
    assert flops_by_part(model, batch)[Part(ATTENTION, "image")] == measured
    assert measured.forward == 2 * 2 * 96 * 96 * 32 * 2 and measured.backward == 2 * measured.forward


def test_attention_of_a_modality_is_that_of_its_queries(tmp_path):
    """Against a loop over all pairs that asks the rule of the mask itself."""
    config = part_config("lmfusion", tmp_path)
    model = build_model(config)
    image = ("image", 2, 2)
    batch = batch_of([document([1, 2, 258], image, [259, 5], seed=1), document([7, 8], seed=2), document([258], image, [259], image, seed=3)], config)
    live, prefix, pairs = batch.doc_ids.tolist(), batch.num_prefix_rows, Counter()
    for q, q_doc in enumerate(live):
        for k, k_doc in enumerate(live):
            inside = batch.segment_ids[q] == batch.segment_ids[k] >= 0
            if q_doc == k_doc >= 0 and (batch.order_ids[k] <= batch.order_ids[q] or inside):
                modality = "image" if q >= batch.modality_bounds[1] else "text"
                pairs[modality, "forward"] += 2
                pairs[modality, "backward"] += 2 * (q >= prefix) + 2 * (q >= prefix and k >= prefix)
    per_pair = 2 * 4 * 8 * 2  # two FLOPs; heads, head dim, layers
    found = flops_by_part(model, batch)
    for modality in ("text", "image"):
        expected = Flops(*(per_pair * pairs[modality, phase] for phase in ("forward", "backward")))
        assert found[Part(ATTENTION, modality)] == expected and expected.backward


def test_the_unet_is_counted_from_its_shapes_forward_and_backward(tmp_path):
    """Pictures of two shapes, so that the network runs twice."""
    config = part_config("transfusion", tmp_path, **{"model.image.patcher": "unet", "model.image.unet_channels": 8})
    model = build_model(config)
    batch = batch_of([document([1, 258], ("image", 2, 2), [259, 258], ("image", 3, 4), [259, 258], ("image", 2, 2), [259])], config)
    names = [name for name, _ in model.image.named_children()]
    counter = FlopCounterMode(display=False)
    with counter:
        terms = model(batch)
    children = counter.get_flop_counts()
    forward = sum(sum(children.get(f"FusionModel.image.{name}", {}).values()) for name in names if name not in ("down", "up"))
    forward += sum(sum(children[f"FusionModel.image.{name}"].values()) for name in ("down.0", "up.0", "up.1"))
    counted = flops_by_part(model, batch)[Part(PATCHER, "image")]
    assert counted.forward == forward
    backward = FlopCounterMode(display=False)
    with backward:
        terms["image"].sum.backward()
    convolutions = backward.get_flop_counts()["Global"][torch.ops.aten.convolution_backward]
    per_image = [layer for layer in model.image.modules() if layer is not model.image.timestep.up and layer_is_per_image(layer, model)]
    linears = sum(2 * 3 * layer.weight.numel() * 2 for layer in per_image)
    linears += 2 * 20 * 2 * 8 * 32 * 2 + 2 * 3 * 256 * 8  # tokens in and out; the first layer of the timestep
    assert counted.backward == convolutions + linears


def layer_is_per_image(layer, model):
    return isinstance(layer, torch.nn.Linear) and layer not in (model.image.input, model.image.from_tokens)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_is_one_more_forward_and_counted_apart(mode, tmp_path):
    found = []
    for setting in ("none", mode):
        config = part_config("transfusion", tmp_path, **{"parallel.activation_checkpointing": setting})
        model, batch = build_model(config), batch_of([document(("image", 8, 12))], config)
        before = flops_by_part(model, batch)
        parallelize(model, model.plan(), config.parallel, None, torch.device("cpu"))
        assert flops_by_part(model, batch) == before
        found.append({part.group: flops.backward for part, flops in by_shape(model, batch).items()})
    plain, checkpointed = found
    more = {group: checkpointed[group] - plain[group] for group in plain}
    counted = Counter()
    for part, flops in recomputed_by_part(model, batch).items():
        counted[part.group] += flops if mode == "full" else 0
    assert more[ATTENTION] == (counted[ATTENTION] if mode == "full" else 0) and more[PROJECTIONS] == counted[PROJECTIONS]
    # The last product of a block is in nobody's backward, so the second forward stops before it.
    last = 2 * 96 * FFN * 32 * 2
    assert counted[FEED_FORWARD] - more[FEED_FORWARD] in (0, last)
    assert more[PATCHER] == counted[PATCHER] == 0


def test_six_nd_bills_every_weight_for_every_token(tmp_path):
    config = part_config("lmfusion", tmp_path)
    model, batch = build_model(config), full_batch(config)
    weights = {name: sum(p.numel() for key, p in model.blocks.named_parameters() if f".{name}." in key and p.ndim == 2) for name in ("text", "image")}
    head = model.text.head_weight.numel()
    assert six_nd(model, batch) == 6 * sum(batch.token_counts[name] * (weights[name] + head) for name in weights)
    exact = {part: flops.total for part, flops in flops_by_part(model, batch).items() if part.group not in (ATTENTION, PATCHER)}
    assert sum(exact.values()) < 0.7 * six_nd(model, batch)
