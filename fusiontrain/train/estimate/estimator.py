"""What a run would take: parameters, memory, FLOPs, traffic and time of one rank, without any of the hardware."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch._subclasses.fake_tensor import FakeTensorMode

from fusiontrain.config.schema import Config
from fusiontrain.data.batch_arrays import patch_dim
from fusiontrain.data.plan.plan import check_world_size
from fusiontrain.modality import IMAGE, TEXT
from fusiontrain.models.build import build_model
from fusiontrain.models.flops import count_flops, recomputed_flops
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.recipes.recipe import SHARED
from fusiontrain.parallel.mesh import mesh_shape
from fusiontrain.train.estimate.hardware import Device, Efficiency, StepTime, step_time
from fusiontrain.train.estimate.layers import simulate_layers, with_shape
from fusiontrain.train.estimate.model import shape_of, traceable, without_codec
from fusiontrain.train.estimate.simulate import AVERAGES, GRADIENTS, OPTIMIZER, OPTIMIZER_STATE, WEIGHTS, Simulated
from fusiontrain.train.estimate.workload import describe, workload
from fusiontrain.utils.errors import UserError
from fusiontrain_kernels._launch import tracing_for_a_gpu

OFFLOADED = (WEIGHTS, GRADIENTS, OPTIMIZER_STATE, AVERAGES)
"""What `parallel.cpu_offload` keeps in the host's memory."""


@dataclass(frozen=True)
class Target:
    """The machines of a run."""

    world_size: int
    device: Device
    gpus_per_node: int = 8
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def room(self) -> float | None:
        """Bytes of a GPU that tensors can have; None where its memory is not known."""
        memory = self.device.memory_bytes
        return None if memory is None else memory * (1 - self.efficiency.reserve)


@dataclass(frozen=True)
class Prediction:
    """Of one rank and step. flops and recomputed: the model's own, and those of activation checkpointing."""

    config: Config
    micro_batch: int
    micro_batches: int
    simulated: Simulated
    flops: float
    recomputed: float
    time: StepTime | None

    @property
    def phase(self) -> str:
        """Where the most memory of the GPU is needed."""
        return max(self.simulated.memory, key=self.memory_of)

    @property
    def memory(self) -> float:
        """Bytes of the GPU at the peak."""
        return self.memory_of(self.phase)

    def memory_of(self, phase: str) -> float:
        """Bytes of the GPU at the peak of a phase."""
        return sum(size for category, size in self.simulated.memory[phase].items() if not self.is_on_host(category))

    def is_on_host(self, category: str) -> bool:
        """Whether these bytes are in the host's memory."""
        return self.config.parallel.cpu_offload and category in OFFLOADED


class Estimator:
    """Knows the model and the data of a config; `predict` says what it, or another config of the same model and data, takes.

    parameters: group -> "trainable" or "frozen" -> number. flops: of a step over all ranks, by kind. step: means per sequence. assumptions:
    sentences. Raises UserError for a base that is neither here nor known, and for tokens that do not fit a sequence.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        text_tokens: int | None = None,
        image_tokens: int | None = None,
        tokens_per_image: int | None = None,
    ) -> None:
        self.target = target
        self.on_gpu = target.device.memory_bytes is not None
        check_world_size(config, target.world_size)
        self.shape, known_by_name = shape_of(config)
        lean, codec = without_codec(config)
        self.work = workload(config, patch_dim(lean.data), text_tokens, image_tokens, tokens_per_image)
        self.config, changes = traceable(lean, self.on_gpu)
        model = self._declare(self.config)
        self.parameters = count_parameters(model)
        batches = self.work.batches(self.config)
        self.step = describe(batches)
        sequences = config.train.global_batch_sequences
        counted = Counter[str]()
        for batch in batches:
            counted.update(count_flops(model, batch))
        self.flops = {kind: count * sequences / len(batches) for kind, count in counted.items()}
        every = config.parallel.activation_checkpointing_every
        self._recomputed = sum(recomputed_flops(model, batch, every) for batch in batches) * sequences / len(batches)
        self.assumptions = [note for note in (self.work.origin, known_by_name, codec, *changes) if note]

    def predict(self, config: Config) -> Prediction:
        """config: `self.config`, or one that differs from it in `parallel` or in the size of micro-batches. Raises UserError for a mesh that does
        not fit the ranks."""
        target, parallel = self.target, config.parallel
        micro_batch, micro_batches = micro_batches_of(config, target.world_size)
        mesh_shape(parallel, target.world_size)
        batch = self.work.largest_batch(config, micro_batch)
        with tracing_for_a_gpu():
            simulated = simulate_layers(config, self.shape, batch, micro_batches, target.world_size)
        flops = sum(self.flops.values()) / target.world_size
        recomputed = self._recomputed / target.world_size if parallel.activation_checkpointing == "full" else 0.0
        held = simulated.memory[OPTIMIZER]
        states = held.get(GRADIENTS, 0) * 2 + held.get(OPTIMIZER_STATE, 0)  # the weights that train are as large as their gradients
        time = step_time(
            target.device, target.efficiency, parallel, flops + recomputed, simulated.bytes, states, target.gpus_per_node
        )
        return Prediction(config, micro_batch, micro_batches, simulated, flops, recomputed, time)

    def _declare(self, config: Config) -> FusionModel:
        """The whole model, of fake tensors."""
        with tracing_for_a_gpu(), FakeTensorMode():
            return build_model(with_shape(config, self.shape, self.shape.num_layers))


def micro_batches_of(config: Config, world_size: int) -> tuple[int, int]:
    """Sequences of a micro-batch and micro-batches of a step, on one rank. Raises UserError where they do not divide the global batch."""
    share = config.train.global_batch_sequences // world_size
    size = config.train.micro_batch_sequences or share
    if share % size:
        raise UserError(f"train.micro_batch_sequences={size}: does not divide the {share} sequences of a rank")
    return size, share // size


def count_parameters(model: FusionModel) -> dict[str, dict[str, int]]:
    """Numbers of parameters by whose rows use them (text, image, or all: shared) and by whether they train."""
    found: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        group = next((group for group in (TEXT.name, IMAGE.name) if group in parts), SHARED)
        counts = found.setdefault(group, {"trainable": 0, "frozen": 0})
        counts["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return found


def total(parameters: Mapping[str, Mapping[str, int]], kind: str) -> int:
    """Parameters that are `kind`, of all groups."""
    return sum(counts[kind] for counts in parameters.values())
