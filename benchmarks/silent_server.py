# SPDX-License-Identifier: Apache-2.0
"""What a server that is silent for a while does to pymilvus: with its own settings, and with ours.

    python benchmarks/silent_server.py --out runs/silent [--rows ...]

A Milvus server in a process of its own is stopped (SIGSTOP) while a fresh process connects to it or
waits for a call, as a machine with too much to do stops it for moments. The third pair of rows asks
a gRPC server of Python's with no settings of its own, as milvus-lite's is, for one long call.
Nothing here computes; the times are seconds of waiting.
"""

import argparse
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from upgrade import Server

from m2jax.tasks.vectors import CONNECT_S, PINGS

SETTINGS = {"pymilvus": {}, "ours": {"timeout": CONNECT_S, "grpc_options": PINGS}}
PINGED = {"grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 5_000}  # as pymilvus does
CLIENT = """
import logging, sys, time
from pymilvus import MilvusClient

logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


def timed(call):
    print("ready", flush=True)
    sys.stdin.readline()
    start, said = time.perf_counter(), "done"
    try:
        found = call()
    except Exception as error:
        found, said = None, "failed: " + (str(getattr(error, "message", "")) or repr(error))
    print(f"{said} ({time.perf_counter() - start:.1f} s)", flush=True)
    return found


client = timed(lambda: MilvusClient(sys.argv[1], **eval(sys.argv[2])))
client and timed(lambda: client.has_collection("x"))
"""


def stopped(server, seconds):
    """Stops the server for a while; returns at once."""
    server.process.send_signal(signal.SIGSTOP)
    threading.Timer(seconds, server.process.send_signal, [signal.SIGCONT]).start()


def silent(server, settings, connect, call):
    """What a fresh client says of connection and call, with the server silent meanwhile."""
    words = [sys.executable, "-c", CLIENT, server.uri, repr(SETTINGS[settings])]
    client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = []
    for seconds in (connect, call):
        if client.stdout.readline().strip() != "ready":
            break  # not connected
        if seconds:
            stopped(server, seconds)
        client.stdin.write("\n")
        client.stdin.flush()
        said.append(client.stdout.readline().strip())
    client.communicate()
    return said


def long_call(options, seconds):
    """What one call of so many seconds ends with."""

    def wait(request, _):
        time.sleep(float(request))
        return b""

    handler = grpc.method_handlers_generic_handler(
        "wait.Wait", {"wait": grpc.unary_unary_rpc_method_handler(wait)}
    )
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    start, said = time.perf_counter(), "done"
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[*options.items()]) as channel:
        try:
            channel.unary_unary("/wait.Wait/wait")(str(seconds).encode())
        except grpc.RpcError as error:
            said = f"failed: {error.details()}"
    return [f"{said} ({time.perf_counter() - start:.1f} s)"]


def main():
    """Prints a row of the table as it is made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    rows = ("connect", "call", "long")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| the server | pymilvus' settings | ours |\n|---|---|---|")
    if {"connect", "call"} & {*args.rows}:
        server = Server(args.out / "database.db")
        try:
            if "connect" in args.rows:
                cells = [silent(server, name, 15, 0)[0] for name in SETTINGS]
                print(f"| is silent for 15 s while a process connects | {' | '.join(cells)} |")
            if "call" in args.rows:
                cells = [silent(server, name, 0, 70)[-1] for name in SETTINGS]
                print(f"| is silent for 70 s during a call | {' | '.join(cells)} |")
        finally:
            server.kill()
    if "long" in args.rows:
        cells = [long_call(options, 240)[0] for options in (PINGED, PINGS)]
        print(f"| takes 240 s over one call | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
