"""What is written tensor by tensor is what the safetensors library reads, and what does not fit together is refused in one sentence."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusiontrain.models.tensor_files import BLOCK, Planned, open_tensors, split, write_tensors
from fusiontrain.utils.errors import UserError

SHAPES = {"a": (3, 5), "b.weight": (7,), "größe": (2, 3, 4), "empty": (0, 4), "big": (BLOCK // 256 + 1, 256)}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("max_bytes", [10**9, 1])
def test_the_library_reads_what_is_written(tmp_path, dtype, max_bytes):
    tensors, asked, done = values(), [], []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name].t().contiguous().t() if tensors[name].dim() == 2 else tensors[name]  # rows need not lie one behind another

    planned = [Planned(name, shape, dtype) for name, shape in SHAPES.items()]
    files = write_tensors(tmp_path, planned, read, max_bytes, done.append)
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert found.keys() == tensors.keys() and asked == list(SHAPES)
    assert all(torch.equal(found[name], tensors[name].to(dtype)) for name in tensors)
    assert sum(done) == sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    for file, entry in files.items():
        data = (tmp_path / file).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert int.from_bytes(data[:8], "little") % 8 == 0, "values begin at a multiple of 8"
    stored = open_tensors(tmp_path)
    for name in tensors:
        assert (stored[name].shape, stored[name].dtype) == (SHAPES[name], dtype)
        assert torch.equal(stored[name].rows(0, SHAPES[name][0]), found[name])
    assert torch.equal(stored["a"].rows(1, 2), found["a"][1:2])
    if max_bytes == 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert list(files) == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
        assert index == {"metadata": {"total_size": sum(done)}, "weight_map": dict(zip(SHAPES, files, strict=True))}


def test_a_file_is_larger_than_asked_only_where_one_tensor_is():
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        sizes = torch.randint(0, 9, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator).tolist()
        tensors = [Planned(str(number), (size,), torch.float32) for number, size in enumerate(sizes)]
        shards = split(tensors, 32)
        assert [tensor for shard in shards for tensor in shard] == tensors
        assert all(len(shard) == 1 or sum(tensor.num_bytes for tensor in shard) <= 32 for shard in shards)
        for shard, following in itertools.pairwise(shards):
            assert sum(tensor.num_bytes for tensor in shard) + following[0].num_bytes > 32, "no file ends early"


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def truncate(folder):
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "00001-of-00002.safetensors: cannot be read as safetensors"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors: is missing"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "is not an index of safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "is not an index of safetensors"),
        (lambda folder: edit_index(folder, lambda index: index["weight_map"].update(c="model-00001-of-00002.safetensors")), "names c, and .* does not hold it"),
        (lambda folder: edit_index(folder, lambda index: index["weight_map"].pop("b")), "does not name b, and .* holds it"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors"), "holds a, and so does"),
        (lambda folder: save_file({"b": torch.zeros(1).long()}, folder / "model-00002-of-00002.safetensors"), "b is of dtype I64"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, damage, sentence):
    planned = [Planned(name, (4,), torch.float32) for name in ("a", "b", "b1")]
    write_tensors(tmp_path, planned, lambda name: torch.ones(4), 32)
    assert sorted(open_tensors(tmp_path)) == ["a", "b", "b1"]
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        open_tensors(tmp_path)
    assert "\n" not in str(error.value)
