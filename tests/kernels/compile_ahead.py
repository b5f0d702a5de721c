"""Compile every case of every kernel for GPUs that are not here; a process of its own, since Triton must not interpret.

python compile_ahead.py [--few] [MODULE ...]: prints a line of JSON for each case and architecture. Modules are those
of bcmfnet.kernels that have `aot_cases`, or the files given. --few compiles the first and the last case of each kernel,
for the architectures in turn.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import bcmfnet.kernels

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32)}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def modules(files: list[str]) -> list[Any]:
    if not files:
        names = [f"bcmfnet.kernels.{module.name}" for module in iter_modules(bcmfnet.kernels.__path__)]
        return [module for module in map(importlib.import_module, names) if hasattr(module, "aot_cases")]
    found = []
    for file in files:
        spec = spec_from_file_location(Path(file).stem, file)
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found.append(module)
    return found


def compile_case(case: Any, target: GPUTarget) -> dict[str, int]:
    """Registers a thread, and instructions that store or load what did not fit into them."""
    signature = {name: "constexpr" for name in case.function.arg_names} | case.signature
    constants = {(case.function.arg_names.index(name),): value for name, value in case.constants.items()}
    pointers = [i for i, name in enumerate(case.function.arg_names) if signature[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}  # torch aligns what it allocates
    source = ASTSource(case.function, signature, constants, aligned)
    kernel = triton.compile(source, target=target, options={"num_warps": case.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        instructions = run(TOOLS / "nvdisasm", "-c", file.name)
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", usage))
    return {"registers": registers, "spills": len(re.findall(r"\b(?:STL|LDL)\b", instructions))}


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def describe(number: int) -> str:
    module, case, name = work[number]
    return json.dumps({"kernel": module, "case": case.name, "target": name} | compile_case(case, TARGETS[name]))


def few(cases: list[tuple[str, Any]]) -> list[tuple[str, Any, str]]:
    """The first and the last case of each kernel, each for one of the architectures."""
    first, last = {}, {}
    for module, case in cases:
        first.setdefault(case.function, (module, case))
        last[case.function] = (module, case)
    ends = {id(case): (module, case) for module, case in [*first.values(), *last.values()]}.values()
    return [(*end, name) for end, name in zip(ends, itertools.cycle(TARGETS), strict=False)]


arguments = sys.argv[1:]
files = [argument for argument in arguments if argument != "--few"]
cases = [(m.__name__, case) for m in modules(files) for case in m.aot_cases()]
work = few(cases) if "--few" in arguments else [(*case, name) for case in cases for name in TARGETS]
with multiprocessing.get_context("fork").Pool() as pool:  # a child has the cases, which cannot be sent to one
    for line in pool.imap_unordered(describe, range(len(work))):
        print(line, flush=True)
