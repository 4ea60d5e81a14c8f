"""How fast and how large GPUs are, and from that how long a step should take: a roofline, every assumption of which is a number of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusiontrain.config.schema import ParallelConfig
from fusiontrain.train.devices import PEAKS
from fusiontrain.train.estimate.traffic import ALL_REDUCE, Channel, wire_bytes

GB = 1e9

HOST_BANDWIDTH = 12 * GB
"""Bytes/s of the host's memory, and of the way to it, that one GPU's share of an offloaded update gets."""


@dataclass(frozen=True)
class Device:
    """Of one GPU. peak_flops: dense FLOP/s by precision, None where unknown. Bandwidths in bytes/s, those of links one way: `intra_node` to the
    other GPUs of its machine, `inter_node` its share of the machine's network."""

    name: str
    peak_flops: Mapping[str, float | None]
    memory_bytes: float | None
    memory_bandwidth: float
    intra_node: float
    inter_node: float


def _device(key: str, name: str, memory: float, memory_bandwidth: float, intra_node: float, inter_node: float) -> Device:
    peaks = {precision: PEAKS[key].of(precision) for precision in ("bfloat16", "float32")}
    return Device(name, peaks, memory * GB, memory_bandwidth * GB, intra_node * GB, inter_node * GB)


DEVICES = {
    "a100": _device("a100", "A100 SXM 80 GB", 80, 2039, 300, 25),
    "h100": _device("h100", "H100 SXM 80 GB", 80, 3350, 450, 50),
    "h200": _device("h200", "H200 SXM 141 GB", 141, 4800, 450, 50),
    "b200": _device("b200", "B200 SXM 180 GB", 180, 7700, 900, 50),
    "mi300": _device("mi300", "MI300X 192 GB", 192, 5300, 448, 50),
    "cpu": Device("CPU", {"bfloat16": None, "float32": None}, None, 20 * GB, 1 * GB, 1 * GB),
}
"""Vendors' data sheets; float32 without TF32. inter_node: one 400 Gb/s adapter per GPU (A100: 200)."""


@dataclass(frozen=True)
class Efficiency:
    """What share of the data sheet a training gets. compute: of the peak FLOP/s. links: of a link's bandwidth. overlap: of the communication that
    runs beside computation, as far as that lasts. reserve: of the memory that tensors cannot have: CUDA context, NCCL, fragments."""

    compute: float = 0.5
    links: float = 0.7
    overlap: float = 0.9
    reserve: float = 0.08


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. exposed: communication that nothing hides."""

    compute: float
    communication: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer


def step_time(
    device: Device,
    efficiency: Efficiency,
    parallel: ParallelConfig,
    flops: float,
    traffic: Mapping[Channel, float],
    state_bytes: float,
    gpus_per_node: int,
) -> StepTime | None:
    """Of one rank. flops: with those of recomputation. traffic: bytes of messages per channel. state_bytes: weights that train, their gradients and
    optimizer state, which an update reads and writes. None for a device whose peak is unknown."""
    peak = device.peak_flops[parallel.precision]
    if peak is None:
        return None
    compute = flops / (peak * efficiency.compute)
    communication = sum(
        wire_bytes(channel, size) / (efficiency.links * (device.inter_node if spans_nodes(channel, gpus_per_node) else device.intra_node))
        for channel, size in traffic.items()
    )
    if parallel.cpu_offload:  # a rank's own shards come from the host for every gathering, and its gradients go there
        communication += sum(size / len(channel.ranks) for channel, size in traffic.items() if channel.collective != ALL_REDUCE) / HOST_BANDWIDTH
    exposed = communication - min(communication * efficiency.overlap, compute)
    return StepTime(compute, communication, exposed, 2 * state_bytes / (HOST_BANDWIDTH if parallel.cpu_offload else device.memory_bandwidth))


def spans_nodes(channel: Channel, gpus_per_node: int) -> bool:
    """Whether the ranks of a channel are in more than one machine."""
    return len({rank // gpus_per_node for rank in channel.ranks}) > 1
