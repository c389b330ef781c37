"""The measured programs: our gateway, nginx, HAProxy and a usual aiohttp proxy, each doing the same work."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.bench import traffic
from tests.bench.interpreters import Interpreter
from tests.bench.processes import GATEWAY_CORE, Broken, Process
from tests.bench.upstream import Azure, Tls, nginx_basics, start_nginx
from tests.bench.workplace import HERE, Workplace, free_port

# The whole default pipeline, with a limit that is never reached.
PIPELINE = (
    "access_log",
    "auth_passthrough",
    "rate_limit: {requests_per_minute: 1000000000}",
    f"model_map: {{models: {{{traffic.MODEL}: {traffic.DEPLOYMENT}}}}}",
    "resource_ids",
    f"api_version: {{version: {traffic.API_VERSION}, otherwise: [v1, 2025-04-01-preview]}}",
    "missing_message",
    "missing_fields",
    "missing_delta",
    "prompt_filter_chunk: drop",
    "openai_errors",
    "sse_newline",
)
# The stages that repair Azure's responses.
REPAIRS = ("missing_message", "missing_fields", "missing_delta", "prompt_filter_chunk: drop")


@dataclass(frozen=True)
class Peer:
    """A running gateway or proxy."""

    name: str
    process: Process
    port: int
    newlines: int
    """Newlines after `[DONE]`: two if the gateway repairs Azure's ending, one if it passes that on."""


def nginx(workplace: Workplace, azure: Azure, tls: Tls | None = None) -> Peer:
    """Start nginx as a plain reverse proxy that moves the key. Over TLS it verifies, as our gateway does."""
    name, port = "nginx-tls" if tls else "nginx", free_port()
    verify = f"""
            proxy_ssl_trusted_certificate {tls.certificate};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_session_reuse on;""" if tls else ""  # fmt: skip
    configuration = f"""\
{nginx_basics(workplace, name)}
    map $http_authorization $key {{ "~^Bearer (?<bearer>.+)$" $bearer; default ""; }}
    upstream azure {{
        server 127.0.0.1:{tls.port if tls else azure.port};
        keepalive 256;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = {traffic.CHAT} {{
            proxy_pass {"https" if tls else "http"}://azure{traffic.AZURE_CHAT};{verify}
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Authorization "";
            proxy_set_header api-key $key;
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""
    path = workplace.write(f"{name}.conf", configuration)
    return _up(Peer("nginx", start_nginx(workplace, path, core=GATEWAY_CORE), port, 1))


def haproxy(workplace: Workplace, azure: Azure) -> Peer:
    """Start HAProxy in the same way, on one thread."""
    port = free_port()
    path, _, query = traffic.AZURE_CHAT.partition("?")
    configuration = f"""\
global
    nbthread 1
    maxconn 6000
defaults
    mode http
    timeout connect 10s
    timeout client 600s
    timeout server 600s
    http-reuse always
    option http-no-delay
frontend clients
    bind 127.0.0.1:{port}
    http-request set-header api-key %[req.hdr(authorization),word(2,' ')]
    http-request del-header authorization
    http-request set-path {path}
    http-request set-query {query}
    default_backend azure
backend azure
    server azure 127.0.0.1:{azure.port} pool-max-conn 256
"""
    file = workplace.write("haproxy.cfg", configuration)
    return _up(Peer("HAProxy", workplace.start(["haproxy", "-db", "-f", file], core=GATEWAY_CORE), port, 1))


def usual(workplace: Workplace, azure: Azure, interpreter: Interpreter) -> Peer:
    """Start a proxy written the usual way with aiohttp."""
    port = free_port()
    command: list[str | Path] = [
        interpreter.python,
        "-P",
        HERE / "usual.py",
        str(port),
        f"http://127.0.0.1:{azure.port}",
    ]
    return _up(Peer("usual aiohttp", workplace.start(command, core=GATEWAY_CORE), port, 1))


@dataclass(frozen=True)
class Setup:
    """The configuration of our gateway."""

    pipeline: Sequence[str] = PIPELINE
    stages: Mapping[str, str] | None = None
    """Additional stages: name and code."""
    teams: int = 0
    keys: int = 0
    """Keys of each team. They lead to the team, and Azure gets the resource's key."""
    resources: int = 1
    """Number of resources; all lead to the same upstream."""
    pool: bool = False
    """Whether the model is mapped to a pool of all resources."""
    body_limit: int | None = None
    workers: int | None = None

    def write(self, workplace: Workplace, endpoint: str) -> tuple[Path, int]:
        """Write the files; return the path of `gateway.yaml` and the port."""
        port = free_port()
        folder = f"gateway-{port}"
        key = f", api_key: {traffic.KEY}" if self.keys else ""
        lines = [
            f"listen: 127.0.0.1:{port}",
            "log: {level: info, format: json}",
            "resources:",
            *(f"  azure{number}: {{endpoint: '{endpoint}'{key}}}" for number in range(self.resources)),
            "resource: azure0",
            "pipeline:",
            *(f"  - {'auth_keys' if self.keys and stage == 'auth_passthrough' else stage}" for stage in self.pipeline),
        ]
        if self.pool:
            lines += ["pools:", "  all:", *(f"  - azure{n}/{traffic.DEPLOYMENT}" for n in range(self.resources))]
        if self.body_limit is not None:
            lines.append(f"limits: {{body: {self.body_limit}}}")
        if self.stages:
            lines.append("plugins_path: stages")
            for name, code in self.stages.items():
                workplace.write(f"{folder}/stages/{name}.py", code)
        if self.teams:
            lines.append("teams: teams/*.yaml")
            for number in range(self.teams):
                workplace.write(f"{folder}/teams/t{number:04}.yaml", f"match:{self._match(number)}\n")
        return workplace.write(f"{folder}/gateway.yaml", "\n".join(lines) + "\n"), port

    def _match(self, team: int) -> str:
        if not self.keys:
            return f" {{path_prefix: /t{team:04}}}"
        digests = [sha256(traffic.team_key(team, number).encode()).hexdigest() for number in range(self.keys)]
        lines = [
            f'{{digest: "sha256:{digest}", label: user{place}, created: 2026-01-01}}'
            for place, digest in enumerate(digests)
        ]
        return "\n  keys:" + "".join(f"\n    - {line}" for line in lines)


def ours(
    workplace: Workplace, azure: Azure, interpreter: Interpreter, setup: Setup | None = None, tls: Tls | None = None
) -> Peer:
    """Start our gateway and wait until it responds."""
    setup = setup or Setup()
    endpoint = f"https://localhost:{tls.port}" if tls else f"http://127.0.0.1:{azure.port}"
    path, port = setup.write(workplace, endpoint)
    workers = ["--workers", str(setup.workers)] if setup.workers else []
    process = workplace.start(
        [interpreter.python, "-P", "-m", "gateway", "serve", "--config", path, *workers],
        core=GATEWAY_CORE,
        env={"SSL_CERT_FILE": str(tls.certificate)} if tls else None,
    )
    return _up(Peer(f"ours, {interpreter.name}", process, port, 2))


def _up(peer: Peer, patience: float = 60) -> Peer:
    """Wait until it responds. Raises Broken if it does not."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if peer.process.popen.poll() is not None:
            raise peer.process.ended()
        connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            connection.getresponse()
        except (ConnectionError, TimeoutError):
            time.sleep(0.002)
        else:
            return peer
        finally:
            connection.close()
    raise Broken(f"{peer.name} does not answer after {patience:g} s: {peer.process.log.read_text()[-2000:]}")
