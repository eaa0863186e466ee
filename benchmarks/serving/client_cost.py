#!/usr/bin/env python3
"""What the load generator itself costs: its processor time for each token, through each API, with 64 streams.

    client_cost.py [--streams 64] [--tokens 128] [--save]

A process plays a server whose tokens come one by one, 50 a second on each stream. Its events have the sizes of
Headwater's. The same stream through httpx, line by line as clients usually read it, is measured for comparison.
Processor time is what counts, so other load on the machine changes little.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import httpx

from headwater.bench.apis import APIS, Api, Settings
from headwater.bench.connection import HttpClient
from headwater.bench.exchange import Watched, exchange
from results import save

TOKEN_S = 0.02
LIMIT_S = 300.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(path: str, sent: int, count: int) -> bytes:
    """The event of the token number `sent`."""
    content: dict[str, Any] = {"id": "chatcmpl-0123456789abcdef", "created": 1, "model": "m", "usage": None}
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length" if sent == count else None}
    if path == "/generate":
        meta = {"id": "0123456789abcdef", "prompt_tokens": 100, "cached_tokens": 0, "completion_tokens": sent}
        meta |= {"finish_reason": {"type": "length"} if sent == count else None, "weight_version": "default"}
        content = {"text": " word" * sent, "output_ids": [1234] * sent, "meta_info": meta}
    elif path == "/v1/completions":
        content |= {"choices": [choice | {"text": " word"}], "object": "text_completion"}
    else:
        content |= {"choices": [choice | {"delta": {"content": " word"}}], "object": "chat.completion.chunk"}
    if sent == count and path != "/generate":
        content["usage"] = {"prompt_tokens": 100, "completion_tokens": count, "total_tokens": 100 + count}
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One stream; then the connection ends."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    body = json.loads(await reader.readexactly(length))
    path = head.split()[1].decode()
    count = body["sampling_params"]["max_new_tokens"] if path == "/generate" else body["max_tokens"]
    writer.write(HEAD)
    for sent in range(1, count + 1):
        data = event(path, sent, count)
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await asyncio.sleep(TOKEN_S)
    writer.write(b"0\r\n\r\n")
    writer.close()


def serve(port_to: Connection) -> None:
    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        port_to.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def ours(url: str, api: Api, body: bytes, num_streams: int) -> None:
    http, watched = HttpClient(url), Watched()
    now_s = time.perf_counter()
    asked = (exchange(http, api, body, due_s=now_s, timeout_s=LIMIT_S, watched=watched) for _ in range(num_streams))
    done = await asyncio.gather(*asked)
    http.close()
    assert not any(each.error for each in done), done[0].error


async def usual(url: str, api: Api, body: bytes, num_streams: int) -> None:
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=LIMIT_S) as http:

        async def one() -> None:
            async with http.stream("POST", url + api.path, content=body) as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("data: {"):
                        json.loads(line[6:])

        await asyncio.gather(*(one() for _ in range(num_streams)))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    options = parser.parse_args(argv)
    receives, sends = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sends,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receives.recv()}"
    clients: dict[str, Callable[..., Awaitable[None]]] = {"headwater bench": ours, "httpx": usual}
    records = []
    for name, client in clients.items():
        for api_name, api in APIS.items():
            prompt: Any = [{"role": "user", "content": "a"}] if api.takes_messages else "a"
            body = api.body(prompt, options.tokens, Settings("m"))
            cpu_s, began_s = time.process_time(), time.perf_counter()
            asyncio.run(client(url, api, body, options.streams))
            spent_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
            us_per_token = 1e6 * spent_s / (options.streams * options.tokens)
            records.append({"client": name, "api": api_name, "us_per_token": us_per_token, "cores": spent_s / wall_s})
            print(f"{name:16} {api_name:12} {us_per_token:6.1f} us a token, {spent_s / wall_s:.2f} cores", flush=True)
    server.terminate()
    server.join()
    if options.save:
        facts = {"scripted": {"streams": options.streams, "tokens": options.tokens}}
        print("written to", save("client-cost", records, servers=facts))


if __name__ == "__main__":
    main(sys.argv[1:])
