"""JSON lines beside tars: every line where it lies, and nothing lost at line ends, marks or damage."""

from __future__ import annotations

import json

import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.validate import file_problems
from fusiontrain.data import jsonl
from fusiontrain.data.index.build import build_index
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.index.verify import verify_shard
from fusiontrain.data.jsonl import shard_samples
from fusiontrain.data.loader import Loader
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import mixed_samples, write_shard
from fusiontrain.utils.errors import UserError


def line(text, **other) -> bytes:
    return json.dumps({"text": text, **other}).encode()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


ENDS = {
    "LF": b"%s\n%s\n%s\n",
    "no end of the last line": b"%s\n%s\n%s",
    "CRLF": b"%s\r\n%s\r\n%s\r\n",
    "byte order mark": b"\xef\xbb\xbf%s\n%s\n%s\n",
    "blank lines": b"\n%s\n\n  \n%s\r\n\r\n%s\n\n",
}


@pytest.mark.parametrize("layout", ENDS.values(), ids=ENDS.keys())
def test_every_line_is_found_by_its_bytes(tmp_path, layout):
    lines = [line("eins"), line("zwei", url="x"), line("dréi — \u2028 <|image|>")]
    path = write(tmp_path / "x.jsonl", layout % tuple(lines))
    content = path.read_bytes()
    found = [sample.members["json"] for sample in shard_samples(path)]
    assert [content[m.offset : m.offset + m.size] for m in found] == lines
    index = build_index(path, "auto", "pixels")
    assert len(index) == 3
    assert index.bad == ()
    assert verify_shard(path, index) == []


def test_keys_are_the_numbers_that_an_editor_shows(tmp_path):
    path = write(tmp_path / "x.jsonl", b"\n" + line("a") + b"\n\n" + line("b"))
    assert [sample.key for sample in shard_samples(path)] == ["line-2", "line-4"]


BROKEN = [b"{", b'{"text": 3}', b'"a text"', b'{"content": "a"}', b'{"text": "\xff"}', b'{"text": ""}', b"[" * 100_000, b'{"text": "a"} {"text": "b"}']


def test_broken_lines_are_bad_samples_with_their_offset_and_cost_no_other_line(tmp_path):
    lines = [part for number, bad in enumerate(BROKEN) for part in (line(f"sound {number}"), bad)]
    path = write(tmp_path / "x.jsonl", b"\n".join(lines))
    index = build_index(path, "auto", "pixels")
    assert len(index) == len(BROKEN)
    assert [number for number, *_ in index.bad] == list(range(1, 2 * len(BROKEN), 2))
    for number, key, reason in index.bad:
        offset = sum(len(part) + 1 for part in lines[:number])
        assert key == f"line-{number + 1}"
        assert f"(at offset {offset})" in reason


def test_a_huge_line_is_a_document_and_a_file_without_lines_is_not(tmp_path, monkeypatch):
    text = "x" * 3_000_000
    path = write(tmp_path / "x.jsonl", line("a") + b"\n" + line(text) + b"\n" + line("b"))
    index = build_index(path, "auto", "pixels")
    assert index.text_bytes.tolist() == [1, len(text), 1]
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1_000_000)
    with pytest.raises(UserError, match=r"line 2 at offset 14 is longer"):
        build_index(path, "auto", "pixels")


def test_a_line_with_images_says_that_the_shard_has_none(tmp_path):
    path = write(tmp_path / "x.jsonl", json.dumps({"texts": ["a", None], "images": [None, "0.png"]}).encode())
    index = build_index(path, "auto", "pixels")
    assert len(index) == 0
    assert "has no member .0.png" in index.bad[0][2]


def test_an_empty_file_has_no_samples(tmp_path):
    assert list(shard_samples(write(tmp_path / "x.jsonl", b""))) == []


def config_of(path, **source):
    settings = {"data.sources": [{"path": str(path), **source}], "train.global_batch_sequences": 2, "data.pack_window_documents": 8}
    return tiny_config({"data.modalities": ["text"], "model.recipe": "dense", **settings})


def test_lines_train_beside_tars_of_one_folder_each_once_per_epoch(tmp_path):
    write_shard(tmp_path / "a.tar", mixed_samples(4))
    write(tmp_path / "b.jsonl", b"\n".join(line(f"line number {n}") for n in range(9)))
    assert [path.name for path in expand_shards(str(tmp_path))] == ["a.tar", "b.jsonl"]
    config = config_of(tmp_path)
    assert [problem for problem in file_problems(config) if "sources" in problem.key] == []
    tokenizer = load_tokenizer(config)
    loader = Loader(config, tokenizer, "train", 0, 1)
    seen = {}
    for step in range(40):
        for sequence in loader.plan.step(step):
            for planned, document in zip(sequence.documents, loader.builder.read(sequence, []).documents, strict=True):
                if planned.epoch == 0:
                    assert planned.sample not in seen
                    seen[planned.sample] = tokenizer.decode([t for s in document.segments for t in s.token_ids.tolist() if t < 256])
    assert [seen[sample] for sample in range(4, 13)] == [f"line number {n}" for n in range(9)]
    assert sorted(seen) == list(range(13))


def test_a_text_key_of_lines(tmp_path):
    write(tmp_path / "x.jsonl", b"\n".join(json.dumps({"raw_content": f"n{n}", "text": "wrong"}).encode() for n in range(3)))
    config = config_of(tmp_path, text_key="raw_content")
    (source,) = index_sources(config.data.sources, config.data, load_tokenizer(config))
    assert source.indexes[0].text_bytes.tolist() == [2, 2, 2]


def test_a_line_that_changes_later_is_padding_and_named(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", b"\n".join(line(f"text {n}") for n in range(4)))
    index = build_index(path, "auto", "pixels")
    path.write_bytes(path.read_bytes().replace(b"text 2", b"text 9"))
    (problem,) = verify_shard(path, index)
    assert "line-3" in problem
    assert "CRC32" in problem


def test_the_commands_read_lines_too(tmp_path, capsys):
    write(tmp_path / "x.jsonl", json.dumps({"content": "hello"}).encode())
    assert main(["data", "index", str(tmp_path), "--text-key", "content", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text bytes"] == 5
    assert main(["data", "inspect", str(tmp_path), "--text-key", "content", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pieces"] == [{"text": "hello"}]
