"""A socket, and uvicorn on it until a signal ends it."""

from __future__ import annotations

import math
import socket

import uvicorn
from fastapi import FastAPI

from bcmfnet.errors import ConfigError

BACKLOG = 128


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(
            f"host: expected a name or an address of this machine, got {host}: {error.strerror}"
        ) from None
    except OSError as error:
        raise ConfigError(f"port: expected one that can be had at {host}, got {port}: {error.strerror}") from None


def url_of(listening: socket.socket) -> str:
    """The address of a socket for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: FastAPI, listening: socket.socket, seconds: float) -> None:
    """Serve until SIGINT or SIGTERM; then requests that have arrived are answered.

    Args:
        seconds: within which a body arrives, and within as many more its prediction is made.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(2 * seconds),
    )
    uvicorn.Server(config).run(sockets=[listening])
