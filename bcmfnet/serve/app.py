"""The application: its endpoints, and how a request becomes a prediction or one line that says why not."""

from __future__ import annotations

import asyncio
import io
import logging
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

import bcmfnet
from bcmfnet.data.headers import parse_header
from bcmfnet.data.io import decode_image, encode_png
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.pairs import check_frame_size
from bcmfnet.engine.exported import ExportedPredictor
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.predict import label_ids
from bcmfnet.errors import ConfigError, DataError
from bcmfnet.serve.batches import Batches
from bcmfnet.serve.limits import MEDIA_TYPES, STATUSES, Limits, Queue, Rate, Refused, read_body
from bcmfnet.serve.metrics import Counted, Metrics
from bcmfnet.serve.network import Kind, Network, Prediction
from bcmfnet.serve.page import page_of_api, page_to_try, policy
from bcmfnet.viz import colorize, overlay

log = logging.getLogger("bcmfnet.serve")
PATHS = ("/", "/docs", "/health", "/metrics", "/openapi.json", "/predict", "/predict.png")
IMAGE = {
    "requestBody": {
        "required": True,
        "description": "The bytes of an image file; its EXIF orientation is followed",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES},
    }
}


@dataclass
class Error:
    """Why a request was not served, in one line."""

    detail: str


@dataclass
class ClassShare:
    """A class in an image: its id in label files, its RGB colour, its share of the pixels, and the mean confidence."""

    name: str
    id: int
    color: tuple[int, int, int]
    share: float
    confidence: float | None


@dataclass
class Maps:
    """PNGs in base64: of each pixel the index into `classes`, and the confidence in per cent."""

    labels: str
    confidence: str | None


@dataclass
class Answer:
    """The prediction of an image: its size, its classes in the order of the weights, and its maps where asked for."""

    width: int
    height: int
    classes: list[ClassShare]
    maps: Maps | None


@dataclass
class Health:
    """That the server serves, and what."""

    status: Literal["ok"]
    version: str
    weights: str
    device: str
    classes: list[str]


class Service:
    """A predictor behind limits and batches."""

    def __init__(
        self, predictor: LabelPredictor | ExportedPredictor, table: LabelTable, limits: Limits, most: int, wait: float
    ) -> None:
        self.table, self.limits, self.metrics = table, limits, Metrics()
        self.network = Network(predictor, self.metrics.batch.observe)
        self.batches: Batches[Kind, np.ndarray, Prediction] = Batches(self.network, most, wait)
        self.rate, self.queue = Rate(limits.rate), Queue(limits.queue)
        self.metrics.queue.set_function(lambda: self.queue.length)

    async def predict(self, request: Request, confidence: bool) -> tuple[np.ndarray, Prediction]:
        """The image of a request, RGB uint8 [H, W, 3], and its prediction. Raises Refused."""
        self.rate.take(request.client.host if request.client else "")
        with self.queue.place():
            body = await read_body(request.headers, request.stream(), self.limits)
            try:
                async with asyncio.timeout(self.limits.seconds):
                    image = await asyncio.to_thread(self._decoded, body)
                    return image, await self.batches(Kind(image.shape[:2], confidence), image)
            except TimeoutError:
                raise Refused(504, f"prediction: expected within {self.limits.seconds:g} s, try again") from None
            except ConfigError:  # its message names the file of the weights
                height, width = image.shape[:2]
                raise Refused(422, f"image: the weights do not take images of {width}x{height}") from None
            except Refused:
                raise
            except Exception as error:
                log.error("a prediction failed: %s: %s", type(error).__name__, " ".join(str(error).split()))
                raise Refused(500, "the prediction failed, the server's log says why") from None

    def _decoded(self, body: bytes) -> np.ndarray:
        header = parse_header(io.BytesIO(body))
        if header is not None and header.width * header.height > self.limits.pixels:
            size = f"{header.width}x{header.height}"
            raise Refused(413, f"image: expected at most {self.limits.pixels} pixels, got {size}")
        try:
            image = decode_image(body, "image", self.limits.pixels)
            check_frame_size("image", *image.shape[:2])
        except DataError as error:
            raise Refused(422, str(error)) from None
        return image

    def answer(self, prediction: Prediction, maps: bool) -> Answer:
        """A prediction as JSON holds it."""
        labels, confidence = prediction
        number, count = self.table.num_classes, labels.size
        pixels = np.bincount(labels.ravel(), minlength=number)
        sums = [None] * number if confidence is None else np.bincount(labels.ravel(), confidence.ravel(), number)
        ids = label_ids(np.arange(number, dtype=np.uint8), self.table).tolist()
        classes = [
            ClassShare(
                name, id, color, int(n) / count, float(total) / 100 / int(n) if n and total is not None else None
            )
            for name, id, color, n, total in zip(self.table.classes, ids, self.table.colors, pixels, sums, strict=True)
        ]
        encoded = Maps(_base64(labels), None if confidence is None else _base64(confidence)) if maps else None
        return Answer(labels.shape[1], labels.shape[0], classes, encoded)

    def picture(self, image: np.ndarray, prediction: Prediction, kind: str) -> bytes:
        """A prediction as a PNG of a kind."""
        labels = prediction.labels
        if kind == "confidence":
            if prediction.confidence is None:
                raise Refused(422, "picture: these weights are a file of labels, which gives no confidence")
            return encode_png(prediction.confidence)
        if kind == "labels":
            return encode_png(label_ids(labels, self.table))
        return encode_png(colorize(labels, self.table) if kind == "color" else overlay(image, labels, self.table))


def _base64(picture: np.ndarray) -> str:
    return b64encode(encode_png(picture)).decode()


def create_app(
    predictor: LabelPredictor | ExportedPredictor,
    table: LabelTable,
    name: str,
    limits: Limits = Limits(),
    batch: int = 8,
    wait: float = 0.005,
) -> FastAPI:
    """The ASGI application of a predictor.

    Args:
        name: of the weights, for the page and /health.
        batch, wait: images of a batch at most, and seconds that one waits for others.
    """
    service = Service(predictor, table, limits, batch, wait)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.batches.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="bcmfnet",
        version=bcmfnet.__version__,
        description=f"Semantic segmentation by {name}. An error is one line, in detail.",
        lifespan=running,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Counted, metrics=service.metrics, paths=PATHS)
    _answer_errors(app)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": why} for status, why in STATUSES.items()
    }

    @app.post("/predict", responses=errors, openapi_extra=IMAGE, summary="The classes of an image as JSON")
    async def predict(
        request: Request, maps: Annotated[bool, Query(description="With labels and confidence of each pixel")] = False
    ) -> Answer:
        _, prediction = await service.predict(request, confidence=True)
        return await asyncio.to_thread(service.answer, prediction, maps)

    @app.post(
        "/predict.png",
        responses={200: {"content": {"image/png": {}}}, **errors},
        response_class=Response,
        openapi_extra=IMAGE,
        summary="The label map of an image, or a picture of it, as PNG",
    )
    async def picture(
        request: Request,
        picture: Annotated[
            Literal["labels", "color", "overlay", "confidence"],
            Query(description="labels: the ids that predict writes; confidence: per cent"),
        ] = "labels",
    ) -> Response:
        image, prediction = await service.predict(request, picture == "confidence")
        return Response(await asyncio.to_thread(service.picture, image, prediction, picture), media_type="image/png")

    @app.get("/health", summary="Whether the server serves, and which weights")
    async def health() -> Health:
        return Health("ok", bcmfnet.__version__, name, str(predictor.device), list(table.classes))

    @app.get("/metrics", response_class=PlainTextResponse, summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page(page_to_try(name, table, limits))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page(page_of_api(app.openapi()))

    return app


def _page(text: str) -> HTMLResponse:
    return HTMLResponse(text, headers={"Content-Security-Policy": policy(), "X-Content-Type-Options": "nosniff"})


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Connection": "close"} if error.status in (408, 413, 415) else {}  # the rest of the body is not read
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        return JSONResponse({"detail": error.detail}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)
