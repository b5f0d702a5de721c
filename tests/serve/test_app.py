"""The endpoints in this process: values are those of predict, and each bad request is refused with its own line."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import page
import pytest
import torch
from cv2 import IMREAD_COLOR_RGB, IMREAD_UNCHANGED, imdecode, imencode
from served import TABLE, frame, png

import bcmfnet
from bcmfnet.data.io import read_label
from bcmfnet.data.labels import LabelTable
from bcmfnet.engine.exported import ExportedPredictor
from bcmfnet.engine.predict import Frame, predict
from bcmfnet.serve.limits import Limits, Refused, read_body
from bcmfnet.viz import colorize, overlay

ENDPOINTS = ("/predict", "/predict.png")


def decoded(data: bytes, flags: int = IMREAD_UNCHANGED) -> np.ndarray:
    return imdecode(np.frombuffer(data, np.uint8), flags)


def labels_of(predictor, image: np.ndarray) -> np.ndarray:
    return predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()


def test_label_png_is_what_predict_writes(client, predictor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    assert predict(predictor, TABLE, [Frame(tmp_path / "a.png", Path("a"))], tmp_path).failed == []
    answer = client().post("/predict.png", content=png(0), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.content == (tmp_path / "a_labelIds.png").read_bytes()
    assert len(np.unique(read_label(tmp_path / "a_labelIds.png"))) > 1


def test_pictures_are_those_of_viz(client, predictor):
    labels = labels_of(predictor, frame(1))
    for kind, expected in (("color", colorize(labels, TABLE)), ("overlay", overlay(frame(1), labels, TABLE))):
        answer = client().post("/predict.png", params={"picture": kind}, content=png(1))
        np.testing.assert_array_equal(decoded(answer.content, IMREAD_COLOR_RGB), expected)


def test_json_holds_shares_and_the_confidence_of_each_pixel(client, predictor):
    image = frame(2, 96, 64)
    answer = client().post("/predict", params={"maps": True}, content=png(2, 96, 64)).json()
    frames = torch.from_numpy(image).permute(2, 0, 1)[None]
    scores = torch.nn.functional.interpolate(predictor.logits(frames), (96, 64), mode="bilinear").softmax(1)[0]
    assert (answer["width"], answer["height"]) == (64, 96)
    maps = {name: decoded(base64.b64decode(data)) for name, data in answer["maps"].items()}
    labels = labels_of(predictor, image)
    np.testing.assert_array_equal(maps["labels"], labels)
    np.testing.assert_allclose(maps["confidence"], 100 * scores.amax(0).numpy(), atol=0.51)
    assert [c["name"] for c in answer["classes"]] == list(TABLE.classes)
    assert [c["id"] for c in answer["classes"]][:3] == [7, 8, 11]
    for number, entry in enumerate(answer["classes"]):
        there = labels == number
        assert entry["share"] == pytest.approx(there.mean())
        expected = maps["confidence"][there].mean() / 100 if there.any() else None
        assert entry["confidence"] == (pytest.approx(expected) if there.any() else None)
    assert client().post("/predict", content=png(2)).json()["maps"] is None


def test_requests_that_come_together_are_one_batch_with_equal_labels(client, predictor):
    seen = []

    class Slow:
        device = predictor.device

        def __call__(self, images):
            seen.append(tuple(images.shape))
            time.sleep(0.1)
            return predictor(images)

    together = client(Slow(), batch=4)
    sizes = [(72, 104), (64, 64)]
    jobs = [(seed, *sizes[seed % 2]) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda job: together.post("/predict.png?picture=color", content=png(*job)), jobs))
    for job, answer in zip(jobs, answers, strict=True):
        expected = colorize(labels_of(predictor, frame(*job)), TABLE)
        np.testing.assert_array_equal(decoded(answer.content, IMREAD_COLOR_RGB), expected)
    assert sum(shape[0] for shape in seen) == 12 and max(shape[0] for shape in seen) == 4 and len(seen) <= 7


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


JPEG = imencode(".jpg", frame(0))[1].tobytes()
BAD = {
    "empty": (b"", {}, 400, "body: expected the bytes of an image file, got none"),
    "no image": (
        b"<html>",
        {},
        422,
        "image: not an image that can be decoded (corrupt, or not PNG, JPEG, BMP, TIFF or WebP)",
    ),
    "truncated PNG": (png(0)[:-20], {}, 422, "image: truncated PNG"),
    "truncated JPEG": (JPEG[:-200], {}, 422, "image: truncated JPEG"),
    "bomb": (bomb(), {}, 413, "image: expected at most 8388608 pixels, got 30000x30000"),
    "damaged": (png(0)[:60] + b"x" + png(0)[61:], {}, 422, "image: corrupt PNG (checksum of 'IDAT' at byte 33)"),
    "small": (png(0, 32, 104), {}, 422, "image: expected an image of at least 64x64 pixels, got 104x32"),
    "wrong type": (
        png(0),
        {"Content-Type": "text/plain; charset=utf-8"},
        415,
        "content-type: expected one of image/png, image/jpeg, image/webp, image/bmp, image/tiff, "
        "application/octet-stream, got 'text/plain'",
    ),
    "1 GB by its length": (
        b"x",
        {"Content-Length": str(10**9)},
        413,
        "body: expected at most 16777216 bytes, got 1000000000",
    ),
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("name", BAD)
def test_bad_upload_is_refused_in_one_line(client, endpoint, name):
    body, headers, status, detail = BAD[name]
    answer = client().post(endpoint, content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (status, {"detail": detail})


def test_body_without_a_length_is_refused_as_soon_as_it_is_too_long(client):
    taken = []

    async def chunks():
        for number in range(10**9 // 2**16):
            taken.append(number)
            yield bytes(2**16)

    async def read():
        with pytest.raises(Refused, match="body: expected at most 16777216 bytes, got more") as refused:
            await read_body({}, chunks(), Limits())
        return refused.value.status

    assert asyncio.run(read()) == 413 and len(taken) == 257
    sent = client(bytes=1000).post("/predict", content=iter([bytes(600)] * 2))
    assert (sent.status_code, sent.json()["detail"]) == (413, "body: expected at most 1000 bytes, got more")


def test_query_that_is_not_understood_is_one_line(client):
    answer = client().post("/predict.png?picture=jpeg", content=png(0))
    assert answer.status_code == 422 and answer.json()["detail"].startswith("picture: Input should be 'labels', ")


def test_rate_of_a_client_is_bounded(client):
    served = client(rate=0.5)
    assert [served.post("/predict", content=b"").status_code for _ in range(3)] == [400, 429, 429]
    answer = served.post("/predict", content=b"")
    assert answer.json()["detail"] == "rate: expected at most 0.5 requests a second from a client"
    assert answer.headers["retry-after"] == "2" and served.get("/health").status_code == 200


class Waiting:
    """A network that predicts when it is let."""

    device = torch.device("cpu")

    def __init__(self):
        self.free = threading.Event()

    def __call__(self, images):
        self.free.wait(20)
        return torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8)


def test_full_queue_and_slow_prediction_are_told(client):
    network = Waiting()
    served = client(network, queue=2, seconds=1.0)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(served.post, "/predict.png", content=png(0)) for _ in range(2)]
        deadline = time.monotonic() + 10
        while "bcmfnet_queue_requests 2.0" not in served.get("/metrics").text and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = served.post("/predict.png", content=png(0))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["detail"] == "queue: 2 requests are waiting, try again"
        for answer in (each.result() for each in waiting):
            assert answer.status_code == 504
            assert answer.json()["detail"] == "prediction: expected within 1 s, try again"
    assert served.get("/metrics").text.count("bcmfnet_queue_requests 0.0") == 1
    network.free.set()
    assert served.post("/predict.png", content=png(0)).status_code == 200


def test_failure_of_the_network_is_told_and_the_next_request_served(client, caplog):
    class Failing:
        device = torch.device("cpu")
        fails = True

        def __call__(self, images):
            if self.fails:
                raise RuntimeError("out of\nmemory")
            return torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8)

    network = Failing()
    served = client(network)
    answer = served.post("/predict.png", content=png(0))
    assert (answer.status_code, answer.json()) == (500, {"detail": "the prediction failed, the server's log says why"})
    assert [record.getMessage() for record in caplog.records if record.name == "bcmfnet.serve"] == [
        "a prediction failed: RuntimeError: out of memory"
    ]
    network.fails = False
    assert served.post("/predict.png", content=png(0)).status_code == 200


def test_exported_file_of_labels_has_no_confidence_and_its_size_is_told(client):
    metadata = {"output": "labels", "size": [72, 104], "least_side": 64, "takes_uint8": True}
    labels = torch.arange(72 * 104).reshape(1, 72, 104).remainder(19).to(torch.uint8)
    served = client(ExportedPredictor(SimpleNamespace(metadata=metadata, path="w", run=lambda images: labels)))
    answer = served.post("/predict?maps=1", content=png(0)).json()
    assert answer["maps"]["confidence"] is None and {c["confidence"] for c in answer["classes"]} == {None}
    np.testing.assert_array_equal(decoded(base64.b64decode(answer["maps"]["labels"])), labels[0])
    refused = served.post("/predict.png?picture=confidence", content=png(0))
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        "picture: these weights are a file of labels, which gives no confidence",
    )
    other = served.post("/predict", content=png(0, 64, 64))
    assert (other.status_code, other.json()["detail"]) == (422, "image: the weights do not take images of 64x64")


def test_health_and_metrics_say_what_was_served(client):
    served = client()
    assert served.get("/health").json() == {
        "status": "ok",
        "version": bcmfnet.__version__,
        "weights": "weights",
        "device": "cpu",
        "classes": list(TABLE.classes),
    }
    served.post("/predict", content=png(0))
    served.post("/predict", content=b"")
    served.get("/nowhere")
    lines = served.get("/metrics").text.splitlines()
    for line in (
        'bcmfnet_requests_total{path="/predict",status="200"} 1.0',
        'bcmfnet_requests_total{path="/predict",status="400"} 1.0',
        'bcmfnet_requests_total{path="other",status="404"} 1.0',
        'bcmfnet_request_seconds_count{path="/predict"} 2.0',
        "bcmfnet_batch_images_sum 1.0",
        "bcmfnet_queue_requests 0.0",
    ):
        assert line in lines


def test_pages_are_whole_and_load_nothing_from_elsewhere(client):
    served = client()
    for path in ("/", "/docs"):
        answer = served.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text.replace("http-equiv", "")
        page.parse(answer.text)
    boxes = page.parse(served.get("/").text).all("input", type="checkbox")
    assert [box.attributes["data-color"] for box in boxes] == ["#{:02x}{:02x}{:02x}".format(*c) for c in TABLE.colors]
    headings = [h.text for h in page.parse(served.get("/docs").text).all("h2")]
    assert headings == ["POST /predict", "POST /predict.png", "GET /health", "GET /metrics"]
    described = served.get("/openapi.json").json()["paths"]
    assert {f"{method.upper()} {path}" for path, methods in described.items() for method in methods} == set(headings)
    assert json.dumps(described["/predict"]["post"]["responses"]["413"]).count("Error") == 1


def test_body_that_comes_slowly_is_refused():
    async def chunks():
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    with pytest.raises(Refused, match=r"body: expected within 0.1 s, got [1-6] bytes of it") as refused:
        asyncio.run(read_body({}, chunks(), Limits(seconds=0.1)))
    assert refused.value.status == 408


def test_names_cannot_become_markup():
    from bcmfnet.serve.page import page_to_try

    table = LabelTable("t", ("<script>alert(1)</script>",), ((0, 0, 0),))
    parsed = page.parse(page_to_try("<b>", table, Limits()))
    assert len(parsed.all("script")) == 1 and "<b> tells 1 classes apart" in parsed.all("header")[0].text
