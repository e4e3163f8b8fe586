"""The interpreter harness must itself be able to fail: a wrong kernel has to be caught."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from plugins import interpreter
from plugins.interpreter import Watch, watching


@triton.jit
def copy_kernel(x, y, count, step, B: tl.constexpr):
    index = tl.program_id(0) * step + tl.arange(0, B)
    tl.store(y + index, tl.load(x + index, mask=index < count, other=0.0), mask=index < count)


@triton.jit
def order_kernel(log, ticket):
    place = tl.atomic_add(ticket, 1)
    tl.store(log + place, tl.program_id(0) * 10 + tl.program_id(1))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + row * N + column), tl.load(b + row * N + column), input_precision="ieee")
    tl.store(c + row * N + column, product)


def run_copy(count: int, step: int, length: int = 32) -> list[int]:
    """How often each element of the output was written."""
    x, y = torch.arange(length, dtype=torch.float32), torch.zeros(length)
    watch = Watch()
    watch.allow({"x": x, "y": y})
    with watching(watch):
        interpreter.run(copy_kernel, (4, 1, 1), {"x": x, "y": y, "count": count, "step": step, "B": 8})
    return watch.write_counts(y).tolist()


def test_a_correct_kernel_writes_everything_once():
    assert run_copy(32, 8) == [1] * 32


def test_an_address_outside_is_caught():
    with pytest.raises(Exception, match="load of 8 addresses outside every buffer; first: [xy] \\+ 128 bytes"):
        run_copy(64, 32)


def test_a_double_write_is_counted():
    counts = run_copy(32, 6)
    assert max(counts) == 2 and counts[-1] == 0


def test_the_seed_shuffles_programs_and_each_runs_once():
    logs = []
    for seed in (None, 1, 2):
        log, ticket = torch.zeros(12, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with watching(Watch(seed=seed)):
            interpreter.run(order_kernel, (4, 3, 1), {"log": log, "ticket": ticket})
        logs.append(log.tolist())
    assert logs[0] == [x * 10 + y for x in range(4) for y in range(3)]
    assert logs[1] != logs[0] and logs[2] != logs[1]
    assert sorted(logs[1]) == sorted(logs[2]) == logs[0]


def test_bfloat16_products_are_products():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    c = torch.zeros(16, 16)
    interpreter.run(dot_kernel, (1, 1, 1), {"a": a, "b": b, "c": c, "N": 16})
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-4)


def test_compilation_still_works_afterwards():
    """The swapped library functions are put back: `triton.jit` functions stay compilable in the same process."""
    run_copy(32, 8)
    assert isinstance(tl.sum, triton.runtime.JITFunction)
    assert "create_dot" not in vars(interpreter.backend.interpreter_builder)


def test_a_kernel_compiles_after_it_was_interpreted():
    from plugins import dispatch
    from plugins.aot.compile import Job, to_ptx
    from plugins.tactics import TACTICS
    from tests.plugins.cases import operator

    dispatch.run(TACTICS[4], operator(4, 16, (4, 4), 8, "float32"))
    assert ".target sm_87" in to_ptx(Job("route", "members", "float32", 87))[0]
