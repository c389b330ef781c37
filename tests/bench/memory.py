"""Memory of the gateway: idle, for each open stream, and while a large body passes through."""

from __future__ import annotations

import socket
import time

from tests.bench import limits, traffic
from tests.bench.load import Traffic
from tests.bench.measure import say
from tests.bench.peers import PIPELINE, Setup
from tests.bench.place import Place
from tests.bench.processes import Broken
from tests.bench.rows import Row

STREAMS = 5000
UPLOAD = 1024**3
MB = 1024 * 1024

# No stage of this pipeline reads a body: all requests go to one deployment.
DEPLOYMENT = f"""\
from gateway import Stage


class BenchDeployment(Stage):
    provides = ("deployment",)

    async def __call__(self, request, call_next):
        request.target = request.target.replace(deployment="{traffic.DEPLOYMENT}")
        return await call_next(request)
"""


def memory(place: Place) -> list[Row]:
    """Measure an idle gateway, and one with many silent streams."""
    peer = place.ours()
    idle = peer.process.rss()
    content = traffic.body(1024)
    place.azure.plain()
    place.meter.warm(peer, Traffic(place.workplace.write("idle.request", traffic.request(content)), place.azure.answer))
    before = peer.process.rss()
    place.azure.hold()
    file = place.workplace.write("held.request", traffic.request(traffic.body(1024, stream=True)))
    load = Traffic(file, place.azure.event, events=10_000_000, connections=STREAMS, opening=64)
    with place.meter.held(peer, load):
        time.sleep(2)
        each = (peer.process.rss() - before) / STREAMS
    say(f"memory: idle {idle / MB:.1f} MB, {each / 1024:.1f} KiB for a stream")
    return [
        Row("memory, idle", "MB", limits.IDLE, [idle / MB]),
        Row(f"memory for each of {STREAMS:,} open streams", "KiB", limits.STREAM, [each / 1024]),
    ]


def upload(place: Place) -> list[Row]:
    """Measure the growth of memory while a body passes through that no stage reads."""
    pipeline = ["bench_deployment" if "model_map" in stage else stage for stage in PIPELINE]
    peer = place.ours(Setup(pipeline, stages={"bench_deployment": DEPLOYMENT}, body_limit=2 * UPLOAD))
    place.azure.plain()
    request = traffic.request(traffic.body(1024))
    place.meter.warm(peer, Traffic(place.workplace.write("upload.request", request), place.azure.answer))
    before, arrived = peer.process.rss(), place.azure.body_bytes()
    peer.process.forget_peak()
    begun = time.monotonic()
    answer = _upload(peer.port)
    took = time.monotonic() - begun
    if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(traffic.answer()):
        raise Broken(f"an upload was answered with {answer[:200]!r}")
    if (came := place.azure.body_bytes() - arrived) != UPLOAD:
        raise Broken(f"of {UPLOAD} bytes, {came} reached the upstream")
    raised = (peer.process.peak() - before) / MB
    say(f"upload: {raised:.1f} MB more, {UPLOAD / MB / took:.0f} MB/s")
    return [Row("memory, while 1 GB is uploaded", "MB more", limits.UPLOAD, [raised])]


def _upload(port: int) -> bytes:
    """Send a body of 1 GB and return the response."""
    piece = bytes(MB)
    head = traffic.request(b"").replace(b"Content-Length: 0", b"Content-Length: %d" % UPLOAD)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(head.replace(b"Connection: keep-alive", b"Connection: close"))
        for _ in range(UPLOAD // MB):
            client.sendall(piece)
        answer = b""
        while more := client.recv(65536):
            answer += more
    return answer
