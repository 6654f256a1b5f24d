"""The API client: bounded waiting through elections, safe retries, and an exit code for each way to fail."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cli.client import REQUEST_ID_HEADER, Api
from cli.errors import CliError, NoAgent, NoLeader, OutcomeUnknown, Refused, UsageError
from cli.flags import Args
from cli.main import main
from tests.support.promises import Since

Reply = tuple[int, bytes]


class FakeAgent:
    """Answers each request with what the script says; keeps what was asked."""

    def __init__(self, script: Callable[[int, str], Reply | None]) -> None:
        self.script = script
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, request id) in order."""
        self.address = ""


@contextmanager
def agent(script: Callable[[int, str], Reply | None]) -> Iterator[FakeAgent]:
    """Run a fake agent; a reply of None closes the connection without a word."""
    fake = FakeAgent(script)

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.requests.append((self.command, self.path, self.headers.get(REQUEST_ID_HEADER, "")))
            reply = fake.script(len(fake.requests), self.path)
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(reply[0])
            self.send_header("Content-Length", str(len(reply[1])))
            self.end_headers()
            self.wfile.write(reply[1])

        do_GET = do_PUT = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.address = f"127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_waits_through_an_election() -> None:
    with agent(lambda n, _: (500, b"No cluster leader") if n < 4 else (200, b"[]")) as fake:
        assert Api(fake.address).get("/v1/catalog/nodes").json() == []
    assert len(fake.requests) == 4


def test_gives_up_after_the_bounded_time() -> None:
    with agent(lambda n, _: (500, b"No cluster leader")) as fake:
        since = Since()
        with pytest.raises(NoLeader):
            Api(fake.address, wait_s=0.4).get("/v1/catalog/nodes")
        since.took(2.0)
    assert len(fake.requests) > 1


def test_a_write_is_repeated_under_one_request_id() -> None:
    with agent(lambda n, _: None if n < 3 else (200, b"true")) as fake:
        assert Api(fake.address).put("/v1/kv/a", b"x").json() is True
    assert len(fake.requests) == 3
    ids = {request[2] for request in fake.requests}
    assert len(ids) == 1
    assert len(ids.pop()) >= 16


def test_two_writes_have_two_request_ids() -> None:
    with agent(lambda n, _: (200, b"true")) as fake:
        Api(fake.address).put("/v1/kv/a", b"x")
        Api(fake.address).put("/v1/kv/a", b"x")
    assert fake.requests[0][2] != fake.requests[1][2]


def test_a_write_that_was_sent_and_not_answered_is_unknown_not_failed() -> None:
    with agent(lambda n, _: None) as fake:
        with pytest.raises(OutcomeUnknown):
            Api(fake.address, wait_s=1.0).put("/v1/kv/a", b"x")


def test_what_twice_would_undo_is_sent_once() -> None:
    with agent(lambda n, _: None if n == 1 else (200, b"true")) as fake:
        with pytest.raises(OutcomeUnknown):
            Api(fake.address).write("POST", "/v1/operator/raft/transfer-leader", once=True)
    assert len(fake.requests) == 1
    script = lambda n, _: (500, b"No cluster leader") if n == 1 else (200, b"true")  # noqa: E731
    with agent(script) as fake:
        Api(fake.address).write("POST", "/v1/operator/raft/transfer-leader", once=True)
    assert len(fake.requests) == 2, "what was not begun is sent again"


def test_an_unknown_outcome_stays_unknown_when_the_leader_is_gone_after() -> None:
    script = lambda n, _: None if n == 1 else (500, b"No cluster leader")  # noqa: E731
    with agent(script) as fake:
        with pytest.raises(OutcomeUnknown):
            Api(fake.address, wait_s=1.0).put("/v1/kv/a", b"x")


def test_an_agent_that_lives_but_gets_no_answer_means_no_leader() -> None:
    def script(n: int, path: str) -> Reply:
        if path != "/v1/agent/services":
            time.sleep(0.5)
        return 200, b"{}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cli.client.GRACE_S", -0.3)
        with agent(script) as fake, pytest.raises(NoLeader, match="lives"):
            Api(fake.address, wait_s=0.2).get("/v1/kv/a")


def test_a_write_whose_agent_vanished_after_it_was_sent_is_unknown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def take_one_and_vanish() -> None:
            connection, _ = listener.accept()
            listener.close()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=take_one_and_vanish)
        thread.start()
        with pytest.raises(OutcomeUnknown, match="may have been applied"):
            Api(address, wait_s=1.0).put("/v1/kv/a", b"x")
        thread.join()


def test_a_busy_agent_is_asked_again() -> None:
    with agent(lambda n, _: (429, b"too busy") if n == 1 else (200, b"1")) as fake:
        assert Api(fake.address).get("/v1/x").json() == 1


def test_a_refusal_is_final() -> None:
    with agent(lambda n, _: (400, b"Missing service name")) as fake:
        with pytest.raises(Refused, match="Missing service name") as error:
            Api(fake.address).put("/v1/agent/service/register", {})
    assert error.value.status == 400
    assert len(fake.requests) == 1


def test_not_found_may_be_an_answer() -> None:
    with agent(lambda n, _: (404, b"no")) as fake:
        assert Api(fake.address).get("/v1/kv/x", allow_404=True).status == 404
        with pytest.raises(Refused):
            Api(fake.address).get("/v1/kv/x")


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_agent_says_what_to_start() -> None:
    with pytest.raises(NoAgent, match="lictor cluster up"):
        Api(f"127.0.0.1:{_closed_port()}").get("/v1/x")


@pytest.mark.parametrize("address", ["host:port", "ftp://x", "http://", "unix:relative", ":::"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises((UsageError, NoAgent)):
        Api(address, wait_s=0.1).get("/v1/x")


def test_the_address_comes_from_flag_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LICTOR_HTTP_ADDR", raising=False)
    monkeypatch.delenv("CONSUL_HTTP_ADDR", raising=False)
    assert Api.of(Args({}, [], [])).address == "127.0.0.1:8500"
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "c:1")
    assert Api.of(Args({}, [], [])).address == "c:1"
    monkeypatch.setenv("LICTOR_HTTP_ADDR", "l:1")
    assert Api.of(Args({}, [], [])).address == "l:1"
    assert Api.of(Args({"http-addr": "f:1"}, [], [])).address == "f:1"
    assert Api("https://h:1/").base_url == "https://h:1"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (lambda n, p: (200, b'["dc1"]'), 0),
        (lambda n, p: (403, b"Permission denied"), 1),
        (lambda n, p: (500, b"No cluster leader"), 4),
    ],
)
def test_exit_codes(script: Callable[[int, str], Reply], code: int) -> None:
    with agent(script) as fake:
        assert main(["catalog", "datacenters", "-http-addr", fake.address, "-wait", "200ms"]) == code


def test_exit_codes_without_an_agent_and_with_an_unknown_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["members", "-http-addr", f"127.0.0.1:{_closed_port()}"]) == 3
    with agent(lambda n, _: None) as fake:
        assert main(["kv", "put", "a", "b", "-http-addr", fake.address, "-wait", "200ms"]) == 5
    assert "may or may not" in capsys.readouterr().err


def test_create_of_an_existing_intention_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with agent(lambda n, _: (500, b"duplicate intention found: web => db")) as fake:
        assert main(["intentions", "create", "web", "db", "-http-addr", fake.address]) == 1
    assert "-replace" in capsys.readouterr().err


def test_create_sends_permissions_for_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        "/v1/connect/intentions": b'{"ID": "x"}',
        "/v1/catalog/services": b'{"echo-server": []}',
    }
    row = b'{"SourceName": "echo-client-1", "SourceService": "", "DestinationName": "echo-server"}'
    with agent(lambda n, path: (200, answers.get(path, row))) as fake:
        code = main(
            ["intentions", "create", "-from", "echo-client-1", "-to", "echo-server", "-verb", "http",
             "-http-addr", fake.address]
        )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0
    assert printed.out == "Created: echo-client-1 => echo-server (allow)\n"
    assert "nothing is registered as 'echo-client-1' yet" in printed.err
    assert "echo-server" not in printed.err


@pytest.mark.parametrize(
    "typed",
    [
        ["intentions", "create", "-from", "a"],
        ["intentions", "create", "a"],
        ["intentions", "create", "a", "b", "-from", "a"],
        ["intentions", "create", "a", "b", "-allow", "-deny"],
        ["intentions", "create", "a", "b", "-verb", "SHOUT"],
        ["intentions", "create", "a", "b", "-verb", "http", "-deny"],
        ["services", "register"],
        ["services", "register", "-name", "a", "-port", "x"],
        ["identity", "revoke"],
        ["identity", "revoke", "-serial", "1", "-service", "a"],
        ["kv", "get"],
        ["connect"],
        ["connect", "-id", "a", "-service-id", "b"],
        ["connect", "-id", "a", "-workers", "0"],
        ["connect", "-id", "a", "-otlp-sample", "1"],
        ["connect", "-id", "a", "-otlp-endpoint", "http://127.0.0.1:4318", "-otlp-sample", "1.5"],
        ["connect", "-id", "a", "-otlp-endpoint", "127.0.0.1:4318"],
        ["connect", "-id", "a", "-otlp-endpoint", "http://"],
        ["connect", "-id", "a", "-otlp-endpoint", "http://127.0.0.1:x"],
        ["connect", "-id", "a", "-otlp-endpoint", "http://me:secret@127.0.0.1:4318"],
        ["connect", "-id", "a", "-otlp-endpoint", "http://127.0.0.1:4318/?token=x"],
        ["kv", "get", "-stale", "-consistent", "a"],
    ],
)
def test_usage_errors_ask_no_agent(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*typed]) == 2
    assert capsys.readouterr().err.startswith("Error: ")


def test_errors_of_the_client_are_cli_errors() -> None:
    with agent(lambda n, _: (200, b"<html>")) as fake:
        with pytest.raises(CliError, match="not JSON"):
            Api(fake.address).get("/v1/x").json()
