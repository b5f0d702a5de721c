"""The tree of verbs, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import traceback

from cyclopts import App, CycloptsError, Parameter

import bcmfnet
from bcmfnet.cli.benchmark import app as benchmark
from bcmfnet.cli.compare import compare
from bcmfnet.cli.config import app as config
from bcmfnet.cli.data import app as data
from bcmfnet.cli.env import env
from bcmfnet.cli.evaluate import evaluate
from bcmfnet.cli.export import export
from bcmfnet.cli.loss import loss
from bcmfnet.cli.options import OverlayConfig, name_argument, name_as_typed
from bcmfnet.cli.predict import predict
from bcmfnet.cli.serve import serve
from bcmfnet.cli.train import train
from bcmfnet.errors import ConfigError, printable

OK, FAILURE, USAGE, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 130, 141
LONGEST, SHOWN_END = 600, 150  # characters of an error's line, and of its end where the middle is left out

HELP = """Real-time semantic segmentation with its own kernels: train, evaluate, compare, predict, serve, export.

Exit codes: 0 done; 1 something failed on the way, such as a damaged file or a full disk; 2 the command line or the
configuration cannot be used, or names a file that is not there; 3 a score was below what was asked for; 130 and 143
stopped by Ctrl-C or a signal; 141 nobody reads the output any more."""

overlay = OverlayConfig()
app = App(
    name="bcmfnet",
    help=HELP,
    version=bcmfnet.__version__,
    config=(overlay,),
    default_parameter=Parameter(negative=()),
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
for _verb in (train, evaluate, compare, predict, serve, export, loss, benchmark, data, env, config):
    app.command(_verb)


def run(argv: list[str]) -> int:
    """Parse and run a command line; return its exit code. `--debug` shows the traceback of an error."""
    overlay.arguments = ()
    try:
        code = app(argv) or OK
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except SystemExit:  # rich's answer to a closed pipe when it prints a help
        return CLOSED_PIPE
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return CLOSED_PIPE
        if debug := "--debug" in argv:
            traceback.print_exc()
        return _say(_one_line(error, bounded=not debug), _exit_code(error))


def _exit_code(error: Exception) -> int:
    return USAGE if isinstance(error, CycloptsError | ConfigError) else getattr(error, "exit_code", FAILURE)


def _one_line(error: Exception, bounded: bool) -> str:
    known = isinstance(error, OSError) or type(error).__module__.startswith(("bcmfnet", "cyclopts"))
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        text = name_as_typed(text, overlay.arguments)
    if isinstance(error, CycloptsError):
        text = name_argument(text, error.argument)
    if not known:
        text = f"{type(error).__name__}: {text}"
    if bounded and len(text) > LONGEST:
        return f"{text[: LONGEST - SHOWN_END]} [...] {text[-SHOWN_END:]} (--debug shows all)"
    return text if known else f"{text} (--debug shows where)"


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe; it is /dev/null from then on, so that Python can end in silence."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in output.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _say(message: str, code: int) -> int:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    with contextlib.suppress(BrokenPipeError):
        print(f"bcmfnet{rank}: {printable(message)}", file=sys.stderr)
    return code
