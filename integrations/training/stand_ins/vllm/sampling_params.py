"""See the package."""

from vllm import NotHere

StructuredOutputsParams = NotHere
