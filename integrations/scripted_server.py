#!/usr/bin/env python3
"""Serve the real HTTP routes in front of a scripted engine: `scripted_answers.py` writes its answers.

    PYTHONPATH=src:tests:integrations python integrations/scripted_server.py --port 30001

Everything between the socket and the engine's wire is what `headwater serve` runs: routes, templates, parsers,
streams. The engine is the one of the unit tests (tests/scripted_engine.py). It computes no grammar, so checks of
`required`, `named` and schemas belong to the real model.
"""

import argparse
import asyncio
import signal
import socket
import tempfile
from collections.abc import Iterator

import msgspec
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from headwater.client.engine_client import EngineClient
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.app import create_app
from headwater.http_api.connection import ConnectionLimits
from headwater.http_api.http_server import HttpServer
from headwater.http_api.state import ApiState
from headwater.messages.base import unpack_ids
from headwater.messages.generation import Generate
from headwater.tokenization.tokenizer import Tokenizer
from headwater.tokenization.tokenizer_parts import TokenizerParts
from scripted_answers import CHAT_TEMPLATE, END, SPECIAL_TOKENS, answer_to
from scripted_engine import READY, Script, ScriptedEngine

MODEL = "scripted"
MAX_CONTEXT = 32768  # an agent's prompt with its tools, a token for each byte


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, so answers come in the smallest pieces that there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"eos_token": END},
            eos_token_ids=(backend.token_to_id(END),),
            chat_templates={"default": CHAT_TEMPLATE},
        )
    )


def script_of(tokenizer: Tokenizer) -> Script:
    (end,) = tokenizer.eos_token_ids

    def reply(request: Generate) -> Iterator[int]:
        prompt = tokenizer.decode(unpack_ids(request.prompt_ids).tolist(), skip_special_tokens=False)
        yield from tokenizer.encode(answer_to(prompt))
        while True:
            yield end

    return Script(reply=reply)


async def serve(endpoint: str, tokenizer: Tokenizer, *, port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    state = ApiState(client=EngineClient([endpoint]), server_args={})
    server = HttpServer(create_app(state), ConnectionLimits(), log_level="warning", timeout_graceful_shutdown=2)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
    with socket.create_server(("127.0.0.1", port)) as listener:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        await state.client.start()
        (ready,) = await state.client.wait_ready(timeout_s=20)
        state.set_ready(
            tokenizer=tokenizer,
            model=ModelFacts.from_ready(ready, served_name=MODEL, model_path=MODEL, tokenizer_path=MODEL),
        )
        await serving
        await state.client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=30001)
    args = parser.parse_args()
    tokenizer = byte_tokenizer()
    ready = msgspec.structs.replace(
        READY,
        model_name=MODEL,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
        max_context=MAX_CONTEXT,
        num_pages=4 * MAX_CONTEXT // READY.page_size,
    )
    with tempfile.TemporaryDirectory(prefix="headwater-scripted-") as folder:
        endpoint = f"ipc://{folder}/engine"
        with ScriptedEngine(endpoint, ready=ready, script=script_of(tokenizer)):
            asyncio.run(serve(endpoint, tokenizer, port=args.port))


if __name__ == "__main__":
    main()
