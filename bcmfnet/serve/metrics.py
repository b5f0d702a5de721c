"""What Prometheus reads of a server."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Message, Receive, Send], Awaitable[None]]
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CLOSED = 499
"""Status that is counted where the client went away before the answer."""


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("bcmfnet_requests", "Answered requests", ("path", "status"), **own)
        self.seconds = Histogram("bcmfnet_request_seconds", "Time to the answer", ("path",), buckets=SECONDS, **own)
        self.batch = Histogram("bcmfnet_batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), **own)
        self.queue = Gauge("bcmfnet_queue_requests", "Requests that are worked on or wait", **own)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


class Counted:
    """An ASGI application whose requests are counted; paths that it does not know are counted as `other`."""

    def __init__(self, app: ASGI, metrics: Metrics, paths: Iterable[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), CLOSED

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"] if scope["path"] in self.paths else "other"
        try:
            await self.app(scope, receive, sent)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
