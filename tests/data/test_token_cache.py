"""Cached token ids against live tokenisation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tokenizers

from fusiontrain.config.schema import TokenizerConfig
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.shard_index import TEXT_PIECE, member_reader
from fusiontrain.data.index.tokens import ids_dtype
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.tokenizer import byte_tokenizer, tokenizer_at
from fusiontrain.testing.shards import index_of, interleaved, mixed_samples, png, tokens_of, write_shard

MARKERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|end_image|>"]
CONFIG = TokenizerConfig(begin_text_token=MARKERS[0], end_text_token=MARKERS[1], begin_image_token=MARKERS[2], end_image_token=MARKERS[3])
TEXTS = [
    "plain words",
    " a leading space, and a trailing one ",
    "".join(MARKERS),
    "before <|image|> after <|end_of_text|>",
    "NUL \0 inside",
    "\u00e9\u4e2d\U0001f600",
    "<image>",
    "long " * 200_000,
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE whose markers are special tokens, as a folder."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["plain words, long words, an image after an image"] * 9, vocab_size=300, special_tokens=MARKERS)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer_at(str(folder), CONFIG)


def samples():
    together = interleaved([TEXTS[0], None, "", TEXTS[2], None], [None, png(0), None, None, png(1)])
    return [together, *(interleaved([text], [None]) for text in TEXTS), {"txt": b"a caption", "jpg": png(2, format="JPEG")}]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_cached_ids_are_those_of_the_live_tokenizer(tmp_path, bpe, name):
    tokenizer = bpe if name == "bpe" else byte_tokenizer(TokenizerConfig())
    shard = write_shard(tmp_path / "x.tar", samples())
    index = index_of(shard)
    for _ in range(2):  # built, then read
        cache = tokens_of(shard, tokenizer)
        assert cache.dtype == np.uint16
        file, tokens = open_shard(shard), open_shard(cache.path)
        for row in range(len(index)):
            members = index.members(row)
            live = [tokenizer.encode(p.text) for p in read_sample("auto", members, member_reader(members, file), "pixels").pieces if p.text is not None]
            pieces = index.pieces(row)
            assert cache.counts[pieces][index.kinds[pieces] == TEXT_PIECE].tolist() == list(map(len, live))
            assert cache.read(tokens, row).tolist() == [token for ids in live for token in ids]
        file.close()
        tokens.close()
    markers = {tokenizer.begin_text_id, tokenizer.end_text_id, tokenizer.begin_image_id, tokenizer.end_image_id}
    everything = np.fromfile(cache.path, cache.dtype, offset=cache.offset, count=int(cache.start[-1]))
    assert not markers & set(everything.tolist())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (128_256, np.uint32)])
def test_ids_take_two_bytes_where_they_fit(vocab_size, dtype):
    assert ids_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_each_tokenizer_has_a_cache_of_its_own_and_shares_the_index(tmp_path, bpe):
    shard = write_shard(tmp_path / "x.tar", mixed_samples(4))
    paths = {tokens_of(shard, t).path for t in (bpe, byte_tokenizer(TokenizerConfig()))}
    assert len(paths) == 2
    assert len(list((tmp_path / ".fusiontrain-index").glob("*.index"))) == 1


def test_many_may_build_at_once(tmp_path):
    shard = write_shard(tmp_path / "x.tar", mixed_samples(20))
    tokenizer = byte_tokenizer(TokenizerConfig())
    found = []

    def build():
        cache = tokens_of(shard, tokenizer)
        found.append((cache.path, cache.counts.tolist()))

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(one == found[0] for one in found)
    kept = sorted(path.name.split(".", 1)[0] for path in (tmp_path / ".fusiontrain-index").iterdir())
    assert kept == ["manifest", "manifest", "x", "x"], "an index, its tokens, a manifest of each, and nothing half written"
