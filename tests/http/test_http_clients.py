"""Clients that leave and clients that do not read: they cost the others nothing, and the ring is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from http_rig import Rig, lines, running

from minisgl.messages import AbortRequest, FinishReason, GenerateRequest, RequestError


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with running() as rig:
        yield rig


def leave(connection: http.client.HTTPConnection, reset: bool) -> None:
    """Close a connection, politely (FIN) or not (RST)."""
    assert connection.sock is not None
    if reset:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def acknowledge(rig: Rig, request: GenerateRequest) -> None:
    rig.delta(request, "", [], FinishReason.ABORT)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 1])
def test_a_client_that_leaves_is_aborted_at_once(rig: Rig, reset: bool, stream: bool, after: int) -> None:
    before = rig.stats(in_flight=0, aborting=0)
    connection, request = rig.ask({"prompt": "Hi", "stream": stream})
    rig.dispatched(request)
    if after:
        rig.delta(request, "a", opens=True)
    if after and stream:
        response = connection.getresponse()
        assert json.loads(response.readline()) == {"text_delta": "a"}
        response.close()
    left = time.monotonic()
    leave(connection, reset)
    assert rig.from_http(AbortRequest).rid == request.rid
    assert time.monotonic() - left < 3
    # Its state is kept, and counts as running on the ring, until the scheduler acknowledges.
    rig.delta(request, "b", [1])
    rig.stats(aborted=before["aborted"] + 1, in_flight=0, aborting=1, streams=1)
    acknowledge(rig, request)
    rig.stats(aborting=0, streams=0)
    rig.nothing_from_http(0.05)


def test_an_error_acknowledges_an_abort_too(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    leave(connection, reset=False)
    rig.from_http(AbortRequest)
    rig.ring.send(RequestError(request.rid, 400, "prompt_too_long", "too long"))
    rig.stats(aborting=0, streams=0)


def test_a_client_that_leaves_while_uploading_is_counted(rig: Rig) -> None:
    before = rig.stats(in_flight=0)
    sock = rig.raw_connection()
    sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    rig.stats(in_flight=1)
    sock.close()
    rig.stats(in_flight=0, aborted=before["aborted"] + 1, requests_total=before["requests_total"] + 1)
    rig.nothing_from_http(0.05)


def test_many_clients_that_leave_are_all_aborted(rig: Rig) -> None:
    before = rig.stats(in_flight=0)
    asked = [rig.ask({"prompt": "Hi", "stream": bool(index % 2)}) for index in range(60)]
    requests = {request.rid: request for _, request in asked}
    for index, (connection, request) in enumerate(asked):
        if index % 3:
            rig.delta(request, "a", opens=True)
        leave(connection, reset=bool(index % 4))
    aborted = {rig.from_http(AbortRequest).rid for _ in requests}
    assert aborted == set(requests)
    for request in requests.values():
        acknowledge(rig, request)
    rig.stats(in_flight=0, streams=0, aborted=before["aborted"] + 60)


def test_a_half_sent_pipelined_request_does_not_hide_a_departure(rig: Rig) -> None:
    connection, request = rig.ask({"prompt": "Hi"})
    assert connection.sock is not None
    connection.sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Le")
    rig.delta(request, "a", opens=True)
    leave(connection, reset=False)
    assert rig.from_http(AbortRequest).rid == request.rid
    acknowledge(rig, request)
    rig.stats(in_flight=0, streams=0)


@contextlib.contextmanager
def unread_stream(rig: Rig) -> Iterator[tuple[socket.socket, GenerateRequest]]:
    """A streaming request whose client reads nothing, with small socket buffers."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    sock.connect(("127.0.0.1", rig.port))
    body = b'{"prompt":"slow"}'
    sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    request = rig.from_http(GenerateRequest)
    rig.delta(request, "first", opens=True)
    try:
        yield sock, request
    finally:
        sock.close()


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(rig: Rig) -> None:
    before = rig.stats(in_flight=0)
    block = "x" * 50_000
    with unread_stream(rig) as (slow, slow_request):
        blocks = 0
        while rig.stats()["slow_clients"] == 0:
            for _ in range(5):
                rig.delta(slow_request, block)
                blocks += 1
        connection, request = rig.ask({"prompt": "fast"})
        rig.delta(request, "0", opens=True)
        response = connection.getresponse()
        response.readline()
        for index in range(10):
            began = time.monotonic()
            rig.delta(slow_request, block)
            rig.delta(request, str(index))
            assert json.loads(response.readline()) == {"text_delta": str(index)}
            assert time.monotonic() - began < 5
        rig.delta(request, "", [], FinishReason.LENGTH)
        lines(response)
        rig.delta(slow_request, "", [], FinishReason.LENGTH)
        rig.stats(streams=0, slow_clients=1, in_flight=1)
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += slow.recv(2**20)
        assert received.count(b"x" * 50_000) == blocks + 10
        assert b'"done"' in received
    rig.stats(in_flight=0, slow_clients=0, ok=before["ok"] + 2)


def test_a_client_that_never_reads_is_dropped_at_the_allowance(rig: Rig) -> None:
    before = rig.stats(in_flight=0)
    block = "x" * 100_000
    with unread_stream(rig) as (sock, slow_request):
        deadline = time.monotonic() + 30
        while not rig.tokenizers[0].wait(2):
            rig.delta(slow_request, block)
            assert time.monotonic() < deadline, "a client that does not read is kept for ever"
        assert rig.from_http(AbortRequest).rid == slow_request.rid
        received = bytearray()
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(2**20):
                received += part
        # Cut off, and recognisably so: no terminating chunk.
        assert not received.endswith(b"0\r\n\r\n")
    acknowledge(rig, slow_request)
    rig.stats(in_flight=0, streams=0, aborted=before["aborted"] + 1)
