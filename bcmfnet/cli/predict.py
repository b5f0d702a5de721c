"""`bcmfnet predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions, InferenceOptions, StreamOptions, TTAOptions
from bcmfnet.engine.bounds import Between
from bcmfnet.engine.config import PATH, StreamConfig, TTAConfig
from bcmfnet.errors import ConfigError, printable


def predict(
    *source: Annotated[str, Parameter(required=True), PATH],
    weights: Path = Path("camvid11"),
    max_pixels: Annotated[int, Between(1, 2**31 - 1)] = 2**26,
    workers: Annotated[int, Between(1, 1024)] = 2,
    resume: bool = False,
    inference: InferenceOptions = InferenceOptions(),
    tta: TTAOptions = TTAConfig(),
    stream: StreamOptions = StreamConfig(),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Write label ids, colours and an overlay for each image, or videos of a stream.

    Images keep their folders below SOURCE, and are turned upright where their EXIF orientation says so. One that cannot
    be predicted is reported and the others go on; the exit code is then 1. A stream is predicted
    until it ends, or until Ctrl-C.

    Parameters
    ----------
    source
        Image files, folders of images, or globs such as 'frames/**/*.png'; or one stream: a video file, the index of a
        camera, a URL, or - for raw frames on standard input.
    weights
        Weights file, the folder of a run, whose best weights are taken, camvid11, which comes with the package, or a
        file of bcmfnet export.
    max_pixels
        Largest image that is read at once; the memory that a prediction takes grows with it. A larger TIFF is read and
        predicted in windows (--tta.window), and only its label ids are written, as NAME_labelIds.tif.
    workers
        Threads that read images ahead of the network, and as many that write behind it; each holds images in memory.
    resume
        Go on in the output folder of a prediction that was interrupted: what is done is skipped, what failed is tried
        again.
    """
    common.start_logging()
    from bcmfnet.data.video import Source, is_stream
    from bcmfnet.engine.exported import load_predictor
    from bcmfnet.engine.inference import label_table
    from bcmfnet.engine.predict import find_images, keep_settings, predict
    from bcmfnet.engine.tta import with_tta

    streams = [word for word in source if stream.clip or is_stream(word)]
    if streams:
        if len(source) > 1:
            raise ConfigError(printable(f"SOURCE: expected images or one stream, got {' '.join(source)}"))
        if resume:
            raise ConfigError(printable(f"resume: expected images, got the stream {source[0]}"))
        opened = Source(source[0], stream.size, stream.format, stream.fps, stream.timeout, max_pixels)
        predictor, metadata = load_predictor(weights, inference.device, inference.amp)
        table = label_table(metadata, weights)
        with inference.folder("predict") as folder:
            return _predict_stream(with_tta(predictor, tta), table, opened, folder, stream.videos)
    frames = find_images(source)
    predictor, metadata = load_predictor(weights, inference.device, inference.amp)
    table = label_table(metadata, weights)
    settings = {"weights": str(weights), "device": inference.device, "amp": inference.amp} | tta.changes()
    with inference.folder("predict", resume) as folder:
        keep_settings(folder, settings, resume)
        result = predict(with_tta(predictor, tta), table, frames, folder, max_pixels, workers, resume)
    before = f", {result.kept} of them before" if result.kept else ""
    print(f"{result.done} of {len(frames)} images written to {printable(folder)}{before}")
    if result.times.counts["network"]:
        print(result.times.summary(result.done - result.kept))
    return 1 if result.failed else 0


def _predict_stream(predictor: Any, table: Any, source: Any, folder: Path, videos: str) -> int:
    from bcmfnet.engine.stream import predict_stream

    result = predict_stream(predictor, table, source, folder, videos)
    if result.written:
        lost = f", {result.dropped} dropped" * bool(result.dropped) + f", {result.broken} broken" * bool(result.broken)
        print(f"{result.written} frames written to {printable(folder)}{lost}")
        print(f"{result.speed}; {result.times.summary(result.written)}")
    if result.error is not None:
        raise result.error
    return 1 if result.broken else 0
