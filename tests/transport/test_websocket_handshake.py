"""The WebSocket handshake on both sides; the frames after it are in test_websocket_relay.py."""

from __future__ import annotations

import pytest

from gateway import ApiError, Headers, UpstreamError
from gateway.protocol.headers import make_field
from gateway.transport.websocket_handshake import (
    accept_value,
    check_accepted,
    check_handshake,
    handshake_lines,
    new_key,
    offered_protocols,
    select_protocol,
)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ASKED = {"sec-websocket-version": "13", "sec-websocket-key": KEY}


def test_the_rfc_s_own_example() -> None:
    """RFC 6455, 1.3."""
    assert check_handshake(Headers(ASKED)) == KEY
    assert accept_value(KEY) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({**ASKED, "sec-websocket-version": "12"}, 426),
        ({"sec-websocket-key": KEY}, 426),
        ({**ASKED, "sec-websocket-key": "a"}, 400),
        ({**ASKED, "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==="}, 400),
        ({**ASKED, "sec-websocket-key": "dGhlIHNhbXBsZQ=="}, 400),
        ({"sec-websocket-version": "13"}, 400),
    ],
)
def test_invalid_handshakes(headers: dict[str, str], status: int) -> None:
    """The error for another version names the supported one; a key has 16 bytes."""
    with pytest.raises(ApiError) as caught:
        check_handshake(Headers(headers))
    assert caught.value.status == status
    assert (caught.value.headers.get("sec-websocket-version") == "13") is (status == 426)


def test_keys_are_random_and_valid() -> None:
    """16 random bytes each."""
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(check_handshake(Headers({**ASKED, "sec-websocket-key": key})) == key for key in keys)


def test_the_key_among_the_subprotocols_is_not_forwarded() -> None:
    """At any position, in any of several headers."""
    headers = Headers({"sec-websocket-protocol": "realtime , openai-insecure-api-key.K,,a"})
    headers.add("Sec-WebSocket-Protocol", "openai-insecure-api-key.K, b")
    assert offered_protocols(headers) == ["realtime", "a", "b"]
    assert handshake_lines("k", ["realtime", "a"]).endswith(b"sec-websocket-protocol: realtime, a")
    assert b"protocol" not in handshake_lines("k", [])
    for odd in ("one two", "ä", "a/b"):
        with pytest.raises(ApiError, match="a character that is not allowed"):
            offered_protocols(Headers({"sec-websocket-protocol": f"realtime, {odd}"}))
    with pytest.raises(ApiError, match="Offer `realtime`, too"):
        offered_protocols(Headers({"sec-websocket-protocol": "openai-insecure-api-key.K"}))


def test_the_subprotocol_for_the_client() -> None:
    """Azure's selection if it was offered, else the first, else none: browsers require one that they offered."""
    assert select_protocol(["a", "b"], "b") == "b"
    assert select_protocol(["a", "b"], None) == "a"
    assert select_protocol(["a", "b"], "openai-insecure-api-key.K") == "a"
    assert select_protocol([], "b") is None


def test_azure_s_response_must_match_the_handshake() -> None:
    """With the right accept value, once, and without an extension."""
    right = make_field(b"Sec-WebSocket-Accept", accept_value(KEY))
    assert check_accepted([right], KEY) is None
    assert check_accepted([right, make_field(b"sec-websocket-protocol", b"realtime")], KEY) == "realtime"
    for fields in (
        [],
        [right, right],
        [make_field(b"sec-websocket-accept", accept_value("other"))],
        [right, make_field(b"sec-websocket-extensions", b"permessage-deflate")],
    ):
        with pytest.raises(UpstreamError):
            check_accepted(fields, KEY)
