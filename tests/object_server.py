# SPDX-License-Identifier: Apache-2.0
"""A local object store, S3's or Google's, and a bucket ``runs`` on it that the process finds."""

import contextlib
import logging
import os
import socket

import fsspec
import pytest

# Read when gcsfs is imported: else it asks Google, over gRPC, what kind of bucket it is, and waits
# a minute for the answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@contextlib.contextmanager
def serving(monkeypatch, kind="s3"):
    """Serves in the block; gives the file system of ``s3://`` or ``gs://``."""
    with {"s3": _s3, "gs": _gs}[kind](monkeypatch) as fs:
        yield fs


@contextlib.contextmanager
def _s3(monkeypatch):
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


@contextlib.contextmanager
def _gs(monkeypatch):
    server_lib = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    for name in ("gs", "gcs"):
        monkeypatch.setitem(fsspec.config.conf, name, {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    server = server_lib.create_server("127.0.0.1", port, in_memory=True, default_bucket="runs")
    server.start()
    yield gcsfs.GCSFileSystem(token="anon")
    server.stop()
