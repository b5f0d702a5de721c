"""The files of each format: written with metadata, and read back as a function of images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bcmfnet.errors import CheckpointError, MissingFileError, MissingPackageError
from bcmfnet.export.graph import DeployedGraph
from bcmfnet.inference.quantization import quantized
from bcmfnet.inference.runtimes import run_onnx, run_openvino
from bcmfnet.models.ddrnet import MIN_SIZE

KEY = "bcmfnet"
"""Of the metadata, as JSON, among those of a file."""
OPSET = 18
STRIDE = 64
"""Pixels of an image in one of the context module's map."""
MAX_SIDE, MAX_BATCH = 2**14, 2**10
"""Bounds of what is dynamic in a graph."""

Run = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A kind of file."""

    ending: str
    packages: tuple[str, ...]
    """What it needs to be installed beside torch."""
    write: Callable[[DeployedGraph, Tensor, bool, dict[str, Any], Path, Sequence[Tensor] | None], None]
    """Of (graph, example images, whether sizes are dynamic, metadata, path, calibration images)."""
    read: Callable[[Path, int, bool], tuple[str | None, Run]]
    """Of (path, threads, whether to stop at the logits): the text of a file's metadata, and its function of images
    [N, 3, H, W]."""
    any_size: bool = True
    """Whether dynamic sizes start at 64; torch.export's where no map of the context module has a side of 1."""
    int8: bool = False
    stops: bool = False
    """Whether a file of labels can be read as one of logits."""


@dataclass(frozen=True)
class ExportedFile:
    """A file that was read: its metadata, and the network as a function of images.

    `metadata` is that of the weights file, with what the graph is: "format", "output", "takes_uint8", "size" (height
    and width, or None where they are dynamic), "least_side" (where they are) and "dtype".
    """

    path: Path
    metadata: dict[str, Any]
    run: Run


def export(
    graph: DeployedGraph,
    path: Path,
    *,
    format: str,
    size: Sequence[int],
    dynamic: bool = False,
    metadata: dict[str, Any] | None = None,
    calibration: Sequence[Tensor] | None = None,
) -> None:
    """Write a graph as a file.

    Args:
        graph: on the CPU.
        path: of the file, whose ending is the format's.
        format: a key of `FORMATS`.
        size: height and width of the images, each at least 64.
        dynamic: let the file take any number of images of any size from `least_side` on; else it takes one image of
            that size.
        metadata: of the weights, JSON values; what the graph is joins them.
        calibration: images as the graph takes them, [1, 3, H, W] each, to quantise the file to int8 by; onnx and
            openvino.

    Raises:
        ValueError: calibration for another format.
        MissingPackageError: a package that the format, or int8, needs is not installed.
        CheckpointError: the file cannot be written.
    """
    check_packages(format, int8=calibration is not None)
    dtype = torch.uint8 if graph.takes_uint8 else torch.float32
    least = least_side(graph, format)
    # A dimension of one that is traced is taken for a constant.
    shape = (2, 3, *(max(side, least) for side in size)) if dynamic else (1, 3, *size)
    images = torch.zeros(shape, dtype=dtype)
    kept = (metadata or {}) | {
        "format": format,
        "output": graph.output,
        "takes_uint8": graph.takes_uint8,
        "size": None if dynamic else list(size),
        "least_side": least,
        "dtype": str(next(graph.network.parameters()).dtype).removeprefix("torch.") if calibration is None else "int8",
    }
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # exporters warn of what they do themselves
            FORMATS[format].write(graph, images, dynamic, kept, path, calibration)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def format_of(path: Path) -> str | None:
    """The format that a file's name ends on, None where it is none of these."""
    return next((name for name, kind in FORMATS.items() if path.name.endswith(kind.ending)), None)


def read_exported(path: Path, threads: int | None = None, *, logits: bool = False) -> ExportedFile:
    """Read a file that `export` wrote; its network runs on the CPU, in `threads` threads (None: torch's number).

    With `logits` a file of labels is read as one of logits where its format lets it be: `upsample_argmax` makes labels
    of them faster than a runtime does.

    Raises:
        MissingFileError: no file at the path. CheckpointError: a file that is damaged, or that `export` did not write.
        MissingPackageError: the package that runs it is not installed.
    """
    name = format_of(path)
    if name is None:
        endings = ", ".join(kind.ending for kind in FORMATS.values())
        raise CheckpointError(f"{path}: expected an exported network ({endings})")
    if not path.is_file():
        raise MissingFileError(f"{path}: expected an exported network, found no file")
    check_packages(name)
    try:
        text, run = FORMATS[name].read(path, threads or torch.get_num_threads(), logits)
    except Exception as error:  # each library has errors of its own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a complete file of {name} ({line})") from error
    metadata = _metadata(path, text)
    if logits and FORMATS[name].stops:
        metadata["output"] = "logits"
    return ExportedFile(path, metadata, run)


def check_packages(format: str, int8: bool = False) -> None:
    """Raise ValueError for a format without int8, MissingPackageError for a package that is not installed."""
    kind = FORMATS[format]
    if int8 and not kind.int8:
        formats = " or ".join(name for name, kind in FORMATS.items() if kind.int8)
        raise ValueError(f"format: expected {formats} with int8, got {format}")
    missing = [package for package in (*kind.packages, *["nncf"] * int8) if find_spec(package) is None]
    if missing:
        what = f"{format} in int8" if int8 else format
        raise MissingPackageError(f"format: {what} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _metadata(path: Path, text: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(text or "")
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or not {"output", "takes_uint8", "size", "least_side"} <= metadata.keys():
        raise CheckpointError(f"{path}: expected a file that bcmfnet export wrote, got one without its metadata")
    return metadata


def least_side(graph: DeployedGraph, format: str) -> int:
    """Least side of the images of a file with dynamic sizes, pixels."""
    return MIN_SIZE if FORMATS[format].any_size else 1 + STRIDE * max(stride for _, stride, _ in graph.pools)


def _shapes(dynamic: bool, least_side: int) -> tuple[dict[int, torch.export.Dim]] | None:
    if not dynamic:
        return None
    sides = {axis: torch.export.Dim(name, min=least_side, max=MAX_SIDE) for axis, name in ((2, "height"), (3, "width"))}
    return ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH), **sides},)


def _write_onnx(
    graph: DeployedGraph,
    images: Tensor,
    dynamic: bool,
    metadata: dict[str, Any],
    path: Path,
    calibration: Sequence[Tensor] | None,
) -> None:
    import onnx

    program = torch.onnx.export(
        graph,
        (images,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=[graph.output],
        dynamic_shapes=_shapes(dynamic, least_side(graph, "onnx")),
    )
    assert program is not None  # torch.onnx.export gives one with dynamo
    table = metadata.get("label_table", {})
    shown: dict[str, Any] = {key: metadata[key] for key in ("mean", "std") if key in metadata}
    shown |= {key: table[key] for key in ("classes", "colors") if key in table}  # for whoever does not know ours
    program.model.metadata_props.update({key: json.dumps(value) for key, value in shown.items()})
    program.model.metadata_props[KEY] = json.dumps(metadata)
    model = program.model_proto
    if calibration is not None:
        # The logits are as good as the network gives them: rounded to int8 they would tie.
        left = [model.graph.node[_upsampling(model)].name] if graph.output == "labels" else []
        model = quantized(model, calibration, "images", left)
    onnx.save(model, path)


def _upsampling(model: Any) -> int:
    """Which node of an ONNX model upsamples the logits."""
    return max(number for number, node in enumerate(model.graph.node) if node.op_type == "Resize")


def _read_onnx(path: Path, threads: int, logits: bool) -> tuple[str | None, Run]:
    import onnx

    model = onnx.load(path)
    ours = any(entry.key == KEY for entry in model.metadata_props)
    if logits and ours and model.graph.output[0].name == "labels":
        node = model.graph.node[_upsampling(model)]
        output = onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None)
        del model.graph.output[:], model.graph.node[_upsampling(model) :]
        model.graph.output.append(output)
    metadata, run = run_onnx(model.SerializeToString(), threads)
    return metadata.get(KEY), lambda images: run(images.contiguous())


def _write_openvino(
    graph: DeployedGraph,
    images: Tensor,
    dynamic: bool,
    metadata: dict[str, Any],
    path: Path,
    calibration: Sequence[Tensor] | None,
) -> None:
    import openvino

    count, _, *sides = images.shape
    shape = [-1, 3, -1, -1] if dynamic else [count, 3, *sides]
    model = openvino.convert_model(graph, example_input=images, input=shape)
    if calibration is not None:
        model = quantized(model, calibration)
    model.set_rt_info(json.dumps(metadata), KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


def _read_openvino(path: Path, threads: int, logits: bool) -> tuple[str | None, Run]:
    import openvino

    model = openvino.Core().read_model(path)
    text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
    if logits and text is not None and model.output().get_element_type() == openvino.Type.u8:
        upsampling = [node for node in model.get_ordered_ops() if node.get_type_name() == "Interpolate"][-1]
        model = openvino.Model([upsampling.input_value(0)], model.get_parameters())
    run = run_openvino(model, torch.float32, threads)
    return text, lambda images: run(images.contiguous())


def _write_program(
    graph: DeployedGraph,
    images: Tensor,
    dynamic: bool,
    metadata: dict[str, Any],
    path: Path,
    calibration: Sequence[Tensor] | None,
) -> None:
    program = torch.export.export(graph, (images,), dynamic_shapes=_shapes(dynamic, least_side(graph, "torch")))
    torch.export.save(program, path, extra_files={KEY: json.dumps(metadata)})


def _read_program(path: Path, threads: int, logits: bool) -> tuple[str | None, Run]:
    extra = {KEY: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return extra[KEY], torch.inference_mode()(module)


def _write_package(
    graph: DeployedGraph,
    images: Tensor,
    dynamic: bool,
    metadata: dict[str, Any],
    path: Path,
    calibration: Sequence[Tensor] | None,
) -> None:
    program = torch.export.export(graph, (images,), dynamic_shapes=_shapes(dynamic, least_side(graph, "torch")))
    options = {"aot_inductor.metadata": {KEY: json.dumps(metadata)}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def _read_package(path: Path, threads: int, logits: bool) -> tuple[str | None, Run]:
    package = torch._inductor.aoti_load_package(str(path))
    return package.get_metadata().get(KEY), torch.inference_mode()(package)


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx, int8=True, stops=True),
    "openvino": Format(".xml", ("openvino",), _write_openvino, _read_openvino, int8=True, stops=True),
    "aotinductor": Format(".aoti.pt2", (), _write_package, _read_package, any_size=False),
    "torch": Format(".pt2", (), _write_program, _read_program, any_size=False),
}
"""What `export` writes; a name that ends on two of the endings is of the first one."""
