"""What the verbs share: flags, the overlay of preset, file and flags, logging, tables."""

from __future__ import annotations

import logging
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from cyclopts import App, Argument, ArgumentCollection, Parameter
from cyclopts.config import Dict

from bcmfnet.engine.config import DataConfig, TrainConfig, preset
from bcmfnet.errors import ConfigError

EXCLUSIVE = ("steps", "epochs")
SECTIONS = {field.name for field in fields(TrainConfig) if field.default_factory is not MISSING}
PRESET = "preset"
KEYS = {"dataset": "data.name", "model": "model.name"}
"""Option of a key that is not the option's own name."""

TrainOptions = Annotated[TrainConfig, Parameter(name="*", negative=None, negative_iterable=(), show_default=False)]
"""The flags of a training configuration. A preset sets their defaults, so a help shows none."""


@Parameter(name="*")
@dataclass
class CommonOptions:
    """Flags that every verb has."""

    verbose: Annotated[bool, Parameter(alias="-v")] = False
    """Show debugging messages."""
    quiet: Annotated[bool, Parameter(alias="-q")] = False
    """Show warnings and errors only."""
    debug: bool = False
    """Show the traceback of an error."""

    def start_logging(self) -> None:
        """Send the package's log to standard error at the chosen level."""
        logger = logging.getLogger("bcmfnet")
        logger.setLevel(logging.DEBUG)
        handler = _StderrHandler()
        handler.setLevel(logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO)
        logger.handlers = [handler]


@Parameter(name="*")
@dataclass
class InferenceOptions:
    """Where weights run, and where the results go."""

    output_dir: str | None = None
    """Folder for the results; without it runs/VERB/NAME[-N]."""
    name: str | None = None
    """Name of the folder under runs/VERB; without it the verb."""
    exist_ok: bool = False
    """Write into an output folder that has something in it."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else off."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is the GPU where there is one."""

    def folder(self, verb: str) -> AbstractContextManager[Path]:
        """The folder for the results, for the time of the code inside; see `engine.run_folder`."""
        from bcmfnet.engine.run_folder import run_folder

        return run_folder(verb, self.output_dir, self.name or verb, self.exist_ok)


@Parameter(name="data")
@dataclass
class DataOptions:
    """The labelled frames to look at."""

    name: str | None = None
    """Dataset; without it the one that the weights were trained on."""
    root: str = ""
    """Folder of the dataset; generated data needs none."""
    split: str | None = None
    """Split; without it the validation split of the weights."""
    workers: int = 1
    """Loader processes; 0 loads in the main process."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"data.workers: expected at least 0, got {self.workers}")

    def build(self, metadata: dict[str, Any], weights: Path) -> Any:
        """The dataset, where nothing is said the one of a weights file's metadata."""
        from bcmfnet.data import build_dataset
        from bcmfnet.engine.inference import trained_on

        data = trained_on(metadata, weights)
        if data is None and self.name is None:
            raise ConfigError(f"data.name: expected a dataset, since {weights} does not name one; got none")
        data = data or DataConfig()
        split = self.split or data.val_split
        if self.name not in (None, data.name):
            data = DataConfig(self.name, num_classes=metadata["num_classes"] if self.name == "folder" else None)
        dataset = build_dataset(data.name, self.root, split, **data.options(split))
        if dataset.table.num_classes != metadata["num_classes"]:
            got = f"the {dataset.table.num_classes} of {dataset.table.name}"
            raise ConfigError(f"data.name: expected {metadata['num_classes']} classes, as {weights} has, got {got}")
        return dataset


class _StderrHandler(logging.StreamHandler):
    """Writes to the standard error of the moment, which a progress bar redirects while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class OverlayConfig:
    """Fill what the flags leave open: from the file of --config, and below it from --preset or the run to --resume.

    An option that is set twice is taken from the upper layer; optim.steps in one layer also hides optim.epochs in the
    layers below it, and the reverse. The file may name its preset (`preset = "camvid"`). The arguments of the last
    command line stay in `arguments`, for `name_as_typed`.
    """

    arguments: Iterable[Argument] = ()

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        self.arguments = arguments
        named = {argument.name: argument for argument in arguments}
        if "--preset" not in named:
            return
        path, run = _token(named, "--config"), _token(named, "--resume")
        if run is not None and (path or _token(named, "--preset")):
            raise ConfigError("resume: expected no --preset and no --config, the run has its own configuration")
        file = read_config("config", Path(path)) if path is not None else {}
        given = {key for key in EXCLUSIVE if named[f"--optim.{key}"].tokens}
        _fill(_hide(file, given), path, app, commands, arguments)
        if run is not None:
            source = str(Path(run) / "config.toml")
            values = read_config("resume", Path(source))
        else:
            source, name = PRESET, _token(named, "--preset")
            name = "synthetic" if name is None else name
            values = preset(name) | {"preset": name}
        _fill(_hide(values, given | set(file.get("optim", {}))), source, app, commands, arguments)


def _fill(values: dict[str, Any], source: str | None, app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Give the values to arguments that have none. Nested under the verb, since `data` is a verb too."""
    for command in reversed(commands):
        values = {command: values}
    Dict(values, source=source)(app, commands, arguments)


def _token(named: dict[str, Any], name: str) -> str | None:
    tokens = named[name].tokens if name in named else ()
    return tokens[0].value if tokens else None


def _hide(values: dict[str, Any], above: set[str]) -> dict[str, Any]:
    """Values without optim.steps and optim.epochs, where a layer above sets one of the two."""
    if not above.intersection(EXCLUSIVE) or "optim" not in values:
        return values
    return values | {"optim": {key: value for key, value in values["optim"].items() if key not in EXCLUSIVE}}


def read_config(key: str, path: Path) -> dict[str, Any]:
    """Nested values of a TOML or YAML file, the value of option `key`. Raises ConfigError where it has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: expected a configuration at {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: expected UTF-8 text in {path}: {error}") from None
    try:
        values = _parse_yaml(text) if path.suffix in (".yaml", ".yml") else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{key}: expected TOML or YAML in {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: expected sections of options in {path}, got {type(values).__name__}")
    for section in SECTIONS & values.keys():
        if not isinstance(values[section], dict):
            raise ConfigError(f"[{section}]: expected a section of options in {path}, got {values[section]!r}")
    for flag in {"config", "resume"} & values.keys():
        raise ConfigError(f"{key}: expected no {flag} in {path}, it is for the command line alone")
    return values


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError("YAML needs PyYAML (pip install PyYAML), TOML needs nothing") from None
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def name_as_typed(message: str, arguments: Iterable[Argument]) -> str:
    """The message with the keys before its first colon named as they were set: as flags, or as keys of a file."""
    keys, colon, rest = message.partition(": ")
    typed = [_typed(key, arguments) for key in keys.split(", ")]
    return f"{', '.join(typed)}{colon}{rest}" if all(typed) else message


def name_argument(message: str, argument: Argument | None) -> str:
    """The message with the argument that it is about in front, where it does not name it."""
    if argument is None:
        return message
    names = {argument.name, *(token.keyword for token in argument.tokens if token.keyword)}
    return message if any(name in message for name in names) else f"{_setting(argument)}: {message}"


def _typed(key: str, arguments: Iterable[Argument]) -> str | None:
    """What set the option of a key: `data.root`, or only `root` where a function below the command line says so."""
    words = re.escape(KEYS.get(key, key).replace("_", "-"))
    leaves = {argument.name.removeprefix("--"): argument for argument in arguments if not argument.children}
    for pattern in (words, rf".*\.{words}", rf".*[.-]{words}s?"):
        found = [name for name in leaves if re.fullmatch(pattern, name, re.IGNORECASE)]
        if found:
            chosen = [name for name in found if _source(leaves[name]) != PRESET]
            return ", ".join(_setting(leaves[name]) for name in chosen or found)
    return None


def _source(argument: Argument) -> str:
    """What set an argument: cli, the path of a file, or the preset."""
    return argument.tokens[0].source if argument.tokens else PRESET


def _setting(argument: Argument) -> str:
    if _source(argument) in ("cli", PRESET):
        return argument.name
    return f"{argument.name.removeprefix('--').replace('-', '_')} in {_source(argument)}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as aligned columns, the first row as header; first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        first, *others = row
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip())
        if number == 0:
            print("  ".join("-" * w for w in widths))
