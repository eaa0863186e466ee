"""`headwater chat`: talk to a running server in the terminal, through its OpenAI API."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import click

from headwater.cli.command_line import command, url_option
from headwater.cli.server_call import HttpAnswer, Server, ServerError
from headwater.cli.waiting_line import WaitingLine

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit (or Ctrl-D) leaves."
STATUS_TIMEOUT_S = 5.0
LIST_TIMEOUT_S = 30.0
POLL_S = 0.5


class ChatError(Exception):
    """The server refused the request or ended the answer early; the message is for the user."""


@command()
@click.argument("question", required=False)
@url_option
@click.option("--system", help="The system prompt.")
@click.option("--model", help="Model to chat with. Default: the first one that the server lists.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer in tokens.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.3,
    show_default=True,
    help="0 always takes the most likely token.",
)
@click.option("--api-key", envvar="HEADWATER_API_KEY", show_envvar=True, help="The server's --api-key, or its first.")
def chat(
    question: str | None,
    url: str,
    system: str | None,
    model: str | None,
    max_tokens: int | None,
    temperature: float,
    api_key: str | None,
) -> None:
    """Chat with a running server.

    With QUESTION: ask it, print the answer and exit. The command waits while the server loads its model. If an answer
    takes more than a second to begin, the command shows the reason.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature}
    try:
        server = Server(url, key=api_key and api_key.partition(",")[0])
        listed = first_model(server)  # also with --model: the call waits until a model is loaded
        conversation = Conversation(server, model=model or listed, system=system, options=options)
        if question is not None:
            print_answer(conversation, question)
        else:
            converse(conversation)
    except (ChatError, ServerError) as error:
        click.secho(str(error), err=True, fg="red")
        raise click.exceptions.Exit(1) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


class Conversation:
    """The messages so far; `ask` adds a question and its answer."""

    def __init__(self, server: Server, *, model: str, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self._server = server
        self._options = {name: value for name, value in options.items() if value is not None}
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer in pieces; question and answer are kept only if the answer is complete."""
        messages = [*self.messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        pieces: list[str] = []
        with self._server.stream("POST", "/v1/chat/completions", body, timeout_s=None) as response:
            if response.status != 200:
                raise ChatError(HttpAnswer(response.status, response.read().decode("utf-8", "replace")).refusal())
            for event in server_sent_events(response):
                if "error" in event:
                    raise ChatError(f"The server ended the answer: {event['error'].get('message')}")
                for choice in event.get("choices", ()):
                    if piece := (choice.get("delta") or {}).get("content"):
                        pieces.append(piece)
                        yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def waiting_reason(self) -> str:
        """The reason why no token has arrived yet, as far as the server reports one."""
        try:
            answer = self._server.request("GET", "/server_info", timeout_s=STATUS_TIMEOUT_S)
            states = [state for state in answer.json()["internal_states"] if state.get("success", True)]
            return reason_of(states)
        except (ServerError, ValueError, KeyError, TypeError, AttributeError):
            return "waiting for the first token"


def reason_of(states: list[dict[str, Any]]) -> str:
    """The reason in words, from the state of each engine: an answer is held only if all engines are."""
    if states and all(state.get("released_memory") for state in states):
        return "the server's memory is released; `headwater memory resume` takes it again"
    if states and all(state.get("paused") or state.get("released_memory") for state in states):
        return "generation is paused; `headwater continue` ends the pause"
    others = sum(state.get("num_running_reqs", 0) + state.get("num_waiting_reqs", 0) for state in states) - 1
    beside = f"; {others} other request{'s' * (others > 1)} on the server" if others > 0 else ""
    return f"waiting for the first token{beside}"


def converse(conversation: Conversation) -> None:
    """Read questions from the terminal. Ctrl-C stops an answer; at the prompt it exits, as Ctrl-D does."""
    with contextlib.suppress(ImportError):  # missing on some platforms; with it, the arrow keys recall earlier lines
        import readline  # noqa: F401
    print(f"Chatting with {conversation.model}. {HELP}")
    while True:
        try:
            line = input("\n› ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            conversation.reset()
            print("(forgotten)")
        elif command == "/system":
            conversation.system = rest or None
            conversation.reset()
            print("(new system prompt, conversation forgotten)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            try:
                print_answer(conversation, line)
            except KeyboardInterrupt:
                print(" (stopped)")
            except (ChatError, ServerError) as error:
                click.secho(str(error), err=True, fg="red")


def print_answer(conversation: Conversation, question: str) -> None:
    with WaitingLine(conversation.waiting_reason) as waiting:
        for piece in conversation.ask(question):
            waiting.stop()
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()


def first_model(server: Server) -> str:
    """Wait until the server has loaded a model; the name of the first one. Raises `ChatError`, `ServerError`."""
    with WaitingLine(lambda: "the server is loading its model"):
        answer = server.request("GET", "/v1/models", timeout_s=LIST_TIMEOUT_S)
        while answer.error.get("code") == "loading":
            time.sleep(POLL_S)
            answer = server.request("GET", "/v1/models", timeout_s=LIST_TIMEOUT_S)
    if answer.status_code != 200:
        raise ChatError(answer.refusal())
    try:
        return answer.json()["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ChatError(f"{server.url} answers, but not like a server with OpenAI's API.") from None


def server_sent_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of `data:` lines, up to `[DONE]`."""
    for line in lines:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
