"""An S3 server on the loopback (moto) for tests of datasets and sources behind URLs."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest


@contextmanager
def s3_server() -> Iterator[str]:
    """Gives the URL of a server, which ends with the `with` statement, as do clients that know it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    forget_clients()
    yield url
    # All servers of a process hold the same buckets.
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()
    server.stop()
    forget_clients()


def s3_client(url: str, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """A client of the server at `url`, by an environment that other processes inherit."""
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    return fsspec.filesystem("s3")


def forget_clients() -> None:
    """fsspec keeps clients, and with them the environment that they were made in."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
