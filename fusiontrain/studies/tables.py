"""The studies that `fusiontrain reproduce` knows, with the papers' figures beside what is expected of them.

All train on captioned pictures of the demo world. Shapes, learning rates and the velocity objective are those of the demo, not of the papers: at these
sizes the papers' settings learn nothing in the steps that a machine without a GPU can afford.
"""

from __future__ import annotations

from fusiontrain.studies.study import Expectation, Scale, Study, Values, Variant

SHAPE = ("model.base=null", "model.vocab_size=512", "model.num_heads=4", "model.tie_embeddings=true")
MEDIUM = ("model.dim=128", "model.num_layers=4", "model.ffn_dim=384")
FROM_SCRATCH = (*SHAPE, *MEDIUM, "optimizer.learning_rate=0.003")
SEPARATIONS, RATIOS = ("dense", "shallow", "deep"), ("0", "0.1", "1")
ALIKE = 0.03
"""Losses this close, relatively, are called equal."""


def _image(values: Values, name: str) -> float:
    return _number(values, name, "validation/image")


def _number(values: Values, name: str, column: str) -> float:
    """Raises TypeError where the value was not measured, which the judge of expectations takes for "cannot tell"."""
    value = values[name][column]
    if value is None:
        raise TypeError(f"{name}: {column} was not measured")
    return value


def _alike(first: float, second: float) -> bool:
    return abs(first - second) <= ALIKE * max(abs(first), abs(second))


LMFUSION = Study(
    name="lmfusion-ablation",
    title="LMFusion: what is separated, and how fast the text side learns",
    source="LMFusion (arXiv 2412.15188), section 5.1",
    variants=tuple(
        Variant(
            f"{separation} {ratio}",
            (
                "model.recipe=lmfusion",
                f"model.separation={separation}",
                f"model.freeze_text={str(ratio == '0').lower()}",
                *(() if ratio == "0" else (f"optimizer.text_learning_rate_ratio={ratio}",)),
            ),
        )
        for separation in SEPARATIONS
        for ratio in RATIOS
    ),
    columns=("validation/image", "validation/text", "text drift"),
    published_columns=("HellaSwag against Llama's",),
    published={"dense 1": ("-15% at first, -7% at the end",), "dense 0.1": ("-2%",), **{f"{separation} 0": ("0",) for separation in SEPARATIONS}},
    expectations=(
        Expectation("a frozen text side does not drift: exactly 0", lambda v: all(_number(v, f"{name} 0", "text drift") == 0 for name in SEPARATIONS)),
        Expectation(
            "dense: language drifts more at ratio 1 than at 0.1, and there more than at 0",
            lambda v: _number(v, "dense 1", "text drift") > _number(v, "dense 0.1", "text drift") > 0,
        ),
        Expectation("text frozen: image loss deep < shallow < dense", lambda v: _image(v, "deep 0") < _image(v, "shallow 0") < _image(v, "dense 0")),
        Expectation("image loss: deep with frozen text beats dense at ratio 1", lambda v: _image(v, "deep 0") < _image(v, "dense 1")),
    ),
)

MASK = Study(
    name="transfusion-mask",
    title="Transfusion: attention inside images",
    source="Transfusion (arXiv 2408.11039), table 5 (0.76B)",
    common=(*FROM_SCRATCH, "model.recipe=transfusion"),
    variants=tuple(
        Variant(f"{patcher} {attention}", (f"model.image.patcher={patcher}", f"data.image.attention={attention}"))
        for patcher in ("linear", "unet")
        for attention in ("causal", "bidirectional")
    ),
    columns=("validation/image", "validation/text"),
    published_columns=("FID", "CIDEr"),
    published={
        "linear causal": ("61.3", "12.7"),
        "linear bidirectional": ("20.3", "16.0"),
        "unet causal": ("16.8", "23.3"),
        "unet bidirectional": ("16.7", "25.4"),
    },
    expectations=(
        Expectation("linear: bidirectional beats causal", lambda v: _image(v, "linear bidirectional") < (1 - ALIKE) * _image(v, "linear causal")),
        Expectation("U-Net: the two are about equal", lambda v: _alike(_image(v, "unet bidirectional"), _image(v, "unet causal"))),
        Expectation(
            "text does not move",
            lambda v: _alike(_number(v, "linear bidirectional", "validation/text"), _number(v, "linear causal", "validation/text")),
        ),
    ),
)

PATCH = Study(
    name="transfusion-patch",
    title="Transfusion: size of a patch",
    source="Transfusion (arXiv 2408.11039), table 6 (0.76B; sizes in latent cells, of which one is eight pixels wide)",
    common=(*FROM_SCRATCH, "model.recipe=transfusion"),
    variants=tuple(
        Variant(f"{patcher} {size}x{size}", (f"model.image.patcher={patcher}", f"data.image.patch_size={size}"))
        for patcher in ("linear", "unet")
        for size in (2, 4, 8)
    ),
    columns=("validation/image", "validation/text"),
    published_columns=("FID", "CIDEr"),
    published={
        "linear 2x2": ("20.3", "16.0"),
        "linear 4x4": ("25.6", "14.3"),
        "linear 8x8": ("43.5", "11.3"),
        "unet 2x2": ("16.7", "25.4"),
        "unet 4x4": ("16.0", "29.9"),
        "unet 8x8": ("16.1", "29.5"),
    },
    expectations=(
        Expectation("linear: larger patches are worse", lambda v: _image(v, "linear 2x2") < _image(v, "linear 4x4") < _image(v, "linear 8x8")),
        Expectation(
            "U-Net: 8x8 loses less against 2x2 than linear does",
            lambda v: _image(v, "unet 8x8") / _image(v, "unet 2x2") < _image(v, "linear 8x8") / _image(v, "linear 2x2"),
        ),
    ),
)

WIDTHS = {"64 wide": ("model.dim=64", "model.ffn_dim=192"), "128 wide": (), "192 wide": ("model.dim=192", "model.ffn_dim=576")}

PATCHER = Study(
    name="transfusion-patcher",
    title="Transfusion: linear patches or a U-Net, over sizes",
    source="Transfusion (arXiv 2408.11039), table 7 (0.16B, 0.76B, 7B)",
    common=(*FROM_SCRATCH, "model.recipe=transfusion"),
    variants=tuple(
        Variant(f"{width} {patcher}", (f"model.image.patcher={patcher}", *shape)) for width, shape in WIDTHS.items() for patcher in ("linear", "unet")
    ),
    columns=("validation/image", "validation/text"),
    published_columns=("FID", "CIDEr"),
    published={
        "64 wide linear": ("37.6", "6.2"),
        "64 wide unet": ("18.8", "15.3"),
        "128 wide linear": ("20.3", "16.0"),
        "128 wide unet": ("16.7", "25.4"),
        "192 wide linear": ("18.6", "27.2"),
        "192 wide unet": ("16.0", "33.7"),
    },
    expectations=(
        Expectation("the U-Net beats linear patches at every size", lambda v: all(_image(v, f"{w} unet") < _image(v, f"{w} linear") for w in WIDTHS)),
        Expectation(
            "and by less in the widest model than in the narrowest",
            lambda v: _image(v, "192 wide unet") / _image(v, "192 wide linear") > _image(v, "64 wide unet") / _image(v, "64 wide linear"),
        ),
    ),
)

NOISE_CAP = Study(
    name="transfusion-noise-cap",
    title="Transfusion: noise of images that come before their caption",
    source="Transfusion (arXiv 2408.11039), table 8 (0.76B, U-Net)",
    common=(*FROM_SCRATCH, "model.recipe=transfusion", "model.image.patcher=unet"),
    variants=(Variant("no cap", ("data.image.image_first_noise_cap=1.0",)), Variant("half", ("data.image.image_first_noise_cap=0.5",))),
    columns=("validation/image", "validation/text", "caption"),
    published_columns=("FID", "CIDEr"),
    published={"no cap": ("16.7", "25.4"), "half": ("16.5", "29.4")},
    expectations=(Expectation("captions are better with the cap", lambda v: _number(v, "half", "caption") > _number(v, "no cap", "caption")),),
)

UNTIED = {"dense": "[]", "ffn": "[ffn]", "ffn + qkv + o": "[ffn,qkv,o]", "mot": "[ffn,qkv,o,norms]"}
GAINS = (
    Expectation("image loss of dense in at most 0.56 of the steps", lambda v: _number(v, "mot", "slope/image") <= 0.56),
    Expectation(
        "untying the feed-forward alone gives most of it", lambda v: (1 - _number(v, "ffn", "slope/image")) > 0.5 * (1 - _number(v, "mot", "slope/image"))
    ),
)

MOT = Study(
    name="mot-step-matching",
    title="Mixture-of-Transformers against dense, and which parts to untie",
    source="Mixture-of-Transformers (arXiv 2411.04996), section 3.4 (Transfusion setting, 163M) and 3.5",
    common=(*FROM_SCRATCH, "model.recipe=mot", "model.norm_position=post", "model.image.patcher=linear"),
    variants=tuple(Variant(name, (f"model.untied={parts}",)) for name, parts in UNTIED.items()),
    baseline="dense",
    columns=("slope/image", "reached/image", "slope/text", "reached/text", "validation/image", "validation/text", "step time"),
    published_columns=("slope, image", "slope, text"),
    published={"mot": (".254 (train)", ".97 to .99")},
    expectations=(
        Expectation("image slope < text slope", lambda v: _number(v, "mot", "slope/image") < _number(v, "mot", "slope/text")),
        Expectation("text slope about 1", lambda v: 0.85 <= _number(v, "mot", "slope/text") <= 1.15),
        *GAINS,
    ),
)

CHAMELEON = Study(
    name="mot-chameleon",
    title="Mixture-of-Transformers against dense in the Chameleon setting, and which parts to untie",
    source="Mixture-of-Transformers (arXiv 2411.04996), section 3.2 (Chameleon setting, training loss) and 3.5",
    common=(
        *("model.base=null", "model.recipe=mot", "model.vocab_size=576", "model.norm_position=post", "model.qk_norm=rms"),
        *("model.dim=64", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=128", "optimizer.learning_rate=0.003"),
        *("data.image.representation=codes", "data.image.codebook_size=64", "data.condition_dropout=0.0"),
        *("objective.image=ddpm", "objective.image_weight=1.0"),  # codes are learnt as text is, whatever objective.image says
    ),
    codes=True,
    variants=MOT.variants,
    baseline="dense",
    columns=MOT.columns,
    published_columns=("slope, image", "slope, text"),
    published={"mot": (".260 (37M), .348 (7B)", ".546 (37M), .558 (7B)")},
    expectations=(
        Expectation("image slope < text slope", lambda v: _number(v, "mot", "slope/image") < _number(v, "mot", "slope/text")),
        Expectation("text slope below 1", lambda v: _number(v, "mot", "slope/text") < 1),
        *GAINS,
    ),
)

MERGED = {"dense": "", "mot": "", "text + speech": "[text,speech]", "image + speech": "[image,speech]", "text + image": "[text,image]"}


def _slope(values: Values, name: str, modality: str) -> float:
    return _number(values, name, f"slope/{modality}")


THREE = Study(
    name="mot-modalities",
    title="Mixture-of-Transformers with three modalities, and which may share their weights",
    source="Mixture-of-Transformers (arXiv 2411.04996), sections 3.3 and 3.5 (443M, leave-one-modality-out)",
    common=(
        *CHAMELEON.common, "model.vocab_size=604", "data.modalities=[text,image,speech]", "data.speech.num_units=28",
        "data.tokenizer.begin_speech_token=<|speech|>", "data.tokenizer.end_speech_token=<|/speech|>",
    ),
    series="*",
    codes=True,
    variants=tuple(
        Variant(name, (f"model.untied={'[]' if name == 'dense' else '[ffn,qkv,o,norms]'}", f"model.merged={merged or '[]'}")) for name, merged in MERGED.items()
    ),
    baseline="dense",
    columns=tuple(f"{kind}/{name}" for kind in ("slope", "validation") for name in ("text", "image", "speech")),
    published_columns=("slope, text", "slope, image", "slope, speech"),
    published={
        "mot": (".557", ".262", ".151"), "text + speech": (".684", ".272", ".653"), "image + speech": (".548", ".321", ".304"),
        "text + image": (".875", ".892", ".147"),
    },
    expectations=(
        GAINS[0],
        Expectation("speech gains most and text least", lambda v: _slope(v, "mot", "speech") < _slope(v, "mot", "image") < _slope(v, "mot", "text")),
        Expectation(
            "images lose most where they share with text",
            lambda v: _slope(v, "text + image", "image") > max(_slope(v, name, "image") for name in ("mot", "text + speech", "image + speech")),
        ),
        Expectation(
            "speech loses most where it shares with text",
            lambda v: _slope(v, "text + speech", "speech") > max(_slope(v, name, "speech") for name in ("mot", "image + speech", "text + image")),
        ),
    ),
)  # fmt: skip

STUDIES = {study.name: study for study in (LMFUSION, MASK, PATCH, PATCHER, NOISE_CAP, MOT, CHAMELEON, THREE)}

EVERY = ("checkpoint.keep_last=1", "evaluate.batches=4", "train.log_every_steps=50")
SCALES = {
    "tiny": Scale(
        "tiny", 20_000, 64,
        (
            *EVERY, "train.steps=400", "checkpoint.every_steps=100", "evaluate.every_steps=100", "optimizer.warmup_steps=30",
            "model.image.unet_channels=32",  # with the demo's 128 the U-Net would take twenty times what the transformer does
        ),
    ),
    "small": Scale(
        "small", 200_000, 512,
        (
            *EVERY, "train.steps=2000", "train.global_batch_sequences=64", "checkpoint.every_steps=500", "evaluate.every_steps=250",
            "optimizer.warmup_steps=100", "parallel.precision=bfloat16", "parallel.compile=true",
        ),
        ("train.steps=1000", "train.global_batch_sequences=64"),
    ),
}  # fmt: skip
