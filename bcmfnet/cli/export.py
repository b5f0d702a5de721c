"""`bcmfnet export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from bcmfnet.cli.options import CommonOptions, print_table
from bcmfnet.engine.bounds import Between
from bcmfnet.engine.config import OptionalPath
from bcmfnet.errors import ConfigError, printable

TENSORRT = (
    "format: an engine is built where its GPU is: export --format onnx there, then for TensorRT 10 "
    "trtexec --onnx=FILE.onnx --saveEngine=FILE.engine --fp16, or for TensorRT 11, which takes the types of the file, "
    "export --format onnx --dtype float16 and trtexec --onnx=FILE.onnx --saveEngine=FILE.engine"
)


def export(
    *,
    weights: Path = Path("camvid11"),
    format: Literal["onnx", "openvino", "torch", "aotinductor", "tensorrt"] = "onnx",
    size: Annotated[tuple[int, int], Between(64, 2**14)],
    dynamic: bool = False,
    output: Literal["labels", "logits"] = "labels",
    dtype: Literal["float32", "float16", "int8"] = "float32",
    uint8: bool = False,
    calibration: OptionalPath = None,
    frames: OptionalPath = None,
    output_dir: OptionalPath = None,
    name: str | None = None,
    exist_ok: bool = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Write a trained network as a file for other runtimes, and check its labels against the network's own.

    The file goes from images, RGB [N, 3, H, W], to label maps uint8 [N, H, W], upsampling and argmax included, in
    standard operators alone; it holds mean, std, classes and colours. `predict` and `evaluate` take it as --weights.

    Parameters
    ----------
    weights
        Weights file, the folder of a run, whose best weights are taken, or camvid11, which comes with the package.
    format
        onnx; openvino, an .xml with its .bin; torch, a program of torch.export; aotinductor, compiled for this machine;
        tensorrt says how trtexec makes an engine of an onnx file.
    size
        Height and width of the images.
    dynamic
        Take images of any size and number instead of one of that size.
    output
        labels, or logits at 1/8 of the size.
    dtype
        Of weights and maps. float16 is for onnx: a typed network, as TensorRT 11 takes it. int8 is for onnx and
        openvino, and needs --calibration.
    uint8
        Take images as cameras give them and normalise inside; else they are float32 and normalised already.
    calibration
        Images, a folder or a glob, like those that the file will be used on: int8 takes the ranges of its maps from 64
        of them.
    frames
        Images, a folder or a glob, that the labels are compared on; without it those of --calibration or drawn streets.
    output_dir
        Folder for the file; without it runs/export/NAME[-N].
    name
        Name of the folder under runs/export; without it export.
    exist_ok
        Write into an output folder that has something in it.
    """
    common.start_logging()
    if format == "tensorrt":
        raise ConfigError(TENSORRT)
    if dtype == "float16" and format != "onnx" or dtype == "int8" and format not in ("onnx", "openvino"):
        raise ConfigError(f"dtype: expected float32 with format {format}, got {dtype}")
    if (dtype == "int8") != (calibration is not None):
        raise ConfigError(f"calibration: expected images with dtype int8, and with it alone, got dtype {dtype}")
    from bcmfnet.engine.export import export_checked
    from bcmfnet.engine.run_folder import run_folder

    with run_folder("export", output_dir, name, exist_ok) as folder:
        path, check = export_checked(
            weights, folder, format, size, dynamic=dynamic, output=output, dtype=dtype, uint8=uint8, frames=frames,
            calibration=calibration,
        )  # fmt: skip
    share = 100 * check.differing / check.pixels
    print_table([
        ("check", "value"),
        ("size", f"{sum(file.stat().st_size for file in path.parent.glob(f'{path.stem}.*')) / 1e6:.1f} MB"),
        ("images compared", str(check.images)),
        ("labels that differ", f"{check.differing} of {check.pixels} ({share:.4f} %)"),
        ("their largest margin", f"{check.largest_margin:.2g} logits"),
        ("an image", f"{1000 * check.seconds:.1f} ms"),
        ("its process's peak", "-" if check.peak_bytes is None else f"{check.peak_bytes / 1e6:.0f} MB"),
        ("for_inference", f"{1000 * check.network_seconds:.1f} ms"),
    ])  # fmt: skip
    print(f"\nfile: {printable(path)}")
    return 0 if check.holds() else 1
