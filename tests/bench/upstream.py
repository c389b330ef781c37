"""The fake Azure of all measured programs (`azure.c`), and TLS in front of it."""

from __future__ import annotations

import http.client
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.bench import traffic
from tests.bench.processes import LOAD_CORE, Process
from tests.bench.workplace import Workplace, free_port


class Azure:
    """A running `azure.c` on the load's core."""

    def __init__(self, workplace: Workplace) -> None:
        self.answer = workplace.write("answer.json", traffic.answer())
        self.event = workplace.write("event.txt", traffic.event())
        self.process = workplace.start([workplace.build("azure"), self.answer, self.event], core=LOAD_CORE, talks=True)
        self.port = int(self.process.line())

    def plain(self) -> None:
        """Respond with JSON from now on."""
        self._ask("/control?answer=json")

    def stream(self, events: int, every: int) -> None:
        """Respond with streams from now on; milliseconds between events, 0 for no pause."""
        self._ask(f"/control?answer=stream&events={events}&every={every}")

    def hold(self) -> None:
        """Respond from now on with streams that are silent after one event."""
        self._ask("/control?answer=hold")

    def body_bytes(self) -> int:
        """Return how many bytes of request bodies have arrived."""
        return int(self._ask("/")["body_bytes"])

    def _ask(self, path: str) -> dict[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        reply: dict[str, int] = json.loads(connection.getresponse().read())
        connection.close()
        return reply


@dataclass(frozen=True)
class Tls:
    """nginx in front of Azure, with a certificate made for this run."""

    process: Process
    port: int
    certificate: Path

    @classmethod
    def start(cls, workplace: Workplace, azure: Azure) -> Tls:
        """Make the certificate for `localhost` and start nginx on the load's core."""
        key, certificate = workplace.folder / "key.pem", workplace.folder / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        port = free_port()
        configuration = f"""\
{nginx_basics(workplace, "front")}
    upstream azure {{ server 127.0.0.1:{azure.port}; keepalive 256; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} ssl backlog=4096;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        location / {{
            proxy_pass http://azure;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""
        path = workplace.write("front.conf", configuration)
        return cls(start_nginx(workplace, path, core=LOAD_CORE), port, certificate)


def nginx_basics(workplace: Workplace, name: str) -> str:
    """Return the beginning of nginx's configuration, including the beginning of `http`."""
    folder = workplace.folder / f"{name}-files"
    folder.mkdir()
    temporary = "\n".join(
        f"    {kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""\
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 16000; }}
http {{
    access_log off;
{temporary}
    client_body_buffer_size 256k;
    client_max_body_size 0;
    keepalive_requests 100000000;
    keepalive_timeout 600s;
"""


def start_nginx(workplace: Workplace, configuration: Path, *, core: int) -> Process:
    """Start nginx. Its error log goes to the log of the process, even while nginx reads the configuration."""
    return workplace.start(["nginx", "-e", "stderr", "-p", workplace.folder, "-c", configuration], core=core)
