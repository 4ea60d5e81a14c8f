"""Compressed shards and commands: spooled into a folder that never holds more than it may."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import zlib

import pytest
from filelock import FileLock

from fusiontrain.cli.main import main
from fusiontrain.config.schema import StorageConfig
from fusiontrain.data.index.build import build_index
from fusiontrain.data.loader import Loader
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.spool import Spool
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import write_shards
from fusiontrain.utils.errors import UserError


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A folder of three tars; what is spooled goes to `cache` beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / "shards", shards=3, samples=8)
    return tmp_path / "shards"


def compressed(folder, suffix=".tar.gz"):
    """The folder's tars compressed, in a folder of their own."""
    there = folder.parent / "compressed"
    there.mkdir()
    for path in folder.glob("*.tar"):
        (there / f"{path.stem}{suffix}").write_bytes(gzip.compress(path.read_bytes()))
    return there


def settings(folder, **values):
    return StorageConfig(**{"cache_dir": str(folder.parent / "spool"), "timeout_seconds": 5.0, **values})


def spooled_files(folder):
    return sorted(path for path in (folder.parent / "spool").iterdir() if path.suffix != ".lock")


def hashes(source, folder, steps=12, **overrides):
    storage = {"data.storage.cache_dir": str(folder.parent / "spool"), **overrides}
    config = tiny_config({"data.sources": [{"path": source}], "data.pack_window_documents": 8, **storage})
    found = []
    with contextlib.closing(Loader(config, load_tokenizer(config), "train", 0, 1).iterate(0)) as iterator:
        for (batch,), _ in itertools.islice(iterator, steps):
            found.append((batch.token_ids.numpy().tobytes(), batch.payloads["image"].values.numpy().tobytes()))
    return found


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_compressed_shards_give_the_batches_of_plain_ones(shards, suffix):
    assert hashes(str(compressed(shards, suffix)), shards) == hashes(str(shards), shards)


def test_the_output_of_commands_gives_the_batches_of_files(shards):
    assert hashes(f"pipe:cat {shards}/shard-{{000..002}}.tar | cat", shards) == hashes(str(shards), shards)


def test_commands_of_the_command_line_take_both(shards, capsys):
    assert main(["data", "verify", str(compressed(shards)), f"pipe:cat '{shards}/shard-000.tar'"]) == 0
    assert "32" in capsys.readouterr().out
    assert len(list((shards.parent / "compressed" / ".fusiontrain-index").glob("*.index"))) == 3


def test_braces_of_a_command_are_the_shells_but_for_ranges_of_numbers():
    found = expand_shards("pipe:awk '{print}' x-{08..10}.tar ${HOME} {a,b}")
    assert [shard.command for shard in found] == [f"awk '{{print}}' x-{n}.tar ${{HOME}} {{a,b}}" for n in ("08", "09", "10")]


def test_a_shard_that_is_there_is_not_made_again(shards):
    count = shards.parent / "count"
    (shard,) = expand_shards(f"pipe:echo x >> {count}; cat {shards}/shard-000.tar", settings(shards))
    for _ in range(3):
        build_index(shard, "auto", "pixels")
    assert count.read_text() == "x\n"


def test_a_compressed_shard_that_changes_is_decompressed_anew(shards):
    path = compressed(shards) / "shard-000.tar.gz"
    (shard,) = expand_shards(str(path), settings(shards))
    first = build_index(shard, "auto", "pixels")
    path.write_bytes((path.parent / "shard-001.tar.gz").read_bytes())
    os.utime(path, (1, 1))
    assert build_index(shard, "auto", "pixels").key_bytes.tobytes() != first.key_bytes.tobytes()


def test_the_folder_never_holds_more_than_it_may_and_every_epoch_is_the_same(shards, caplog):
    """Room for two of three shards, read in shuffled order by three threads: each is made again and again."""
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    limit, seen, done = 2 * size + 1000, [], threading.Event()

    def watch():
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                seen.append(sum(path.stat().st_size for path in spooled_files(shards)))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = hashes(str(compressed(shards)), shards, **{"data.storage.cache_bytes": limit})
    done.set()
    watcher.join()
    assert found == hashes(str(shards), shards)
    assert size <= max(seen) <= limit
    assert any("made again for the cache folder" in record.getMessage() for record in caplog.records)


def test_what_was_read_longest_ago_goes_first(tmp_path):
    spool = Spool(tmp_path, 25)
    for key in "abc":
        os.close(spool.open(key, key, lambda: iter_of(bytes(10)))[0]) if key != "c" else None
    os.utime(tmp_path / "a.tar", ns=(10, 10))
    os.utime(tmp_path / "b.tar", ns=(20, 20))
    os.close(spool.open("a", "a", lambda: iter_of(b"never"))[0])  # read just now
    os.close(spool.open("c", "c", lambda: iter_of(bytes(10)))[0])
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["a.tar", "c.tar"]


def iter_of(*chunks):
    yield from chunks


READER = """
import sys, zlib
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.storage.open import open_shard
files = [open_shard(shard) for shard in expand_shards(sys.argv[1])]
print(*(zlib.crc32(file.read(0, file.size)) for file in files))
"""


def test_processes_share_the_folder_and_run_a_command_once(shards):
    count = shards.parent / "count"
    path = f"pipe:echo x >> {count}; sleep 1; cat {shards}/shard-{{000..001}}.tar"
    processes = [subprocess.Popen([sys.executable, "-c", READER, path], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    expected = " ".join(str(zlib.crc32((shards / f"shard-00{n}.tar").read_bytes())) for n in range(2))
    assert [process.communicate()[0].strip() for process in processes] == [expected] * 3
    assert count.read_text() == "x\n" * 2


def test_what_a_killed_process_left_makes_room(shards):
    size = (shards / "shard-000.tar").stat().st_size
    (shards.parent / "spool").mkdir()
    (shards.parent / "spool" / "dead.part").write_bytes(bytes(size))
    (shard,) = expand_shards(f"pipe:cat {shards}/shard-000.tar", settings(shards, cache_bytes=size + 10))
    assert open_shard(shard).size == size
    assert [path.suffix for path in spooled_files(shards)] == [".tar"]


# ---------------------------------------------------------------- what fails, and how it says so


def refused(shards, path, **values):
    """The sentence."""
    with pytest.raises(UserError) as error:
        open_shard(expand_shards(path, settings(shards, **values))[0])
    assert "\n" not in str(error.value)
    assert not spooled_files(shards), "nothing half done stays"
    return str(error.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat nothing.tar", r"pipe:cat nothing\.tar \[\w{8}\]: the command ended with status 1: .*nothing\.tar: No such file"),
        ("cat nothing.tar | cat", "ended with status 1"),
        ("no-such-program-at-all", "ended with status 127: .*not found"),
        ("cat SHARD; exit 3", "ended with status 3"),
        ("head -c 5000 SHARD", "output does not end as a tar does"),
        ("true", "output does not end as a tar does"),
        ("cat SHARD; kill -9 $$", "ended with status -9"),
    ],
)
def test_a_command_that_fails_is_one_sentence(shards, command, message):
    assert re.search(message, refused(shards, f"pipe:{command.replace('SHARD', str(shards / 'shard-000.tar'))}"))


def test_a_command_that_falls_silent_is_killed_with_its_children(shards):
    note = shards.parent / "pid"
    assert "wrote nothing for 0.3 seconds" in refused(shards, f"pipe:sleep 300 & echo $! > {note}; wait", timeout_seconds=0.3)
    deadline = time.monotonic() + 10
    while is_running(int(note.read_text())):
        assert time.monotonic() < deadline, "the command's child still runs"
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_secrets_of_a_command_are_not_shown(shards):
    command = "pipe:curl -sSf -H 'Authorization: Bearer hunter2' http://user:hunter3@127.0.0.1:1/x.tar?sig=hunter4"
    said = refused(shards, command)
    assert re.search(r"pipe:curl http://127\.0\.0\.1:1/x\.tar \[\w{8}\]: the command ended with status", said) and "hunter" not in said
    said = refused(shards, "pipe:echo 'cannot get http://user:hunter5@there/x.tar?sig=hunter6 today' >&2; exit 4")
    assert re.search(r"cannot get http://there/x\.tar.* today", said) and "hunter" not in said


def test_a_cache_too_small_for_one_shard_is_one_sentence(shards):
    said = r"shard-000\.tar \[\w{8}\]: does not fit into the 4096 bytes of .*raise data\.storage\.cache_bytes"
    assert re.search(said, refused(shards, f"pipe:cat {shards}/shard-000.tar", cache_bytes=4096))
    assert "does not fit into the 4096 bytes" in refused(shards, str(compressed(shards) / "shard-000.tar.gz"), cache_bytes=4096)


def test_a_cache_that_others_are_filling_says_so(tmp_path):
    (tmp_path / "theirs.part").write_bytes(bytes(20))
    with FileLock(tmp_path / "theirs.lock"), pytest.raises(UserError, match=r"x: does not fit into the 25 bytes of .*, which other processes are filling"):
        Spool(tmp_path, 25).open("mine", "x", lambda: iter_of(bytes(10)))
    assert (tmp_path / "theirs.part").exists()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no gzip" + data, lambda data: data[:-8] + bytes(4) + data[-4:]])
def test_a_damaged_compressed_shard_is_one_sentence(shards, damage):
    path = compressed(shards) / "shard-000.tar.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert re.search(r"shard-000\.tar\.gz: cannot be decompressed \(.+\); fetch or write the shard anew", refused(shards, str(path)))


def test_a_command_that_gives_another_size_later_ends_the_run(shards):
    (shard,) = expand_shards(f"pipe:cat {shards}/shard-000.tar", settings(shards))
    file = open_shard(shard)
    (shards / "shard-000.tar").write_bytes((shards / "shard-000.tar").read_bytes() + bytes(1024))
    (path,) = spooled_files(shards)
    path.unlink()
    with pytest.raises(UserError, match="must not change during a run"):
        file.read(0, 10)


def test_a_cache_folder_that_cannot_be_made(shards):
    (shards.parent / "taken").touch()
    with pytest.raises(UserError, match=r"cannot be kept in data\.storage\.cache_dir=.*taken"):
        open_shard(expand_shards(f"pipe:cat {shards}/shard-000.tar", settings(shards, cache_dir=str(shards.parent / "taken")))[0])
