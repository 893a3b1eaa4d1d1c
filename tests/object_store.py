"""An S3 server of this machine for the tests: moto's, in a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

SECRET = "a-secret-that-must-stay-out-of-every-file"


@dataclass
class ObjectServer:
    """A server with the bucket ``lab``.

    Attributes:
        environment: what a client's environment has to hold.
    """

    process: subprocess.Popen[bytes]
    port: int
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Started, answering, with its bucket; ended at the end."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                put = urllib.request.Request(f"http://127.0.0.1:{port}/lab", method="PUT")
                urllib.request.urlopen(put, timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield ObjectServer(process, port)
    finally:
        process.kill()
        process.wait()
