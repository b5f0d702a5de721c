"""What a server takes at most, each limit with its HTTP status, and the body of a request read within them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/tiff", "application/octet-stream")
STATUSES = {
    400: "No body",
    408: "The body did not arrive in time",
    413: "Too many bytes or pixels",
    415: "Not a media type of images",
    422: "No image that can be read, of a size that the weights do not take, or a query that is not understood",
    429: "Too many requests of one client",
    500: "The prediction failed",
    503: "Too many requests wait",
    504: "The prediction took too long",
}
"""Statuses of requests that are not served."""
CLIENTS = 10_000
"""Clients whose rate is remembered; those that were not heard of for longest are forgotten first."""


@dataclass(frozen=True)
class Limits:
    """Bytes of a body; pixels of an image; requests of a client a second, twice as many at once; seconds for a body to
    arrive, and again for its prediction; requests that are worked on or wait at one time."""

    bytes: int = 2**24
    pixels: int = 2**23
    rate: float = 20.0
    seconds: float = 30.0
    queue: int = 64


class Refused(Exception):
    """A request that is not served: an HTTP status, one line for the client, and seconds to wait before the next."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class Rate:
    """A bucket of 2 * rate requests for each client, which fills again with `rate` a second."""

    def __init__(self, rate: float) -> None:
        self.rate, self.most = rate, max(1.0, 2 * rate)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request of a client. Raises Refused where it had too many."""
        now = time.monotonic()
        left, since = self._left.pop(client, (self.most, now))
        left = min(self.most, left + (now - since) * self.rate)
        allowed = left >= 1
        self._left[client] = (left - allowed, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        if not allowed:
            wait = max(1, round((1 - left) / self.rate))
            raise Refused(429, f"rate: expected at most {self.rate:g} requests a second from a client", wait)


class Queue:
    """Counts the requests that are worked on or wait."""

    def __init__(self, most: int) -> None:
        self.most, self.length = most, 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in it for the time of the code inside. Raises Refused where there is none."""
        if self.length >= self.most:
            raise Refused(503, f"queue: {self.most} requests are waiting, try again", retry_after=1)
        self.length += 1
        try:
            yield
        finally:
            self.length -= 1


async def read_body(headers: Mapping[str, str], chunks: AsyncIterator[bytes], limits: Limits) -> bytes:
    """The body of a request with an image. Raises Refused for one of another type, too long, too slow or empty.

    What its length forbids is refused before a byte of it is read, what has no length as soon as it is too long.
    """
    kind = headers.get("content-type", MEDIA_TYPES[-1]).partition(";")[0].strip().lower()
    if kind not in MEDIA_TYPES:
        raise Refused(415, f"content-type: expected one of {', '.join(MEDIA_TYPES)}, got {kind[:80]!r}")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.bytes:
        raise Refused(413, f"body: expected at most {limits.bytes} bytes, got {length[:20]}")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in chunks:
                if len(body) + len(chunk) > limits.bytes:
                    raise Refused(413, f"body: expected at most {limits.bytes} bytes, got more")
                body += chunk
    except TimeoutError:
        raise Refused(408, f"body: expected within {limits.seconds:g} s, got {len(body)} bytes of it") from None
    if not body:
        raise Refused(400, "body: expected the bytes of an image file, got none")
    return bytes(body)
