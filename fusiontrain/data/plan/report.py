"""What a training will be shown, from the plan alone: no shard is opened."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fusiontrain.config.schema import Config
from fusiontrain.data.plan.plan import Plan, PlannedSequence, check_world_size
from fusiontrain.data.plan.reads import Reads
from fusiontrain.modality import IMAGE, TEXT


def report(plan: Plan, config: Config, steps: int, world_size: int) -> dict[str, Any]:
    """The first `steps` steps of a training, and from them how far its sources reach. Planning must not have begun elsewhere.

    fill: tokens that are no padding. balance: the dearest rank's share of a step against the mean, for the worst step and for all on average.
    read a chunk: how many ranks read a chunk of neighbours, or parts of it, in an epoch. bytes of chunks: what `data.chunk_cache_bytes` should allow for.
    """
    check_world_size(config, world_size)
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    ratios: dict[str, list[float]] = {"cost": [], IMAGE.name: []}
    reads = Reads(plan.sources)
    for step in range(steps):
        shares = plan.shares(step, world_size)
        ratios["cost"].append(_max_over_mean([sum(s.cost for s in share) for share in shares]))
        ratios[IMAGE.name].append(_max_over_mean([sum(s.image_tokens for s in share) for share in shares]))
        for rank, share in enumerate(shares):
            reads.add(step, rank, share)
            for sequence in share:
                _count(sequence, plan, documents, tokens)
    room = steps * plan.sequences_per_step * config.data.sequence_length
    text, image = (sum(count for key, count in tokens.items() if key.startswith(f"{name} ")) for name in (TEXT.name, IMAGE.name))
    # These are counted where windows are packed, which reach beyond the last of the steps.
    unusual = {"cut short": plan.truncated, "split": plan.split, "dropped as too long": plan.dropped, "dropped, patches do not divide them": plan.unfit}
    return {
        "samples": sum(len(source) for source in plan.sources),
        "steps": steps,
        "sequences": steps * plan.sequences_per_step,
        "documents": sum(documents.values()),
        "text tokens": text,
        "image tokens": image,
        "fill": f"{(text + image) / room:.4f}",
        **{f"samples {what} (in whole windows)": count for what, count in unusual.items()},
        **{f"balance of {name} over {world_size} ranks": f"worst {max(values):.4f}, mean {sum(values) / len(values):.4f}" for name, values in ratios.items()},
        f"of {world_size} ranks read a chunk": f"{reads.ranks_per_chunk():.2f}",
        **({"bytes of chunks that a rank holds": reads.most_bytes()} if config.data.io_mode == "lanes" else {}),
        **_by_source(plan, config, steps, documents, tokens),
    }


def _by_source(plan: Plan, config: Config, steps: int, documents: Counter[str], tokens: Counter[str]) -> dict[str, Any]:
    place = plan.place(steps)
    end = place * config.train.steps // steps
    rows: dict[str, Any] = {"documents of the mixed stream": place}
    for number, source in enumerate(plan.sources):
        path = source.name
        counts = ", ".join(f"{tokens[f'{name} {number}']:,} {name}" for name in (TEXT.name, IMAGE.name))
        epochs = plan.mixture.given(number, end) / len(source)
        rows[f"source {number} ({path})"] = f"{documents[str(number)]:,} documents, {counts} tokens; {epochs:.2f} epochs by step {config.train.steps:,}"
    if plan.mixture.end is not None and plan.mixture.end < end:
        rows["used up"] = f"about step {plan.mixture.end * steps // place:,}: before train.steps={config.train.steps:,}"
    return rows


def _count(sequence: PlannedSequence, plan: Plan, documents: Counter[str], tokens: Counter[str]) -> None:
    for document in sequence.documents:
        documents[str(document.source)] += 1
        tokens[f"{IMAGE.name} {document.source}"] += document.image_tokens
        tokens[f"{TEXT.name} {document.source}"] += document.num_tokens - document.image_tokens


def _max_over_mean(loads: list[int]) -> float:
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0
