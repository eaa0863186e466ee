"""From a body of Ollama's API to the fields of a chat completion."""

import json
from collections.abc import Mapping
from typing import Any

from headwater.generation.answer_fields import Json
from headwater.generation.errors import bad_request, unsupported
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.json_object import JsonObject, json_objects
from headwater.http_api.ollama.schemas import OllamaChatRequest, OllamaGenerateRequest, OllamaOptions, OllamaRequest

RENAMED = (
    ("response_format.json_schema", "format"),
    ("response_format", "format"),
    ("max_tokens", "options.num_predict"),
    ("reasoning_effort", "think"),
    ("continue_final_message", "messages"),
)
_SAME = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
_ROLES = ("system", "user", "assistant", "tool")
LATEST = ":latest"


def plain_name(name: str) -> str:
    """The model's name without the tag that Ollama's clients add."""
    return name.removesuffix(LATEST)


def chat_fields(body: OllamaChatRequest, model: ModelFacts) -> Json:
    """The whole chat completion. InvalidRequest names what is not honoured."""
    fields = _shared_fields(body, model) | {"messages": chat_messages(body.messages)}
    if body.messages and body.messages[-1].get("role") == "assistant":
        fields["continue_final_message"] = True
    return fields | ({"tools": body.tools} if body.tools else {})


def generate_fields(body: OllamaGenerateRequest, model: ModelFacts) -> Json:
    """The chat completion about one prompt."""
    said = [] if body.system is None else [{"role": "system", "content": body.system}]
    return _shared_fields(body, model) | {"messages": [*said, {"role": "user", "content": body.prompt}]}


def raw_fields(body: OllamaGenerateRequest, model: ModelFacts) -> Json:
    """The completion of a prompt without the template, which may hold control tokens."""
    for name in ("system", "think"):
        if getattr(body, name):
            raise bad_request(name, f"{name}: goes with the chat template, not with raw")
    fields = {"max_tokens": model.max_context} | _shared_fields(body, model) | {"prompt": body.prompt}
    if body.logprobs:  # a completion has one field for both
        fields["logprobs"] = fields.pop("top_logprobs")
    return fields


def _shared_fields(body: OllamaRequest, model: ModelFacts) -> Json:
    fields: Json = {"model": plain_name(body.model), "stream": body.stream}
    fields |= {name: getattr(body, name) for name in ("cache_salt", "extra_key") if name in body.model_fields_set}
    if body.logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    elif body.top_logprobs:
        raise bad_request("top_logprobs", "top_logprobs: needs logprobs to be true")
    return fields | _sampling(body.options, model) | _format(body.format) | _thinking(body.think)


def _sampling(options: OllamaOptions, model: ModelFacts) -> Json:
    fields = {name: getattr(options, name) for name in _SAME if getattr(options, name) is not None}
    if options.repeat_penalty is not None:
        fields["repetition_penalty"] = options.repeat_penalty
    if options.num_predict is not None and options.num_predict > 0:
        fields["max_tokens"] = options.num_predict
    if options.num_ctx is not None and options.num_ctx > model.max_context:
        message = f"options.num_ctx: must be at most {model.max_context}, the context of this server"
        raise bad_request("options.num_ctx", f"{message}; got {options.num_ctx}")
    _check_window(options)
    return fields


def _check_window(options: OllamaOptions) -> None:
    """A penalty looks at the whole context here."""
    penalties = (options.repeat_penalty or 1) != 1 or options.presence_penalty or options.frequency_penalty
    if penalties and options.repeat_last_n not in (None, -1):
        message = "options.repeat_last_n: must be -1 beside a penalty: penalties look at the whole context"
        raise unsupported("options.repeat_last_n", message)


def _format(form: str | dict[str, Any]) -> Json:
    if form == "":
        return {}
    if form == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(form, str):
        raise bad_request("format", f"format: must be 'json' or a JSON schema, got {form!r}")
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "format", "schema": form}}}


def _thinking(think: bool | str | None) -> Json:
    if think is None:
        return {}
    fields: Json = {"chat_template_kwargs": {"enable_thinking": bool(think)}}
    return fields | ({"reasoning_effort": think} if isinstance(think, str) and think else {})


def chat_messages(messages: list[dict[str, Any]]) -> list[Json]:
    """The messages of a chat completion. InvalidRequest names the place of the first fault."""
    calls = _Calls()
    return [_message(message, calls) for message in json_objects(messages, "messages")]


class _Calls:
    """Ids for calls. Ollama's clients send none: a result names its tool, and results follow the order of the calls."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._open: list[tuple[str, str]] = []  # ids and names of calls without a result

    def new(self, name: str, given: str) -> str:
        self._num_calls += 1
        id = given or f"call{self._num_calls:05}"  # nine letters and digits, as Mistral's templates want
        self._open.append((id, name))
        return id

    def take(self, name: str, given: str) -> str:
        """The id of the call that a result belongs to."""
        fitting = [call for call in self._open if call[0] == given or (not given and name in ("", call[1]))]
        if not fitting:
            return given or self.new(name, "")
        self._open.remove(fitting[0])
        return fitting[0][0]


def _message(message: JsonObject, calls: _Calls) -> Json:
    role = message.text("role")
    if role not in _ROLES:
        raise message.fault("role", f"must be one of {', '.join(_ROLES)}, got {role!r}")
    message.refuse("images", "this server takes text only")
    converted: Json = {"role": role, "content": message.text("content", default="")}
    if role == "tool":
        name = message.text("tool_name", default=message.text("name", default=""))
        converted["tool_call_id"] = calls.take(name, message.text("tool_call_id", default=""))
        return converted | ({"name": name} if name else {})
    if thinking := message.text("thinking", default=""):
        converted["reasoning_content"] = thinking
    if found := message.objects("tool_calls"):
        converted["tool_calls"] = [_call(call, calls) for call in found]
    return converted


def _call(call: JsonObject, calls: _Calls) -> Json:
    function = JsonObject(call.get("function"), call.place("function"))
    name, arguments = function.text("name"), function.get("arguments")
    if isinstance(arguments, Mapping) or arguments is None:
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    elif not isinstance(arguments, str):
        raise function.fault("arguments", "must be an object")
    id = calls.new(name, call.text("id", default=""))
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
