"""The paper's Tables 2 and 3 again: speeds measured here and counts, beside what is published; and Table 1's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.benchmarks import harness, network
from bcmfnet.benchmarks._results import Row
from bcmfnet.benchmarks.harness import Provider, Unavailable
from bcmfnet.benchmarks.peers import PEERS
from bcmfnet.benchmarks.peers.published import BEYOND, PAPER, Published
from bcmfnet.errors import ConfigError
from bcmfnet.inference import for_inference
from bcmfnet.models import count_multiply_adds, count_parameters, create_model, list_models

INFERENCE = "_for_inference"
"""Ending of a provider that is a network of this package after `for_inference`."""
MISSING = "-"


@dataclass(frozen=True)
class Table:
    """What one of the paper's tables is of."""

    title: str
    classes: int
    size: tuple[int, int]
    """Frame on a GPU, which is the dataset's own."""
    cpu_size: tuple[int, int]
    """Frame on a CPU, of a quarter of the pixels: SegNet alone takes 1.3 T multiply-adds for a whole one."""
    networks: tuple[str, ...]
    """In the order of the paper, and then what came after it."""


TABLES = {
    "cityscapes": Table("Table 2, Cityscapes", 19, (1024, 2048), (512, 1024), (
        "segnet", "enet", "bisenet1", "bisenet_v2", "icnet", "lednet", "cabinet", "ddrnet23_slim", "bcmfnet",
        f"bcmfnet{INFERENCE}", "pidnet_s",
    )),
    "camvid": Table("Table 3, CamVid", 11, (720, 960), (360, 480), (
        "dfanet_a", "bisenet1", "bisenet_v2", "msfnet", "ddrnet23_slim", "bcmfnet", f"bcmfnet{INFERENCE}", "pidnet_s",
    )),
}  # fmt: skip
NETWORKS = tuple(dict.fromkeys(name for table in TABLES.values() for name in table.networks))


@dataclass(frozen=True)
class Case:
    """Networks of a table, on a frame of one size."""

    table: str
    size: tuple[int, int]
    networks: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.table}-1x3x{self.size[0]}x{self.size[1]}"


class Speeds:
    """A benchmark whose providers are networks: frames to logits in float32, each at the size of its own logits.

    They run as eager PyTorch with their batch norms, channels_last on a CPU; `for_inference` has a row of its own. They
    differ in what they compute, so there is no reference to agree with: logits have to be finite, one for each class.
    """

    BASELINE = "bcmfnet"

    def make_inputs(self, case: Case, device: torch.device) -> tuple[Tensor]:
        return network.make_inputs(network.Case("bcmfnet", case.size, TABLES[case.table].classes), device)

    def providers(self, case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
        return {name: _provider(name, TABLES[case.table].classes, device) for name in case.networks}

    def expected(self, case: Case, frames: Tensor) -> int:
        return TABLES[case.table].classes

    def disagreement(self, case: Case, provider: str, output: Tensor, expected: int) -> str | None:
        if output.ndim == 4 and output.shape[1] == expected and output.isfinite().all():
            return None
        return f"expected finite logits [1, {expected}, h, w], got {list(output.shape)}"

    def bytes_moved(self, case: Case) -> int:
        return 4 * 3 * case.size[0] * case.size[1]


class Eager(nn.Module):
    """A network's logits; the frame is brought to the order of memory that the weights have."""

    def __init__(self, model: nn.Module, layout: torch.memory_format):
        super().__init__()
        self.model, self.layout = model.to(memory_format=layout), layout

    def forward(self, frames: Tensor) -> Tensor:
        output = self.model(frames.contiguous(memory_format=self.layout))
        return output if isinstance(output, Tensor) else output.logits


def _provider(name: str, classes: int, device: torch.device) -> Provider | Unavailable:
    own = name.removesuffix(INFERENCE)
    if not _is_here(own):
        return Unavailable("there is no code of it, only its published figures")
    torch.manual_seed(0)
    (frames,) = network.make_inputs(network.Case(own, (128, 128), classes, batch=2), torch.device("cpu"))
    model = network.with_statistics(_build(own, classes), frames).to(device)
    if name != own:
        return for_inference(model, output="logits")
    return Eager(model, torch.channels_last if device.type == "cpu" else torch.contiguous_format)


def _is_here(name: str) -> bool:
    return name in PEERS or name in list_models()


def _build(name: str, classes: int) -> nn.Module:
    return PEERS[name](classes) if name in PEERS else create_model(name, num_classes=classes)


@lru_cache(None)
def counts(name: str, classes: int, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters of a network, and its multiply-adds for a frame."""
    with torch.device("meta"):
        model = _build(name, classes)
    return count_parameters(model), count_multiply_adds(model, (1, 3, *size))


def published(table: str, name: str) -> Published:
    """What the paper prints of a network, or its own where the paper does not have it."""
    return next(row for row in (*PAPER[table], *BEYOND[table]) if row.network == name)


def run(
    networks: Sequence[str] = (),
    *,
    device: str = "cpu",
    size: tuple[int, int] | None = None,
    threads: Sequence[int] = (),
    seconds: float = 1.0,
    output: Path | None = None,
) -> list[Row]:
    """Measure the networks of both tables in turn; a row for each, with its counts and its `published` figures.

    Args:
        networks: those to run, all where there are none.
        device: cpu, cuda or cuda:N.
        size: height and width of the frames, in place of the tables' own.
        threads: numbers of threads on a CPU; without them as many as torch uses.
        seconds: least time to measure for each network.
        output: CSV file that gets the measured columns, see `harness.run`.

    Raises:
        ConfigError: an argument that names nothing here, or is out of range.
    """
    for name in networks:
        if name not in NETWORKS:
            raise ConfigError(f"networks: expected some of {', '.join(NETWORKS)}, got {name!r}")
    place = harness.find_device(device)
    work = []
    for key, table in TABLES.items():
        chosen = tuple(name for name in table.networks if not networks or name in networks)
        if chosen:
            frame = size or (table.cpu_size if place.type == "cpu" else table.size)
            work.append(("tables", Speeds(), Case(key, frame, chosen)))
    rows = harness.run_cases(work, place, threads=threads or (torch.get_num_threads(),), seconds=seconds, output=output)
    cases = {case.name: case for *_, case in work}
    return [_counted(row, cases[row["case"]]) for row in rows]


def _counted(row: Row, case: Case) -> Row:
    """A measured row with frames a second, counts and published figures."""
    name, classes = row["provider"].removesuffix(INFERENCE), TABLES[case.table].classes
    known = published(case.table, name)
    row |= {"table": case.table, "fps": 1e6 / row["time_us_50"] if "time_us_50" in row else None}
    if _is_here(name):
        row["parameters"], row["multiply_adds"] = counts(name, classes, case.size)
        if known.size is not None:
            row["multiply_adds_at_published_size"] = counts(name, classes, known.size)[1]
    return row | {"published": asdict(known)}


COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda row: _title(row),
    "FPS": lambda row: _number(row["fps"]),
    "20 %": lambda row: _rate(row, 80),
    "80 %": lambda row: _rate(row, 20),
    "FPS*": lambda row: _printed(row, "fps"),
    "mIoU*": lambda row: _printed(row, "miou"),
    "M params": lambda row: _number(row.get("parameters"), 1e6),
    "M params*": lambda row: _printed(row, "params"),
    "G mult-adds": lambda row: _number(row.get("multiply_adds"), 1e9),
    "at frame*": lambda row: _number(row.get("multiply_adds_at_published_size"), 1e9),
    "GFLOPs*": lambda row: _printed(row, "gflops"),
    "frame*": lambda row: _frame(row["published"]["size"]),
    "GPU*": lambda row: _printed(row, "gpu"),
}
NOTE = """\
* published, on the frame and the GPU that are named; the rest was measured or counted here. Speeds: float32 frames to
logits, batch 1, the median and its quantiles. Papers print multiply-adds as FLOPs, for SegNet and ENet twice as many.
Where counts differ, the network's file in benchmarks/peers says by how much and why."""


def shown(rows: Sequence[Row]) -> Iterator[tuple[str, list[list[str]]]]:
    """A heading and a table for each of the paper's, and one of what others print."""
    for (table, case, threads), group in groupby(rows, key=lambda row: (row["table"], row["case"], row["threads"])):
        frame = case.partition("-")[2]
        heading = f"{TABLES[table].title}: {frame}{f', threads {threads}' if threads else ''}"
        yield heading, [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in group)]
    for table in dict.fromkeys(row["table"] for row in rows):
        header = ["network", "mIoU*", "FPS*", "M params*", "GFLOPs*", "frame*", "GPU*", "source"]
        yield f"{TABLES[table].title}: published elsewhere", [header, *map(_elsewhere, BEYOND[table])]


def _elsewhere(row: Published) -> list[str]:
    cells = (row.miou, row.fps, row.params, row.gflops)
    return [row.title, *map(_text, cells), _frame(row.size), _text(row.gpu), row.source]


def _title(row: Row) -> str:
    title = row["published"]["title"]
    return f"{title}, for_inference" if row["provider"].endswith(INFERENCE) else title


def _rate(row: Row, share: int) -> str:
    """Frames a second at a quantile of the times."""
    time = row.get(f"time_us_{share}")
    return _number(time and 1e6 / time)


def _number(value: float | None, unit: float = 1.0) -> str:
    return MISSING if value is None else f"{value / unit:.3g}" if value < 1000 * unit else f"{value / unit:.0f}"


def _printed(row: Row, name: str) -> str:
    return _text(row["published"][name])


def _text(value: Any) -> str:
    return MISSING if value is None else str(value)


def _frame(size: Sequence[int] | None) -> str:
    return MISSING if size is None else "x".join(map(str, size))


def by_class(paths: Sequence[Path]) -> list[list[str]]:
    """The layout of Table 1: a row for each evaluation with the IoU of each class and their mean, in per cent.

    Args:
        paths: an evaluation.json of `bcmfnet evaluate` or `train` each, or the folder that it is in.

    Raises:
        ConfigError: a file that is not there or is no evaluation, or evaluations of different classes.
    """
    rows: list[list[str]] = []
    for path in paths:
        file = path / "evaluation.json" if path.is_dir() else path
        try:
            scores = json.loads(file.read_text())
            iou, mean = dict(scores["iou"]), scores["miou"]
            cells = [MISSING if value is None else f"{100 * value:.1f}" for value in (*iou.values(), mean)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"evaluations: expected the scores of an evaluation, got {file}: {error!r}") from None
        header = ["", *iou, "mIoU"]
        if rows and rows[0] != header:
            raise ConfigError(f"evaluations: expected the classes {', '.join(rows[0][1:-1])}, got {file} with others")
        rows += [*([] if rows else [header]), [str(path), *cells]]
    return rows
