"""Training from un-indexed shards: what webdataset reads, packed and collated as ever, and honest about what it cannot do."""

from __future__ import annotations

import contextlib
import itertools
import logging
from pathlib import Path

import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.config.validate import cross_section_problems, file_problems
from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.shard import shown_source
from fusiontrain.data.stream import StreamLoader
from fusiontrain.data.tar import members_in
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.range_server import range_server
from fusiontrain.testing.runs import trainer_of
from fusiontrain.testing.shards import interleaved, mixed_samples, png, write_shard, write_shards
from fusiontrain.testing.training import world_config
from fusiontrain.train.build import require_same_data
from fusiontrain.train.checkpoint import list_checkpoints, read_manifest
from fusiontrain.train.metrics import read_metrics
from fusiontrain.utils.errors import UserError

SETTINGS = {
    "data.mode": "stream", "data.stream_shuffle_documents": 7, "train.global_batch_sequences": 4, "data.pack_window_documents": 8,
    "data.condition_dropout": 0.0, "data.max_bad_fraction": 0.0,
}  # fmt: skip


def config_of(*paths, **overrides):
    return tiny_config({**SETTINGS, "data.sources": [{"path": str(path)} for path in paths], **overrides})


def stream(*paths, rank=0, world_size=1, **overrides):
    config = config_of(*paths, **overrides)
    return StreamLoader(config, load_tokenizer(config), rank, world_size)


def keys_of(loader, start, count):
    with contextlib.closing(loader.iterate(start)) as steps:
        return [[(ref.key, ref.index) for batch in batches for ref in batch.sources] for batches, _ in itertools.islice(steps, count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("stream"), shards=4, samples=6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_epoch_without_overlap(shards, world_size):
    epochs = [[], []]
    for rank in range(world_size):
        samples = stream(shards, rank=rank, world_size=world_size)._samples(0, 0)
        for epoch in epochs:
            epoch += [raw["__key__"] for _, raw in itertools.islice(samples, 24 // world_size)]
    expected = sorted(f"s{shard}-{n:04d}" for shard in range(4) for n in range(6))
    assert [sorted(epoch) for epoch in epochs] == [expected, expected]
    assert epochs[0] != epochs[1]


def test_one_shard_is_shuffled_anew_in_every_epoch(shards):
    samples = stream(f"{shards}/shard-000.tar")._samples(0, 0)
    orders = [tuple(raw["__key__"] for _, raw in itertools.islice(samples, 6)) for _ in range(4)]
    assert len(set(orders)) > 2
    assert {tuple(sorted(order)) for order in orders} == {tuple(f"s0-{n:04d}" for n in range(6))}


def tokens_of(document):
    return [s.token_ids.tolist() if s.token_ids is not None else s.values.tolist() for s in document.segments]


def test_documents_are_those_that_the_plan_gives(shards):
    """Token for token and pixel for pixel; in another order, and each as often as the other in the long run."""
    config = config_of(shards, **{"data.mode": "planned", "data.validation_sources": [{"path": shards}]})
    planned = Loader(config, load_tokenizer(config), "validation", 0, 1)
    expected = {}
    for step in itertools.count():
        sequences = planned.plan.step(step)
        if not sequences:
            break
        expected |= {document.source.key: tokens_of(document) for sequence in sequences for document in planned.builder.read(sequence, []).documents}
    assert len(expected) == 24
    loader = stream(shards)
    seen = {}
    for group in itertools.islice(loader._groups(0), 40):
        sequence = loader._sequence(group, 0)
        assert sequence.num_tokens <= 96
        seen |= {document.source.key: tokens_of(document) for document in sequence.documents}
    assert seen == expected
    assert loader.skipped == 0


def test_a_start_gives_one_order_with_or_without_a_thread_and_another_start_another(shards):
    first = keys_of(stream(shards), 0, 6)
    assert keys_of(stream(shards, **{"data.num_workers": 1, "data.prefetch_bytes": 1}), 0, 6) == first
    assert keys_of(stream(shards, seed=1), 0, 6) != first
    again = keys_of(stream(shards), LoaderState(3, 0, {}), 3)
    assert again != first[3:], "a resumed run does not go on where it was"
    assert again == keys_of(stream(shards), 3, 3)


def test_sources_come_by_their_weights(tmp_path):
    for name in "ab":
        write_shard(tmp_path / name / "x.tar", [{"txt": f"{name} {n}".encode()} for n in range(5)], prefix=name)
    sources = [{"path": str(tmp_path / name), "weight": weight} for name, weight in (("a", 3.0), ("b", 1.0))]
    loader = stream(**{"data.sources": sources})
    keys = [waiting.source.key[0] for waiting in itertools.islice(loader._documents(0), 800)]
    assert 0.70 < keys.count("a") / len(keys) < 0.80


def test_pipes_and_compressed_tars_are_read(tmp_path, shards):
    write_shard(tmp_path / "z.tar.gz", mixed_samples(5), prefix="z")
    loader = stream(f"pipe:cat {shards}/shard-{{000..003}}.tar", tmp_path / "z.tar.gz")
    assert len(loader.shards[0]) == 4
    seen = {key for step in keys_of(loader, 0, 30) for key, _ in step}
    assert len(seen) == 24 + 5
    assert loader.skipped == 0


def test_a_pipe_that_fails_after_its_last_byte_is_counted(shards):
    """Its tar looks whole; only the exit status tells."""
    path = f"pipe:cat {shards}/shard-000.tar; exit 3"
    loader = stream(path, **{"data.max_bad_fraction": 0.9})
    assert len({key for step in keys_of(loader, 0, 6) for key, _ in step}) == 6
    assert loader.skipped > 0
    assert set(loader.log.counts) == {(shown_source(path), "read")}
    with pytest.raises(UserError, match=r"unreadable \(1 read\).*ended with status 3"):
        keys_of(stream(path), 0, 6)


def test_a_pipe_that_falls_silent_is_counted_and_its_arguments_are_not_shown(shards, caplog):
    path = f"pipe:sleep 60 # --token hunter2 {shards}/shard-000.tar"
    loader = stream(path, shards, **{"data.max_bad_fraction": 0.9, "data.storage.timeout_seconds": 0.2})
    with pytest.raises(UserError, match=r"not one sample could be read") as error:
        keys_of(loader, 0, 40)
    (finding,) = loader.log.take(100)
    assert "wrote nothing for 0.2 seconds" in finding["message"]
    assert "hunter2" not in f"{error.value} {finding} {caplog.text} {loader.fields}"


def test_a_pipe_that_ends_between_two_members_is_counted(tmp_path, shards):
    """`tarfile` takes it for a whole tar."""
    data = Path(shards, "shard-000.tar").read_bytes()
    with contextlib.closing(open_shard(Path(shards, "shard-000.tar"))) as file:
        end = [member.offset for member in members_in(file, Path("x"))][-1] - 512
    (tmp_path / "cut.tar").write_bytes(data[:end])
    loader = stream(f"pipe:cat {tmp_path}/cut.tar", shards, **{"data.max_bad_fraction": 0.9})
    keys_of(loader, 0, 12)
    assert any("does not end as a tar does" in finding["message"] for finding in loader.log.take(100))


def test_shards_behind_http_are_read_as_local_ones(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("fusiontrain.data.storage.retry.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("fusiontrain.data.storage.retry.LONGEST_WAIT_SECONDS", 0.05)
    with range_server(Path(shards)) as server:
        faults = itertools.cycle([None, "503", "short"])
        server.fault = lambda number, path: next(faults)
        loader = stream(server.url + "/shard-{000..003}.tar")
        assert keys_of(loader, 0, 12) == keys_of(stream(shards), 0, 12)
        assert loader.skipped == 0


def test_a_shard_cut_within_a_member_is_counted_and_the_others_go_on(tmp_path):
    write_shards(tmp_path, shards=3, samples=6)
    cut = tmp_path / "shard-001.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    loader = stream(tmp_path, **{"data.max_bad_fraction": 0.9})
    seen = {key for step in keys_of(loader, 0, 12) for key, _ in step}
    assert {f"s{shard}-{n:04d}" for shard in (0, 2) for n in range(6)} <= seen
    assert set(loader.log.counts) == {(str(tmp_path), "read")}
    finding = loader.log.take(100)[0]
    assert (finding["shard"], finding["reason"]) == (str(cut), "read")


def test_bad_samples_become_padding_or_stay_out_and_are_counted(tmp_path):
    half = png(1, (40, 40))
    broken = {"undecodable": half[: len(half) // 2], "no image": b"x"}
    samples = [interleaved([f"text {n}", None], [None, png(n)]) for n in range(8)]
    samples += [interleaved([name, None], [None, data]) for name, data in broken.items()]
    write_shard(tmp_path / "x.tar", [*samples, {"json": b"{"}])
    loader = stream(tmp_path, **{"data.max_bad_fraction": 0.9})
    seen = {key for step in keys_of(loader, 0, 6) for key, _ in step}
    assert seen == {f"sample-{n:04d}" for n in range(8)}
    assert {reason for _, reason in loader.log.counts} == {"decode", "format"}
    assert {finding["key"] for finding in loader.log.take(100)} == {"sample-0008", "sample-0009", "sample-0010"}
    with pytest.raises(UserError, match="unreadable"):
        keys_of(stream(tmp_path), 0, 6)


def test_what_cannot_be_streamed_is_refused(tmp_path, shards, caplog):
    (tmp_path / "x.jsonl").write_text("{}")
    write_shard(tmp_path / "empty" / "x.tar", [])
    for path, ranks, why in (
        (shards, 5, "4 sequences|cannot share"), (f"{shards}/shard-000.tar", 2, "1 shards for 2 ranks"), (tmp_path / "x.jsonl", 1, "data.mode=planned"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            stream(path, world_size=ranks)
    with pytest.raises(UserError, match="not one sample"):
        keys_of(stream(tmp_path / "empty"), 0, 1)
    with caplog.at_level(logging.WARNING):
        stream(shards)
    assert "not elastic" in caplog.text


def test_settings_that_need_a_plan_are_refused(tmp_path, shards, capsys):
    sources = [{"path": "pipe:cat x.tar", "max_epochs": 1}, {"path": "x", "weight_schedule": [[5, 1.0]]}]
    config = config_of(**{"data.sources": sources, "data.mix_by": "tokens", "data.io_mode": "lanes", "data.from_step": [[1, 2]]})
    keys = [problem.key for problem in cross_section_problems(config)]
    assert keys == ["data.from_step", "data.io_mode", "data.mix_by", "data.sources.0", "data.sources.1"]
    assert "data.sources.0.path" not in [problem.key for problem in file_problems(config)], "a pipe is not on the disk"
    (tmp_path / "c.yaml").write_text(to_yaml(config_of(shards)))
    assert main(["data", "plan", str(tmp_path / "c.yaml")]) == 2
    assert "has no plan" in capsys.readouterr().err


def train(config):
    with trainer_of(config) as trainer:
        trainer.run()


def test_a_run_trains_and_resumes_from_a_stream(tmp_path, shards):
    settings = {
        "data.sources": [{"path": f"pipe:cat {shards}/shard-{{000..003}}.tar"}], "data.mode": "stream", "data.num_workers": 1,
        "data.prefetch_bytes": 1, "sample.prompts": [], "model.image": {"patcher": "linear"},
    }  # fmt: skip
    train(world_config(tmp_path, settings))
    config = world_config(tmp_path, {**settings, "train.steps": 6})
    train(config)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 7))
    assert all(line["loss"] > 0 and line["skipped"] == 0 for line in metrics)
    state = read_manifest(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])["state"]
    assert state["data"]["fields"]["data.mode"] == "stream"
    fields = StreamLoader(config, load_tokenizer(config), 0, 2).fields
    with pytest.raises(UserError, match=r"number of ranks \(data.mode=stream is not elastic\) differs"):
        require_same_data(state["data"], fields, tmp_path)
