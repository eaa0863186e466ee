"""The types of query parameters in /openapi.json, where a route reads their texts itself to answer in its own words."""

from pydantic import WithJsonSchema

SECONDS = WithJsonSchema({"type": "number", "minimum": 0})
FLAG = WithJsonSchema({"type": "boolean"})
MODE = WithJsonSchema({"type": "string", "enum": ["idle", "now", "drain"]})
