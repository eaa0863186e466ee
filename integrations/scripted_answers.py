"""What the scripted model says: a function of the prompt alone, so that checks of tools do not depend on wit.

| the last message of the prompt | the answer |
|---|---|
| a tool's result | `The tool says: ` and the result |
| asks for the `weather in CITY`, and tools are offered | a call of `get_weather` for each city |
| begins with `Think: ` | the rest as a thought, then the rest as the answer |
| anything else | `You said: ` and the message |
"""

import json
import re

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
END = SPECIAL_TOKENS[1]
# ChatML with tools in the manner of Hermes: the form that Qwen's models were trained on, in its shortest wording
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\nFor each call: <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'tool' %}{{ '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- else %}{{ message.content or '' }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", re.DOTALL)
_CITY = re.compile(r"weather in (\w+)")
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def answer_to(prompt: str) -> str:
    """The whole answer to a rendered prompt."""
    turns = _TURN.findall(prompt.removesuffix("<|im_start|>assistant\n"))
    if not turns:
        return f"You said: {prompt}"
    role, text = turns[-1]
    if role == "tool":
        results = [_RESULT.findall(text)[0] for role, text in turns if role == "tool"]
        return f"The tool says: {', '.join(results)}"
    cities = _CITY.findall(text) if "<tools>" in prompt else []
    if cities:
        return "\n".join(_call("get_weather", {"city": city}) for city in cities)
    if text.startswith("Think: "):
        thought = text.removeprefix("Think: ")
        return f"<think>\n{thought}\n</think>\n\n{thought}"
    return f"You said: {text}"


def _call(name: str, arguments: dict[str, str]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
