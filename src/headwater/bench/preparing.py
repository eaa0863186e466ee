"""Before the first round: the model's name, the length of words in tokens, and requests that nothing measures."""

import time
from collections.abc import Sequence

import msgspec

from headwater.bench.apis import Prompt, refusal
from headwater.bench.arrivals import Session
from headwater.bench.connection import ConnectionBroke, HttpClient
from headwater.bench.conversation import PromptWriter
from headwater.bench.exchange import Exchange, Watched, exchange
from headwater.bench.load import Pace, Target, play
from headwater.bench.words import text_of

LIST_TIMEOUT_S = 30.0
FEW_WORDS, MANY_WORDS = 8, 32  # short enough for any context


async def first_model(http: HttpClient) -> str:
    """The first model that the server lists. Raises ConnectionBroke, also for a refusal."""
    answer = await http.request("GET", "/v1/models", timeout_s=LIST_TIMEOUT_S)
    try:
        return msgspec.json.decode(answer.text.encode())["data"][0]["id"]
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        said = refusal(answer.status, answer.text)
        raise ConnectionBroke(f"{http.url} lists no model, so give --model ({said})") from None


async def words_per_token(target: Target) -> float:
    """How many of our words the server counts as one token. Asks it twice; raises ConnectionBroke for a refusal."""
    few, many = [(await _ask_words(target, count)).told.num_prompt_tokens for count in (FEW_WORDS, MANY_WORDS)]
    if many <= few:
        return 1.0
    return (MANY_WORDS - FEW_WORDS) / (many - few)


async def warm_up(target: Target, sessions: Sequence[Session], writer: PromptWriter, *, num_at_once: int) -> None:
    """Send the first turns of some sessions, and measure nothing. Raises ConnectionBroke if one of them fails."""
    first_turns = [Session(0.0, session.turns[:1]) for session in sessions]
    pace = Pace(is_open=False, num_at_once=num_at_once)
    done = await play(target, first_turns, writer=writer, pace=pace, watched=Watched())
    _raise_error(target, done)


async def _ask_words(target: Target, count: int) -> Exchange:
    text = text_of("calibration", count)
    prompt: Prompt = [{"role": "user", "content": text}] if target.api.takes_messages else text
    body = target.api.body(prompt, 1, target.settings)
    now_s = time.perf_counter()
    asked = exchange(target.http, target.api, body, due_s=now_s, timeout_s=target.timeout_s, watched=Watched())
    found = await asked
    _raise_error(target, [found])
    return found


def _raise_error(target: Target, done: Sequence[Exchange]) -> None:
    for each in done:
        if each.error:
            raise ConnectionBroke(f"{target.http.url}{target.api.path}: {each.error}")
