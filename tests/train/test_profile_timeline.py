"""How the time of a trace is divided: traces written by hand, so that every share is known."""

from __future__ import annotations

import pytest

from fusiontrain.train.profile.host import SCOPE, STEP
from fusiontrain.train.profile.parts import BACKWARD, FORWARD, ONCE, RECOMPUTED, Call, Cell, whole
from fusiontrain.train.profile.timeline import divide
from fusiontrain.train.profile.trace import Event, parse_trace

CALLS = [
    Call("feed-forward", {"text": 3.0, "image": 1.0}, {"text": 1.0, "image": 1.0}),
    whole("attention"),
    whole("data wait"),
    whole("optimizer"),
]


def entry(kind, name, start, end, thread=1, **more):
    """Chrome's format, microseconds."""
    return {"ph": "X", "cat": kind, "name": name, "tid": thread, "ts": start, "dur": end - start, "args": more}


def scope(number, start, end):
    return entry("user_annotation", f"{SCOPE}{CALLS[number].group} #{number}", start, end)


def operator(name, start, end, sequence=None, thread=1):
    return entry("cpu_op", name, start, end, thread, **({} if sequence is None else {"Sequence number": sequence}))


def node(start, end, sequence, thread=1):
    return entry("cpu_op", "autograd::engine::evaluate_function: MmBackward0", start, end, thread, **{"Sequence number": sequence, "Fwd thread id": 1})


def divided(*entries):
    events = parse_trace([entry("user_annotation", f"{STEP} 1", 0, 100), *entries, {"ph": "i", "name": "ignored"}])
    return divide(events, CALLS)


def shares(found):
    return {tuple(cell): pytest.approx(1e6 * seconds) for cell, seconds in found.cells.items()}


def test_forward_and_backward_of_a_scope_and_whose_rows_they_are():
    found = divided(
        scope(2, 0, 10),
        scope(0, 10, 30), operator("aten::mm", 12, 28, 7),
        scope(1, 30, 40), operator("aten::bmm", 31, 39, 8),
        node(50, 58, 8), operator("aten::bmm", 51, 57, 8),
        node(58, 68, 7),
        scope(3, 80, 90),
    )  # fmt: skip
    assert shares(found) == {
        ("data wait", "all", ONCE): 10,
        ("feed-forward", "text", FORWARD): 15,
        ("feed-forward", "image", FORWARD): 5,
        ("attention", "all", FORWARD): 10,
        ("attention", "all", BACKWARD): 8,
        ("feed-forward", "text", BACKWARD): 5,
        ("feed-forward", "image", BACKWARD): 5,
        ("optimizer", "all", ONCE): 10,
        ("idle", "all", ONCE): 32,
    }
    assert sum(found.cells.values()) == pytest.approx(sum(found.steps)) == pytest.approx(100e-6)


def test_a_backward_belongs_to_the_operator_that_made_its_node():
    """An operator that makes none shows the number of the next one that does."""
    found = divided(
        scope(1, 0, 10), operator("aten::detach", 1, 2, 7),
        scope(0, 10, 20), operator("aten::mm", 11, 19, 7),
        node(50, 60, 7),
    )  # fmt: skip
    assert (Cell("attention", "all", BACKWARD) not in found.cells) and found.cells[Cell("feed-forward", "text", BACKWARD)] == pytest.approx(5e-6)


def test_a_scope_inside_a_backward_is_recomputation_and_makes_no_nodes():
    found = divided(
        scope(0, 0, 10), operator("aten::mm", 1, 9, 7),
        node(20, 60, 7), scope(1, 25, 45), operator("aten::bmm", 26, 44, 9),
        node(60, 70, 9),
    )  # fmt: skip
    assert found.cells[Cell("attention", "all", RECOMPUTED)] == pytest.approx(20e-6)
    assert found.cells[Cell("feed-forward", "image", BACKWARD)] == pytest.approx(10e-6)
    assert found.cells[Cell("rest of the model", "all", BACKWARD)] == pytest.approx(10e-6)


def test_collectives_are_exposed_where_the_host_waits_and_hidden_where_it_computes():
    gather = entry("user_annotation", "FSDP::all_gather_copy_out (blocks.0)", 40, 60)
    found = divided(
        entry("cpu_op", "gloo:all_gather", 5, 50),  # begins in one scope and ends in another
        scope(0, 0, 30), operator("aten::mm", 10, 20, 1),
        gather, operator("aten::split_with_sizes_copy", 52, 58),
        operator("c10d::allreduce_", 70, 80), entry("cpu_op", "gloo:all_reduce", 70, 85),
    )  # fmt: skip
    cells = {cell.group: 0.0 for cell in found.cells}
    for cell, seconds in found.cells.items():
        cells[cell.group] += 1e6 * seconds
    assert cells == pytest.approx({"feed-forward": 30, "collectives exposed": 20 + 15, "sharding": 10, "idle": 25})
    assert found.hidden == pytest.approx(25e-6)
    assert sum(found.cells.values()) == pytest.approx(100e-6)


def gpu_trace():
    launches = [
        scope(0, 0, 10), entry("cuda_runtime", "cudaLaunchKernel", 4, 5, correlation=1),
        scope(1, 10, 20), entry("cuda_runtime", "cudaLaunchKernel", 14, 15, correlation=2),
        operator("aten::mm", 5, 9, 7),
        node(22, 26, 7, thread=2), entry("cuda_runtime", "cudaLaunchKernel", 24, 25, 2, correlation=3),
        entry("cuda_runtime", "cudaMemcpyAsync", 1, 2, correlation=4),
        entry("cuda_runtime", "cudaStreamSynchronize", 30, 95, correlation=5),
        scope(2, 95, 100),
    ]  # fmt: skip
    kernels = [
        entry("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 5, 10, 7, correlation=4),
        entry("kernel", "gemm", 10, 30, 7, correlation=1),
        entry("kernel", "ncclDevKernel_AllGather", 25, 50, 8, correlation=99),
        entry("kernel", "attention", 40, 60, 7, correlation=2),
        entry("kernel", "gemm_backward", 60, 90, 7, correlation=3),
    ]
    return [*launches, *kernels]


def test_on_a_gpu_an_instant_belongs_to_its_kernel_and_the_kernel_to_who_launched_it():
    found = divided(*gpu_trace())
    cells = {tuple(cell): 1e6 * seconds for cell, seconds in found.cells.items()}
    assert cells == pytest.approx({
        ("host to device", "all", ONCE): 5,
        ("feed-forward", "text", FORWARD): 15,
        ("feed-forward", "image", FORWARD): 5,
        ("collectives exposed", "all", ONCE): 10,
        ("attention", "all", FORWARD): 20,
        ("feed-forward", "text", BACKWARD): 15,
        ("feed-forward", "image", BACKWARD): 15,
        ("data wait", "all", ONCE): 5,
        ("idle", "all", ONCE): 10,
    })  # fmt: skip
    assert found.hidden == pytest.approx(15e-6)
    assert found.syncs == {"cudaStreamSynchronize between the parts": 1}


def test_kernels_of_two_streams_do_not_count_twice():
    more = [entry("cuda_runtime", "cudaLaunchKernel", 15, 16, correlation=11), entry("kernel", "beside", 20, 45, 9, correlation=11)]
    found = divided(*gpu_trace(), *more)
    assert sum(found.cells.values()) == pytest.approx(100e-6)


def test_waits_that_a_gpu_would_have_are_counted_in_the_model_alone():
    found = divided(scope(1, 0, 10), operator("aten::nonzero", 2, 3), scope(3, 20, 30), operator("aten::_local_scalar_dense", 22, 23))
    assert found.syncs == {"aten::nonzero in attention, forward": 1}


def test_time_outside_of_the_steps_is_nobodys():
    found = divided(scope(0, 90, 120), operator("aten::mm", 95, 115, 3), scope(3, 200, 300))
    assert sum(found.cells.values()) == pytest.approx(100e-6)
    assert found.cells[Cell("idle", "all", ONCE)] == pytest.approx(90e-6)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no 'fusiontrain step'"):
        divide([Event("aten::mm", "cpu_op", 1, 0, 1)], CALLS)
