"""`bcmfnet serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from bcmfnet.cli.options import CommonOptions, DeviceOptions
from bcmfnet.engine.bounds import Between


def serve(
    *,
    weights: Path = Path("camvid11"),
    host: str = "127.0.0.1",
    port: Annotated[int, Between(0, 65535)] = 8000,
    max_bytes: Annotated[int, Between(1, 2**30)] = 2**24,
    max_pixels: Annotated[int, Between(64 * 64, 2**28)] = 2**23,
    rate: Annotated[float, Between(0.01, 1e6)] = 20.0,
    timeout: Annotated[float, Between(0.1, 3600)] = 30.0,
    queue: Annotated[int, Between(1, 10_000)] = 64,
    batch: Annotated[int, Between(1, 64)] = 8,
    batch_wait: Annotated[float, Between(0, 1)] = 0.005,
    where: DeviceOptions = DeviceOptions(),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Serve a network over HTTP: a page to try it, and JSON and PNG for programs (see /docs).

    SIGTERM and Ctrl-C end it when the requests that have arrived are answered.

    Parameters
    ----------
    weights
        Weights file, the folder of a run, whose best weights are taken, camvid11, which comes with the package, or a
        file of bcmfnet export.
    host
        Address to listen at; 127.0.0.1 is this machine alone, 0.0.0.0 whoever reaches it.
    port
        Port to listen at; 0 takes a free one.
    max_bytes
        Largest body of a request.
    max_pixels
        Largest image.
    rate
        Requests a second of one client; twice as many at once.
    timeout
        Seconds for a body to arrive, and again for its prediction.
    queue
        Requests that are worked on or wait at one time.
    batch
        Images of one size that are predicted together at most.
    batch_wait
        Seconds that an image waits for others.
    """
    common.start_logging()
    from bcmfnet.serve import require_packages

    require_packages()
    from bcmfnet.engine.exported import load_predictor
    from bcmfnet.engine.inference import label_table
    from bcmfnet.serve.app import create_app
    from bcmfnet.serve.limits import Limits
    from bcmfnet.serve.server import bound_socket, url_of
    from bcmfnet.serve.server import serve as run

    with bound_socket(host, port) as listening:
        predictor, metadata = load_predictor(weights, where.device, where.amp)
        limits = Limits(max_bytes, max_pixels, rate, timeout, queue)
        app = create_app(predictor, label_table(metadata, weights), weights.name, limits, batch, batch_wait)
        print(f"serving at {url_of(listening)}", flush=True)
        run(app, listening, timeout)
    return 0
