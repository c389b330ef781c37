"""The files of `deploy/`, checked without the programs that run them."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_compose_file_is_valid() -> None:
    """By the compose specification's own schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, str(ROOT / "deploy" / "compose.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_gives_the_variables_that_the_shipped_configuration_reads() -> None:
    """Swapping the image is enough: the variables have the names of the Go proxy."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    names = {"AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_MODEL_MAPPER", "AZURE_OPENAI_API_VER"}
    assert set(compose["services"]["gateway"]["environment"]) == names
    shipped = (ROOT / "config" / "gateway.yaml").read_text()
    for name in names:
        assert f"${{{name}" in shipped


def test_image_listens_on_every_interface_as_theirs_did() -> None:
    """Port 8080 on all interfaces, as an unprivileged user, with the hashed lock file."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    for words in ('"serve", "--listen", "0.0.0.0:8080"', "EXPOSE 8080", "--require-hashes", "USER 65532"):
        assert words in text
    for line in text.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name


def test_image_takes_what_was_given_to_theirs() -> None:
    """The Go proxy's flags without a command, and a config.yaml in /app, with or without `-c`."""
    from gateway.cli.arguments import GO_PROXY_FILE

    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["gateway"]' in text
    assert "GATEWAY_LISTEN=0.0.0.0:8080" in text
    assert f"WORKDIR {GO_PROXY_FILE.parent}\n" in text.split("FROM")[2]
    assert GO_PROXY_FILE.name == "config.yaml"
    assert "${GATEWAY_LISTEN:-" in (ROOT / "config" / "gateway.yaml").read_text()


def unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign] # systemd's names keep their case
    assert parser.read(ROOT / "deploy" / name)
    return parser


def test_systemd_unit_is_hardened() -> None:
    """It parses, checks the configuration before it starts, and drops unneeded privileges."""
    service = unit("gateway.service")["Service"]
    assert "gateway check" in service["ExecStartPre"]
    for name in ("NoNewPrivileges", "DynamicUser", "PrivateTmp", "ProtectHome", "MemoryDenyWriteExecute"):
        assert service[name] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert int(service["TimeoutStopSec"]) > 30


def test_systemd_waits_reloads_and_stops_as_the_supervisor_means_it() -> None:
    """Readiness is notified, a reload uses the served file, and one socket is passed in, without `Accept`."""
    service = unit("gateway.service")["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == service["ExecStart"].replace("serve", "reload")
    assert service["KillMode"] == "mixed"
    text = (ROOT / "deploy" / "gateway.socket").read_text()
    assert [line for line in text.splitlines() if line.startswith("ListenStream=")] == ["ListenStream=127.0.0.1:8080"]
    assert "Accept" not in unit("gateway.socket")["Socket"]


def test_nginx_keeps_a_connection_shorter_than_the_gateway() -> None:
    """Otherwise a request could reach a connection that the gateway is closing."""
    from gateway.settings import Timeouts

    text = (ROOT / "deploy" / "nginx" / "gateway.conf").read_text()
    assert "keepalive_timeout 60s" in text
    assert Timeouts().keep_alive > 60
