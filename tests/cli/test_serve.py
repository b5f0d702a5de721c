"""`bcmfnet serve`: what it refuses, and a server of its own under load, on bad connections and at its end."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import png

from bcmfnet.serve import PACKAGES


@pytest.fixture
def packages():
    for module in PACKAGES:
        pytest.importorskip(module)


def test_missing_packages_are_named(bcmfnet, monkeypatch):
    monkeypatch.setattr("bcmfnet.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    answer = bcmfnet("serve")
    assert (answer.code, answer.err) == (1, "bcmfnet: uvicorn: needed to serve; pip install 'bcmfnet[serve]'\n")


def test_packages_are_those_of_the_extra():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert sorted(PACKAGES.values()) == sorted(project["optional-dependencies"]["serve"])


def test_address_that_cannot_be_had_is_told(bcmfnet, packages):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = bcmfnet("serve", "--port", port)
    assert (
        answer.code == 2 and f"bcmfnet: --port: expected one that can be had at 127.0.0.1, got {port}: " in answer.err
    )
    answer = bcmfnet("serve", "--host", "nowhere.invalid")
    assert answer.code == 2 and "--host: expected a name or an address of this machine, got nowhere.inv" in answer.err


@pytest.mark.parametrize(("words", "said"), [
    (("--port", 70000), "--port: expected an integer from 0 to 65535, got 70000"),
    (("--rate", 0), "--rate: expected a number from 0.01 to 1000000.0, got 0"),
    (("--weights", "nothing.safetensors", "--port", 0), "nothing.safetensors: expected a weights file"),
])  # fmt: skip
def test_options_that_cannot_be_used_are_named(bcmfnet, packages, words, said):
    answer = bcmfnet("serve", *words)
    assert answer.code == 2 and said in answer.err


@contextlib.contextmanager
def served(*words: object) -> Iterator[tuple[subprocess.Popen, tuple[str, int]]]:
    """A server of its own and its address; killed where it does not end by itself."""
    command = [sys.executable, "-P", "-m", "bcmfnet", "serve", "--port", "0", "--amp", "off", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            host, port = re.fullmatch(r"serving at http://(.+):(\d+)\n", process.stdout.readline()).groups()
            yield process, (host, int(port))
        finally:
            process.kill()


def post(address: tuple[str, int], body: bytes, path: str = "/predict.png") -> bytes:
    headers = {"Content-Type": "image/png"}
    with urllib.request.urlopen(urllib.request.Request(f"http://{address[0]}:{address[1]}{path}", body, headers)) as r:
        return r.read()


def raw(address: tuple[str, int], head: str, body: bytes = b"") -> str:
    """What is answered to bytes on a connection until the server closes it."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"POST /predict HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        return b"".join(iter(lambda: connection.recv(2**16), b"")).decode()


@pytest.mark.exhaustive
def test_server_bears_bad_connections_and_ends_with_what_has_arrived(packages):
    with served("--timeout", 6) as (process, address):
        assert address[0] == "127.0.0.1"
        slow = raw(address, "Content-Length: 100", b"x")
        assert slow.startswith("HTTP/1.1 408 ") and slow.endswith(
            '{"detail":"body: expected within 6 s, got 1 bytes of it"}'
        )
        large = raw(address, f"Content-Length: {10**9}", b"x")
        assert large.startswith("HTTP/1.1 413 ") and "got 1000000000" in large
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            sent, part = 0, b"10000\r\n" + bytes(2**16) + b"\r\n"
            with contextlib.suppress(ConnectionError):
                while sent < 10**9:
                    connection.sendall(part)
                    sent += 2**16
        assert 2**24 <= sent < 2**26
        answers: list[bytes] = []
        large_frame = png(1, 480, 640)
        expected = post(address, large_frame)
        asking = [threading.Thread(target=lambda: answers.append(post(address, large_frame))) for _ in range(3)]
        for thread in asking:
            thread.start()
        deadline = time.monotonic() + 10
        while "queue_requests 3.0" not in metrics(address) and time.monotonic() < deadline and not answers:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(20)
        assert process.wait(20) in (143, -signal.SIGTERM)
        assert answers == [expected] * 3
        assert process.stderr.read() == ""


def metrics(address: tuple[str, int]) -> str:
    return urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics").read().decode()


def resident(process: subprocess.Popen) -> float:
    """MB of memory of a process."""
    line = next(x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


@pytest.mark.exhaustive
def test_load_loses_nothing_and_memory_stays_flat(packages, capsys):
    clients, each = 8, 60
    images = [png(seed, 96, 128) for seed in range(4)] + [png(seed, 64, 64) for seed in range(4)]
    with served("--rate", 1e6) as (process, address):
        expected = [post(address, image) for image in images]
        lost: list[object] = []
        seconds: list[float] = []

        def ask(number: int) -> None:
            for turn in range(each):
                which = (number + turn) % len(images)
                start = time.perf_counter()
                try:
                    if post(address, images[which]) != expected[which]:
                        lost.append(which)
                except OSError as error:
                    lost.append(error)
                seconds.append(time.perf_counter() - start)

        memory = []
        for _ in range(3):
            start = time.perf_counter()
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rate = clients * each / (time.perf_counter() - start)
            memory.append(resident(process))
        counted = metrics(address)
    total = 3 * clients * each
    assert lost == [] and len(seconds) == total
    assert f'bcmfnet_requests_total{{path="/predict.png",status="200"}} {total + len(images):.1f}' in counted
    batches = float(re.search(r"bcmfnet_batch_images_count (\S+)", counted)[1])
    assert batches < total / 2
    assert memory[2] < memory[0] + 20, memory
    cuts = statistics.quantiles(seconds, n=100)
    with capsys.disabled():
        print(f"\n{rate:.0f} requests/s, p50 {1e3 * cuts[49]:.0f} ms, p99 {1e3 * cuts[98]:.0f} ms, MB {memory}, "
              f"{total / batches:.1f} images a batch")  # fmt: skip


@pytest.mark.exhaustive
def test_endpoints_are_as_their_schema_says(packages, tmp_path):
    pytest.importorskip("schemathesis")
    with served("--rate", 1e6) as (_, address):
        url = f"http://{address[0]}:{address[1]}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--max-examples", "50", "--seed", "1"]
        command += ["--exclude-checks", "positive_data_acceptance"]  # a schema cannot say which bytes are an image
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
