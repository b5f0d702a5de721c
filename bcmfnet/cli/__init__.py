"""The command line: parse, call the engine, print. One file for each verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; `bcmfnet --help` lists them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us: the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    argv = sys.argv[1:] if argv is None else list(argv)
    # OpenMP's threads spin while they wait, and hold cores that the loader's processes and other programs need. What
    # `benchmark` measures is the library, in a program that says nothing of that.
    if argv[:1] != ["benchmark"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from bcmfnet.cli.app import run

    sys.exit(run(argv))
