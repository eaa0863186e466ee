"""Accepted ranges, each written once: for the check, the words of the 400 and /openapi.json."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator

from headwater.generation.token_arrays import int32_array
from headwater.messages.base import is_timeout

MAX_N = 128
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_LOGPROB_TOKEN_IDS = 256
MAX_NAME_CHARS = 256  # rid, cache_salt, extra_key
MAX_TOKENS = 1 << 40  # far beyond any context, to which it is cut


def within(low: float, high: float, *, above_low: bool = False) -> Callable[[Any], Any]:
    """A check that a number lies in [low, high], or in (low, high]; NaN never does."""
    interval = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"

    def check(value: Any) -> Any:
        if value is None or (low <= value <= high and not (above_low and value == low)):
            return value
        raise ValueError(f"must be {interval}, got {value}")

    return check


def at_least(low: int) -> Callable[[Any], Any]:
    """A check that a number is `low` or more, for counts that are cut to what fits."""

    def check(value: Any) -> Any:
        if value is None or low <= value:
            return None if value is None else min(value, MAX_TOKENS)
        raise ValueError(f"must be {low} or more, got {value}")

    return check


def _span(low: float, high: float) -> Any:
    return Field(json_schema_extra={"minimum": low, "maximum": high})


Temperature = Annotated[float, AfterValidator(within(0, 100)), _span(0, 100)]
TopP = Annotated[float, AfterValidator(within(0, 1, above_low=True)), _span(0, 1)]
TopK = Annotated[int, AfterValidator(within(-1, 2**31 - 1)), _span(-1, 2**31 - 1)]
MinP = Annotated[float, AfterValidator(within(0, 1)), _span(0, 1)]
Penalty = Annotated[float, AfterValidator(within(-2, 2)), _span(-2, 2)]
RepetitionPenalty = Annotated[float, AfterValidator(within(0, 10, above_low=True)), _span(0, 10)]
NumTokens = Annotated[int, AfterValidator(at_least(0)), Field(json_schema_extra={"minimum": 0})]
NumTokensFromOne = Annotated[int, AfterValidator(at_least(1)), Field(json_schema_extra={"minimum": 1})]
ReasoningBudget = Annotated[int, AfterValidator(at_least(-1)), Field(json_schema_extra={"minimum": -1})]
NumSamples = Annotated[int, AfterValidator(within(1, MAX_N)), _span(1, MAX_N)]
NumLogprobs = Annotated[int, AfterValidator(within(0, MAX_LOGPROBS)), _span(0, MAX_LOGPROBS)]
Seed = Annotated[int, AfterValidator(within(-(2**63), 2**64 - 1))]
Priority = Annotated[int, AfterValidator(within(-(2**31), 2**31 - 1)), _span(-(2**31), 2**31 - 1)]


def check_unicode(text: Any) -> Any:
    """JSON may contain half a surrogate pair, which no tokenizer can encode."""
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"is not valid Unicode: a lone surrogate at character {error.start}") from None
    return text


def check_name(name: Any) -> Any:
    check_unicode(name)
    if isinstance(name, str) and len(name) > MAX_NAME_CHARS:
        raise ValueError(f"must have at most {MAX_NAME_CHARS} characters, got {len(name)}")
    return name


Text = Annotated[str, AfterValidator(check_unicode)]
Name = Annotated[str, AfterValidator(check_name)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def check_stop(stop: list[str]) -> list[str]:
    """At most MAX_STOP_STRINGS strings of 1 to MAX_STOP_CHARS characters."""
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(f"must hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
    for string in stop:
        check_unicode(string)
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise ValueError(f"each string must have 1 to {MAX_STOP_CHARS} characters, got {len(string)}")
    return stop


Stop = Annotated[
    list[str],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    AfterValidator(check_stop),
]


def _bounded(max_items: int) -> Callable[[Any], Any]:
    def check(values: Any) -> Any:
        if len(values) > max_items:
            raise ValueError(f"must hold at most {max_items} items, got {len(values)}")
        return values

    return check


def check_logit_bias(bias: dict[int, float]) -> dict[int, float]:
    """At most MAX_LOGIT_BIAS token ids, each with a bias from -100 to 100."""
    _bounded(MAX_LOGIT_BIAS)(bias)
    for token_id, value in bias.items():
        if not -100 <= value <= 100:
            raise ValueError(f"each bias must be from -100 to 100, got {value} for token {token_id}")
    return bias


StopTokenIds = Annotated[list[int], AfterValidator(_bounded(MAX_STOP_TOKEN_IDS))]
# the type in /openapi.json; `read_prompt_ids` makes arrays
PromptIds = Annotated[list[int] | list[list[int]], WrapValidator(lambda value, read: read_prompt_ids(value, read))]


def check_logprob_ids(ids: list[int] | list[list[int]]) -> list[int] | list[list[int]]:
    """At most MAX_LOGPROB_TOKEN_IDS ids for each prompt; the number of prompts is bounded elsewhere."""
    lists = ids if ids and isinstance(ids[0], list) else [ids]
    for one in lists:
        _bounded(MAX_LOGPROB_TOKEN_IDS)(one)
    return ids


LogprobTokenIds = Annotated[list[int] | list[list[int]], AfterValidator(check_logprob_ids)]
LogitBias = Annotated[dict[int, float], AfterValidator(check_logit_bias)]


def read_prompt_ids(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """One prompt's token ids, or a list of prompts', as int32 arrays.

    Anything but a plain list of integers is read by pydantic: it stays a list, or is refused in pydantic's words.
    """
    try:
        if isinstance(value, list) and value:
            return [int32_array(ids) for ids in value] if isinstance(value[0], list) else int32_array(value)
    except (TypeError, OverflowError):  # an item that is not an integer, or too large for any vocabulary
        pass
    return read(value)


def timeout_seconds(value: Any, max_s: float) -> float:
    """A duration from a query string or JSON. Raises ValueError that names the range."""
    expected = f"must be a number of seconds from 0 to {max_s:g}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{expected}, got {value!r}")
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{expected}, got {value!r}") from None
    if not is_timeout(seconds, max_s=max_s):
        raise ValueError(f"{expected}, got {value!r}")
    return seconds
