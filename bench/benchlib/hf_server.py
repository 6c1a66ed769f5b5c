"""The baseline server: FastAPI around Hugging Face `generate`, streaming minisgl's JSON lines.

    PYTHONPATH=bench python -m benchlib.hf_server --model DIR --port PORT --device cpu --dtype bfloat16

It is what a good tutorial builds: no batching, no paging. Requests wait in order for one of `--parallel` slots; more
slots do not help, because the generate loops then fight for the same interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fastapi
import torch
import transformers
import uvicorn
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from benchlib.hf_model import HfModel


def make_app(hf: HfModel, parallel: int) -> fastapi.FastAPI:
    app = fastapi.FastAPI()
    slots = asyncio.Semaphore(parallel)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/server_info")
    def server_info() -> dict[str, Any]:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "fastapi": fastapi.__version__,
            "python": platform.python_version(),
            "device": str(hf.model.device),
            "dtype": str(hf.model.dtype),
            "attention": hf.model.config._attn_implementation,
            "torch_threads": torch.get_num_threads(),
            "parallel": parallel,
        }

    @app.post("/generate")
    async def generate(body: dict[str, Any]) -> Response:
        prompt, limit = body.get("prompt"), body.get("max_new_tokens", 128)
        if not isinstance(prompt, str) or not isinstance(limit, int) or limit < 1:
            message = "send a string `prompt` and an integer `max_new_tokens` of at least 1"
            return JSONResponse({"error": {"message": message}}, 400)
        return StreamingResponse(answer(prompt, limit, body), media_type="application/x-ndjson")

    async def answer(prompt: str, limit: int, body: dict[str, Any]) -> AsyncIterator[str]:
        input_ids = hf.tokenizer(prompt).input_ids
        ignore_eos = bool(body.get("ignore_eos"))
        generated = 0
        try:
            async with slots:
                stream = hf.stream(input_ids, limit, ignore_eos, float(body.get("temperature", 1.0)))
                async for ids, text in iterate_in_threadpool(stream):
                    generated += len(ids)
                    if ids or text:
                        yield json.dumps({"text_delta": text, "token_ids": ids}) + "\n"
        except (RuntimeError, ValueError, IndexError) as error:
            yield json.dumps({"event": "error", "message": f"{type(error).__name__}: {error}"}) + "\n"
            return
        usage = {"prompt_tokens": len(input_ids), "completion_tokens": generated}
        reason = "length" if generated == limit else "stop"
        yield json.dumps({"event": "done", "finish_reason": reason, "usage": usage}) + "\n"

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local model directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--parallel", type=int, default=1, help="requests generated at the same time (default: 1)")
    arguments = parser.parse_args()
    hf = HfModel.load(arguments.model, arguments.device, arguments.dtype)
    uvicorn.run(make_app(hf, arguments.parallel), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
