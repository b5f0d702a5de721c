"""The figures: each shows the rows that it is drawn from, and those that are committed are drawn from today's."""

import re

import pytest

from bcmfnet.benchmarks import figures, plot

COMMITTED = figures.RESULTS.parents[1] / "docs" / "figures"


def texts(path):
    return re.findall(r">([^<>]*)</text>", path.read_text())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    plot.draw(folder := tmp_path_factory.mktemp("figures"))
    return folder


@pytest.mark.parametrize("name", [f"{name}-{mode}" for name in plot.FIGURES for mode in plot.THEMES])
def test_committed_figures_are_drawn_from_the_rows(drawn, name):
    assert texts(COMMITTED / f"{name}.svg") == texts(drawn / f"{name}.svg")


def test_bars_are_the_rows(drawn):
    rows = figures.measured(figures.RESULTS / figures.MACHINES["no AMX"])
    shown = " ".join(texts(drawn / "loss-light.svg"))
    for benchmark, case, usual in plot.LOSSES.values():
        for provider in (*plot.PROVIDERS.values(), usual):
            value = float(rows[benchmark, case, provider, "1"]["time_us_50"]) / 1e3
            assert (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") in shown


def test_light_and_dark_differ_in_colours_alone(drawn):
    light, dark = ((drawn / f"loss-{mode}.svg").read_text() for mode in plot.THEMES)
    assert light != dark
    assert re.sub(r"#[0-9a-f]{6}", "", light) == re.sub(r"#[0-9a-f]{6}", "", dark)
