"""What is made of the counts: occupancy, a row for each kernel, and the comparison with the committed file."""

from __future__ import annotations

import csv

import pytest
from sass.build import Count, Traffic
from sass.count import COLUMNS, RESULTS, Case, by_kernel, grown, resident_warps, row_of

COUNT = Count("kernel", 1, 4, 32, 256, 32, 1024, Traffic(10, 40, 30), Traffic(2, 8, 8), {
    "integer": 1000, "float": 500, "global load 16": 10, "global store 4": 2, "shared load 4": 7, "shared atomic 4": 3,
})  # fmt: skip


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [
        (256, 32, 1024, 64),  # all of a multiprocessor's
        (128, 166, 46120, 12),  # 168 registers: 3 warps a scheduler
        (128, 64, 60 << 10, 12),  # 3 blocks in 228 KB
        (64, 32, 1024, 64),
        (32, 16, 1024, 32),  # 32 blocks
        (1024, 64, 1024, 32),
    ],
)
def test_resident_warps(threads, registers, shared, expected):
    assert resident_warps(COUNT._replace(threads=threads, registers=registers, shared=shared)) == expected


def test_a_row():
    """Counts of one image stand for eight; sectors have 32 bytes; floors are of 132 x 4 x 1.75 GHz, and of 4.3 TB/s."""
    row = row_of(Case("case", "op", lambda: None, images=8), COUNT)
    assert set(row) == set(COLUMNS)
    assert (row["blocks"], row["instructions"], row["integer"], row["shared"], row["atomic"]) == (
        32,
        12176,
        8000,
        56,
        24,
    )
    assert (row["bytes_read"], row["bytes_written"]) == (8 * 30 * 32, 8 * 8 * 32)
    assert (row["sectors_a_read"], row["sectors_a_write"]) == (4, 4)
    assert row["issue_us"] == pytest.approx(12176 / (132 * 4 * 1750), abs=1e-3)
    special = row_of(Case("case", "op", lambda: None), COUNT._replace(instructions={"special": 231000}))
    assert special["floor_us_h200"] == special["special_us"] == 2  # 2 clocks a warp
    assert row["widths"].split()[0] == "global_load_16:80"
    bound_by_memory = row_of(Case("case", "op", lambda: None), COUNT._replace(reads=Traffic(1, 1, 10**6)))
    assert bound_by_memory["floor_us_h200"] == pytest.approx((10**6 + 8) * 32 / 4.3e6, abs=1e-3)
    assert bound_by_memory["floor_us_h100"] == pytest.approx((10**6 + 8) * 32 / 3.0e6, abs=1e-3)


def test_a_single_block_is_not_multiplied():
    """It adds up what the others have left, once for all images."""
    row = row_of(Case("case", "op", lambda: None, images=8), COUNT._replace(blocks=1))
    assert (row["blocks"], row["instructions"]) == (1, 1522)


@pytest.mark.parametrize(
    ("column", "named"),
    [("issue_us", True), ("memory_us_h200", True), ("scratch_bytes", True), ("floor_us_h100", False)],
)
def test_what_has_grown_is_named(column, named):
    sizes = {"issue_us": "10", "memory_us_h200": "20", "floor_us_h100": "30", "scratch_bytes": "40"}
    committed = [{"case": "a", "kernel": "k"} | sizes]
    row = {
        "case": "a",
        "kernel": "k",
        "issue_us": 10.4,
        "memory_us_h200": 20.9,
        "floor_us_h100": 31,
        "scratch_bytes": 40,
    }
    assert grown([row], committed) == []
    found = grown([row | {column: 60}], committed)
    assert found == ([f"a: k: {column}: expected {committed[0][column]}, got 60"] if named else [])
    assert grown([row | {"kernel": "new", column: 60}], committed) == []


def test_what_is_compiled_of_one_kernel_is_one_row():
    """Sums of what was done, the larger sizes, every class of instructions; what has another name stays apart."""
    small = COUNT._replace(kernel="b#1", threads=128, registers=40, instructions={"float": 1, "warp": 2})
    a, b = by_kernel([small, COUNT._replace(kernel="a"), COUNT._replace(kernel="b#0")])
    assert a == COUNT._replace(kernel="a")
    assert b[:7] == ("b", 2, 8, 64, 256, 40, 1024) and (b.reads, b.writes) == (Traffic(20, 80, 60), Traffic(4, 16, 16))
    assert b.instructions == COUNT.instructions | {"float": 501, "warp": 2}


@pytest.mark.parametrize("backend", RESULTS)
def test_the_committed_file_has_every_column(backend):
    with RESULTS[backend].open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    cases = {row["case"] for row in rows}
    assert cases == {row["case"] for row in rows if row["kernel"] == "all"} and len(cases) > 10


@pytest.mark.parametrize(("backend", "cases", "most"), [("cuda", 4, 40e6), ("triton", 2, 60e6)])
def test_the_upsampled_loss_of_eight_images_takes_little_scratch(backend, cases, most):
    """Eight images of 1024x1024 in 19 classes, whose logits at that size would take 638 MB. Triton's kernels keep maps
    of what the CUDA kernels hold, and where ranks decide more of them."""
    with RESULTS[backend].open() as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "all"]
    scratch = {row["case"]: int(row["scratch_bytes"]) for row in rows if row["case"].startswith("bcl-8x19x128x128")}
    scratch = {case: size for case, size in scratch.items() if backend == "cuda" or not case.endswith("paper")}
    assert len(scratch) == cases and 20e6 < min(scratch.values()) and max(scratch.values()) < most
