"""Compiles for GPUs that are not here every Triton kernel that the launchers launch, and checks the code.

    python -m tests.compiled_kernels [--only CASE ...] [--break WHAT]

The launchers run as they do on a GPU, up to the launch: Triton's own specialisation decides what is compiled. Prints a
line of JSON for each kernel and target and ends with status 1 if any of them spills (attention with Triton before 3.9:
more than 40), does not fit, or does its products without tensor cores. Not under Triton's interpreter: a kernel is
interpreted or compiled for the life of a process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from stepdpo_kernels.ops import ragged_triton
from stepdpo_kernels.ops.linear_logprob import triton_chunked, triton_kernel
from stepdpo_kernels.ops.linear_logprob.triton_kernel import Config, Problem
from stepdpo_kernels.ops.pair_loss import triton_kernel as pair_kernel
from stepdpo_kernels.ops.tree_attention import triton_kernel as tree_kernel
from stepdpo_kernels.ops.tree_attention.triton_kernel import Launch
from stepdpo_kernels.ops.tree_attention.triton_tiles import make_tiles
from stepdpo_kernels.packing import build_batch
from tests.forests import nested_pairs

# target of triton_kernel -> what Triton calls it, its shared memory in bytes, its matrix instruction
TARGETS = {
    ("cuda", 80): (GPUTarget("cuda", 80, 32), 99 * 1024, "mma.sync"),  # as much as consumer parts have
    ("cuda", 90): (GPUTarget("cuda", 90, 32), 227 * 1024, "wgmma.mma_async"),
    ("cuda", 100): (GPUTarget("cuda", 100, 32), 227 * 1024, "tcgen05.mma"),
    ("hip", 0): (GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
}


class Offline:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target][0]


@contextmanager
def launches(target: tuple[str, int]) -> Iterator[list[tuple[str, Any]]]:
    """Within this context a launch compiles its kernel for `target` and no more; gives names and compiled kernels."""
    compiled: list[tuple[str, Any]] = []
    run, target_of, processors = JITFunction.run, triton_kernel.target_of, triton_kernel.processors

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(Offline(target))
    JITFunction.run = compile_only
    modules: tuple[Any, ...] = (triton_kernel, tree_kernel)
    for module in modules:
        module.target_of = lambda device: target
    triton_kernel.processors = lambda device: 100
    try:
        yield compiled
    finally:
        JITFunction.run, triton_kernel.processors = run, processors
        for module in modules:
            module.target_of = target_of


def head(dtype: torch.dtype, rows: int, size: int, vocabulary: int, bias: bool, softcap: bool) -> None:
    """Forward and backward of both heads; an odd size keeps rows from beginning at multiples of 16 bytes."""
    hidden, weight = torch.zeros(rows, size, dtype=dtype), torch.zeros(vocabulary, size, dtype=dtype)
    options = (torch.zeros(vocabulary, dtype=dtype) if bias else None, 30.0 if softcap else None, None)
    problem = (hidden, weight, torch.zeros(rows, dtype=torch.int64), *options)
    _, stats = triton_kernel.forward(Problem(*problem))
    grad = torch.zeros(rows)
    triton_kernel.backward(Problem(*problem), grad, stats, True, True, bias)
    _, stats, _, kept = triton_chunked._forward._init_fn(*problem, True, True)
    for q in (kept, kept[: rows // 2]):
        triton_chunked._weight_gradients._init_fn(grad, stats, q, *problem, True, bias)
    triton_chunked._forward._init_fn(*problem, False, False)


def pair(pairs: int, rows: int, reference: bool, weights: bool) -> None:
    """Forward and backward; counts that are 1, divisible by 16 or neither are compiled apart."""
    many = torch.zeros(rows, dtype=torch.int64)
    few = torch.zeros(pairs, dtype=torch.int64)
    refs, weight = torch.zeros(2 * pairs) if reference else None, torch.zeros(pairs) if weights else None
    logps = torch.zeros(rows)
    pair_kernel._pair_loss._init_fn(logps, many, few, many, many, few, few, refs, weight, 0.4, 0.0)
    pair_kernel._token_gradients._init_fn(torch.zeros(2 * pairs), few, few, many, many, pairs)


def tree(
    dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int], window: bool, softcap: bool, sinks: bool
) -> None:
    """Forward and backward; every head begins at a multiple of 16 elements."""
    pairs = nested_pairs()
    plan = build_batch(pairs, range(len(pairs)), "tree").plan
    query, key, value = (
        torch.zeros(plan.num_tokens, h, size, dtype=dtype)
        for h, size in ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    )
    options = (1.0, 5 if window else None, 30.0 if softcap else None)
    config = tree_kernel._config(query, value)
    tiles = make_tiles(plan, options[1], heads[0] // heads[1], *config.shapes)
    inputs = (query, key, value, torch.zeros(heads[0], dtype=dtype) if sinks else None, *tiles, *options)
    out, stats = tree_kernel._attention._init_fn(*inputs)
    tree_kernel._gradients._init_fn(out, out, stats, *inputs[:6], *inputs[7:])  # without forward's tiles


def segments(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    index, lengths = torch.zeros(64, dtype=torch.int64), torch.full((16,), 4)
    ragged_triton.segment_sum._init_fn(torch.zeros(64, *shape, dtype=dtype), index, lengths)


# Head sizes of queries and keys, and of values, to query heads for each head of keys: what models have, and odd ones
TREES = {(16, 16): 2, (32, 32): 4, (64, 64): 7, (128, 128): 4, (192, 128): 1, (256, 256): 2}
ODD_TREES = {(80, 80): 1, (96, 48): 1, (240, 144): 3}
PLAIN, WINDOW, SOFTCAP, ALL = (False,) * 3, (True, False, False), (False, True, False), (True,) * 3  # and sinks


def trees() -> Iterator[tuple[torch.dtype, dict[tuple[int, int], int], tuple[bool, bool, bool]]]:
    """What makes kernels of their own; float16 and bfloat16 differ in nothing but an instruction's name."""
    for options in (PLAIN, WINDOW, SOFTCAP, ALL):
        yield torch.bfloat16, TREES, options
    for options in (PLAIN, ALL):
        yield torch.bfloat16, ODD_TREES, options
        yield torch.float32, TREES, options
    yield torch.float32, ODD_TREES, ALL
    yield torch.float16, TREES | ODD_TREES, ALL


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for count, reference, weights in itertools.product((1, 16, 17), (False, True), (False, True)):
        name = f"pair-{count}{'-reference' * reference}{'-weights' * weights}"
        yield name, lambda n=count, reference=reference, weights=weights: pair(n, n, reference, weights)
    sixteen, thirty_two = (torch.bfloat16, torch.float16), (torch.float32,)
    shapes = ((1024, 128, 512), (1023, 67, 509), (1, 128, 1000))  # numbers divisible by 16, not, and 1
    for dtype, shape, bias, softcap in itertools.product(sixteen + thirty_two, shapes, (False, True), (False, True)):
        kind = f"{str(dtype).removeprefix('torch.')}-{shape[0]}"
        name = f"head-{kind}{'-bias' * bias}{'-softcap' * softcap}"
        yield name, lambda d=dtype, s=shape, bias=bias, softcap=softcap: head(d, *s, bias, softcap)
    for dtype, shape in itertools.product((*sixteen, *thirty_two, torch.float64), ((), (5, 26), (4, 128))):
        name = f"segments-{str(dtype).removeprefix('torch.')}-{math.prod(shape)}"
        yield name, lambda d=dtype, s=shape: segments(d, s)
    for dtype, shares, options in trees():
        for sizes, share in shares.items():
            on = "".join(
                f"-{name}" for name, chosen in zip(("window", "softcap", "sinks"), options, strict=True) if chosen
            )
            name = f"tree-{str(dtype).removeprefix('torch.')}-{sizes[0]}-{sizes[1]}{on}"
            yield name, lambda d=dtype, s=sizes, h=share, options=options: tree(d, (2 * h, 2), s, *options)


def resources(kernel: Any, target: tuple[str, int]) -> dict[str, Any]:
    """shared (bytes), registers, spilled (bytes, or registers on AMD), and how many matrix instructions there are."""
    instruction = TARGETS[target][2]
    if target[0] == "hip":
        assembly = kernel.asm["amdgcn"]
        numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)", assembly)}
        spilled = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
        registers, matrix = numbers["vgpr_count"], assembly.count(instruction)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            command = [str(tool), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        spilled = numbers["STACK"] + numbers["LOCAL"]
        registers, matrix = numbers["REG"], kernel.asm["ptx"].count(instruction)
    return {"shared": kernel.metadata.shared, "registers": registers, "spilled": spilled, "matrix": matrix}


# The tiles of attention are chosen with 3.9. Older versions spill some: bytes, or on AMD registers, of a thread.
OLD_TREE_SPILLS = 40 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 0


def faults(kernel: Any, target: tuple[str, int], found: dict[str, Any], case: str) -> list[str]:
    wrong = []
    wide = "float32" in case  # products are exact and need no tensor cores
    if found["spilled"] > (OLD_TREE_SPILLS if case.startswith("tree-") else 0):
        wrong.append(f"spills {found['spilled']}")
    if found["shared"] > TARGETS[target][1]:
        wrong.append(f"needs {found['shared']} bytes of shared memory of {TARGETS[target][1]}")
    if "tt.dot" in kernel.asm["ttir"] and not found["matrix"] and not wide:
        wrong.append(f"multiplies without {TARGETS[target][2]}")
    return wrong


def break_something(what: str) -> None:
    """Makes this check fail, which shows that it can."""
    wrong = {
        "registers": (Config(128, 256, 32, 4, 2), Launch(128, 128, 4, 2)),
        "shared memory": (Config(128, 128, 128, 8, 5), Launch(128, 128, 8, 5)),
        "tensor cores": (Config(128, 128, 64, 8, 4), Launch(64, 32, 8, 2)),
    }
    of_head, of_tree = wrong[what]
    for key in triton_kernel.CONFIGS:
        triton_kernel.CONFIGS[key] = of_head
    for of in tree_kernel.CONFIGS:
        tree_kernel.CONFIGS[of] = tree_kernel.Config(of_tree, of_tree, of_tree)
    if what == "tensor cores":  # as if products were of float32
        triton_kernel.INTERPRETED = tree_kernel.INTERPRETED = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--break", dest="what", choices=["registers", "shared memory", "tensor cores"])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name begins with one of these")
    arguments = parser.parse_args()
    if arguments.what:
        break_something(arguments.what)
    seen: set[str] = set()
    failed = False
    for target in TARGETS:
        with launches(target) as compiled:
            for case, launch in cases():
                if not case.startswith(tuple(arguments.only)):
                    continue
                compiled.clear()
                try:
                    launch()
                except triton.runtime.errors.OutOfResources as error:
                    compiled.clear()
                    failed = True
                    print(json.dumps({"target": target, "case": case, "faults": [str(error)]}), flush=True)
                for name, kernel in compiled:
                    if kernel.hash in seen:
                        continue
                    seen.add(kernel.hash)
                    found = resources(kernel, target)
                    wrong = faults(kernel, target, found, case)
                    failed |= bool(wrong)
                    line = {"target": target, "case": case, "kernel": name, **found, "faults": wrong}
                    print(json.dumps(line), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
