"""Scores of painting and captioning: right answers score 1, wrong ones little, and every kind of scene is counted once."""

from __future__ import annotations

import numpy as np
import pytest

from fusiontrain.data.world.make import make_world, read_split
from fusiontrain.generate import score
from fusiontrain.generate.score import judge_model
from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.generation import TOKENIZER

CONFIG = tiny_config({"data.image": {"size": 32, "patch_size": 4}, "data.sequence_length": 256, "sample.steps": 1, "objective.image": "flow_matching"})
COUNT = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, 500, seed=2, validation_share=0.8)
    return folder


@pytest.fixture
def answers(world, monkeypatch):
    """Makes painting and captioning answer with the truth, moved on by `shift` documents and enlarged by `scale`."""
    truth = {kind: [doc for doc in read_split(world, "validation") if doc.kind == kind][:COUNT] for kind in ("paint", "describe")}

    def use(shift: int, scale: int = 1) -> None:
        pictures = [doc.pictures[1].repeat(scale, 0).repeat(scale, 1) for doc in truth["paint"]]
        texts = [doc.texts[1] for doc in truth["describe"]]
        monkeypatch.setattr(score, "paint_as_configured", lambda *args, **kwargs: pictures[shift:] + pictures[:shift])
        monkeypatch.setattr(score, "caption", lambda *args, **kwargs: texts[shift:] + texts[:shift])

    return use


def judged(world, count: int = COUNT):
    return judge_model(None, TOKENIZER, CONFIG, world, count, 0)


@pytest.mark.parametrize("scale", [1, 2])
def test_the_truth_is_right_and_other_documents_are_at_chance(world, answers, scale) -> None:
    answers(0, scale)
    right = judged(world)
    assert len(right.prompts) == len(right.pictures) == COUNT
    assert set(right.summary) == {"color_accuracy", "shape_accuracy", "size_accuracy", "place_accuracy", "caption_accuracy"}
    assert right.summary["caption_accuracy"] == 1
    assert min(right.summary.values()) >= 0.98
    answers(1, scale)
    wrong = judged(world).summary
    assert wrong["color_accuracy"] < 0.3 and wrong["shape_accuracy"] < 0.45 and wrong["caption_accuracy"] < 0.05


def test_kinds_of_scenes_add_up(world, answers) -> None:
    answers(0)
    for part in judged(world).details.values():
        counts = {kind: scores["count"] for kind, scores in part.items()}
        assert counts["all"] == COUNT
        assert sum(count for kind, count in counts.items() if "object" in kind) == COUNT
        assert counts["pairs seen in training"] + counts["with a held-out pair"] == COUNT


def test_a_split_without_such_documents_has_no_scores(world, monkeypatch) -> None:
    monkeypatch.setattr(score, "read_split", lambda *args: iter(()))
    model = build_model(CONFIG)
    result = judge_model(model, TOKENIZER, CONFIG, world, 4, 0)
    assert result.summary == {} and result.details["painting"]["all"]["count"] == 0


def test_a_real_model_is_judged_the_same_twice(world) -> None:
    model = build_model(CONFIG)
    first, again = (judge_model(model, TOKENIZER, CONFIG, world, 3, 7) for _ in range(2))
    assert first.summary == again.summary and first.captions == again.captions
    assert all(np.array_equal(a, b) for a, b in zip(first.pictures, again.pictures, strict=True))
