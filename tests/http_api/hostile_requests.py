"""Requests made to break a server: raw bodies, and hostile values for every parameter that the schema names."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

JSON = "application/json"
DEEP = 20_000

RAW_BODIES = [
    b"",
    b"   ",
    b"null",
    b"true",
    b"5",
    b"NaN",
    b"-Infinity",
    b'"text"',
    b"[]",
    b"[[], {}]",
    b"{",
    b'{"a"',
    b'{"a": }',
    b"\x00",
    b"\xff\xfe\x00",
    b'{"text": "\xff"}',
    b'{"text": "\xed\xa0\x80"}',
    b"\xef\xbb\xbf{}",
    '{"text": "a"}'.encode("utf-16"),
    b'{"text": "a", "text": {"b": 1}, "prompt": 1, "prompt": []}',
    b'{"\\ud800": 1, "\x7f": 2, "": 3, "__proto__": {}}',
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b"[" * 500 + b"]" * 500,
    b'{"text": ' + b"[" * DEEP,
    b'{"text": ' + b"1" * 5000 + b"}",
    b"9" * 10_000,
    b'{"timeout": 1e999, "n": -1e999}',
]
CONTENT_TYPES = [JSON, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "\xff", ""]

VALUES = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**400),
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "\x00",
    "\ud800",
    "a\udfff",
    "/",
    "9" * 5000,
    "x" * 5000,
    "[" * DEEP,
    '{"a":' * 900 + "1" + "}" * 900,
    [],
    [None],
    [[]],
    [0, "a", None, {}],
    ["\ud800"],
    [2**70],
    [float("nan")],
    {},
    {"": None},
    {"a": {"b": [{}]}},
    {"\ud800": "\ud800"},
    {"1": 10**400},
]
NUMBERS = ["-1", "NaN", "1e999", "9" * 5000]
QUERIES = [*NUMBERS, "", "%00", "%ff", "%ed%a0%80", "%22", "a" * 20_000, "{}", "true", "&x&=&", "%"]


class Call(NamedTuple):
    """One request: enough to send it again by hand."""

    method: str
    path: str
    content: bytes = b""
    content_type: str = JSON


class Operations:
    """The operations of an OpenAPI schema, with an example of each body's required members."""

    def __init__(self, schema: dict[str, Any], examples: dict[str, dict[str, Any]]) -> None:
        self._schema = schema
        self._examples = examples

    def calls(self, path: str, method: str) -> Iterator[Call]:
        operation = self._schema["paths"][path][method]
        method = method.upper()
        for name in path_parameters(path):
            for value in QUERIES:
                if "&" not in value and value.rstrip("%"):
                    yield Call(method, path.replace(f"{{{name}}}", value))
        plain = path.replace("{", "").replace("}", "").replace(":path", "")
        yield Call(method, plain)
        for body in RAW_BODIES:
            yield Call(method, plain, body)
        for content_type in CONTENT_TYPES:
            yield Call(method, plain, b'{"text": "a", "rid": "b"}', content_type)
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "query":
                yield from (Call(method, f"{plain}?{parameter['name']}={value}") for value in QUERIES)
                yield Call(method, f"{plain}?{parameter['name']}=1&{parameter['name']}=2")
        for body in self._bodies(path, operation):
            yield Call(method, plain, json.dumps(body).encode())

    def _bodies(self, path: str, operation: dict[str, Any]) -> Iterator[Any]:
        content = operation.get("requestBody", {}).get("content", {}).get(JSON)
        if content is None:
            return
        example = self._examples.get(path, {})
        yield example
        for name, schema in self._members(content["schema"]).items():
            for value in VALUES:
                yield example | {name: value}
            for inner in self._members(schema):
                for value in VALUES:
                    yield example | {name: {inner: value}}
        yield dict.fromkeys(self._members(content["schema"]), "�")

    def _members(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Members of the objects that a schema allows."""
        if "$ref" in schema:
            schema = self._schema["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        members = dict(schema.get("properties", {}))
        for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
            members |= self._members(part)
        return members


def path_parameters(path: str) -> list[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]
