# SPDX-License-Identifier: Apache-2.0
"""A local S3 server, and a bucket ``runs`` on it that the process's s3fs finds."""

import contextlib
import logging

import pytest


@contextlib.contextmanager
def serving(monkeypatch):
    """Serves in the block."""
    server_lib = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = server_lib.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.makedirs("runs", exist_ok=True)  # the servers of one process share buckets
    yield fs
    server.stop()
