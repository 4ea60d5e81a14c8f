"""How many patches a picture becomes under a policy, and pictures of many shapes on their way through index, plan, batch and model."""

from __future__ import annotations

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.index import cache
from fusiontrain.data.loader import Loader
from fusiontrain.data.modalities.image import decode_image
from fusiontrain.data.modalities.policy import grid_of
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.models.build import build_model
from fusiontrain.models.modalities.image import GridEmbedding
from fusiontrain.objectives.noise import keyed_normal
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import png, write_shard
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import global_counts, train_step

NATIVE = {"size": 8, "patch_size": 4, "resize": "native", "min_tokens": 4, "max_tokens": 16}
SIZES = [(8, 8), (8, 24), (30, 9), (3, 3), (200, 10), (12, 16), (40, 40)]
"""(height, width) of the pictures of the shard."""


def native(side: int, smallest: int, largest: int) -> ImageDataConfig:
    return ImageDataConfig(size=side, patch_size=side, resize="native", min_tokens=smallest, max_tokens=largest)


def stretch(rows: int, columns: int, height: int, width: int) -> float:
    return abs(math.log(rows * width / (columns * height)))


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize(("side", "smallest", "largest"), [(16, 64, 256), (14, 1, 1000), (4, 4, 16), (16, 30, 40), (8, 7, 7)])
def test_a_native_grid_keeps_to_its_bounds_and_to_the_shape(side, smallest, largest):
    config = native(side, smallest, largest)
    random = np.random.default_rng(0)
    for height, width in (2 ** random.uniform(0, 12, (3000, 2))).astype(int).tolist():
        rows, columns = grid_of(height, width, config)
        assert grid_of(width, height, config) == (columns, rows), "a turned picture has a turned grid"
        assert min(rows, columns) >= 1
        assert rows * columns <= largest
        if largest >= 4 * smallest:
            assert rows * columns >= smallest
        if smallest <= height * width / side**2 <= largest and rows * columns < largest:
            assert abs(rows - height / side) < 1
            assert abs(columns - width / side) < 1
        scale = math.sqrt(rows * columns / (height * width))
        if min(height, width) * scale > 8:
            assert stretch(rows, columns, height, width) < 1 / 8


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((512, 512), (16, 16)),  # scaled down to 256 patches
        ((256, 256), (16, 16)),
        ((160, 320), (10, 20)),  # as it is
        ((165, 325), (10, 20)),  # to whole patches
        ((600, 800), (14, 18)),  # ideally 13.86 x 18.48
        ((32, 32), (8, 8)),  # enlarged to 64 patches
        ((16, 64), (4, 16)),
        ((1, 1), (8, 8)),
        ((1, 3000), (1, 256)),  # thinner than a patch
        ((3000, 1), (256, 1)),
        ((16, 3200), (1, 200)),
    ],
)
def test_native_grids_by_hand(size, grid):
    assert grid_of(*size, native(16, 64, 256)) == grid


@pytest.mark.parametrize("resize", ["square", "stretch"])
def test_the_other_policies_know_one_grid(resize):
    config = ImageDataConfig(size=64, patch_size=16, resize=resize)
    assert {grid_of(height, width, config) for height, width in SIZES} == {(4, 4)}


@pytest.mark.parametrize("size", SIZES)
def test_a_native_picture_is_all_of_it_in_patches_of_its_grid(size):
    config = ImageDataConfig(**NATIVE)
    data = png(3, size[::-1])
    values, (rows, columns) = decode_image("png", data, config)
    assert (rows, columns) == grid_of(*size, config)
    whole = Image.open(io.BytesIO(data)).resize((4 * columns, 4 * rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(whole, np.float32) / 127.5 - 1
    assert len(values) == rows * columns
    for (row, column), patch in zip(itertools.product(range(rows), range(columns)), values, strict=True):
        block = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert np.array_equal(patch.reshape(3, 4, 4), block.transpose(2, 0, 1)), "to the last bit"


# ---------------------------------------------------------------- one index for all


@pytest.fixture
def shard(tmp_path):
    samples = [{"txt": f"picture {number}".encode(), "png": png(number, size[::-1])} for number, size in enumerate(SIZES)]
    return write_shard(tmp_path / "shapes.tar", samples)


def make_loader(shard, image, **overrides):
    settings = {"data.sources": [{"path": str(shard)}], "data.image": image, "data.condition_dropout": 0.0, "data.sequence_length": 96}
    settings["data.pack_window_documents"] = len(SIZES)
    config = tiny_config({**settings, "train.global_batch_sequences": 4, "model.image": {"patcher": "linear"}, **overrides})
    return Loader(config, load_tokenizer(config), "train", 0, 1)


POLICIES = [
    {"size": 8, "patch_size": 4},
    {"size": 16, "patch_size": 4, "resize": "stretch"},
    NATIVE,
    {**NATIVE, "max_tokens": 32},
    {**NATIVE, "patch_size": 2, "min_tokens": 1},
]


def test_one_index_serves_every_policy(shard, monkeypatch):
    """The files that the first policy left are all that the others need, and each plans with grids of its own."""
    make_loader(shard, POLICIES[0])
    files = {path: path.stat().st_mtime_ns for path in shard.parent.rglob("*") if path.is_file()}

    def forbidden(*args):
        raise AssertionError("indexed anew")

    monkeypatch.setattr(cache, "build_index", forbidden)
    monkeypatch.setattr(cache, "build_tokens", forbidden)
    seen = set()
    for image in POLICIES:
        loader = make_loader(shard, image)
        planned = {d.sample: d.image_tokens for step in range(3) for s in loader.plan.step(step) for d in s.documents}
        expected = {number: math.prod(grid_of(*size, loader.config.data.image)) for number, size in enumerate(SIZES)}
        assert planned == expected
        seen.add(tuple(sorted(expected.items())))
        assert loader.fields["data.image.resize"] == repr(image.get("resize", "square"))
    assert len(seen) == len(POLICIES)
    assert files == {path: path.stat().st_mtime_ns for path in shard.parent.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- through the model


def first_batch(loader):
    with contextlib.closing(loader.iterate(0)) as steps:
        (batch,), _ = next(steps)
    return batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_holds_pictures_of_many_shapes(shard, num_workers):
    loader = make_loader(shard, NATIVE, **{"data.num_workers": num_workers})
    batch = first_batch(loader)
    payload = batch.payloads["image"]
    assert len(set(payload.grids)) > 3
    found = {source.index: grid for source, grid in zip(batch.sources, payload.grids, strict=True)}
    assert all(grid == grid_of(*SIZES[number], loader.config.data.image) for number, grid in found.items())
    assert payload.image_ids.bincount().tolist() == [rows * columns for rows, columns in payload.grids]
    for image, source in enumerate(batch.sources):
        data = png(source.index, SIZES[source.index][::-1])
        assert np.array_equal(payload.values[payload.image_ids == image].numpy(), decode_image("png", data, loader.config.data.image)[0])
    assert loader.skipped == 0


def test_what_a_token_may_see_is_the_rule_also_between_pictures_of_many_shapes(shard):
    batch = first_batch(make_loader(shard, NATIVE))
    doc, order, segment = batch.doc_ids, batch.order_ids, batch.segment_ids
    same = (doc[:, None] == doc) & (doc[:, None] >= 0)
    allowed = same & ((order <= order[:, None]) | ((segment[:, None] == segment) & (segment >= 0)))
    rows = torch.arange(batch.num_tokens)
    seen = torch.zeros_like(allowed)
    for ranges in batch.key_ranges.unbind(1):
        seen |= (rows >= ranges[:, :1]) & (rows < ranges[:, 1:])
    real = doc >= 0
    assert torch.equal(seen[real], allowed[real])


def test_noise_of_a_picture_does_not_depend_on_its_neighbours(shard):
    payload = first_batch(make_loader(shard, NATIVE)).payloads["image"]
    noise = keyed_normal(payload.noise_keys, payload.image_ids, payload.values.shape[-1], payload.grids)
    for image, grid in enumerate(payload.grids):
        mine = payload.image_ids == image
        alone = keyed_normal(payload.noise_keys[image : image + 1], torch.zeros(int(mine.sum()), dtype=torch.int64), payload.values.shape[-1], (grid,))
        assert torch.equal(noise[mine], alone)


@pytest.mark.parametrize("patcher", ["linear", "unet"])
def test_a_picture_enters_and_leaves_the_model_as_it_would_alone(shard, patcher):
    overrides = {"model.image": {"patcher": patcher, "unet_channels": 8, "position_embedding": "sincos2d"}}
    loader = make_loader(shard, NATIVE, **overrides)
    payload = first_batch(loader).payloads["image"]
    image = build_model(loader.config).image
    levels = torch.linspace(0.1, 0.9, len(payload.grids))
    with torch.no_grad():
        for parameter in image.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        rows, state = image.encode(payload.values, levels, payload.image_ids, payload.grids)
        prediction = image.decode(rows, state)
        for number, grid in enumerate(payload.grids):
            mine = payload.image_ids == number
            alone, own = image.encode(payload.values[mine], levels[number : number + 1], torch.zeros(int(mine.sum()), dtype=torch.int64), (grid,))
            torch.testing.assert_close(rows[mine], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(prediction[mine], image.decode(alone, own), atol=1e-5, rtol=1e-5)


def test_positions_follow_the_rows_and_columns_of_each_grid():
    grids, dim = ((2, 5), (3, 1), (1, 4)), 16
    table = GridEmbedding(dim)(grids, torch.device("cpu"), torch.float64)
    expected = []
    for rows, columns in grids:
        for row, column in itertools.product(range(rows), range(columns)):
            angles = [[place / 10_000 ** (i / 4) for i in range(4)] for place in (row, column)]
            expected.append([f(angle) for part in angles for f in (math.cos, math.sin) for angle in part])
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("patcher", ["linear", "unet"])
def test_training_steps_on_pictures_of_many_shapes(shard, patcher):
    overrides = {"model.image": {"patcher": patcher, "unet_channels": 8, "position_embedding": "sincos2d"}, "optimizer.learning_rate": 1e-2}
    loader = make_loader(shard, NATIVE, **overrides)
    config = loader.config
    model = build_model(config)
    optimizer = build_optimizer(dict(model.named_parameters()), embedding_names(model), config.optimizer)
    batch = first_batch(loader)
    counts = global_counts([batch])
    assert counts.targets["image"] == len(batch.payloads["image"].grids)
    results = [train_step(model, optimizer, [batch], counts, {"text": 1.0, "image": 5.0}, 1.0, 1, torch.device("cpu")) for _ in range(8)]
    assert all(result.finite for result in results)
    assert results[-1].losses["image"] < results[0].losses["image"]
