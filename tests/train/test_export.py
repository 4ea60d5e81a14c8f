"""Models out and in: what is exported is what was trained, needs nothing else, and is loaded, trained from and exported again unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fusiontrain
from fusiontrain.cli.checkpoint_folders import parse_size
from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model, declare_model, first_weights
from fusiontrain.models.fusion import FusionModel
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import Ranks, build_mesh, process_group, read_ranks
from fusiontrain.testing.batches import random_documents, text_batch
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of
from fusiontrain.testing.memory import peak_rss_above_baseline
from fusiontrain.testing.models import LLAMA3_ROPE, write_tiny_llama
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import SHAPE_KEYS, full_tensors, lmfusion_config, write_base
from fusiontrain.train.checkpoint import save_checkpoint
from fusiontrain.train.export import export_model
from fusiontrain.train.identity import model_identity
from fusiontrain.train.retention import Retention
from fusiontrain.train.sources import open_source
from fusiontrain.train.state import TrainState, model_tensors
from fusiontrain.utils.errors import UserError

DENSE = {"model.recipe": "dense", "data.modalities": ["text"]}
NO_SHAPE = {f"model.{key}": None for key in SHAPE_KEYS}
TOKENS = [256, *b"gr\xc3\xb6\xc3\x9fer \n a  b", 3, 250, 257]


def save(folder: Path, config: Config, model: FusionModel, ranks: Ranks, averaged: bool = False) -> dict[str, torch.Tensor | None]:
    """A checkpoint of step 3 with weights that training has moved; returns all of them, gathered. Averages are the weights and one."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.add_(0.1 * len(name)).mul_(1 + 1 / len(name))
    stored = model_tensors(model, parameters, include_frozen=config.model.base is None)
    tensors, identity = {"model": stored, "optimizer": {}}, model_identity(config, stored)
    if averaged:
        tensors["ema"] = {name: parameter.detach() + 1 for name, parameter in parameters.items() if parameter.requires_grad}
        identity |= {"ema": 0.9}
    save_checkpoint(folder / "checkpoints", TrainState(step=3), tensors, identity, to_yaml(config), ranks, Retention(last=9), {})
    return full_tensors(parameters)


def save_alone(folder: Path, config: Config, averaged: bool = False) -> FusionModel:
    """A run folder with a checkpoint of one rank; returns the model."""
    model = build_model(config).eval()
    save(folder, config, model, Ranks(), averaged)
    return model


def save_sharded(config: Config, folder: str) -> dict[str, torch.Tensor | None]:
    """On every rank of a group: the same of a model that is spread over them."""
    ranks = read_ranks()
    with process_group(ranks, config.parallel):
        model = declare_model(config)
        parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device, first_weights(config, model))
        return save(Path(folder), config, model, ranks)


def weights(model: FusionModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def run(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["checkpoint", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> tuple[Path, Config, FusionModel]:
    """A run of LMFusion, and its base beside it."""
    folder = tmp_path_factory.mktemp("fused")
    config = lmfusion_config(write_base(folder / "base"), {"run.dir": str(folder / "run")})
    return folder, config, save_alone(folder / "run", config, averaged=True)


@pytest.fixture(scope="module")
def exported(fused, tmp_path_factory) -> Path:
    """That run, exported under its own names."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export_model(open_source(fused[0] / "run"), out, "fusiontrain")
    return out


# -------------------------------------------------------------------- to Hugging Face


@pytest.mark.parametrize(
    ("llama", "size"),
    [(None, "5GB"), ({"tie_word_embeddings": True, "head_dim": 16}, "10KB"), ({"rope_parameters": LLAMA3_ROPE, "pad_token_id": 9}, "20 KiB")],
    ids=["random weights", "tied, wide heads", "llama 3.1 rotary scaling"],
)
def test_a_dense_model_becomes_a_llama_of_transformers(tmp_path, capsys, llama, size):
    from transformers import AutoModelForCausalLM, AutoTokenizer  # ranks import this file too

    base = {} if llama is None else {**NO_SHAPE, "model.base": write_tiny_llama(tmp_path / "base", **llama)}
    config = tiny_config({**DENSE, **base})
    model = save_alone(tmp_path / "run", config)
    report = run(capsys, "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--max-shard-size", size)
    assert (report["format"], report["recipe"], report["step"]) == ("huggingface", "dense", 3)
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (len(report["files"]) > 1) == (size != "5GB") == (tmp_path / "out" / "model.safetensors.index.json").is_file()
    llama_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(llama_model).__name__ == "LlamaForCausalLM" and llama_model.dtype == torch.float32
    expected = llama_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(model.text_logits(text_batch(TOKENS))[: len(TOKENS)], expected, atol=1e-5, rtol=1e-5)
    assert llama_model.config.eos_token_id == 257 and llama_model.config.pad_token_id == (llama or {}).get("pad_token_id")
    loaded = fusiontrain.load(tmp_path / "out")
    assert same(weights(loaded.model), weights(model)) and not loaded.model.training
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("größer \n a  b 12345 don't <x>", "".join(map(chr, range(1, 300))), ""):
        assert tokenizer.encode(text, add_special_tokens=False) == loaded.tokenizer.encode(text) and tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|/image|>"]) == [256, 257, 258, 259]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)


def test_the_text_side_of_lmfusion_is_its_base_bit_for_bit(fused, exported, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder, _, model = fused
    run(capsys, "export", str(folder / "run"), "--out", str(tmp_path / "text"), "--format", "huggingface")
    assert same(tensors_in(tmp_path / "text"), tensors_in(folder / "base"))
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "text")(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(model.text_logits(text_batch(TOKENS))[: len(TOKENS)], logits, atol=1e-5, rtol=1e-5)
    run(capsys, "export", str(exported), "--out", str(tmp_path / "again"), "--format", "huggingface", "--dtype", "bfloat16")
    assert same(tensors_in(tmp_path / "again"), {name: tensor.bfloat16() for name, tensor in tensors_in(folder / "base").items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


# -------------------------------------------------------------------- under our own names


CONFIGS = {
    "lmfusion": lambda base: lmfusion_config(base),
    "transfusion": lambda _: tiny_config({"model.image": {"unet_channels": 8}}),
    "mot": lambda _: tiny_config({"model.recipe": "mot", "model.norm_position": "post", "model.qk_norm": "layer"}),
}


@pytest.mark.parametrize("recipe", CONFIGS)
def test_what_ranks_saved_in_shards_is_exported_whole(tmp_path, recipe):
    base = write_base(tmp_path / "base")
    config = CONFIGS[recipe](base)
    wanted = shared_pool().run(save_sharded, 2, config, str(tmp_path / "run"))[0]
    source = open_source(tmp_path / "run")
    export_model(source, tmp_path / "out", "fusiontrain", max_shard_bytes=20_000)
    if recipe == "mot":
        with pytest.raises(UserError, match="as no Llama does: export it with --format fusiontrain"):
            export_model(source, tmp_path / "text", "huggingface")
    shutil.rmtree(base), shutil.rmtree(tmp_path / "run")
    loaded = fusiontrain.load(tmp_path / "out")
    assert same(weights(loaded.model), wanted) and same(tensors_in(tmp_path / "out"), wanted)
    assert loaded.config.model.recipe == recipe and loaded.config.data.sequence_length == config.data.sequence_length


def test_a_loaded_folder_computes_what_the_run_does(fused, exported, monkeypatch, tmp_path):
    folder, config, model = fused
    batch = batch_of(random_documents(4, 3), config)
    with torch.no_grad():
        wanted = {name: term.sum for name, term in model(batch).items()}
    monkeypatch.chdir(tmp_path)
    for path in (exported, folder / "run", folder / "run" / "checkpoints", folder / "run" / "checkpoints" / "step-00000003"):
        loaded = fusiontrain.load(path)
        with torch.no_grad():
            assert {name: term.sum for name, term in loaded.model(batch).items()} == wanted
        assert loaded.tokenizer.encode("ab") == [97, 98] and not loaded.model.training
    picture = loaded.sample("a red circle", seed=1)
    again = fusiontrain.load(exported).sample("a red circle", seed=1)
    assert isinstance(picture, Image.Image) and picture.size == (8, 8) and np.array_equal(picture, again)
    picture.save("p.png")
    texts = {loaded.caption(shown, max_new_tokens=5) for shown in (picture, np.asarray(picture), "p.png", Path("p.png"))}
    assert len(texts) == 1, "an image, its numbers and its file are the same picture"


def test_weights_may_be_loaded_in_half_the_size(exported):
    loaded, whole = fusiontrain.load(exported, dtype=torch.bfloat16), fusiontrain.load(exported)
    assert same(weights(loaded.model), {name: tensor.bfloat16() for name, tensor in weights(whole.model).items()})
    logits, expected = (trained.model.text_logits(text_batch(TOKENS)).detach().float() for trained in (loaded, whole))
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert loaded.sample("a red circle", steps=2).size == (8, 8)


@pytest.mark.parametrize("device", ["cudaa", "cuda:99", "mps", 3.5])
def test_a_device_that_is_not_there_is_one_sentence(exported, device):
    with pytest.raises(UserError, match=rf"^device '{device}': .*give (cpu|cuda|device='cpu')[^\n]*$"):
        fusiontrain.load(exported, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_cuda_device_without_cuda_is_one_sentence(exported):
    with pytest.raises(UserError, match=r"^device 'cuda': torch sees no CUDA device here: give device='cpu', or see `fusiontrain doctor`$"):
        fusiontrain.load(exported, device="cuda")


def test_averages_are_exported_where_asked_for(fused, tmp_path, capsys):
    folder, _, model = fused
    run(capsys, "export", str(folder / "run"), "--out", str(tmp_path / "out"), "--ema")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert same(tensors_in(tmp_path / "out"), {name: tensor + (name in trains) for name, tensor in weights(model).items()})
    assert same(weights(fusiontrain.load(folder / "run", ema=True).model), tensors_in(tmp_path / "out"))
    with pytest.raises(UserError, match="has one kind of weights"):
        fusiontrain.load(tmp_path / "out", ema=True)


# -------------------------------------------------------------------- in again


def test_export_import_export_keeps_every_byte(fused, exported, tmp_path, capsys):
    folder = fused[0]
    for kind in ("fusiontrain", "huggingface"):
        first, base, last = (str(tmp_path / f"{kind}-{place}") for place in ("first", "base", "last"))
        run(capsys, "export", str(folder / "run"), "--format", kind, "--out", first, "--max-shard-size", "30KB")
        run(capsys, "import", first, "--out", base)
        run(capsys, "export", base, "--format", kind, "--out", last, "--max-shard-size", "30KB")
        names = sorted(path.name for path in Path(first).iterdir())
        assert names == sorted(path.name for path in Path(last).iterdir())
        assert ("config.yaml" in names) == (kind == "fusiontrain")
        for name in names:
            assert Path(first, name).read_bytes() == Path(last, name).read_bytes(), name


def test_a_run_starts_from_an_exported_model_of_its_recipe(exported, fused):
    config = lmfusion_config(str(exported))
    assert same(weights(build_model(config)), weights(fused[2]))
    assert any(parameter.requires_grad for parameter in build_model(config).parameters())
    with pytest.raises(UserError, match=r"is a lmfusion model, and model\.recipe is dense.*--format huggingface"):
        build_model(tiny_config({**DENSE, **NO_SHAPE, "model.base": str(exported)}))
    with pytest.raises(UserError, match=r"image\.input\.weight is .* there and .* in the configured model"):
        build_model(lmfusion_config(str(exported), {"data.image": {"size": 8, "patch_size": 2}}))


def test_a_llama_of_others_is_checked_and_made_a_base(tmp_path, capsys):
    llama = write_tiny_llama(tmp_path / "llama", torch_dtype="float16")
    tensors = {name: tensor.half() for name, tensor in tensors_in(tmp_path / "llama").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old folders: config.json says it too
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert main(["checkpoint", "import", llama, "--out", str(tmp_path / "base")]) == 0
    out, err = capsys.readouterr()
    assert f"model.base={tmp_path / 'base'}" in out and "tokenizer" in err, "it has none, and a run will need one"
    assert same(tensors_in(tmp_path / "base"), tensors)
    model = build_model(lmfusion_config(str(tmp_path / "base")))
    assert torch.equal(model.get_parameter("blocks.1.attention.q.image.weight"), tensors["model.layers.1.self_attn.q_proj.weight"].float())
    with pytest.raises(UserError, match=r"start a training from it with model\.base"):
        fusiontrain.load(tmp_path / "base")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    assert main(["checkpoint", "import", llama, "--out", str(tmp_path / "bad")]) == 2
    assert "holds values that are not finite" in capsys.readouterr().err and not (tmp_path / "bad").exists()


# -------------------------------------------------------------------- what is refused


def rewrite(folder: Path, edit) -> None:
    """Change the tensors of a folder, with checksums that fit."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    if "files" in config:
        config["files"] = {path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
        (folder / "config.json").write_text(json.dumps(config))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def said(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NAME = "blocks.1.feed_forward.up.image.weight"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: flip(folder / "model.safetensors", -5), r"model.safetensors: is not what was exported"),
        (lambda folder: os.truncate(folder / "model.safetensors", 900), r"model.safetensors: is not what was exported"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors: is missing"),
        (lambda folder: rewrite(folder, lambda tensors: tensors.pop(NAME)), rf"{NAME} is absent there and \[48, 32\]"),
        (lambda folder: rewrite(folder, lambda tensors: tensors.update(more=torch.zeros(2))), r"more is \[2\] there and absent"),
        (lambda folder: rewrite(folder, lambda tensors: tensors.update({NAME: tensors[NAME].t().contiguous()})), rf"{NAME} is \[32, 48\] there and \[48, 32\]"),
        (lambda folder: said(folder, format_version=99), r"config.json: has format 99, this version reads 1"),
        (lambda folder: said(folder, shape={}), r"config.json: lacks what an exported model's says"),
        (lambda folder: said(folder, model_type="t5"), r"model_type is 't5'"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"nor an exported model"),
        (lambda folder: (folder / "config.yaml").unlink(), r"config.yaml: is missing"),
    ],
)
def test_an_exported_folder_that_is_not_whole_is_refused(exported, tmp_path, damage, sentence):
    folder = shutil.copytree(exported, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=sentence) as error:
        fusiontrain.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 900), r"cannot be read as safetensors"),
        (lambda folder: rewrite(folder, lambda tensors: tensors.pop("model.norm.weight")), r"no tensor for final_norm"),
        (lambda folder: rewrite(folder, lambda tensors: tensors.update({"model.norm.bias": torch.zeros(32)})), r"model.norm.bias has no place in the Llama"),
        (lambda folder: rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})), r"has shape \[31\], config.json says \[32\]"),
        (lambda folder: said(folder, mlp_bias=True), r"mlp_bias=true is not supported"),
        (lambda folder: said(folder, hidden_act="gelu"), r"hidden_act='gelu' is not supported"),
        (lambda folder: said(folder, quantization_config={"bits": 4}), r"quantised weights are not supported"),
        (lambda folder: said(folder, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}), r"rotary scaling 'linear' is not supported"),
        (lambda folder: said(folder, rope_parameters={"rope_type": "llama3"}), r"the key 'factor' is missing"),
    ],
)
def test_a_folder_that_is_no_whole_llama_is_not_imported(tmp_path, capsys, damage, sentence):
    write_base(tmp_path / "llama")
    damage(tmp_path / "llama")
    assert main(["checkpoint", "import", str(tmp_path / "llama"), "--out", str(tmp_path / "out")]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and re.search(sentence, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_damaged_checkpoint_is_not_exported(fused, tmp_path):
    folder = shutil.copytree(fused[0] / "run" / "checkpoints" / "step-00000003", tmp_path / "step-00000003")
    flip(folder / "__0_0.distcp", 2000)
    with pytest.raises(UserError, match=r"__0_0.distcp: does not match its checksum: the checkpoint is damaged"):
        open_source(folder)


def test_folders_are_replaced_only_where_asked_and_only_exports(fused, exported, tmp_path, capsys):
    folder = fused[0]
    out = tmp_path / "out"

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["checkpoint", "export", *arguments]) == 2
        return capsys.readouterr().err

    out.mkdir()
    run(capsys, "export", str(folder / "run"), "--out", str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "is there already and not empty" in refused(str(folder / "run"), "--out", str(out))
    run(capsys, "export", str(folder / "run"), "--out", str(out), "--overwrite", "--format", "huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and before.keys() != {path.name for path in out.iterdir()}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    assert "is no exported model" in refused(str(folder / "run"), "--out", str(mine), "--overwrite")
    assert "which is to be exported" in refused(str(exported), "--out", str(exported), "--overwrite")
    assert "which is to be exported" in refused(str(folder / "run"), "--out", str(folder / "run"), "--overwrite")
    assert (mine / "thesis.tex").read_text() == "years" and (exported / "config.json").is_file() and (folder / "run" / "checkpoints").is_dir()
    (tmp_path / "file").write_text("")
    assert "not empty" in refused(str(folder / "run"), "--out", str(tmp_path / "file"))
    assert "--max-shard-size 5XB" in refused(str(folder / "run"), "--out", str(tmp_path / "new"), "--max-shard-size", "5XB")


def test_a_disk_without_room_leaves_nothing_behind(fused, tmp_path):
    """A process that may write no file above 4 KiB stands in for the full disk."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            export_model(open_source(fused[0] / "run"), tmp_path / "out", "fusiontrain")
        except UserError as error:
            os._exit(7 if f"{tmp_path / 'out'}: cannot be written" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_known_before_a_byte_is_written(fused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    source = open_source(fused[0] / "run")
    asked = []
    with pytest.raises(UserError, match=r"needs 0 MiB, and 0 MiB are free"):
        export_model(source, tmp_path / "out", "fusiontrain", progress=lambda done, total: asked.append(done))
    assert asked == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("300kb", 300_000), ("7B", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5TB", "5IB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="give a size such as 500MB"):
        parse_size(text)


# -------------------------------------------------------------------- memory

VOCAB, DIM = 16_384, 256
LARGEST = VOCAB * DIM * 4


def test_one_tensor_is_in_memory_at_a_time(tmp_path, fused):
    """A model of 64 MiB whose largest tensors have 16, out of a checkpoint and out of an exported folder."""
    shape = {"model.vocab_size": VOCAB, "model.dim": DIM, "model.ffn_dim": 1024, "model.num_layers": 8}
    model = save_alone(tmp_path / "run", tiny_config({**DENSE, **shape}))
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 > 3.5 * LARGEST
    del model
    sources = {"out": ("run", None), "half": ("run", torch.bfloat16), "again": ("out", None)}
    for name, (source, dtype) in sources.items():

        def work(run: Path, out: Path, dtype: torch.dtype | None = dtype) -> None:
            export_model(open_source(run), out, "huggingface", dtype)

        small, large = (fused[0] / "run", tmp_path / f"{name}-small"), (tmp_path / source, tmp_path / name)
        peak = peak_rss_above_baseline(lambda large=large: work(*large), lambda small=small: work(*small))
        assert LARGEST / 2 < peak < 2.5 * LARGEST, f"{name}: {peak / LARGEST:.2f} of the largest tensor"


def test_importing_the_package_imports_nothing():
    code = "import sys, fusiontrain; fusiontrain.load; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.stdout.strip() == "[]", result.stderr
