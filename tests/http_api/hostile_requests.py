"""Requests made to break a server: raw bodies, and hostile values for every parameter that the schema names.

`ask` sends them without a client library, which takes half of the time where a test sends thousands.
"""

import asyncio
import functools
import json
from collections.abc import Collection, Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI

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
NUMBERS = ["-1", "NaN", "1e999", "9" * 5000, str(2**63), str(2**64), "9" * 25, "-" + "9" * 25]
QUERIES = [*NUMBERS, "", "%00", "%ff", "%ed%a0%80", "%22", "a" * 20_000, "{}", "true", "&x&=&", "%"]


class Call(NamedTuple):
    """One request: enough to send it again by hand."""

    method: str
    path: str
    content: bytes = b""
    content_type: str = JSON


class Operations:
    """The operations of an OpenAPI schema, with an example of each body's required members."""

    def __init__(
        self, schema: dict[str, Any], examples: dict[str, dict[str, Any]], tried: Mapping[str, Collection[str]]
    ) -> None:
        """`tried` are members of a path's body that another path is sent with every value."""
        self._schema = schema
        self._examples = examples
        self._tried = tried

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

    def random_calls(self, path: str, method: str, *, seed: int, count: int) -> Iterator[Call]:
        """Several members at a time, hostile or nearly right, of the schema and of none."""
        content = self._schema["paths"][path][method].get("requestBody", {}).get("content", {}).get(JSON)
        if content is None:
            return
        random = Random(f"{seed} {path}")
        members = self._members(content["schema"])
        plain = path.replace("{", "").replace("}", "").replace(":path", "")
        for _ in range(count):
            body = dict(self._examples.get(path, {}))
            for name in random.sample(sorted(members), k=min(len(members), random.randint(1, 5))):
                body[name] = self._value(members[name], random)
            yield Call(method.upper(), plain, json.dumps(body).encode())

    def _value(self, schema: dict[str, Any], random: Random, depth: int = 0) -> Any:
        """A value that fits the schema, or one that does not."""
        if depth > 4 or random.random() < 0.15:
            return random.choice(VALUES)
        if "$ref" in schema:
            schema = self._schema["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        choices = schema.get("anyOf") or schema.get("oneOf") or ()
        if choices:
            return self._value(random.choice(choices), random, depth)
        if "enum" in schema:
            return random.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                inner = schema.get("properties") or {random.choice("ab1"): {}}
                names = random.sample(sorted(inner), k=min(len(inner), random.randint(0, 4)))
                return {name: self._value(inner[name], random, depth + 1) for name in names}
            case "array":
                return [self._value(schema.get("items", {}), random, depth + 1) for _ in range(random.randint(0, 3))]
            case "integer":
                return random.choice([0, 1, 2, 7, schema.get("maximum", 3), schema.get("minimum", -1)])
            case "number":
                return random.choice([0, 0.5, 1, 2.5])
            case "boolean":
                return random.random() < 0.5
            case "string":
                return random.choice(["a", "user", "text", "hello there", "é", "auto", "{}", "1"])
        return random.choice(VALUES)

    def _bodies(self, path: str, operation: dict[str, Any]) -> Iterator[Any]:
        content = operation.get("requestBody", {}).get("content", {}).get(JSON)
        if content is None:
            return
        example = self._examples.get(path, {})
        yield example
        for name, schema in self._members(content["schema"]).items():
            if name in self._tried.get(path, ()):
                continue
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


class Answer(NamedTuple):
    status_code: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


@functools.lru_cache
def _place(path: str) -> dict[str, Any]:
    """The part of a scope that says where a request goes, as httpx reads and quotes it."""
    url = httpx.URL(f"http://test{path}")
    return {"path": url.path, "raw_path": url.raw_path.split(b"?")[0], "query_string": url.query}


async def ask(app: FastAPI, method: str, path: str, *, content: bytes = b"", content_type: bytes) -> Answer:
    """The whole answer to a request with the headers that httpx sends. What the app raises is a 500."""
    headers = [
        (b"host", b"test"),
        (b"accept", b"*/*"),
        (b"accept-encoding", b"gzip, deflate"),
        (b"connection", b"keep-alive"),
        (b"user-agent", b"plain"),
        (b"content-type", content_type),
        (b"content-length", str(len(content)).encode()),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "headers": headers,
        "scheme": "http", "server": ("test", None), "client": ("127.0.0.1", 123), "root_path": "", **_place(path),
    }  # fmt: skip
    requests = [{"type": "http.request", "body": content, "more_body": False}]
    status, parts, is_complete = 0, [], asyncio.Event()

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await is_complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            assert not status, "two answers"
            status = message["status"]
        elif message["type"] == "http.response.body":
            assert not is_complete.is_set(), "an answer goes on after its end"
            if method != "HEAD":
                parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                is_complete.set()

    try:
        await app(scope, receive, send)
    except Exception as error:
        return Answer(500, f"{b''.join(parts)!r} {error!r}".encode())
    assert is_complete.is_set() and status, "an answer without an end"
    return Answer(status, b"".join(parts))
