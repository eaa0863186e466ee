"""Completes the document that FastAPI derives from the routes: answers, errors, keys."""

from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.routing import APIRoute

from headwater.generation.answer_fields import Json
from headwater.http_api.openapi import answers, other_answers, pooling_answers

JSON, EVENTS = "application/json", "text/event-stream"
REFERENCE = "#/components/schemas/{name}"
ANSWERS: dict[str, Any] = {  # by operation id
    "chat_completions": answers.ChatCompletion,
    "completions": answers.Completion,
    "list_models": answers.ModelList,
    "get_model": answers.ModelCard,
    "generate": answers.Generated | list[answers.Generated],
    "generate_put": answers.Generated | list[answers.Generated],
    "tokenize": answers.Tokens,
    "detokenize": answers.Text,
    "embeddings": pooling_answers.EmbeddingList,
    "encode": pooling_answers.Encoded | list[pooling_answers.Encoded],
    "score": pooling_answers.Scores,
    "create_response": other_answers.ResponseObject,
    "count_input_tokens": other_answers.CountedInput,
    "get_response": other_answers.ResponseObject,
    "list_input_items": other_answers.ItemPage,
    "delete_response": other_answers.DeletedResponse,
    "create_message": other_answers.Message,
    "count_tokens": other_answers.CountedTokens,
    "ollama_chat": other_answers.OllamaChatAnswer,
    "ollama_generate": other_answers.OllamaGenerateAnswer,
    "ollama_embed_texts": other_answers.OllamaEmbeddings,
    "ollama_embed_prompt": other_answers.OllamaEmbedding,
    "ollama_tags": other_answers.OllamaModels,
    "ollama_running": other_answers.OllamaModels,
    "ollama_show": other_answers.OllamaModel,
    "ollama_show_version": other_answers.OllamaVersion,
    "flush_cache": answers.FlushAnswer,
    "flush_cache_post": answers.FlushAnswer,
    "reset_prefix_cache": answers.FlushAnswer,
    "get_kv_event_sources": list[answers.KvEventSource],
}
EVENT_SHAPES: dict[str, Any] = {
    "chat_completions": answers.ChatCompletionChunk,
    "completions": answers.Completion,
    "generate": answers.Generated,
    "generate_put": answers.Generated,
}
ERRORS: dict[str, Any] = {  # by the first tag; error_shapes.py makes them
    "anthropic": answers.AnthropicErrorAnswer,
    "ollama": answers.OllamaErrorAnswer,
    "": answers.ErrorAnswer,
}
EVENT_TEXT = "Server-sent events with JSON. Except for messages and responses, `[DONE]` ends them."
UNUSED = ("HTTPValidationError", "ValidationError")  # FastAPI's own error, which this server does not send


def operation_id(route: APIRoute) -> str:
    """The name of the route's function: the name of the call in generated clients."""
    return f"ollama_{route.name}" if "ollama" in route.tags else route.name  # it has a `generate` as well


def install_document(app: FastAPI) -> None:
    """`app.openapi` makes the whole document at its first call."""
    derive = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            _complete(derive())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi


def _complete(document: Json) -> None:
    components = document["components"]["schemas"]
    for name in UNUSED:
        components.pop(name, None)
    for body in components.values():
        for name, field in body.get("properties", {}).items():
            if name not in body.get("required", ()):
                _allow_null(field)
    answer_of, event_of, error_of = (_schemas(shapes, components) for shapes in (ANSWERS, EVENT_SHAPES, ERRORS))
    _name_booleans(components)
    for operation in _operations(document):
        name, tag = operation["operationId"], operation["tags"][0]
        error = error_of.get(tag, error_of[""])
        _complete_responses(operation["responses"], answer_of.get(name), error, event=event_of.get(name))
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "The API key; for control routes the admin key."},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
    }
    document["security"] = [{}, {"key": []}, {"header": []}]


def _allow_null(field: Json) -> None:
    """A null in a request counts as left out (generation/body.py)."""
    if field.get("default") == {}:
        del field["default"]  # generators take no default of an object
    if isinstance(kind := field.get("type"), str) and kind != "null":
        field["type"] = [kind, "null"]
        if "enum" in field:
            field["enum"] = [*field["enum"], None]
        elif "const" in field:
            field["enum"] = [field.pop("const"), None]
    elif "$ref" in field:
        field["anyOf"] = [{"$ref": field.pop("$ref")}, {"type": "null"}]
    elif "anyOf" in field and {"type": "null"} not in field["anyOf"]:
        field["anyOf"].append({"type": "null"})


def _name_booleans(part: Any) -> None:
    """A field that is always true or always false becomes a boolean: generators know no enums of booleans."""
    if isinstance(part, dict):
        values = part.get("enum")
        if isinstance(values, list) and {type(value) for value in values} <= {bool, type(None)}:
            del part["enum"]
            part["type"] = ["boolean", "null"] if None in values else "boolean"
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _name_booleans(inner)


def _schemas(shapes: dict[str, Any], components: Json) -> Json:
    """References to the shapes, by the same names; their schemas are added to `components`."""
    schemas, made = msgspec.json.schema_components(shapes.values(), ref_template=REFERENCE)
    components |= {name: _open(schema) for name, schema in made.items()}
    return dict(zip(shapes, schemas, strict=True))


def _operations(document: Json) -> Iterator[Json]:
    for methods in document["paths"].values():
        yield from methods.values()


def _complete_responses(responses: Json, answer: Json | None, error: Json, *, event: Json | None) -> None:
    responses.pop("422", None)  # it would be a 400
    has_bodies = any("content" in response for response in responses.values())
    for status, response in responses.items():
        if not has_bodies:
            break  # a probe, which answers by its status alone
        content = response.setdefault("content", {})
        if status >= "4":
            is_outcome = "text/plain" in content  # a flush that was not done
            content.setdefault(JSON, {})["schema"] = {"anyOf": [answer or {}, error]} if is_outcome else error
        elif answer is not None:
            content.setdefault(JSON, {})["schema"] = answer
        if EVENTS in content:
            content[EVENTS] = {"schema": {"description": EVENT_TEXT}, "x-event": event}
    responses["default"] = {"description": "An error.", "content": {JSON: {"schema": error}}}


def _open(schema: Json) -> Json:
    """Later servers may add fields to an answer."""
    return {name: value for name, value in schema.items() if name != "additionalProperties"}
