"""The implementations that a model uses: how they are chosen, and that training does not depend on them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fusiontrain.config.schema import Config, KernelsConfig
from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.kernels import OPERATORS, Kernels, choose_kernels
from fusiontrain.models.shape import shape_from_config
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.models import write_tiny_llama
from fusiontrain.testing.training import BOI, EOI, lmfusion_config
from fusiontrain.types import Batch
from fusiontrain.utils.errors import UserError
from fusiontrain_kernels import choices
from fusiontrain_kernels._launch import interpreting
from fusiontrain_kernels.modality_gemm import modality_gemm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="runs Triton kernels on the CPU")
TEXT = [256, 72, 101, 108, 111, 257]
KINDS = {
    "mixed": [document([256, 9, 8, BOI], ("image", 2, 3), [EOI, 33, 34, 257], seed=1), document(TEXT, seed=2)],
    "text": [document(TEXT, seed=3), document([256, 1, 2, 3], seed=4)],
    "image": [document(("image", 2, 2), seed=5), document(("image", 1, 3), seed=6)],
}


def config_of(recipe: str, tmp_path, others: dict[str, Any] | None = None, **kernels: str) -> Config:
    """One layer, because the interpreter takes milliseconds for every tile."""
    settings = {"data.sequence_length": 24, **{f"kernels.{key}": value for key, value in kernels.items()}, **(others or {})}
    if recipe == "lmfusion":
        return lmfusion_config(write_tiny_llama(tmp_path, num_hidden_layers=1), settings)
    return tiny_config({"model.image": {"patcher": "linear"}, "model.num_layers": 1, **settings})


def chosen(device: torch.device = CPU, dtype: torch.dtype = torch.float32, head_dim: int = 32, **settings: Any) -> Kernels:
    shape = shape_from_config(tiny_config({"model.head_dim": head_dim}).model)
    return choose_kernels(KernelsConfig.model_validate(settings), shape, device, dtype)


# ---------------------------------------------------------------- the choice


def names_that_are_taken(operator: str) -> set[str]:
    """What the operator itself says when it is asked for an implementation that there is not."""
    rows, heads, ranges = torch.zeros(2, 4), torch.zeros(2, 1, 4), torch.tensor([[[0, 2]]] * 2, dtype=torch.int32)
    arguments = {
        "masked_routing_attention": (heads, heads, heads, ranges, ranges),
        "modality_gemm": (rows, [torch.zeros(4, 4)], (0, 2)),
        "rms_norm": (rows, [torch.ones(4)], (0, 2), 1e-5),
        "qk_norm_rope": (heads, heads, None, None, rows, rows, (0, 2), 1e-5),
        "rope": (heads, rows, rows),
        "swiglu": (rows, rows),
        "linear_cross_entropy": (rows, torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64), torch.ones(2)),
    }
    call = getattr(import_module(f"fusiontrain_kernels.{operator}"), operator)
    for name in choices.IMPLEMENTATIONS[operator]:
        if choices.obstacle(operator, name, torch.device("cpu")):
            continue
        call(*arguments[operator], impl=name)
    with pytest.raises(ValueError, match="choose one of") as error:
        call(*arguments[operator], impl="fastest")
    return set(str(error.value).split("choose one of ")[1].split(", "))


@needs_interpreter
def test_the_config_names_the_implementations_that_there_are():
    assert set(choices.IMPLEMENTATIONS) - set(OPERATORS.values()) == {"qk_norm_rope"}  # no recipe norms its heads
    assert names_that_are_taken("qk_norm_rope") == {"auto", *choices.IMPLEMENTATIONS["qk_norm_rope"]}
    for key, operator in OPERATORS.items():
        names = {name for part in get_args(KernelsConfig.model_fields[key].annotation) for name in get_args(part)}
        assert names == {"auto", *choices.IMPLEMENTATIONS[operator]} == names_that_are_taken(operator), key


def test_auto_is_the_plain_one_on_a_cpu_and_triton_on_a_gpu():
    assert chosen() == Kernels("chunked", "segments", "eager", "eager", "reference", "chunked")
    assert chosen(GPU) == Kernels(*["triton"] * 6)


def test_auto_says_why_it_passes_triton_over():
    kernels = chosen(GPU, head_dim=512)
    assert kernels.attention == "chunked"
    assert kernels.gemm == "triton"
    assert kernels.origin.startswith("kernels on cuda: attention chunked (kernels.impl=auto: triton cannot: there are no tiles for a head dim of 512, ")


def test_one_name_for_all_and_others_for_single_operators():
    assert chosen(impl="reference") == Kernels(*["reference"] * 6)
    assert chosen(impl="reference", attention="auto", gemm="segments") == Kernels("chunked", "segments", *["reference"] * 4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"impl": "triton", "head_dim": 512}, "kernels.impl=triton: masked_routing_attention .* head dim of 512"),
        ({"gemm": "grouped_mm", "dtype": torch.float64}, "kernels.gemm=grouped_mm: .*float64; set kernels.gemm to auto or one of segments, triton, reference$"),
        ({"gemm": "grouped_mm", "head_dim": 6, "dtype": torch.bfloat16}, "kernels.gemm=grouped_mm: .* rows of 12 bfloat16 numbers are no multiple of 16 bytes"),
    ],
)
def test_an_explicit_choice_that_cannot_run_is_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence) as error:
        chosen(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 8)], ids=str)
def test_grouped_mm_takes_rows_of_sixteen_bytes(dtype: torch.dtype, width: int):
    """What the choice says is what the operator does."""
    for count in (width, width + width // 2):
        obstacle = choices.obstacle("modality_gemm", "grouped_mm", CPU, dtype, [count, 16])
        rows, weight = torch.ones(2, count, dtype=dtype), torch.ones(16, count, dtype=dtype)
        if count == width:
            assert obstacle is None
            assert (modality_gemm(rows, [weight], (0, 2), impl="grouped_mm") == width).all()
        else:
            assert obstacle == f"rows of {count} {str(dtype).removeprefix('torch.')} numbers are no multiple of 16 bytes"
            with pytest.raises(ValueError, match="multiples of 16 bytes"):
                modality_gemm(rows, [weight], (0, 2), impl="grouped_mm")


def test_triton_without_a_gpu_is_one_sentence_before_any_training(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    sentence = r"kernels.impl=triton: .* on a GPU, not on cpu .*; set kernels.impl to auto, or kernels.attention to one of chunked, sdpa, reference$"
    with pytest.raises(UserError, match=sentence):
        build_model(tiny_config({"kernels.impl": "triton"}))


def test_a_line_for_the_log_says_what_was_chosen_and_why():
    assert build_model(tiny_config({"kernels.attention": "sdpa"})).kernels.origin == (
        "kernels on cpu: attention sdpa (kernels.attention=sdpa); "
        "gemm segments, norm eager, rope eager, swiglu reference, cross_entropy chunked (kernels.impl=auto: the best on cpu)"
    )


# ---------------------------------------------------------------- the same training


def train(config: Config, batch: Batch, dtype: torch.dtype, steps: int = 2) -> tuple[dict[str, torch.Tensor], FusionModel]:
    """Losses, gradients and weights of every step. Not AdamW: its first step is the sign of a gradient, however small."""
    model = build_model(config).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # copies and zeros would hide a wrong weight
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    seen = {}
    for step in range(steps):
        terms = model(batch)
        sum(term.sum for term in terms.values()).backward()
        seen |= {f"{step} loss {name}": term.sum.detach() for name, term in terms.items()}
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (not parameter.requires_grad), name
            if parameter.grad is not None:
                seen[f"{step} gradient {name}"] = parameter.grad
                with torch.no_grad():
                    parameter -= 0.01 * parameter.grad
                parameter.grad = None
            seen[f"{step} weight {name}"] = parameter.detach().clone()
    return seen, model


def assert_same_training(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float):
    """The largest error of a tensor is at most `tolerance` times its largest number (or 0.01, where that is smaller)."""
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        error = (seen[name].double() - value.double()).abs().max()
        assert error <= tolerance * value.abs().max().clamp(min=1e-2), f"{name}: {error:.2e}"


@needs_interpreter
@pytest.mark.parametrize(
    ("recipe", "kind", "dtype"),
    [*((recipe, kind, torch.float64) for recipe in ("lmfusion", "transfusion") for kind in KINDS), ("lmfusion", "mixed", torch.float32)],
)
def test_two_steps_with_triton_equal_the_reference(tmp_path, recipe: str, kind: str, dtype: torch.dtype):
    batch = batch_of(KINDS[kind], config_of(recipe, tmp_path))
    expected, _ = train(config_of(recipe, tmp_path, impl="reference"), batch, dtype)
    seen, model = train(config_of(recipe, tmp_path, impl="triton"), batch, dtype)
    assert model.kernels == Kernels(*["triton"] * 6)
    # Image losses are float32 whatever the model's dtype.
    assert_same_training(seen, expected, 2e-5 if dtype == torch.float32 else 1e-6 if kind != "text" else 1e-12)


@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
def test_a_step_with_other_plain_kernels_equals_the_reference(tmp_path, recipe: str):
    batch = batch_of(KINDS["mixed"], config_of(recipe, tmp_path))
    expected, _ = train(config_of(recipe, tmp_path, impl="reference"), batch, torch.float32)
    for kernels in ({}, {"gemm": "grouped_mm", "attention": "sdpa", "cross_entropy": "reference"}):
        seen, _ = train(config_of(recipe, tmp_path, **kernels), batch, torch.float32)
        assert_same_training(seen, expected, 2e-5)


@needs_interpreter
@pytest.mark.parametrize("kernels", [{}, {"impl": "reference"}, {"impl": "triton"}], ids=["auto", "reference", "triton"])
def test_frozen_text_gives_the_same_bits_with_and_without_images(tmp_path, kernels: dict[str, str]):
    """The pictures take the place of padding, which is text too: the same text rows stand in products of other sizes."""
    config = config_of("lmfusion", tmp_path, **kernels)
    model = build_model(config)
    text = [document(TEXT, seed=3), document([256, 1, 2, 3], seed=4)]
    alone, together = batch_of(text, config), batch_of([*text, *KINDS["image"]], config)
    assert alone.modality_bounds != together.modality_bounds
    rows = sum(document.num_tokens for document in text)
    with torch.no_grad():
        assert torch.equal(model.text_logits(alone)[:rows], model.text_logits(together)[:rows])


# ---------------------------------------------------------------- compiled


PLAIN = {"impl": "reference", "gemm": "grouped_mm", "attention": "sdpa"}


@needs_interpreter
@pytest.mark.parametrize(
    "kernels", [{}, {"impl": "reference"}, PLAIN, {"impl": "triton", "attention": "chunked"}], ids=["auto", "reference", "plain", "triton"]
)
def test_one_graph_of_a_block_takes_any_routing(tmp_path, kernels: dict[str, str]):
    """Forward and backward, at a fixed number of rows: no break in the graph and no other compilation, whatever the batch holds."""
    rows = {"data.sequence_length": 24 if "impl" in kernels else 200, "parallel.frozen_prefix": False}
    config = config_of("lmfusion", tmp_path, rows, **kernels)
    model, plain, graphs = build_model(config), build_model(config_of("lmfusion", tmp_path, rows, impl="reference")), CompileCounterWithBackend("aot_eager")
    layouts = [[document(TEXT, ("image", 1, count), seed=count), document([256, 1, 2, 3])] for count in ([3] if "impl" in kernels else [10, 130])]
    torch.compiler.reset()
    model.blocks[0].compile(backend=graphs, fullgraph=True)
    for documents in (KINDS["mixed"], KINDS["text"], *layouts):
        batch, gradients = batch_of(documents, config), []
        for each in (model, plain):
            each.zero_grad()
            sum(term.sum for term in each(batch).values()).backward()
            gradients.append({name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None})
        assert_same_training(*gradients, 2e-5)
    assert graphs.frame_count == 1
