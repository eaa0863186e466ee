"""Names of stores, policies and formats, as flags, bodies and messages spell them.

The command line reads this file alone.
"""

from typing import Literal

StoreKind = Literal["file", "redis", "memory"]  # storage/registry.py opens them
PrefetchPolicyName = Literal["best_effort", "wait_complete", "timeout"]
RestorePolicyName = Literal["auto", "always"]
WritePolicyName = Literal["write_through", "write_through_selective", "write_back"]
KvEventsFormat = Literal["map", "array"]
SpeculativeAlgorithmName = Literal["none", "ngram", "tree"]
ToolPromptName = Literal["auto", "off"]
ToolFormatName = Literal[  # those of generation/tool_formats/formats.py
    "auto", "none", "gpt-oss", "kimi-k3", "kimi-k2", "deepseek-v3.2", "deepseek-v3", "deepseek-v3.1",
    "gemma4", "glm", "qwen3-xml", "mistral", "mistral-v3", "hermes", "lfm2", "pythonic", "llama3",
]  # fmt: skip
ReasoningFormatName = Literal[  # those of generation/reasoning.py
    "auto", "none", "gpt-oss", "kimi-k3", "gemma4", "mistral", "deepseek-v3", "deepseek-r1", "glm", "qwen3",
]  # fmt: skip
