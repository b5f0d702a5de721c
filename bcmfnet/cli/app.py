"""The tree of verbs, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import sys
import traceback

from cyclopts import App, CycloptsError

import bcmfnet
from bcmfnet.cli.benchmark import benchmark
from bcmfnet.cli.config import app as config
from bcmfnet.cli.data import app as data
from bcmfnet.cli.env import env
from bcmfnet.cli.evaluate import evaluate
from bcmfnet.cli.loss import loss
from bcmfnet.cli.options import OverlayConfig
from bcmfnet.cli.predict import predict
from bcmfnet.cli.train import train
from bcmfnet.errors import ConfigError

USAGE, FAILURE = 2, 1

app = App(
    name="bcmfnet",
    help="Real-time semantic segmentation with its own kernels: train, evaluate, predict.",
    version=bcmfnet.__version__,
    config=(OverlayConfig(),),
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
for _verb in (train, evaluate, predict, loss, benchmark, data, env, config):
    app.command(_verb)


def run(argv: list[str]) -> int:
    """Parse and run a command line; return its exit code. `--debug` shows the traceback of an error."""
    debug = "--debug" in argv
    try:
        return app(argv) or 0
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except SystemExit as error:
        return int(error.code or 0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, CycloptsError | ConfigError):
            return _say(_one_line(error), USAGE)
        return _say(_one_line(error), getattr(error, "exit_code", FAILURE))


def _one_line(error: Exception) -> str:
    known = type(error).__module__.startswith(("bcmfnet", "cyclopts")) or isinstance(error, OSError)
    text = " ".join(str(error).split())
    return text if known else f"{type(error).__name__}: {text} (--debug shows where)"


def _say(message: str, code: int) -> int:
    print(f"bcmfnet: {message}", file=sys.stderr)
    return code
