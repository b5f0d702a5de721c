"""Tables of figures: a ratio stands only where the best eager form was measured in the same run."""

from __future__ import annotations

import pytest

from bcmfnet.benchmarks import figures, scaling


def row(provider="cpp", baseline="eager_best", speedup="37.123"):
    return {"provider": provider, "baseline": baseline, "speedup": speedup, "time_us_50": "4399.1"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (row(), "4.4 ms (37x)"),
        (row(baseline="eager_best_bf16"), "4.4 ms (37x)"),
        (row(baseline="eager", speedup="128"), "4.4 ms"),
        (row(speedup=""), "4.4 ms"),
        (row("eager_best", speedup="1"), "4.4 ms"),
        (None, "-"),
    ],
)
def test_cells(value, expected):
    assert figures.cell(value) == expected


def test_a_cell_with_memory():
    assert figures.cell(row() | {"extra_bytes": "4915200"}, memory=True) == "4.4 ms (37x), 4.92 MB"
    assert figures.cell(row() | {"extra_bytes": ""}, memory=True) == "4.4 ms (37x)"
    large = {"time_us_50": "1410000", "extra_bytes": "2512000000"}
    assert figures.cell(row() | large, memory=True) == "1,410 ms (37x), 2,512 MB"


def test_a_table_has_the_machines_side_by_side():
    table = figures.Table("bcl", 1, {"a": "one", "b": "two"}, {"ours": ("cpp", None)})
    other = {("bcl", "two", "cpp", "2"): row()}  # another number of threads is no part of the table
    rows = {"X": {("bcl", "one", "cpp", "1"): row()}, "Y": {("bcl", "two", "naive", "1"): row()}, "Z": other}
    found = list(figures.lines(table, rows))
    assert found == ["|  | X, a | X, b | Y, a | Y, b |", "|---|---|---|---|---|", "| ours | 4.4 ms (37x) | - | - | - |"]


def test_a_table_is_drawn_anew_and_nothing_else():
    table = figures.Table("bcl", 1, {"a": "one"}, {"ours": ("cpp",)})
    old = "Text | ours |\n\n|  | X, a |\n|---|---|\n| ours | 9 ms |\n\nMore.\n"
    found = figures.redrawn(old, table, {"X": {("bcl", "one", "cpp", "1"): row()}})
    assert found == old.replace("9 ms", "4.4 ms (37x)")


def test_rows_without_a_time_are_left_out(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("benchmark,case,provider,threads,time_us_50\nbcl,c,cpp,1,4.5\nbcl,c,cuda,1,\n")
    assert list(figures.measured(path)) == [("bcl", "c", "cpp", "1")]
    assert figures.measured(tmp_path / "none.csv") == {}


def test_floors_of_both_languages_stand_in_one_row(monkeypatch, tmp_path):
    head = "case,kernel,launches,instructions,issue_us,memory_us_h200,scratch_bytes\n"
    cuda, triton = tmp_path / "cuda.csv", tmp_path / "triton.csv"
    cuda.write_text(head + "a,k,1,2,3,4,5\na,all,7,163343313,176.779,499.913,51566592\nb,all,1,1e6,1,2,0\n")
    triton.write_text(head + "a,all,9,1,334.31,499.98,52099999\n")
    monkeypatch.setattr(figures, "INSTRUCTIONS", cuda)
    monkeypatch.setattr(figures, "TRITON_INSTRUCTIONS", triton)
    assert figures.floors()[2:] == [
        "| a | 7 | 163.3 M | 177 | 500 | 51.6 | 9 | 334 | 500 | 52.1 |",
        "| b | 1 | 1.0 M | 1 | 2 | 0 | - | - | - | - |",
    ]


def test_the_scaling_table_has_ends_and_powers(monkeypatch):
    """Time that grows as the value, memory as its square."""
    rows = {}
    for cases in scaling.AXES.values():
        for value, case in cases.items():
            for provider in ("cpp", "eager_best", "naive"):
                costs = {"time_us_50": str(2e3 * value), "extra_bytes": str(1e6 * value**2)}
                rows["scaling", case.name, provider, "1"] = costs
    # A case is on two axes, so each is looked at alone.
    monkeypatch.setattr(figures, "measured", lambda path: rows)
    monkeypatch.setattr(scaling, "AXES", {"classes": scaling.AXES["classes, at 256x512"]})
    head, _, row = figures.scaling()
    cell = "4 to 2,000 ms (n^1.00), 4 to 1,000,000 MB (n^2.00)"
    assert head == figures.SCALING_HEAD and row == f"| classes: 2 to 1000 | {cell} | {cell} | {cell} |"


def test_frames_a_second_step_by_step(monkeypatch):
    measured = {"time_us_50": "400000", "time_us_95": "500000"}
    later = {"time_us_50": "40000", "time_us_95": "50000"}
    rows = {
        ("fps", "random-1x3x8x8", "ours_labels", "2"): later,
        ("fps", "trained-1x3x8x8", "ours_labels", "2"): measured,
        ("fps", "trained-1x3x8x8", "eager_best_frame_bf16", "2"): later,
    }
    monkeypatch.setattr(figures, "measured", lambda path: rows)
    assert figures.steps()[2:] == [
        "| `for_inference()`, 1x3x8x8, float32 | - | - | 2.5 FPS (400, 500 ms) | - | 25 FPS (40, 50 ms) |",
        "| eager, the best form, 1x3x8x8, bfloat16 | - | - | - | 25 FPS (40, 50 ms) | - |",
    ]


def test_the_papers_table_has_measured_and_published_speeds(monkeypatch):
    rows = {("tables", "camvid-1x3x360x480", "bcmfnet_for_inference", "2"): {"time_us_50": "5e4", "time_us_95": "6e4"}}
    monkeypatch.setattr(figures, "measured", lambda path: rows)
    assert figures.paper_table("camvid")[2:] == ["| BCMFNet, `for_inference()` | 20 | 60 ms | 225.0 | - | 76.2 |"]
    assert len(figures.paper_table("cityscapes")) == 2


def test_the_files_of_each_format(monkeypatch, tmp_path):
    path = tmp_path / "exports.csv"
    path.write_text(
        "format,dtype,size,bytes,pixels,differing,largest_margin,seconds,network_seconds,peak_bytes\n"
        "onnx,int8,8x8,6000000,1000,3,0.25,0.5,1,2000000000\nonnx,int8,16x16,1,1,1,1,1,1,1\n"
    )
    monkeypatch.setattr(figures, "EXPORTS", path)
    assert figures.exports("8x8")[2:] == ["| onnx, int8 | 3 (0.3 %) | 0.25 | 6.0 MB | 500 ms | 2.00 | 2,000 MB |"]
