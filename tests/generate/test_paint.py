"""Painting: the cache against the whole forward, the sampler's loop against images it must recover, guidance, and independence of batching."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusiontrain.generate.guidance import denoise, guide, image_noise
from fusiontrain.generate.paint import paint, paint_latents
from fusiontrain.generate.stream import opening, read_tokens
from fusiontrain.models.build import build_model
from fusiontrain.objectives.ddpm import Ddpm
from fusiontrain.objectives.flow_matching import FlowMatching
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.generation import BOI, BOS, EOI, TOKENIZER, lively_model
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.keyed import hash_key

PROMPTS = ["a", "a large red circle at the top", "blue!"]
CONFIG = tiny_config({"objective.image": "flow_matching"})


@pytest.fixture(scope="module")
def model():
    return lively_model(CONFIG)


def painted(model, prompts=PROMPTS, config=CONFIG, **settings) -> list[np.ndarray]:
    settings = {"steps": 3, "guidance": 3.0, "seed": 1, "context": 96, **settings}
    return paint(model, TOKENIZER, prompts, image=config.data.image, **settings)


def largest_difference(some, others) -> int:
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(some, others, strict=True))


def test_ragged_rows_in_pieces_equal_the_whole_forward(model) -> None:
    """Rows of different lengths share a cache; text, an image, text, a second image and text again."""
    torch.manual_seed(0)
    texts = [[BOS, 10, 11, 12, 13, 14, BOI], [BOS, BOI], [BOS, 20, 21, BOI]]
    after = [[EOI, 30, BOI], [EOI, 40, 41, 42, BOI], [EOI, BOI]]
    last = [[EOI, 50, 51], [EOI], [EOI, 60]]
    documents = [
        document(text, ("image", 2, 2), then, ("image", 2, 2), end, seed=row, max_timestep=0.0)
        for row, (text, then, end) in enumerate(zip(texts, after, last, strict=True))
    ]
    cache = model.new_cache(3, 24)
    behind = [read_tokens(model, cache, texts)]
    predictions = []
    for place, following in ((1, after), (3, last)):
        values = torch.from_numpy(np.stack([doc.segments[place].values for doc in documents]))
        model.decode_image(torch.randn_like(values), torch.ones(3), (2, 2), cache, commit=False)  # leaves no trace
        predictions.append(model.decode_image(values, torch.zeros(3), (2, 2), cache, commit=True))
        behind.append(read_tokens(model, cache, following))
    for row, doc in enumerate(documents):
        batch = batch_of([doc], CONFIG)
        _, hidden, images = model._hidden(batch)
        logits = model.text.logits(hidden[: batch.modality_bounds[1]])
        ends = np.cumsum([len(part[row]) for part in (texts, after, last)]) - 1
        for end, actual in zip(ends, behind, strict=True):
            torch.testing.assert_close(actual[row], logits[end], atol=1e-5, rtol=1e-5)
        whole = model.image.decode(hidden[batch.modality_bounds[1] :], images.patcher_state).reshape(2, 4, -1)
        for prediction, expected in zip(predictions, whole, strict=True):
            torch.testing.assert_close(prediction[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ["auto", "ddpm", "ddim"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(Ddpm(1000), 50), (Ddpm(20), 20), (Ddpm(1000, "v"), 1), (Ddpm(1000, "x0"), 9), (FlowMatching(3.0), 7), (FlowMatching(1.0), 1)],
)
def test_denoising_with_a_perfect_prediction_ends_at_the_image(sampler, steps, clip, name) -> None:
    clean = torch.linspace(-1, 1, 2 * 6 * 5).view(2, 6, 5)

    def predict(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What the objective would want of a model that knows the image: from the formulas, not from the sampler."""
        level = levels[:, None, None]
        if isinstance(sampler, FlowMatching):
            return (x - clean) / level
        kept = sampler.alpha_bar[(levels * sampler.num_timesteps).round().long()][:, None, None]
        noise = (x - kept.sqrt() * clean) / (1 - kept).sqrt()
        return {"eps": noise, "x0": clean, "v": kept.sqrt() * noise - (1 - kept).sqrt() * clean}[sampler.prediction].float()

    image = denoise(predict, sampler, [11, 12], 5, (2, 3), steps, torch.device("cpu"), clip=clip, sampler=name, eta=0.5)
    torch.testing.assert_close(image, clean, atol=1e-3, rtol=0)


def test_clipping_holds_the_image_in_the_range_of_pixels() -> None:
    def predict(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return -3 * x

    for sampler in (Ddpm(100), FlowMatching(1.0)):
        free, held = (denoise(predict, sampler, [1], 4, (2, 2), 5, torch.device("cpu"), clip=clip) for clip in (None, 1.0))
        assert free.abs().max() > 1.5
        assert held.abs().max() <= 1


def test_noise_is_a_function_of_key_and_draw_alone() -> None:
    cpu = torch.device("cpu")
    together = image_noise([5, 6, 7], 2, 4, (2, 3), cpu)
    assert together.shape == (3, 6, 4)
    assert torch.equal(together[1:2], image_noise([6], 2, 4, (2, 3), cpu))
    assert not torch.equal(together[1:2], image_noise([6], 3, 4, (2, 3), cpu))


def test_every_step_gets_noise_of_its_own(monkeypatch) -> None:
    noises: list[torch.Tensor] = []
    monkeypatch.setattr("fusiontrain.generate.guidance.image_noise", lambda *args: noises.append(image_noise(*args)) or noises[-1])
    denoise(lambda x, levels: x, Ddpm(100), [1, 2], 4, (2, 2), 3, torch.device("cpu"))
    numbers = torch.stack(noises).flatten(2).flatten(0, 1)  # the start and three steps, of two images
    assert len(numbers) == 8
    assert len({tuple(row.tolist()) for row in numbers}) == 8


def test_guide_is_linear_between_and_beyond_the_two_predictions() -> None:
    with_text, without = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])
    assert torch.equal(guide(with_text, without, 0.0), without)
    assert torch.equal(guide(with_text, without, 1.0), with_text)
    assert torch.equal(guide(with_text, without, 3.0), torch.tensor([-3.0, 8.0]))


def test_guidance_of_one_is_no_guidance_and_costs_half(model, monkeypatch) -> None:
    calls = []
    decode = model.decode_image
    monkeypatch.setattr(model, "decode_image", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    plain = painted(model, guidance=1.0)
    assert len(calls) == 3
    guided = painted(model, guidance=3.0)
    assert len(calls) == 3 + 6
    monkeypatch.undo()
    assert largest_difference(plain, painted(model, guidance=1 + 1e-7)) <= 1
    assert largest_difference(plain, guided) > 8


def test_without_text_the_prompt_does_not_matter(model) -> None:
    assert np.array_equal(painted(model, ["one thing"], guidance=0.0)[0], painted(model, ["quite another"], guidance=0.0)[0])
    assert largest_difference(painted(model, ["one thing"]), painted(model, ["quite another"])) > 8


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_batching_changes_nothing_and_no_global_random_state_is_used(objective) -> None:
    config = tiny_config({"objective.image": objective})
    model = lively_model(config)
    torch.manual_seed(1)
    together = painted(model, config=config)
    torch.manual_seed(2)
    alone = painted(model, config=config, batch_size=1)
    assert [picture.shape for picture in together] == [(8, 8, 3)] * 3
    assert together[0].dtype == np.uint8
    assert largest_difference(together, alone) <= 1
    assert largest_difference(together, painted(model, config=config, seed=2)) > 8
    same_prompt = painted(model, ["a", "a"], config=config)
    assert largest_difference(same_prompt[:1], same_prompt[1:]) > 8, "two pictures of one prompt have noise of their own"


def test_painting_puts_the_training_mode_back(model) -> None:
    model.train()
    painted(model)
    assert model.training
    model.eval()
    painted(model)
    assert not model.training


def test_the_cache_has_room_for_the_longest_prompt_and_its_picture_alone(model, monkeypatch) -> None:
    sizes = []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda rows, length: sizes.append((rows, length)) or new_cache(rows, length))
    painted(model, batch_size=2)
    assert sizes == [(2, 31 + 4), (2, 2 + 4), (1, 7 + 4), (1, 2 + 4)]
    assert opening(TOKENIZER) == [BOS]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"prompts": ["x" * 91]}, "prompt 1 with its picture: needs 97 tokens"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_mistakes_are_one_sentence(model, settings, word) -> None:
    with pytest.raises(UserError, match=word):
        painted(model, **settings)
    painted(model, ["x" * 90])  # exactly the context


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_every_sampler_paints_its_own_picture_and_asks_the_model_as_often_as_it_says(objective, monkeypatch) -> None:
    model, calls, pictures = lively_model(tiny_config({"objective.image": objective})), [], {}
    decode = model.decode_image
    monkeypatch.setattr(model, "decode_image", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    for sampler, cost in (("ddpm", 3), ("ddim", 3), ("euler", 3), ("heun", 5)):
        calls.clear()
        (pictures[sampler],) = painted(model, ["a"], guidance=1.0, sampler=sampler)
        assert len(calls) == cost
    (usual,) = painted(model, ["a"], guidance=1.0)
    assert np.array_equal(usual, pictures["ddpm" if objective == "ddpm" else "euler"])
    assert np.array_equal(painted(model, ["a"], guidance=1.0, sampler="ddim", eta=1.0)[0], pictures["ddpm"])
    different = [("ddpm", "ddim"), ("euler", "heun"), ("ddpm", "heun")]
    assert all(largest_difference([pictures[one]], [pictures[other]]) > 2 for one, other in different)


def test_a_sampler_that_there_is_not_is_a_sentence(model) -> None:
    with pytest.raises(UserError, match="'dpm': must be auto or one of ddpm, ddim, euler, heun"):
        painted(model, sampler="dpm")


def test_too_many_steps_of_a_schedule_are_refused() -> None:
    config = tiny_config({"objective.image": "ddpm", "objective.num_timesteps": 10})
    with pytest.raises(UserError, match="num_timesteps=10"):
        painted(build_model(config), config=config, steps=11)


def test_a_model_that_cannot_paint_says_so(model) -> None:
    dense = build_model(tiny_config({"model.recipe": "dense", "data.modalities": ["text"]}))
    with pytest.raises(UserError, match="text only"):
        painted(dense)
    latents = tiny_config({"data.image": {"size": 8, "patch_size": 4, "representation": "latents", "channels": 4}})
    with pytest.raises(UserError, match="latents"):
        painted(build_model(latents), config=latents)


# ---------------------------------------------------------------- latents


def latent_config(**overrides):
    return tiny_config({"data.image": {"size": 64, "patch_size": 2, "channels": 4, "representation": "latents"}, **overrides})


def test_a_latent_is_what_the_sampler_makes_of_the_keyed_noise() -> None:
    """One step of Euler along the velocity that the whole forward says: no number is cut at 1, which is the end of pixels alone."""
    config = latent_config(**{"objective.image": "flow_matching"})
    model = lively_model(config)
    (latent,) = paint_latents(model, TOKENIZER, ["red"], 6, image=config.data.image, steps=1, guidance=1.0, seed=3)
    assert latent.shape == (4, 6, 6) and latent.dtype == np.float32 and np.abs(latent).max() > 1
    noise = image_noise([hash_key(3, 0)], 0, 4 * 2 * 2, (3, 3), torch.device("cpu"))
    cache = model.new_cache(1, 5 + 9)
    read_tokens(model, cache, [[BOS, *b"red", BOI]])
    velocity = model.decode_image(noise, torch.ones(1), (3, 3), cache, commit=False)
    patches = (noise - velocity)[0].numpy().reshape(3, 3, 4, 2, 2)
    expected = np.block([[patches[row, column] for column in range(3)] for row in range(3)])
    np.testing.assert_allclose(latent, expected, atol=1e-5)


def test_a_model_of_latents_says_how_to_see_what_it_paints() -> None:
    config = latent_config()
    model, settings = lively_model(config), {"steps": 1, "guidance": 1.0, "seed": 0}
    with pytest.raises(UserError, match=r"no autoencoder, so no pictures: `sample --latents CELLS` writes \.latent\.npy"):
        paint(model, TOKENIZER, ["red"], image=config.data.image, **settings)
    with pytest.raises(UserError, match=r"multiple of data\.image\.patch_size=2"):
        paint_latents(model, TOKENIZER, ["red"], 5, image=config.data.image, **settings)
    with pytest.raises(UserError, match="not trained on latents"):
        paint_latents(lively_model(tiny_config()), TOKENIZER, ["red"], 8, image=tiny_config().data.image, **settings)
