"""A profile of the real trainer on the CPU: what the report holds, that it sums to the step, and that a part without its name would be missed."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fusiontrain.cli.train import SilentReporter
from fusiontrain.models import fusion
from fusiontrain.models.flops import ATTENTION, FEED_FORWARD, HEAD, PATCHER, PROJECTIONS
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import world_config
from fusiontrain.train.profile.advice import largest_loss
from fusiontrain.train.profile.parts import CHECKPOINT, COLLECTIVES, DATA_WAIT, IDLE, IMAGE_LOSS, NORMS, OPTIMIZER, SHARDING
from fusiontrain.train.profile.report import Row
from fusiontrain.train.profile.take import for_profile, take_profile
from fusiontrain.train.profile.window import Window

STEPS = 2
MODEL_PARTS = {(PROJECTIONS, "text"), (PROJECTIONS, "image"), (ATTENTION, "all"), (FEED_FORWARD, "text"), (FEED_FORWARD, "image"), (NORMS, "text")}


def take(config, folder, ranks=None):
    return take_profile(config, "tiny", ranks or Ranks(), SilentReporter(), STEPS, 1, folder)


def on_this_rank(config, folder):
    import torch.distributed as dist

    report = take(config, folder, Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size()))
    return None if report is None else report.to_dict()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, world_config(folder, {"data.sequence_length": 128})


@pytest.fixture(scope="module")
def report(world):
    folder, config = world
    found = take(config, folder / "one")
    assert json.loads((folder / "one" / "report.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    return found


def seconds(report):
    return {(row["group"], row["modality"]): sum(row["seconds"].values()) for row in report["rows"]}


def require_whole(report):
    """Every instant is somewhere."""
    assert sum(row["share"] for row in report["rows"]) == pytest.approx(1)
    assert sum(seconds(report).values()) == pytest.approx(report["step_seconds"])


def test_the_parts_sum_to_the_step_and_are_all_there(report):
    found = report.to_dict()
    require_whole(found)
    spent = seconds(found)
    expected = MODEL_PARTS | {(PATCHER, "image"), (HEAD, "text"), (IMAGE_LOSS, "image"), (DATA_WAIT, "all"), (OPTIMIZER, "all"), ("checkpoint", "all")}
    assert expected <= spent.keys() and all(spent[part] > 0 for part in expected)
    assert (COLLECTIVES, "all") not in spent and (SHARDING, "all") not in spent
    assert spent[IDLE, "all"] < 0.5 * report.step_seconds
    for row in report.rows:
        if row.group in (PROJECTIONS, FEED_FORWARD, ATTENTION):
            assert row.seconds["forward"] > 0 and row.seconds["backward"] > 0 and "recomputed" not in row.seconds


def test_flops_of_the_rows_are_those_of_the_step(report):
    assert sum(sum(row.flops.values()) for row in report.rows) == pytest.approx(report.flops["model"], rel=1e-6)
    assert report.flops["hardware"] == report.flops["model"] < report.flops["6ND"]
    assert report.peak.flops > 0 and "measured here" in report.peak.source
    assert 0 < report.mfu < 1
    row = next(row for row in report.rows if row.group == ATTENTION)
    assert row.flops_per_second == pytest.approx(sum(row.flops.values()) / row.total) and row.of_peak == pytest.approx(row.flops_per_second / report.peak.flops)
    assert all(row.flops_per_second is None for row in report.rows if row.group == NORMS)


def test_memory_ranks_and_findings(report):
    assert [name for name in report.memory if name.startswith("forward")] == ["forward, embedding", "forward, block 0", "forward, block 1"]
    assert report.memory["optimizer"]["gradients"] > 0 and report.memory["losses"]["activations"] > report.memory["before"]["activations"]
    assert report.memory["losses"]["optimizer state"] >= 2 * report.memory["losses"]["weights that train"]
    (rank,) = report.ranks
    assert rank.tokens["text"] > rank.tokens["image"] > 0 and report.imbalance == {"model_seconds": 1.0, "tokens": 1.0}
    assert report.compilation == {"compiled_while_warming_up": 0, "compiled_again": 0, "graph_breaks": {}}
    assert report.largest_loss.startswith("The largest loss is ") and report.largest_loss.endswith(".")


def test_deepspeed_counts_the_same_products(report):
    pytest.importorskip("deepspeed")
    assert report.cross_check["ratio"] == pytest.approx(1, abs=1e-9)


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.found, self.links, self.cells = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_is_whole_and_needs_nothing_else(world, report):
    folder, _ = world
    outline = Outline()
    outline.feed((folder / "one" / "report.html").read_text())
    assert not outline.open and not {"script", "link", "img"} & set(outline.found)
    assert outline.links == report.files and all((folder / "one" / name).is_file() for name in report.files)
    assert {row.name for row in report.rows} <= set(outline.cells) and "100.0%" in outline.cells


def test_a_profile_leaves_the_run_alone(world, report):
    folder, config = world
    assert not (folder / "run").exists() and not (folder / "one" / "run").exists()
    changed = for_profile(config, 4, Path("elsewhere"))
    assert changed.data == config.data and changed.parallel == config.parallel and changed.train.global_batch_sequences == config.train.global_batch_sequences


def test_training_itself_pays_nothing(world, report):
    """Whatever a profile puts on modules, functions and classes is off again: they are the objects that they were."""
    from fusiontrain.train import trainer
    from fusiontrain.types import Batch
    from fusiontrain_kernels.masked_routing_attention import masked_routing_attention

    named = (fusion.masked_routing_attention, trainer.count_flops, Batch.to, torch.nn.utils.clip_grad_norm_)
    assert fusion.masked_routing_attention is masked_routing_attention
    assert not [function for function in named if hasattr(function, "__wrapped__") and "profile" in function.__code__.co_filename]


def test_a_part_that_loses_its_name_is_missed(world, monkeypatch):
    """Without its scope attention would count as projections: the report has no row for it, and its FLOPs no time."""
    folder, config = world
    install = Window.__init__

    def without_attention(self, *args):
        install(self, *args)
        name = self.scopes._name
        self.scopes._name = lambda undo, owner, what, call: None if what == "masked_routing_attention" else name(undo, owner, what, call)

    monkeypatch.setattr(Window, "__init__", without_attention)
    found = take(config, folder / "broken").to_dict()
    require_whole(found)
    assert (ATTENTION, "all") not in seconds(found)
    assert sum(sum(row["flops"].values()) for row in found["rows"]) < 0.9 * found["flops"]["model"]


def test_a_text_only_model_has_no_row_for_pictures(world):
    folder, _ = world
    sources = [{"path": str(folder / "world" / "train")}]
    settings = {"model.recipe": "dense", "data.modalities": ["text"], "data.sources": sources, "train.threads": 1}
    dense = tiny_config({**settings, "run.dir": str(folder / "run")})
    found = take(dense, folder / "text").to_dict()
    require_whole(found)
    assert not [part for part in seconds(found) if part[1] == "image" or part[0] in (PATCHER, IMAGE_LOSS)]
    assert found["ranks"][0]["tokens"].get("image", 0) == 0
    products = {row["group"] for row in found["rows"] if row["flops"]}
    assert products == {PROJECTIONS, FEED_FORWARD, ATTENTION, HEAD}


def test_two_ranks_wait_for_each_other_and_recompute(world):
    folder, config = world
    parallel = config.parallel.model_copy(update={"activation_checkpointing": "full"})
    found, nothing = shared_pool().run(on_this_rank, 2, config.model_copy(update={"parallel": parallel}), folder / "two", timeout_seconds=240)
    assert nothing is None
    require_whole(found)
    spent = seconds(found)
    assert spent[COLLECTIVES, "all"] > 0 and spent[SHARDING, "all"] > 0 and found["hidden_collectives_seconds"] >= 0
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1] and found["imbalance"]["tokens"] >= 1
    recomputed = {row["group"] for row in found["rows"] if row["seconds"].get("recomputed")}
    assert {PROJECTIONS, ATTENTION, FEED_FORWARD} <= recomputed and HEAD not in recomputed
    assert found["flops"]["hardware"] > found["flops"]["model"]
    assert found["files"][2:] == ["trace-rank-0.json", "trace-rank-1.json"] and found["memory"]["losses"]["gathered weights and buffers"] > 0


def row(group, milliseconds, flops=0.0, lost=None):
    return Row(group, "all", {"once": milliseconds / 1e3}, 0.0, {"forward": flops} if flops else {}, None, None, lost)


def test_the_largest_loss_is_what_no_product_needed():
    """The feed-forward takes most of the time and loses little; without a peak nobody can tell."""
    even, config = {"model_seconds": 1.0}, tiny_config()
    rows = [row(FEED_FORWARD, 60, 1e9, 0.005), row(DATA_WAIT, 30), row(COLLECTIVES, 10)]
    assert "is data wait: 30.0 ms of a step (30%); raise data.num_workers" in largest_loss(rows, even, config)
    assert "is feed-forward: 60.0 ms" in largest_loss([row(FEED_FORWARD, 60, 1e9), *rows[1:]], even, config)
    assert "the one that computes 1.50 times the mean" in largest_loss([row(COLLECTIVES, 10)], {"model_seconds": 1.5}, config)


@pytest.mark.parametrize(
    ("group", "advice", "heeded"),
    [
        (NORMS, "parallel.compile=true", {"parallel.compile": True}),
        (PATCHER, "model.image.patcher=linear", {"model.image.patcher": "linear"}),
        (COLLECTIVES, "parallel.forward_prefetch=1", {"parallel.forward_prefetch": 1}),
        (FEED_FORWARD, "raise train.micro_batch_sequences", {"train.micro_batch_sequences": None}),
        (CHECKPOINT, "checkpoint.asynchronous=true", {"checkpoint.asynchronous": True}),
    ],
)
def test_what_is_done_already_is_not_advised(group, advice, heeded):
    before = {
        "parallel.compile": False, "model.image.patcher": "unet", "parallel.forward_prefetch": 0, "train.micro_batch_sequences": 1,
        "checkpoint.asynchronous": False,
    }  # fmt: skip
    told = largest_loss([row(group, 10)], {"model_seconds": 1.0}, tiny_config(before))
    assert advice in told
    now = largest_loss([row(group, 10)], {"model_seconds": 1.0}, tiny_config({**before, **heeded}))
    assert advice not in now and now != told
