"""`headwater chat`: talk to a running server in the terminal, through its OpenAI API."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

DEFAULT_URL = "http://127.0.0.1:30000"
HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit (or Ctrl-D) leaves."


class ChatError(Exception):
    """The server could not be asked or refused; the message is for the user."""


def chat(
    question: Annotated[str | None, typer.Argument(help="Ask this, print the answer and leave.")] = None,
    url: Annotated[str, typer.Option(help="Where the server is.")] = DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to ask. Default: the first one the server lists.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.3,
    api_key: Annotated[
        str | None, typer.Option(help="The server's --api-key.", envvar="HEADWATER_API_KEY")
    ] = None,
) -> None:
    """Chat with a running server."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    options = {"max_tokens": max_tokens, "temperature": temperature}
    try:
        with httpx.Client(
            base_url=url, headers=headers, timeout=httpx.Timeout(10.0, read=None), trust_env=False
        ) as http:
            conversation = Conversation(
                http, model=model or first_model(http), system=system, options=options
            )
            if question is not None:
                print_answer(conversation.ask(question))
            else:
                converse(conversation)
    except (ChatError, httpx.InvalidURL) as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None


class Conversation:
    """The messages so far, and how to ask for the next one."""

    def __init__(
        self, http: httpx.Client, *, model: str, system: str | None, options: dict[str, Any]
    ) -> None:
        self.model = model
        self._http = http
        self._options = {name: value for name, value in options.items() if value is not None}
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer in pieces; question and answer are kept only if the answer came to its end."""
        messages = [*self.messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        pieces: list[str] = []
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ChatError(explain_refusal(answer))
                for event in server_sent_events(answer.iter_lines()):
                    if "error" in event:
                        raise ChatError(f"The server ended the answer: {event['error'].get('message')}")
                    for choice in event.get("choices", ()):
                        if piece := (choice.get("delta") or {}).get("content"):
                            pieces.append(piece)
                            yield piece
        except httpx.TransportError as error:
            raise ChatError(explain_transport_error(error, str(self._http.base_url))) from None
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def converse(conversation: Conversation) -> None:
    """Read questions from the terminal. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""
    with contextlib.suppress(
        ImportError
    ):  # not on every platform; with it, the arrow keys bring old lines back
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
                print_answer(conversation.ask(line))
            except KeyboardInterrupt:
                print(" (stopped)")
            except ChatError as error:
                typer.secho(str(error), err=True, fg="red")


def print_answer(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def first_model(http: httpx.Client) -> str:
    """The name of the first model the server lists. Raises `ChatError` if none answers or it is not ready."""
    try:
        answer = http.get("/v1/models")
    except httpx.TransportError as error:
        raise ChatError(explain_transport_error(error, str(http.base_url))) from None
    if answer.status_code != 200:
        raise ChatError(explain_refusal(answer))
    try:
        return answer.json()["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ChatError(f"{http.base_url} answers, but not like a server with OpenAI's API.") from None


def server_sent_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of `data:` lines, up to `[DONE]`."""
    for line in lines:
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def explain_refusal(answer: httpx.Response) -> str:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    return f"The server answered {answer.status_code}: {message}"


def explain_transport_error(error: httpx.TransportError, url: str) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"No server answers at {url}. Start one with `headwater serve`, or say where it is with --url."
    if isinstance(error, httpx.UnsupportedProtocol):
        return f"{url} is not an address like {DEFAULT_URL}."
    return f"The connection to {url} broke: {error or type(error).__name__}"
