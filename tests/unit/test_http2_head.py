"""What of a field list is decided on and passed on, be the names seen for the first time or not."""

from __future__ import annotations

import pytest

from proxy.http.errors import BadRequest
from proxy.http2 import head
from proxy.http2.head import passed_on, read_request, value_of

Fields = list[tuple[bytes, bytes]]
ASK: Fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/a")]
NOT_PASSED_ON: Fields = [
    (b"keep-alive", b"1"), (b"proxy-connection", b"x"), (b"http2-settings", b"x"), (b"upgrade", b"h2c"),
    (b"connection", b"close"), (b"x-forwarded-client-cert", b"Hash=1"), (b"x_forwarded_client_cert", b"Hash=1"),
    (b"x-forwarded_client-cert", b"Hash=1"), (b"content_length", b"3"), (b"transfer_encoding", b"chunked"),
]  # fmt: skip


def own(size: int) -> Fields:
    """Fields of the app's own, with names that differ."""
    return [(b"x-app_%d" % n, b"v") for n in range(size)]


@pytest.mark.parametrize("time", ["first", "second"])
def test_what_is_not_passed_on(time: str) -> None:
    mine = own(3)
    assert read_request([*ASK, *NOT_PASSED_ON, *mine]).fields == mine
    assert read_request([*ASK[:2], ASK[3], (b"host", b"a"), *mine]).authority == b"a"
    answer = [(b":status", b"200"), (b"content-type", b"x"), *NOT_PASSED_ON, *mine]
    assert passed_on(answer, response=True) == [*answer[:2], *mine]
    assert passed_on(answer, response=False) == [answer[1], *mine]


def test_names_beyond_all_that_are_remembered_are_taken_alike() -> None:
    many = own(2 * head._KINDS_MAX)
    assert read_request([*ASK, *many]).fields == many
    assert len(head._KINDS) <= head._KINDS_MAX
    long = (b"x_" + b"l" * 100, b"v")
    assert read_request([*ASK, long, *NOT_PASSED_ON]).fields == [long]
    assert long[0] not in head._KINDS
    with pytest.raises(BadRequest):
        read_request([*ASK, (b":protocol", b"websocket")])
    assert passed_on([(b":status", b"200"), *NOT_PASSED_ON, *many], response=True)[1:] == many


def test_the_value_of_a_field() -> None:
    assert value_of([(b"a", b"1"), (b"b", b"2"), (b"b", b"3")], b"b") == b"2"
    assert value_of([(b"a", b"1")], b"b") == b""
