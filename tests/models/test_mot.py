"""Mixture-of-Transformers against a loop written from the paper's equations, and what its switches untie and merge."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.types import Batch

BOI, EOI = 258, 259
ALL = ["ffn", "qkv", "o", "norms"]
NAMES = ("text", "image", "speech")
THREE = {"data.modalities": list(NAMES), "data.speech.num_units": 30, "model.vocab_size": 300}


def mot_config(**overrides):
    settings = {"model.recipe": "mot", "model.norm_position": "post", "model.image": {"patcher": "linear"}, **overrides}
    return tiny_config({key: value for key, value in settings.items() if value is not None})


def documents(speech: bool, max_timestep: float = 1.0) -> list:
    units = [("speech", 262, 275, 263)] if speech else []
    return [
        document([256, 72, 101, BOI], ("image", 2, 3), [EOI, 9, 8], *units, [257], seed=1, max_timestep=max_timestep),
        document([256, BOI], ("image", 1, 2), [EOI, 33, 34], *units, [5, BOI], ("image", 2, 2), [EOI, 257], seed=2, max_timestep=max_timestep),
        document([256, 9, 8, 7], *units, [257], seed=3),
    ]


def randomised(config) -> FusionModel:
    """Weights with a value of their own for every modality: ones and zeros of fresh norms and heads would hide what is used where."""
    model, generator = build_model(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# ---------------------------------------------------------------- the loop


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def layer_norm(x, weight, bias):
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * weight + bias


def rotate(vector, position, theta):
    half = len(vector) // 2
    turned = []
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half), dtype=torch.float64)
        turned.append(torch.complex(vector[i], vector[i + half]) * torch.complex(angle.cos(), angle.sin()))
    return torch.stack([pair.real for pair in turned] + [pair.imag for pair in turned])


class Loop:
    """The block of MoT (section 2.2, equations 1 to 3) token by token in float64: each takes the weights of its modality's group."""

    def __init__(self, model: FusionModel, batch: Batch, group_of: dict[str, str]) -> None:
        self.state = {name: value.double() for name, value in model.state_dict().items()}
        self.shape, self.batch, self.group_of = model.shape, batch, group_of
        bounds = batch.modality_bounds
        self.modality = [NAMES[next(m for m in range(len(bounds) - 1) if row < bounds[m + 1])] for row in range(batch.num_tokens)]
        self.live = [row for row in range(batch.num_tokens) if batch.doc_ids[row] >= 0]

    def weight(self, name, row, kind="weight"):
        for group in (self.group_of[self.modality[row]], "shared"):
            if f"{name}.{group}.{kind}" in self.state:
                return self.state[f"{name}.{group}.{kind}"]
        raise KeyError(name)

    def head_norm(self, heads, name, row):
        if self.shape.qk_norm == "none":
            return heads
        weight = self.weight(name, row)
        if self.shape.qk_norm == "rms":
            return [rms(head, weight, self.shape.norm_eps) for head in heads]
        weights, biases = (tensor.reshape(len(heads), -1) for tensor in (weight, self.weight(name, row, "bias")))
        return [layer_norm(head, weights[number], biases[number]) for number, head in enumerate(heads)]

    def attention(self, at, xs):
        order, q, k, v, found = self.batch.order_ids.tolist(), {}, {}, {}, {}
        for row in self.live:
            for part, into in (("q", q), ("k", k), ("v", v)):
                into[row] = list((self.weight(f"{at}.{part}", row) @ xs[row]).reshape(-1, self.shape.head_dim))
            for part, into in (("q", q), ("k", k)):
                normed = self.head_norm(into[row], f"{at}.{part}_norm", row)
                into[row] = [rotate(head, order[row], self.shape.rope_theta) for head in normed]
        for row in self.live:
            seen = [key for key in self.live if self.sees(row, key)]
            out = []
            for head in range(self.shape.num_heads):
                group = head * self.shape.num_kv_heads // self.shape.num_heads
                scores = torch.stack([q[row][head] @ k[key][group] for key in seen]) / math.sqrt(self.shape.head_dim)
                out.append(sum(p * v[key][group] for p, key in zip(scores.softmax(0), seen, strict=True)))
            found[row] = self.weight(f"{at}.o", row) @ torch.cat(out)
        return found

    def sees(self, row, key):
        doc, order, segment = self.batch.doc_ids, self.batch.order_ids, self.batch.segment_ids
        return bool(doc[row] == doc[key] and (order[key] <= order[row] or (segment[row] >= 0 and segment[key] == segment[row])))

    def feed_forward(self, at, x, row):
        gate, up = (self.weight(f"{at}.{part}", row) @ x for part in ("gate", "up"))
        return self.weight(f"{at}.down", row) @ (gate / (1 + torch.exp(-gate)) * up)

    def hidden(self, rows):
        xs, eps, post = list(rows.double()), self.shape.norm_eps, self.shape.norm_position == "post"
        for layer in range(self.shape.num_layers):
            norm, at = f"blocks.{layer}.attention_norm", f"blocks.{layer}.attention"
            normed = {row: xs[row] if post else rms(xs[row], self.weight(norm, row), eps) for row in self.live}
            for row, update in self.attention(at, normed).items():
                xs[row] = xs[row] + (rms(update, self.weight(norm, row), eps) if post else update)
            norm, at = f"blocks.{layer}.feed_forward_norm", f"blocks.{layer}.feed_forward"
            for row in self.live:
                x = xs[row] if post else rms(xs[row], self.weight(norm, row), eps)
                update = self.feed_forward(at, x, row)
                xs[row] = xs[row] + (rms(update, self.weight(norm, row), eps) if post else update)
        return torch.stack([rms(xs[row], self.weight("final_norm", row), eps) for row in self.live])


OWN = {name: name for name in NAMES}
CASES = {
    "as published": (OWN, {}),
    "norms before, QK-norm": (OWN, {"model.norm_position": "pre", "model.qk_norm": "rms"}),
    "QK-norm with biases": (OWN, {"model.qk_norm": "layer"}),
    "feed-forward alone": (OWN, {"model.untied": ["ffn"]}),
    "attention alone": (OWN, {"model.untied": ["qkv", "o"]}),
    "three modalities": (OWN, {**THREE, "model.qk_norm": "layer"}),
    "text and speech merged": (OWN | dict.fromkeys(("text", "speech"), "text_speech"), {**THREE, "model.merged": ["text", "speech"], "model.qk_norm": "layer"}),
    "image and speech merged": (OWN | dict.fromkeys(("image", "speech"), "image_speech"), {**THREE, "model.merged": ["image", "speech"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal_the_loop_of_the_paper(case):
    group_of, overrides = CASES[case]
    config = mot_config(**overrides)
    model = randomised(config)
    batch = batch_of(documents("speech" in config.data.modalities), config)
    prefix, rows, _ = model._embed(batch, 0)
    assert not len(prefix)
    hidden = torch.cat(model._hidden(batch)[:2])
    expected = Loop(model, batch, group_of).hidden(rows.detach())
    torch.testing.assert_close(hidden[batch.doc_ids >= 0].double(), expected, atol=2e-5, rtol=2e-4)


# ---------------------------------------------------------------- what is untied


def names_of(model: FusionModel, part: str) -> set[str]:
    """The groups that a part of the first block (or of the model) has weights for."""
    return set(model.get_submodule(part).keys())


def test_what_is_not_untied_has_one_set_of_weights():
    parts = {
        "ffn": ["blocks.0.feed_forward.gate", "blocks.0.feed_forward.down"],
        "qkv": ["blocks.0.attention.q", "blocks.0.attention.v"],
        "o": ["blocks.0.attention.o"],
        "norms": ["blocks.0.attention_norm", "blocks.0.feed_forward_norm", "blocks.0.attention.q_norm", "final_norm"],
    }
    for untied in ([], ["ffn"], ["ffn", "qkv"], ["qkv", "o", "norms"], ALL):
        model = build_model(mot_config(**{"model.untied": untied, "model.qk_norm": "rms"}))
        for name, modules in parts.items():
            for module in modules:
                assert names_of(model, module) == ({"text", "image"} if name in untied else {"shared"})


def test_equal_weights_in_all_modalities_are_the_dense_model():
    """Dense here is Transfusion with the same norm placement: MoT shares nothing with it but the function."""
    for overrides in ({}, {**THREE, "model.qk_norm": "layer"}):
        mot = randomised(mot_config(**overrides))
        dense = randomised(mot_config(**overrides, **{"model.untied": []}))
        shared = dict(dense.named_parameters())
        with torch.no_grad():
            for name, parameter in mot.named_parameters():
                parts = ["shared" if part in NAMES and not name.startswith((f"{part}.",)) else part for part in name.split(".")]
                parameter.copy_(shared[".".join(parts)])
        config = mot_config(**overrides)
        batch = batch_of(documents("speech" in config.data.modalities), config)
        terms, expected = mot(batch), dense(batch)
        assert terms.keys() == expected.keys() and len(terms) == len(config.data.modalities)
        for name in terms:
            torch.testing.assert_close(terms[name].sum, expected[name].sum, atol=1e-4, rtol=1e-5)
        sum(term.sum for term in terms.values()).backward()
        sum(term.sum for term in expected.values()).backward()
        for part in ("blocks.0.attention.q", "blocks.1.feed_forward.down", "final_norm"):
            summed = sum(child.weight.grad for child in mot.get_submodule(part).values())
            torch.testing.assert_close(summed, dense.get_submodule(part)["shared"].weight.grad, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("overrides", [{}, THREE], ids=["two", "three"])
def test_the_order_of_documents_in_storage_changes_no_loss_and_no_gradient(overrides):
    config = mot_config(**overrides)
    found = []
    for turn in range(3):
        model = randomised(config)
        mixed = documents("speech" in config.data.modalities, max_timestep=0.0)  # clean images: noise is keyed by their number in the sequence
        terms = model(batch_of(mixed[turn:] + mixed[:turn], config))
        text = terms["text"].sum
        text.backward()
        found.append((text.item(), model.get_submodule("blocks.0.attention.q")["image"].weight.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-4, rtol=1e-3)


def test_a_modality_without_rows_gets_zero_gradients():
    model = build_model(mot_config(**THREE))
    batch = batch_of([document([256, 5, 6, 257])], mot_config(**THREE))
    sum(term.sum for term in model(batch).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if {"image", "speech"} & set(name.split(".")):
            assert not parameter.grad.any(), name


def test_speech_that_the_data_lack_has_no_weights():
    model = build_model(mot_config())
    assert not any("speech" in name for name, _ in model.named_parameters())
