"""The page in a browser: an image is segmented, wiped, pointed at and read by keyboard, on a desk and on a phone."""

from __future__ import annotations

import shutil
import socket
import threading

import numpy as np
import pytest
import torch
from served import TABLE, png

HEIGHT, WIDTH = 96, 128
PIXELS = "new Set([...new Uint32Array(after.getContext('2d').getImageData(0, 0, 128, 96).data.buffer)])"


class Halves:
    """Class 0 to the left, class 13 to the right; with 80 % to 20 %."""

    device = torch.device("cpu")

    def logits(self, images):
        logits = torch.full((len(images), 19, HEIGHT // 8, WIDTH // 8), -40.0)
        high, low = np.log(0.8), np.log(0.2)
        logits[:, 0, :, :8], logits[:, 13, :, :8] = high, low
        logits[:, 0, :, 8:], logits[:, 13, :, 8:] = low, high
        return logits


@pytest.fixture
def address():
    for module in ("fastapi", "prometheus_client"):
        pytest.importorskip(module)
    uvicorn = pytest.importorskip("uvicorn")
    from bcmfnet.serve.app import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(Halves(), TABLE, "halves"), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium or google-chrome on PATH")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 360])
def test_image_is_segmented_wiped_and_read(browser, address, scheme, width):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert page.locator("#file").bounding_box()["width"] > 150
    image = {"name": "a.png", "mimeType": "image/png", "buffer": png(0, HEIGHT, WIDTH)}
    page.set_input_files("#file", files=[image])
    page.wait_for_selector("#result:not([hidden])")
    assert page.inner_text("#status").startswith("a.png: 128 x 96 pixels in ")
    view = page.locator("#view")
    box = view.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 128 * 20.5, box["y"] + box["height"] / 96 * 10.5)
    assert page.evaluate("told.value") == "road, 80 % sure at 20, 10"
    view.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    assert page.evaluate("told.value") == "road, 80 % sure at 22, 11"
    page.focus("#slider")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("getComputedStyle(after).clipPath") == "inset(0px 0px 0px 30%)"
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert page.input_value("#slider") == "75" and page.evaluate("told.value").startswith("car, 80 % sure at 96, ")
    rows = page.locator(".checks li:visible")
    assert rows.all_inner_texts() == ["road\n50.0 %", "car\n50.0 %"]
    colors = [0xA6000000 | int.from_bytes(bytes(TABLE.colors[label]), "little") for label in (0, 13)]
    drawn = drawn_colors(page)
    assert len(drawn) == 2
    page.focus(".checks li:not([hidden]) input")
    page.keyboard.press("Space")
    assert drawn_colors(page) == {0} | (drawn - {nearest(drawn, colors[0])})
    page.locator("#none").press("Enter")
    assert drawn_colors(page) == {0}
    page.locator("#all").press("Enter")
    assert drawn_colors(page) == drawn
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert [line for line in said if "willReadFrequently" not in line] == []
    assert {url.startswith((address, "data:", "blob:")) for url in asked} == {True}
    page.set_input_files("#file", files=[image | {"buffer": b"nothing"}])
    page.wait_for_selector("#status.failed")
    assert page.inner_text("#status").startswith("a.png: image: not an image that can be decoded")
    page.goto(f"{address}/docs")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def drawn_colors(page) -> set[int]:
    return set(page.evaluate(f"[...{PIXELS}]"))


def nearest(drawn: set[int], color: int) -> int:
    """What a canvas has made of a colour with alpha: it keeps its channels multiplied."""
    channels = lambda word: np.frombuffer(np.uint32(word).tobytes(), np.uint8).astype(int)  # noqa: E731
    return min(drawn, key=lambda word: np.abs(channels(word) - channels(color)).sum())
