"""What the verbs share: flags, the overlay of preset, file and flags, logging, tables."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import reprlib
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TextIO, get_args

from cyclopts import UNSET, App, Argument, ArgumentCollection, Parameter
from cyclopts.config import Dict

from bcmfnet.engine.bounds import as_utf8, bounds_of, check_numbers, number_type
from bcmfnet.engine.config import PATH, DataConfig, OptionalPath, StreamConfig, TrainConfig, TTAConfig, Workers, preset
from bcmfnet.errors import ConfigError

HIDDEN_BY = {"optim.epochs": "optim.steps", "optim.steps": "optim.epochs", "data.crops": "data.crop"}
"""Options that count no more where the other one is set in a layer above."""
SECTIONS = {field.name for field in fields(TrainConfig) if field.default_factory is not MISSING}
PRESET = "preset"
MAX_BYTES, MAX_DEPTH = 2**20, 3
"""Of a configuration file: bytes to read at most, and how deep its values are nested."""
YAML_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")
NONE = ("none", "null")
SWITCH = {"on": "true", "off": "false"}
KEYS = {"dataset": "data.name", "model": "model.name"}
"""Option of a key that is not the option's own name."""

TrainOptions = Annotated[TrainConfig, Parameter(name="*", negative=None, negative_iterable=(), show_default=False)]
"""The flags of a training configuration. A preset sets their defaults, so a help shows none."""
TTAOptions = Annotated[TTAConfig, Parameter(name="tta", consume_multiple=True)]
"""The flags of test-time augmentation."""
StreamOptions = Annotated[StreamConfig, Parameter(name="stream")]
"""The flags of streams."""


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
        follows = os.environ.get("RANK", "0") != "0"  # one of several processes, whose leader says the same
        handler.setLevel(logging.WARNING if self.quiet or follows else logging.DEBUG if self.verbose else logging.INFO)
        logger.handlers = [handler]


@Parameter(name="*")
@dataclass
class DeviceOptions:
    """Where weights run."""

    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else off."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is the GPU where there is one."""


@Parameter(name="*")
@dataclass
class InferenceOptions(DeviceOptions):
    """Where weights run, and where the results go."""

    output_dir: OptionalPath = None
    """Folder for the results; without it runs/VERB/NAME[-N]."""
    name: str | None = None
    """Name of the folder under runs/VERB; without it the verb."""
    exist_ok: bool = False
    """Write into an output folder that has something in it."""

    def folder(self, verb: str, resume: bool = False) -> AbstractContextManager[Path]:
        """The folder for the results, for the time of the code inside; see `engine.run_folder`."""
        from bcmfnet.engine.run_folder import run_folder

        if resume and self.output_dir is None and self.name is None:
            raise ConfigError("resume: expected --output-dir or --name, the folder to go on in, got none")
        return run_folder(verb, self.output_dir, self.name, self.exist_ok or resume)


@Parameter(name="data")
@dataclass
class DataOptions:
    """The labelled frames to look at."""

    name: str | None = None
    """Dataset; without it the one that the weights were trained on."""
    root: Annotated[str, PATH] = ""
    """Folder of the dataset; generated data needs none."""
    colors: OptionalPath = None
    """Colour file of a folder dataset, needed where its masks are colours."""
    split: str | None = None
    """Split; without it the validation split of the weights."""
    workers: Workers = 1
    """Loader processes; 0 loads in the main process."""

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
            count = metadata["num_classes"] if self.name == "folder" and self.colors is None else None
            data = DataConfig(self.name, num_classes=count)
        if self.colors is not None:
            data.colors = self.colors
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

    An option that is set twice is taken from the upper layer, which also hides options in the layers below it (see
    HIDDEN_BY). The file may name its preset (`preset = "camvid"`). Then the words of every
    option, typed or filled in, are checked and made what its type is read from (see `_prepare`). The arguments of the
    last command line stay in `arguments`, for `name_as_typed`.
    """

    arguments: Iterable[Argument] = ()

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        self.arguments = arguments
        if any(argument.name == "--preset" for argument in arguments):
            self._overlay(app, commands, arguments)
        for argument in arguments:
            if not argument.children:
                _prepare(argument)

    def _overlay(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        named = {argument.name: argument for argument in arguments}
        path, run = _token(named, "--config"), _token(named, "--resume")
        if run is not None and (path or _token(named, "--preset")):
            raise ConfigError("resume: expected no --preset and no --config, the run has its own configuration")
        file = read_config("config", Path(_local_path(path))) if path is not None else {}
        given = {key for key in HIDDEN_BY.values() if named[f"--{key}"].tokens}
        _fill(_hide(file, given), path, app, commands, arguments)
        if run is not None:
            source = str(Path(_local_path(run)) / "config.toml")
            values = read_config("resume", Path(source))
        else:
            source, name = PRESET, _token(named, "--preset")
            name = "synthetic" if name is None else name
            values = preset(name) | {"preset": name}
        given |= {f"{section}.{key}" for section in SECTIONS for key in file.get(section, {})}
        _fill(_hide(values, given), source, app, commands, arguments)


def _fill(values: dict[str, Any], source: str | None, app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Give the values to arguments that have none. Nested under the verb, since `data` is a verb too."""
    for command in reversed(commands):
        values = {command: values}
    Dict(values, source=source)(app, commands, arguments)


def _prepare(argument: Argument) -> None:
    """Check the numbers of an option, and make its paths and switches what they stand for.

    Numbers are checked here because cyclopts rounds 1.5 to an integer, and because options of a verb alone are in no
    dataclass that checks itself.
    """
    annotation = argument.field_info.annotation
    words = [token.value for token in argument.tokens if token.implicit_value is UNSET]
    kind = number_type(annotation)
    if kind is not None:
        optional = NoneType in get_args(argument.hint)
        numbers = [_parsed(word) for word in words if not (optional and word.lower() in NONE)]
        got = numbers[0] if len(numbers) == 1 else tuple(numbers)
        check_numbers(_setting(argument), kind, bounds_of(annotation), numbers, got)
    elif argument.hint is bool:
        _replace_words(argument, lambda word: SWITCH.get(word.lower(), word))
    elif argument.hint in (Path, Path | None) or PATH in getattr(annotation, "__metadata__", ()):
        _replace_words(argument, _local_path)


def _parsed(word: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def _replace_words(argument: Argument, replace: Callable[[str], str]) -> None:
    argument.tokens[:] = [token.evolve(value=replace(token.value)) for token in argument.tokens]


def _local_path(text: str) -> str:
    """A path with `~` replaced, in the encoding of this system's file names, whatever the locale is."""
    with contextlib.suppress(UnicodeError):
        text = os.fsdecode(as_utf8(text).encode("utf-8"))
    return os.path.expanduser(text)


def _token(named: dict[str, Any], name: str) -> str | None:
    tokens = named[name].tokens if name in named else ()
    return tokens[0].value if tokens else None


def _hide(values: dict[str, Any], above: set[str]) -> dict[str, Any]:
    """Values without those that options of a layer above hide."""
    hidden = {key for key, other in HIDDEN_BY.items() if other in above}
    return {
        section: {key: value for key, value in inner.items() if f"{section}.{key}" not in hidden}
        if isinstance(inner, dict)
        else inner
        for section, inner in values.items()
    }


def read_config(key: str, path: Path) -> dict[str, Any]:
    """Nested values of a TOML or YAML file, the value of option `key`. Raises ConfigError where it has none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{key}: expected a configuration at {path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{key}: expected a configuration at {path}, got a file of more than {MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: expected UTF-8 text in {path}: {error}") from None
    try:
        values = _parse_yaml(text) if path.suffix in (".yaml", ".yml") else tomllib.loads(text.replace("\r\n", "\n"))
    except ValueError as error:
        raise ConfigError(f"{key}: expected TOML or YAML in {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{key}: expected options in {path}, got a deep nest of values") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: expected sections of options in {path}, got {type(values).__name__}")
    for flag in {"config", "resume"} & values.keys():
        raise ConfigError(f"{key}: expected no {flag} in {path}, it is for the command line alone")
    for name, value in values.items():
        if name in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"[{name}]: expected a section of options in {path}, got {reprlib.repr(value)}")
        for option, inner in value.items() if isinstance(value, dict) else ((name, value),):
            if isinstance(inner, dict) or (isinstance(inner, list) and any(isinstance(v, dict | list) for v in inner)):
                raise ConfigError(
                    f"{option} in {path}: expected a value or a list of values, got {reprlib.repr(inner)}"
                )
    return values


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError("YAML needs PyYAML (pip install PyYAML), TOML needs nothing") from None
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return {} if node is None else _words(node)


def _words(node: Any, depth: int = 0) -> Any:
    """Scalars of a YAML document as the words that they are: `off` is no boolean here, and 010 no octal number."""
    where = f"line {node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise ValueError(f"a deep nest of values, {where}")
    if node.tag.removeprefix("tag:yaml.org,2002:") not in YAML_TAGS:
        raise ValueError(f"tag {node.tag}, {where}")
    if node.id == "scalar":
        return None if node.tag.endswith(":null") else node.value
    if node.id == "sequence":
        return [_words(item, depth + 1) for item in node.value]
    values: dict[str, Any] = {}
    for key, value in node.value:
        name = key.value if key.id == "scalar" else f"a {key.id}"
        if key.id != "scalar" or name in values:
            raise ValueError(
                f"{name} as a key{' for the second time' * (name in values)}, line {key.start_mark.line + 1}"
            )
        values[name] = _words(value, depth + 1)
    return values


def name_as_typed(message: str, arguments: Iterable[Argument]) -> str:
    """The message with the keys before its first colon named as they were set: as flags, or as keys of a file."""
    keys, colon, rest = message.partition(": ")
    typed = []
    for key in keys.split(", "):
        if not (name := _typed(key, arguments)):
            return message
        typed.append(name)
    return f"{', '.join(typed)}{colon}{rest}"


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
