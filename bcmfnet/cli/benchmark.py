"""`bcmfnet benchmark`, `bcmfnet benchmark tables` and `bcmfnet benchmark classes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from bcmfnet.cli.options import CommonOptions, print_table
from bcmfnet.engine.bounds import Between

app = App(name="benchmark")


@app.default
def benchmark(
    *names: str,
    device: str = "cpu",
    case: str = "*",
    providers: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    threads: Annotated[tuple[int, ...], Parameter(consume_multiple=True), Between(1, 4096)] = (),
    seconds: Annotated[float, Between(0, 3600, "(]")] = 1.0,
    output: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Time this installation's ops beside what they replace; each must first agree with the float64 reference.

    Exit code 1 says that one of them did not, or failed; it has no time then.

    Parameters
    ----------
    names
        Benchmarks; all where none is named.
    device
        cpu, cuda or cuda:N.
    case
        Pattern of the cases to run, as of file names: 1x19x*.
    providers
        What to time; everything that can run here where none is named.
    threads
        Numbers of threads on a CPU; one, and as many as torch uses, where none is given.
    seconds
        Least time to measure for each provider of a case.
    output
        CSV file to write the rows to, in place of those of the same case; in a folder, the machine's own file.
    json_output
        Print JSON instead of tables.
    """
    common.start_logging()
    from bcmfnet.benchmarks import _results, harness

    rows = harness.run(
        names, device=device, case=case, providers=providers, threads=threads, seconds=seconds, output=output
    )
    if json_output:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, device.partition(":")[0])
    return 1 if _results.failed(rows) else 0


@app.command
def tables(
    *networks: str,
    device: str = "cpu",
    size: Annotated[tuple[int, int] | None, Between(32, 2**14)] = None,
    threads: Annotated[tuple[int, ...], Parameter(consume_multiple=True), Between(1, 4096)] = (),
    seconds: Annotated[float, Between(0, 3600, "(]")] = 1.0,
    output: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Print the paper's Tables 2 and 3 again: speeds measured here and counts, beside the published figures.

    Exit code 1 says that one of the networks failed; it has no speed then.

    Parameters
    ----------
    networks
        Networks; all of both tables where none is named.
    device
        cpu, cuda or cuda:N.
    size
        Height and width of the frames; without it the datasets' own on a GPU, half of that each on a CPU.
    threads
        Numbers of threads on a CPU; as many as torch uses where none is given.
    seconds
        Least time to measure for each network.
    output
        CSV file to write the measured rows to, in place of those of the same case; in a folder, the machine's own file.
    json_output
        Print JSON instead of tables.
    """
    common.start_logging()
    from bcmfnet.benchmarks import _results
    from bcmfnet.benchmarks import tables as paper

    rows = paper.run(networks, device=device, size=size, threads=threads, seconds=seconds, output=output)
    if json_output:
        print(json.dumps(rows, indent=2))
    else:
        _print_machine(rows[0])
        for heading, table in paper.shown(rows):
            print(f"\n{heading}")
            print_table(table)
        print(f"\n{paper.NOTE}", *_results.remarks(rows), sep="\n")
    return 1 if _results.failed(rows) else 0


@app.command
def classes(*evaluations: Path, common: CommonOptions = CommonOptions()) -> int:
    """Print evaluations in the layout of the paper's Table 1: the IoU of each class, and their mean, in per cent.

    Parameters
    ----------
    evaluations
        Folders with an evaluation.json, as `bcmfnet evaluate` and `train` leave them, or such files.
    """
    common.start_logging()
    from bcmfnet.benchmarks.tables import by_class
    from bcmfnet.errors import ConfigError

    if not evaluations:
        raise ConfigError("evaluations: expected at least one folder of an evaluation, got none")
    print_table(by_class(evaluations))
    return 0


def _print_machine(row: dict[str, Any]) -> None:
    versions = [f"{name} {row[name] or 'none'}" for name in ("python", "torch", "triton", "compiler", "cuda")]
    print(f"{row['machine']}, {row['capability']}; commit {row['commit'] or 'unknown'}; {', '.join(versions)}")


def _print(rows: list[dict[str, Any]], device: str) -> None:
    from bcmfnet.benchmarks import _results
    from bcmfnet.ops import backends

    _print_machine(rows[0])
    for threads, rate in {row["threads"]: row["copy_gb_per_s"] for row in rows}.items():
        print(f"copy{f', threads {threads}' if threads else ''}: {rate:.3g} GB/s")
    for row in backends.describe():
        if row["device"] == device and row["op"] in {row["benchmark"] for row in rows}:
            print(f"{row['op']} on {row['device']}: {row['backend']} ({row['reason']})")
    for heading, table in _results.tables(rows):
        print(f"\n{heading}")
        print_table(table)
    for number, line in enumerate(_results.remarks(rows)):
        print(line if number else f"\n{line}")
