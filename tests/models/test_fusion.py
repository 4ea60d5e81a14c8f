"""The model against a loop written from the papers' equations, and the laws that need no second process."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.models import write_tiny_llama
from fusiontrain.types import Batch, Document

BOI, EOI = 258, 259
WORDS = [256, 72, 101, 108, 108, 111]
IMAGE = ("image", 2, 3)


def interleaved_documents() -> list:
    return [
        document([*WORDS, BOI], IMAGE, [EOI, 257], seed=1),
        document([256, BOI], IMAGE, [EOI, 33, 34, 35, 257], seed=2, max_timestep=0.5),
        document([*WORDS, BOI], IMAGE, [EOI, 5, 6, BOI], ("image", 1, 2), [EOI, 7, 257], seed=3),
        document([256, 9, 8, 7, 257], seed=4),
    ]


def as_kind(one: Document, bidirectional: bool) -> Document:
    """The document with images whose patches see all of their image, or those before them."""
    return dataclasses.replace(one, segments=tuple(dataclasses.replace(s, bidirectional=s.bidirectional and bidirectional) for s in one.segments))


def lmfusion_config(tmp_path, **overrides):
    shape = dict.fromkeys(("model.vocab_size", "model.dim", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.ffn_dim"))
    base = write_tiny_llama(tmp_path)
    return tiny_config({**shape, "model.recipe": "lmfusion", "model.base": base, "data.image.patch_size": 4, **overrides})


def randomise(model: FusionModel) -> FusionModel:
    """Give every trainable weight a value of its own, so that copies and zeros hide nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def total(terms) -> torch.Tensor:
    return sum(term.sum for term in terms.values())


# ---------------------------------------------------------------- the loop


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotate(vector, position, theta):
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(vector)), dtype=torch.float64)
        a, b = vector[i], vector[i + half]
        out[i], out[i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def naive_hidden(model: FusionModel, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The blocks of LMFusion 3.1, token by token in float64: each token takes the weights of its modality, sees what the mask rule allows."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    modality = ["text" if row < batch.modality_bounds[1] else "image" for row in range(batch.num_tokens)]
    doc, order, segment = batch.doc_ids.tolist(), batch.order_ids.tolist(), batch.segment_ids.tolist()
    shape, xs = model.shape, list(rows.double())
    live = [row for row in range(batch.num_tokens) if doc[row] >= 0]

    def weight(name, row):
        for group in (modality[row], "shared"):
            if f"{name}.{group}.weight" in state:
                return state[f"{name}.{group}.weight"]
        raise KeyError(name)

    for layer in range(shape.num_layers):
        at = f"blocks.{layer}.attention"
        q, k, v = {}, {}, {}
        for row in live:
            x = rms(xs[row], weight(f"blocks.{layer}.attention_norm", row), shape.norm_eps)
            heads = lambda part: (weight(f"{at}.{part}", row) @ x).reshape(-1, shape.head_dim)  # noqa: B023, E731
            q[row] = [rotate(head, order[row], shape.rope_theta) for head in heads("q")]
            k[row] = [rotate(head, order[row], shape.rope_theta) for head in heads("k")]
            v[row] = heads("v")
        for row in live:
            seen = [
                key
                for key in live
                if doc[key] == doc[row] and (order[key] <= order[row] or (segment[row] >= 0 and segment[key] == segment[row]))
            ]
            out = []
            for head in range(shape.num_heads):
                group = head * shape.num_kv_heads // shape.num_heads
                scores = torch.stack([q[row][head] @ k[key][group] for key in seen]) / math.sqrt(shape.head_dim)
                out.append(sum(p * v[key][group] for p, key in zip(scores.softmax(0), seen, strict=True)))
            xs[row] = xs[row] + weight(f"{at}.o", row) @ torch.cat(out)
        for row in live:
            x = rms(xs[row], weight(f"blocks.{layer}.feed_forward_norm", row), shape.norm_eps)
            gate, up = (weight(f"blocks.{layer}.feed_forward.{part}", row) @ x for part in ("gate", "up"))
            xs[row] = xs[row] + weight(f"blocks.{layer}.feed_forward.down", row) @ (gate / (1 + torch.exp(-gate)) * up)
    return torch.stack([rms(xs[row], weight("final_norm", row), shape.norm_eps) if row in live else xs[row] for row in range(len(xs))])


@pytest.mark.parametrize(("separation", "frozen_prefix"), [("deep", True), ("deep", False), ("shallow", True), ("dense", True)])
def test_hidden_states_equal_the_loop_of_the_paper(tmp_path, separation, frozen_prefix):
    config = lmfusion_config(tmp_path, **{"model.separation": separation, "parallel.frozen_prefix": frozen_prefix})
    model = randomise(build_model(config))
    batch = batch_of(interleaved_documents(), config)
    rows = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: rows.extend([*(prefix.rows for prefix in args[3:]), args[0].detach()]))
    hidden = torch.cat(model._hidden(batch)[:2])
    assert len(rows) == 1 + frozen_prefix
    expected = naive_hidden(model, torch.cat(rows), batch)
    live = batch.doc_ids >= 0
    torch.testing.assert_close(hidden[live].double(), expected[live], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_transfusion_equals_the_loop_with_images_of_either_kind(bidirectional):
    config = tiny_config({"model.image.patcher": "linear"})
    model = randomise(build_model(config))
    documents = [as_kind(one, bidirectional) for one in interleaved_documents()]
    batch = batch_of(documents, config)
    rows = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    hidden = model._hidden(batch)[1]
    live = batch.doc_ids >= 0
    assert (batch.segment_ids[live] >= 0).any() == bidirectional
    torch.testing.assert_close(hidden[live].double(), naive_hidden(model, rows[0], batch)[live], atol=2e-5, rtol=2e-4)


# ---------------------------------------------------------------- law 4


def test_text_logits_are_bit_identical_to_the_llama_before_and_after_training(tmp_path):
    config = lmfusion_config(tmp_path)
    model = build_model(config)
    dense = build_model(
        config.model_copy(
            update={
                "model": config.model.model_copy(update={"recipe": "dense"}),
                "data": config.data.model_copy(update={"modalities": ("text",)}),
            }
        )
    )
    text = batch_of([document(WORDS, seed=1), document([256, 1, 2, 3], seed=2)], config)
    expected = dense.text_logits(text)
    assert torch.equal(model.text_logits(text), expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    batch = batch_of(interleaved_documents(), config)
    before = total(model(batch)).item()
    for _ in range(3):
        optimizer.zero_grad()
        total(model(batch)).backward()
        optimizer.step()
    assert total(model(batch)).item() != before
    assert torch.equal(model.text_logits(text), expected)


# ---------------------------------------------------------------- gradients


def test_caption_loss_trains_the_image_side_and_never_a_frozen_weight(tmp_path):
    config = lmfusion_config(tmp_path)
    model = randomise(build_model(config))
    frozen = set(model.plan().frozen)
    model(batch_of([document([256, BOI], IMAGE, [EOI, 33, 34, 257])], config))["text"].sum.backward()
    last = f"blocks.{model.shape.num_layers - 1}"
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
    reached = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert f"{last}.attention.k.image.weight" in reached
    assert f"{last}.attention.v.image.weight" in reached
    assert "blocks.0.feed_forward.down.image.weight" in reached
    assert "image.input.weight" in reached
    assert f"{last}.attention.q.image.weight" not in reached, "no caption token reads an image token's last query"


def test_caption_before_its_image_has_no_trainable_ancestor(tmp_path):
    config = lmfusion_config(tmp_path)
    model = randomise(build_model(config))
    model(batch_of([document([*WORDS, BOI], IMAGE, [EOI])], config))["text"].sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("patcher", ["linear", "unet"])
@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
def test_a_text_only_batch_gives_zero_gradients_to_the_image_side_not_none(tmp_path, patcher, recipe):
    settings = {"model.image.patcher": patcher, "model.image.unet_channels": 8}
    config = lmfusion_config(tmp_path, **settings) if recipe == "lmfusion" else tiny_config({"model.recipe": recipe, **settings})
    model = randomise(build_model(config))
    terms = model(batch_of([document(WORDS)], config))
    assert terms["image"].count == 0
    assert terms["text"].count == len(WORDS) - 1
    total(terms).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        if name.startswith("image.") or ".image." in name:
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("patcher", ["linear", "unet"])
def test_an_image_only_batch_trains(patcher):
    config = tiny_config({"model.recipe": "transfusion", "model.image.patcher": patcher, "model.image.unet_channels": 8})
    model = randomise(build_model(config))
    patch_dim = config.data.image.channels * config.data.image.patch_size**2
    terms = model(batch_of([document(("image", 2, 2), ("image", 1, 3), patch_dim=patch_dim)], config))
    assert terms["text"].count == 0
    assert terms["text"].sum == 0
    assert terms["image"].count == 2
    total(terms).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.image.output.weight.grad.any()


# ---------------------------------------------------------------- storage


def test_image_rows_enter_the_blocks_multiplied_by_their_scale_and_text_rows_as_they_are(tmp_path):
    entered = []
    for scale in (1.0, 3.0):
        config = lmfusion_config(tmp_path, **{"model.image.input_scale": scale, "parallel.frozen_prefix": False})
        model, rows = randomise(build_model(config)), []
        model.blocks[0].register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].detach()))
        batch = batch_of(interleaved_documents(), config)
        model._hidden(batch)
        entered.append(rows[0])
    border = batch.modality_bounds[1]
    assert torch.equal(entered[0][:border], entered[1][:border])
    torch.testing.assert_close(entered[1][border:], 3 * entered[0][border:])


def test_storage_order_of_documents_changes_no_loss(tmp_path):
    config = lmfusion_config(tmp_path)
    model = randomise(build_model(config))
    documents = interleaved_documents()
    clean = [dataclasses.replace(d, segments=tuple(dataclasses.replace(s, max_timestep=0.0) for s in d.segments)) for d in documents]
    forward, backward = (model(batch_of(order, config))["text"] for order in (clean, clean[::-1]))
    assert forward.count == backward.count
    torch.testing.assert_close(forward.sum, backward.sum, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("input_scale", "attention"), [(1.0, "bidirectional"), (3.0, "bidirectional"), (1.0, "causal")])
def test_decoding_in_pieces_equals_the_whole_forward(tmp_path, input_scale, attention):
    settings = {"model.image.input_scale": input_scale, "data.image": {"size": 8, "patch_size": 4, "attention": attention}}
    config = lmfusion_config(tmp_path, **settings)
    model = randomise(build_model(config))
    after = [EOI, 33, 34, 35]
    doc = as_kind(document([*WORDS, BOI], IMAGE, after, max_timestep=0.0), attention == "bidirectional")
    batch = batch_of([doc], config)
    expected = model.text_logits(batch)[batch.doc_ids[: batch.modality_bounds[1]] >= 0]
    cache = model.new_cache(1, 40)
    pieces = [model.decode_text(torch.tensor([WORDS]), cache), model.decode_text(torch.tensor([[BOI]]), cache)]
    values = torch.from_numpy(doc.segments[1].values)[None]
    model.decode_image(torch.randn_like(values), torch.ones(1), (2, 3), cache, commit=False)
    model.decode_image(values, torch.zeros(1), (2, 3), cache, commit=True)
    pieces += [model.decode_text(torch.tensor([[token]]), cache) for token in after]
    actual = torch.cat(pieces, dim=1)[0]
    torch.testing.assert_close(actual, expected[: len(actual)], atol=2e-5, rtol=1e-4)
