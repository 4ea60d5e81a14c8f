"""The demo world: what is written can be read back, and the judge can be trusted."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fusiontrain.data.world.judge import mean_shares, read_scene, score_caption, score_picture
from fusiontrain.data.world.make import (
    NUM_PHRASINGS,
    caption,
    make_world,
    parse_caption,
    random_document,
    read_split,
    world_info,
)
from fusiontrain.data.world.scene import HELD_OUT_PAIRS, SceneObject, has_held_out_pair, random_scene, render
from fusiontrain.utils.errors import UserError

RED = SceneObject("small", "red", "circle", "top left")
BLUE = SceneObject("large", "blue", "square", "bottom right")


def _clean(count: int, seed: int) -> list[tuple[tuple[SceneObject, ...], np.ndarray]]:
    rng = Random(seed)
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, np.asarray(render(scene))) for scene in scenes]


def test_judge_reads_clean_pictures():
    pictures = _clean(600, seed=0)
    assert np.mean([read_scene(pixels) == scene for scene, pixels in pictures]) >= 0.99


@pytest.mark.parametrize(("deviation", "share"), [(20, 0.99), (40, 0.95)])
def test_judge_reads_noisy_pictures(deviation, share):
    """Gaussian noise on every channel: everything is read with a deviation of 20 of 255 in 99% of pictures, of 40 in 95%."""
    noise = np.random.default_rng(deviation)
    right = []
    for scene, pixels in _clean(200, seed=1):
        noisy = np.clip(pixels + noise.normal(0, deviation, pixels.shape), 0, 255).round().astype(np.uint8)
        right.append(read_scene(noisy) == scene)
    assert np.mean(right) >= share


def test_scores_of_wrong_captions_are_at_chance():
    """Single objects of scenes that have nothing to do with the picture: 1/8 color, 1/4 shape, 1/2 size, 1/5 place."""
    rng = Random(2)
    scores, captions = [], []
    for _ in range(1000):
        painted, told = (random_scene(rng, held_out=True, num_objects=1) for _ in range(2))
        scores.append(score_picture(np.asarray(render(painted)), told))
        captions.append(score_caption(caption(painted, rng.randrange(NUM_PHRASINGS)), told))
    for shares in (mean_shares(scores), mean_shares(captions)):
        assert shares["color"] == pytest.approx(1 / 8, abs=0.03)
        assert shares["shape"] == pytest.approx(1 / 4, abs=0.04)
        assert shares["size"] == pytest.approx(1 / 2, abs=0.05)
        assert shares["place"] == pytest.approx(1 / 5, abs=0.04)
        assert shares["all_right"] < 0.02


def test_missing_and_extra_objects_count_as_wrong():
    one, both = np.asarray(render((RED,))), np.asarray(render((RED, BLUE)))
    assert score_picture(both, (RED, BLUE)).all_right
    assert score_picture(one, (RED, BLUE)).shares == dict.fromkeys(("color", "shape", "size", "place"), 0.5)
    assert score_picture(both, (RED,)).shares == dict.fromkeys(("color", "shape", "size", "place"), 0.5)
    blank = score_picture(np.full((32, 32, 3), 245, dtype=np.uint8), (RED,))
    assert not any(blank.correct.values()) and not blank.all_right
    assert score_caption(caption((RED, BLUE), 0), (RED,)).shares["color"] == 0.5


def test_swapped_colors_are_seen():
    swapped = (SceneObject("small", "blue", "circle", "top left"), SceneObject("large", "red", "square", "bottom right"))
    score = score_picture(np.asarray(render(swapped)), (RED, BLUE))
    assert score.shares == {"color": 0.0, "shape": 1.0, "size": 1.0, "place": 1.0}


@pytest.mark.parametrize("phrasing", range(NUM_PHRASINGS))
def test_captions_are_read_back(phrasing):
    rng = Random(phrasing)
    for _ in range(200):
        scene = random_scene(rng, held_out=True)
        assert parse_caption(caption(scene, phrasing)) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "there is a.",
        "a small red circle.",
        "a small red circle at the top.",
        "a small red red circle at the top left.",
        "a small red blue circle at the top left.",
        "then a small red circle appears at the top left.",
        "a small red dog at the top left.",
    ],
)
def test_what_is_no_caption_is_refused(text):
    assert parse_caption(text) is None


def test_stories_tell_what_the_pictures_show():
    rng = Random(3)
    documents = [random_document(rng, held_out=True) for _ in range(300)]
    kinds = {kind: [document for document in documents if document.kind == kind] for kind in ("paint", "describe", "story", "text")}
    assert all(kinds.values())
    for document in kinds["story"]:
        assert [text is None for text in document.texts] == [False, True] * (len(document.texts) // 2)
        assert len(document.texts) in (4, 6)
    assert all(text.endswith(".") for document in kinds["text"] for text in document.texts if text)
    for document in documents:
        for picture, scene in zip(document.pictures, document.scenes, strict=True):
            assert (picture is None) == (scene is None)
            if picture is not None and scene is not None:
                assert read_scene(picture) == scene


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_world(tmp_path / name, 60, seed, documents_per_shard=25)
    first = _files(tmp_path / "a")
    # 54 training documents in shards of 25: pictures need more than one, texts alone have a series of their own
    assert {"train/pictures-00000.tar", "train/pictures-00001.tar", "train/texts-00000.tar", "world.json"} <= set(first)
    assert first == _files(tmp_path / "b")
    assert first["train/pictures-00000.tar"] != _files(tmp_path / "c")["train/pictures-00000.tar"]


def test_layout_is_energons_interleaved_one(tmp_path):
    make_world(tmp_path, 40, seed=0)
    num_documents = 0
    for series in ("pictures", "texts"):
        with tarfile.open(tmp_path / "train" / f"{series}-00000.tar") as archive:
            names = archive.getnames()
            for name in (name for name in names if name.endswith(".json")):
                file = archive.extractfile(name)
                assert file is not None
                fields = json.load(file)
                num_documents += 1
                assert (fields["kind"] == "text") == (series == "texts")
                assert all((text is None) != (image is None) for text, image in zip(fields["texts"], fields["images"], strict=True))
                assert {f"{name[:-5]}.{image}" for image in fields["images"] if image} <= set(names)
    assert num_documents == 36


def test_held_out_pairs_are_only_in_validation(tmp_path):
    make_world(tmp_path, 800, seed=0, validation_share=0.25)
    held_out = {}
    for split in ("train", "validation"):
        documents = list(read_split(tmp_path, split))
        scenes = [scene for document in documents for scene in document.scenes if scene]
        held_out[split] = sum(has_held_out_pair(scene) for scene in scenes)
        texts = " ".join(text for document in documents for text in document.texts if text)
        told = any(f"{color} {shape}" in texts or f"{shape} that is {size} and {color}" in texts
                   for color, shape in HELD_OUT_PAIRS for size in ("small", "large"))  # fmt: skip
        assert told == (split == "validation")
    assert held_out["train"] == 0 and held_out["validation"] > 0


def test_only_worlds_are_replaced(tmp_path):
    make_world(tmp_path / "world", 200, seed=0, documents_per_shard=60)
    make_world(tmp_path / "world", 20, seed=1)
    info = world_info(tmp_path / "world")
    assert info is not None and info["seed"] == 1
    assert len(list(read_split(tmp_path / "world", "train"))) == 18  # no shard of the larger world is left
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a demo world"):
        make_world(tmp_path / "other", 20, seed=0)
    assert (tmp_path / "other" / "thesis.txt").exists()
    with pytest.raises(UserError, match="make-world"):
        next(read_split(tmp_path / "other", "train"))
