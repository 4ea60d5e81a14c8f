"""The configuration: frozen, complete, and dumb. It holds values and checks them; it builds nothing.

Every field has its unit in its name where it has one. Unknown keys are refused. Checks that need more than one section
live in `validate.py`; loading, merging and error sentences live in `load.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    dir: str = Field("runs/default", description="run folder: config, metrics, checkpoints, samples, logs")


class ImageModelConfig(Section):
    patcher: Literal["linear", "unet"] = Field("unet", description="how patches enter and leave the transformer")
    unet_channels: int = Field(128, ge=8, description="width of the U-Net's convolutions")
    unet_blocks: int = Field(1, ge=1, description="residual blocks in each half of the U-Net")
    position_embedding: Literal["none", "sincos2d"] = Field(
        "none", description="none: rotary positions only, as Transfusion; sincos2d: add a fixed table of row and column"
    )
    input_scale: float = Field(1.0, gt=0, description="factor on image rows where they enter the blocks: larger ones learn faster beside a small text model")
    vae: str | None = Field(None, description="diffusers AutoencoderKL folder: pixels are encoded to latents on the device")


class ModelConfig(Section):
    recipe: Literal["dense", "transfusion", "lmfusion", "mot", "chameleon"] = Field(..., description="which weights are per modality and what is frozen")
    base: str | None = Field(None, description="Hugging Face Llama folder to start from; lmfusion needs one")
    separation: Literal["dense", "shallow", "deep"] = Field(
        "deep", description="lmfusion: what is per modality: nothing, FFN and its norm, or attention too (the paper's choice)"
    )
    freeze_text: bool = Field(True, description="lmfusion: text weights, and those that images share with it, never change (the paper's learning-rate ratio 0)")
    untied: tuple[Literal["ffn", "qkv", "o", "norms"], ...] = Field(
        ("ffn", "qkv", "o", "norms"), description="mot: the parts that are per modality; the paper's model unties all"
    )
    merged: tuple[Literal["text", "image", "speech"], ...] = Field((), description="mot: modalities that share one set of weights, for leave-one-out")
    dropout: float = Field(0.0, ge=0, le=0.9, description="share of a sublayer's output that is dropped in training (Chameleon 7B: 0.1), keyed by token")
    # The shape of a model without a base. With a base these come from its config.json and must stay unset.
    vocab_size: int | None = Field(None, ge=8)
    dim: int | None = Field(None, ge=8)
    num_layers: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    num_kv_heads: int | None = Field(None, ge=1, description="default: num_heads")
    head_dim: int | None = Field(None, ge=2, description="default: dim / num_heads")
    ffn_dim: int | None = Field(None, ge=8)
    rope_theta: float | None = Field(None, gt=0, description="default 10000")
    norm_eps: float | None = Field(None, gt=0, description="default 1e-5")
    tie_embeddings: bool | None = Field(None, description="default false")
    norm_position: Literal["pre", "post"] | None = Field(None, description="post: sublayers are normed before they are added (MoT, Chameleon 34B); default pre")
    qk_norm: Literal["none", "rms", "layer"] | None = Field(
        None, description="of every head of queries and keys: rms with one weight (MoT), layer with weight and bias per head (Chameleon); default none"
    )
    image: ImageModelConfig = ImageModelConfig()


class SourceConfig(Section):
    path: str = Field(
        ...,
        description="a .tar, .tar.gz, .tgz or .jsonl, a folder of them, a glob, a brace range such as shard-{000..015}.tar, a URL of these, or pipe:COMMAND",
    )
    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="what metrics call it; default: the end of its path")
    weight: float = Field(1.0, gt=0, description="share relative to the other sources, of documents or tokens as data.mix_by says")
    weight_schedule: tuple[tuple[int, float], ...] = Field(
        (), description="[[document, weight], ...]: the weight from that document of the mixed stream on; `data plan` shows where a step lies"
    )
    max_epochs: int | None = Field(None, ge=1, description="the source leaves the mixture after so many; null for never")
    format: Literal["auto", "interleaved", "captions"] = "auto"
    text_key: str | None = Field(None, min_length=1, description="field of the json that holds the text, a.b for nested ones; null looks for the usual names")
    image_first_probability: float = Field(0.2, ge=0, le=1, description="caption pairs only: share shown as image then caption (Transfusion 4.1: 0.2)")


class TokenizerConfig(Section):
    path: str | None = Field(None, description="folder or tokenizer.json; 'bytes' for the built-in; default: the model's base folder")
    begin_image_token: str = Field("<|image|>", description="token text of BOI, which must be in the vocabulary")
    end_image_token: str = Field("<|/image|>", description="token text of EOI")
    begin_speech_token: str | None = Field(None, description="token text that opens speech; needed where data.modalities has speech")
    end_speech_token: str | None = Field(None, description="token text that closes it")
    begin_text_token: str | None = Field("<|begin_of_text|>", description="put before every document; null for none")
    end_text_token: str = Field("<|end_of_text|>", description="put after every document")


class ImageDataConfig(Section):
    decoder: Literal["auto", "pillow", "simplejpeg"] = Field(
        "auto", description="of JPEGs; auto: simplejpeg where it is installed, which must then be so on all machines of a run"
    )
    resize: Literal["square", "stretch", "native"] = Field(
        "square", description="square: cropped to size x size pixels; stretch: all of it to that; native: its own shape in min_tokens to max_tokens patches"
    )
    size: int = Field(256, ge=4, description="side of a picture in pixels; resize: native: of those that sampling paints; latents and codes stay as they lie")
    min_tokens: int = Field(64, ge=1, description="resize: native: patches that a smaller picture is enlarged to")
    max_tokens: int = Field(1024, ge=1, description="resize: native: patches that a larger picture is scaled down to")
    patch_size: int = Field(2, ge=1, description="side of a patch, in pixels or, with latents, latent cells; of what one code stands for, in sampling")
    representation: Literal["pixels", "latents", "codes"] = Field(
        "pixels", description="latents: .latent.npy members [C, H, W]; codes: .vq.npy members [h, w], which are tokens behind those of the tokenizer"
    )
    codebook_size: int | None = Field(None, ge=1, description="codes: one more than the largest; model.vocab_size holds the tokenizer's tokens and these")
    channels: int = Field(3, ge=1, description="3 for pixels; the latent's channels otherwise")
    attention: Literal["bidirectional", "causal"] = Field("bidirectional", description="patches see all of their image, or those before them (Transfusion T5)")
    image_first_noise_cap: float = Field(
        0.5, ge=0, le=1, description="largest noise level of an image that opens its document (Transfusion T8); 0 = clean, no image loss"
    )


class SpeechDataConfig(Section):
    num_units: int | None = Field(
        None, ge=1, description="one more than the largest unit of the .units.npy members, which are tokens behind those of the tokenizer and of images"
    )


class StorageConfig(Section):
    retries: int = Field(8, ge=0, description="further tries of a read over a network, at random times up to 30 seconds apart")
    timeout_seconds: float = Field(60, gt=0, description="a read over a network, or the silence of a `pipe:` command, that lasts longer has failed")
    cache_dir: str | None = Field(
        None, description="folder on a local disk for .tar.gz and `pipe:` shards; default: fusiontrain/spool in the user's cache folder"
    )
    cache_bytes: int = Field(64 << 30, ge=1, description="size of that folder; what was read longest ago makes room")


class DataConfig(Section):
    mode: Literal["planned", "stream"] = Field(
        "planned", description="stream: read un-indexed shards and pipes as webdataset does; not elastic, no exact resume, no `data plan`"
    )
    stream_shuffle_documents: int = Field(1000, ge=1, description="mode stream: documents of each source that a rank shuffles in memory")
    sources: tuple[SourceConfig, ...] = Field(..., min_length=1)
    validation_sources: tuple[SourceConfig, ...] = ()
    modalities: tuple[Literal["text", "image", "speech"], ...] = Field(
        ("text", "image"), description="pictures that are not named are dropped, their markers are kept; speech is dropped with its markers"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    image: ImageDataConfig = ImageDataConfig()
    speech: SpeechDataConfig = SpeechDataConfig()
    sequence_length: int = Field(4096, ge=8, description="token budget of a packed sequence")
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="share of text-then-image documents whose text is dropped, for guidance")
    document_mask: bool = Field(True, description="tokens see their own document only")
    mix_by: Literal["documents", "tokens"] = Field("documents", description="what the weights of the sources are shares of")
    oversize: Literal["truncate", "drop", "split"] = Field(
        "truncate", description="documents longer than sequence_length; split: into several, at the borders of texts and images"
    )
    storage: StorageConfig = StorageConfig()
    pack_window_documents: int = Field(1024, ge=1, description="documents that are packed together, best fit decreasing")
    io_mode: Literal["global", "lanes"] = Field(
        "global", description="lanes: each chunk of neighbours is read whole and by one rank alone, for stores that are slow or priced by the request"
    )
    lanes: int = Field(64, ge=1, description="io_mode lanes: parts of the data that pack alone; the number of ranks must divide it")
    chunk_cache_bytes: int = Field(2**30, ge=1, description="io_mode lanes over a network: memory per rank for chunks; 1.5 times what `data plan` prints")
    index_dir: str | None = Field(
        None, description="folder for the indexes of the shards, as of `data index --out`; default: beside them, or in the user's cache folder"
    )
    from_step: tuple[tuple[int, int], ...] = Field(
        (), description="[[step, data step], ...]: from that step of the training on, the data of the data step on; to skip a loss spike"
    )
    max_bad_fraction: float = Field(1e-3, ge=0, le=1, description="stop when more than this share of documents is unreadable")
    executor: Literal["threads", "processes"] = Field("threads", description="what builds batches ahead")
    num_workers: int = Field(1, ge=0, description="threads or processes per rank that build batches ahead; 0 builds them in the training loop")
    prefetch_bytes: int = Field(
        256 * 2**20, ge=1, description="memory per rank for batches that are built ahead; at least three steps are held, whatever their size"
    )


class ObjectiveConfig(Section):
    text_weight: float = Field(1.0, ge=0)
    speech_weight: float = Field(1.0, ge=0)
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log of the softmax's denominator in the text loss of training (Chameleon: 1e-5)")
    image_weight: float = Field(5.0, ge=0, description="lambda of Transfusion 4.1; codes are tokens like any other and have 1")
    image: Literal["ddpm", "flow_matching"] = Field(
        "ddpm", description="ddpm: predict the noise, cosine schedule (the papers); flow_matching: predict the velocity"
    )
    prediction: Literal["eps", "v", "x0"] = Field(
        "eps", description="ddpm: predict the noise (the papers), v, or the image; weights of its squared error: SNR, SNR + 1, 1"
    )
    num_timesteps: int = Field(1000, ge=2, description="ddpm: steps of the noise schedule")
    time_shift: float = Field(1.0, gt=0, description="flow_matching: s in t' = s t / (1 + (s - 1) t); > 1 trains more on high noise")


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-4, gt=0)
    text_learning_rate_ratio: float = Field(
        1.0, ge=0, description="lmfusion with model.freeze_text=false: rate of all but the image side (LMFusion 5.1: 0.1 and 1; its 0 is freeze_text)"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices; norms, biases and embeddings have none")
    warmup_steps: int = Field(4000, ge=0)
    final_learning_rate: float = Field(1.5e-5, ge=0, description="end of the cosine")
    clip_norm: float = Field(1.0, gt=0)


class TrainConfig(Section):
    steps: int = Field(..., ge=1)
    global_batch_sequences: int = Field(..., ge=1, description="packed sequences per optimizer step, over all ranks")
    micro_batch_sequences: int | None = Field(None, ge=1, description="per rank and forward; default: all of a rank's share at once")
    log_every_steps: int = Field(10, ge=1, description="how often a line is printed and TensorBoard written; metrics.jsonl has every step")
    threads: int | None = Field(None, ge=1, description="CPU threads per process; default: cores / local processes")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep a moving average of the weights that train, such as 0.9999; null for none")
    max_skipped_in_a_row: int = Field(5, ge=1, description="so many steps without an update, for a loss that is not finite or a spike, end the run")
    spike: Literal["log", "skip", "stop"] = Field("log", description="what to do with a step whose loss or gradient norm stands out")
    spike_sigmas: float = Field(6.0, gt=0, description="standard deviations above the mean of the window that count as a spike")
    spike_window: int = Field(128, ge=16, description="steps that a spike is compared with")
    skip_steps: tuple[tuple[int, int], ...] = Field((), description="[[first, last], ...]: steps (as in metrics.jsonl) whose data are passed over")


class ParallelConfig(Section):
    engine: Literal["fsdp2", "deepspeed"] = Field("fsdp2", description="deepspeed: ZeRO of the package of that name, an extra")
    zero_stage: Literal[1, 2, 3] = Field(
        2, description="engine deepspeed: spread over the ranks the optimizer's state (1), gradients too (2), weights too (3)"
    )
    dp_replicate: int = Field(1, description="copies of the model; -1: all remaining ranks, which with dp_shard: 1 is DDP, for small models")
    dp_shard: int = Field(-1, description="ranks that share one copy; -1: all remaining ranks")
    frozen: Literal["shard", "replicate"] = Field(
        "shard", description="how frozen weights are held: in shards, gathered like all others, or whole on every rank, never gathered"
    )
    reshard_after_forward: Literal["default", "always", "never"] | int = Field(
        "default",
        description="free gathered weights after the forward: default: those of the blocks; always: the root's too; never: gather once per step; "
        "a number: keep them sharded over so many neighbouring ranks, such as the GPUs of a machine",
    )
    cpu_offload: bool = Field(False, description="sharded weights, gradients and optimizer state stay in the host's memory between uses")
    forward_prefetch: int = Field(0, ge=0, description="blocks whose gathering starts ahead in the forward; 0: as soon as the CPU gets there")
    backward_prefetch: int = Field(1, ge=1, description="blocks whose gathering starts ahead in the backward")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype; parameters and reductions are float32")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="what a block computes again in the backward; selective: all but its products and attention; full: everything"
    )
    activation_checkpointing_every: int = Field(1, ge=1, description="every n-th block does, from the first on; the others keep everything")
    frozen_prefix: bool = Field(
        True, description="with frozen text: text that no image of its document comes before runs forward only; false: like all text, for comparison"
    )
    compile: bool = False
    timeout_seconds: int = Field(300, ge=1, description="a collective, or a wait for data, that takes longer ends the run and names the ranks to blame")


class KernelsConfig(Section):
    impl: Literal["auto", "reference", "triton"] = Field(
        "auto",
        description="for every operator that is null below. auto: the best one for the device, the log says which; reference: the specification, "
        "slow; triton: a GPU. An implementation that is asked for by name and cannot run ends the run",
    )
    attention: Literal["auto", "reference", "chunked", "sdpa", "flex", "flash", "triton"] | None = Field(
        None,
        description="chunked: query chunks over their key ranges; sdpa: torch's own with a dense mask; flex: torch's flex_attention; "
        "flash: flash-attn, for text alone",
    )
    gemm: Literal["auto", "reference", "segments", "grouped_mm", "triton"] | None = Field(
        None, description="segments: one GEMM per modality; grouped_mm: torch's own; triton: one launch, with SwiGLU in it where swiglu is triton too"
    )
    norm: Literal["auto", "reference", "eager", "triton"] | None = Field(None, description="triton: the residual is added in the same pass")
    rope: Literal["auto", "reference", "eager", "triton"] | None = None
    swiglu: Literal["auto", "reference", "triton"] | None = None
    cross_entropy: Literal["auto", "reference", "chunked", "triton"] | None = Field(
        None, description="chunked and triton never hold the logits of all rows; reference does"
    )


class MetricsConfig(Section):
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="where the run's numbers are shown too; wandb and mlflow are extras, set up by environment variables of theirs"
    )


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1)
    asynchronous: bool = Field(True, description="write in the background while training goes on; false: the loop waits for the disk")
    frozen: Literal["reference", "copy"] = Field(
        "reference", description="frozen weights of model.base: by path and hash; copy: stored too, so that nothing needs the base any more"
    )
    timeout_seconds: int = Field(1800, ge=1, description="a save in which a rank waits longer for another, as on slow storage, ends the run")
    grace_seconds: float = Field(
        240, gt=0, description="a run that is asked to stop and has not saved and left after so long ends; less than the scheduler's own patience"
    )
    keep_last: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1, description="also keep, for good, checkpoints whose step this divides")
    keep_best: str | None = Field(None, description="also keep the one with the lowest value of this key of metrics.jsonl, e.g. validation/image")
    resume: str = Field("auto", description="auto: newest complete checkpoint of run.dir; none; or a checkpoint folder")
    accept_data_change: bool = Field(False, description="resume on other data than the checkpoint's; see data.from_step for where they begin")


class EvaluateConfig(Section):
    every_steps: int | None = Field(1000, ge=1, description="and after the last step; null for never")
    batches: int = Field(8, ge=1, description="global batches of the validation sources, always the same ones")


class SampleConfig(Section):
    every_steps: int | None = Field(1000, ge=1, description="and after the last step; null for never")
    prompts: tuple[str, ...] = ()
    steps: int = Field(250, ge=1, description="denoising steps")
    sampler: Literal["auto", "ddpm", "ddim", "euler", "heun"] = Field(
        "auto", description="of pictures; auto: ddpm with objective.image=ddpm, else euler; heun asks the model twice a step, for an error of second order"
    )
    ddim_eta: float = Field(0.0, ge=0, le=1, description="sampler ddim: share of ddpm's noise; 0 draws none")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance scale; 1 = none")
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, description="of text; 0 = most likely token")


class DemoConfig(Section):
    dir: str = Field(..., description="gets world/, tokenizer.json and llama/ (random weights) on first use")
    documents: int = Field(300, ge=2)
    tokens: bool = Field(False, description="the world has codes of its pictures and speech too, and its tokenizer <|speech|> and <|/speech|>")
    seed: int = Field(0, ge=0, lt=2**63)


class Config(Section):
    seed: int = Field(0, ge=0, lt=2**63)
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    metrics: MetricsConfig = MetricsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    demo: DemoConfig | None = Field(None, description="data and base that `fusiontrain train` makes by itself where they are missing; for debugging")
