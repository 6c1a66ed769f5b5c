"""A small real HTTP server that speaks minisgl's and sglang's streams, and misbehaves when the prompt tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DELTA_SECONDS = 0.004


class StubServer:
    """Answers POST /generate; the first word of the prompt chooses what goes wrong."""

    def __init__(self) -> None:
        self.connections = 0
        self.running = 0
        self.most_running = 0
        self.prompts: list[str] = []
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                body = json.loads(await reader.readexactly(length) or b"{}")
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                try:
                    await self.answer(body, writer)
                finally:
                    self.running -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, body: dict, writer: asyncio.StreamWriter) -> None:
        sglang = "text" in body
        prompt = body["text"] if sglang else body["prompt"]
        tokens = body["sampling_params"]["max_new_tokens"] if sglang else body["max_new_tokens"]
        self.prompts.append(prompt)
        mode = prompt.split(" ")[0]
        if mode == "refused":
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 13\r\n\r\n{'error': 'x'}"[:-1])
            await writer.drain()
            return
        if mode == "garbage":
            writer.write(b"this is not HTTP\r\n\r\n")
            await writer.drain()
            return
        if mode == "silent":
            await asyncio.sleep(30)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number, frame in enumerate(sglang_frames(mode, tokens) if sglang else native_frames(mode, tokens)):
            if mode == "cut" and number == 2:
                writer.transport.abort()
                return
            writer.write(b"%x\r\n%s\r\n" % (len(frame), frame))
            await writer.drain()
            await asyncio.sleep(DELTA_SECONDS)
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def native_frames(mode: str, tokens: int) -> Iterator[bytes]:
    def line(**fields: object) -> bytes:
        return json.dumps(fields).encode() + b"\n"

    if mode == "error":
        yield line(event="error", message="the engine failed", code="engine_failure")
        return
    if mode == "empty":
        yield line(event="done", finish_reason="length", usage={"prompt_tokens": 3, "completion_tokens": 0})
        return
    sent = tokens - 1 if mode == "short" else tokens
    if mode == "merged":
        # Two lines in one chunk, then the rest as one line of several tokens.
        yield line(text_delta="a ", token_ids=[1]) + line(text_delta="b ", token_ids=[2])
        yield line(text_delta="c ", token_ids=list(range(3, tokens + 1)))
    elif mode == "split":
        text = line(text_delta="é", token_ids=list(range(tokens)))
        yield text[:7]
        yield text[7:]
    else:
        for token in range(sent):
            yield line(text_delta="" if mode == "mute" else f"t{token} ", token_ids=[token])
    if mode != "endless":
        claimed = tokens + 1 if mode == "miscounted" else sent
        yield line(event="done", finish_reason="length", usage={"prompt_tokens": 3, "completion_tokens": claimed})


def sglang_frames(mode: str, tokens: int) -> Iterator[bytes]:
    text = ""
    if mode == "error":
        yield b'data: {"error": {"message": "bad", "code": 400}}\n\ndata: [DONE]\n\n'
        return
    for count in range(1, tokens + 1):
        if mode == "merged" and count % 3 and count != tokens:
            continue
        text += f'"completion_tokens": {count} '
        finish = {"type": "abort" if mode == "aborted" else "length"} if count == tokens else None
        event = {
            "text": text,
            "output_ids": list(range(count)),
            "meta_info": {"id": "x", "finish_reason": finish, "prompt_tokens": 3, "completion_tokens": count},
        }
        yield b"data: " + json.dumps(event).encode() + b"\n\n"
    if mode != "endless":
        yield b"data: [DONE]\n\n"


@contextmanager
def stub_server() -> Iterator[StubServer]:
    """The server, listening on 127.0.0.1:port from a thread of its own."""
    server = StubServer()
    loop = asyncio.new_event_loop()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(server.handle, "127.0.0.1", 0)

    listening = loop.run_until_complete(listen())
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(listening.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
