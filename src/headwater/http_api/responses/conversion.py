"""From a body of OpenAI's responses to the fields of a chat completion."""

from headwater.generation.answer_fields import Json
from headwater.generation.errors import unsupported
from headwater.http_api.json_object import JsonObject, json_objects
from headwater.http_api.responses.schemas import ResponsesRequest

RENAMED = (
    (".function.", "."),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("messages", "input"),
    ("max_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
    ("continue_final_message", "input"),
)
LOGPROBS = "message.output_text.logprobs"
# These add to what the server has not: results of its own tools, images, and encrypted reasoning (it is in the clear).
_INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
    }
)

# name -> the value that asks for nothing, and why others are refused
_OF_REASONING = {
    "summary": ("auto", "reasoning is answered whole, not as a summary"),
    "generate_summary": ("auto", "reasoning is answered whole, not as a summary"),
    "context": ("auto", "the chat template decides which earlier reasoning the model sees"),
    "mode": ("standard", "there is one way to reason"),
}


def request_fields(body: ResponsesRequest, messages: list[Json]) -> Json:
    """The whole chat completion about `messages`. InvalidRequest names what is not honoured."""
    said = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    fields = body.shared_fields() | {"messages": [*said, *messages], "max_tokens": body.max_output_tokens}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in json_objects(body.tools, "tools")]
    fields |= {"tool_choice": _choice(body), "parallel_tool_calls": body.parallel_tool_calls}
    if body.text is not None:
        fields |= _text(JsonObject(body.text, "text"))
    if body.reasoning is not None:
        fields |= _reasoning(JsonObject(body.reasoning, "reasoning"))
    _check_include(body.include)
    if has_logprobs(body):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return fields


def has_logprobs(body: ResponsesRequest) -> bool:
    """Whether the answer reports log-probabilities."""
    return LOGPROBS in body.include or body.top_logprobs > 0


def _tool(tool: JsonObject) -> Json:
    tool.kind(("function",), why="this server runs no tools itself")
    tool.refuse("defer_loading", "all tools are shown to the model")
    tool.refuse("output_schema", "write it into the description")
    if tool.get("allowed_callers") not in (None, ["direct"]):
        raise unsupported(tool.place("allowed_callers"), f"{tool.place('allowed_callers')}: must be ['direct']")
    function: Json = {"name": tool.text("name")}
    if tool.get("parameters") is not None:
        function["parameters"] = tool.plain("parameters")
    if description := tool.text("description", default=""):
        function["description"] = description
    if tool.flag("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(body: ResponsesRequest) -> object:
    """A chat completion has the name of a function one level deeper."""
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _text(text: JsonObject) -> Json:
    if text.get("verbosity") not in (None, "medium"):
        raise unsupported("text.verbosity", "text.verbosity: not supported: say it in the prompt")
    if text.get("format") is None:
        return {}
    form = JsonObject(text.get("format"), "text.format")
    match form.kind(("text", "json_object", "json_schema"), why="not a format"):
        case "json_schema":
            schema = {"name": form.text("name"), "schema": form.plain("schema"), "strict": form.flag("strict")}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case kind:
            return {"response_format": {"type": kind}}


def _reasoning(reasoning: JsonObject) -> Json:
    for name, (accepted, why) in _OF_REASONING.items():
        if reasoning.get(name) not in (None, accepted):
            place = reasoning.place(name)
            raise unsupported(place, f"{place}: {why}; accepted: {accepted!r}")
    return {} if reasoning.get("effort") is None else {"reasoning_effort": reasoning.text("effort")}


def _check_include(include: list[str]) -> None:
    for index, name in enumerate(include):
        if name not in _INCLUDABLE:
            raise unsupported(f"include[{index}]", f"include[{index}]: {name!r} is not known here")
