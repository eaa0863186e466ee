"""Which format the text of a chat template chooses.

`HEADWATER_CHAT_TEMPLATES` names a folder of official templates; `make test-templates` fetches 70.
"""

import json
import os
from pathlib import Path

import pytest

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.reasoning import REASONING_FORMATS, reasoning_format_of
from headwater.generation.tool_formats.formats import TOOL_FORMATS, tool_format_of
from headwater.generation.tool_formats.parts import CallArguments, CallStart
from headwater.generation.tool_formats.tool_format import Tool
from headwater.tokenization.chat_template import ChatTemplate

FOLDER = os.environ.get("HEADWATER_CHAT_TEMPLATES")
# tool calls and thinking of each official template, by its file's name. None: a format that is not known here
FORMATS = {
    ("deepseek-v3", "deepseek-r1"): """
        deepseek-ai-DeepSeek-R1-Distill-Llama-8B llama-cpp-deepseek-r1
    """,
    ("deepseek-v3", "deepseek-v3"): """
        deepseek-ai-DeepSeek-R1-Distill-Qwen-32B
    """,
    ("deepseek-v3.1", "deepseek-v3"): """
        deepseek-ai-DeepSeek-V3.1
    """,
    ("deepseek-v3.2", "deepseek-v3"): """
        deepseek-ai-DeepSeek-V3.2 deepseek-ai-DeepSeek-V4-Flash-0731 deepseek-ai-DeepSeek-V4
    """,
    ("gemma4", "gemma4"): """
        google-gemma-4-31B-it-interleaved google-gemma-4-31B-it
    """,
    ("glm", "glm"): """
        GLM-4.6 GLM-4.7-Flash
    """,
    ("glm", "qwen3"): """
        Spark2.5 inclusionai-ling-3.0-flash poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2
    """,
    ("gpt-oss", "gpt-oss"): """
        openai-gpt-oss-120b
    """,
    ("hermes", "qwen3"): """
        Bielik-11B-v3.0-Instruct Qwen-QwQ-32B Qwen-Qwen3-0.6B Reka-Edge
    """,
    ("hermes", None): """
        MiMo-VL NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use NousResearch-Hermes-3-Llama-3.1-8B-tool_use
        Qwen-Qwen2.5-7B-Instruct ibm-granite-granite-4.0 ibm-granite-granite-4.1
    """,
    ("kimi-k2", "qwen3"): """
        Kimi-K2-Thinking
    """,
    ("kimi-k2", None): """
        Kimi-K2-Instruct moonshotai-Kimi-K2
    """,
    ("kimi-k3", "kimi-k3"): """
        Kimi-K3
    """,
    ("lfm2", "qwen3"): """
        LFM2.5-8B-A1B
    """,
    ("lfm2", None): """
        LFM2-8B-A1B
    """,
    ("llama3", None): """
        meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct meta-llama-Llama-3.3-70B-Instruct
    """,
    ("mistral", "mistral"): """
        mistralai-Ministral-3-14B-Reasoning-2512
    """,
    ("mistral", None): """
        Mistral-Small-3.2-24B-Instruct-2506 unsloth-mistral-Devstral-Small-2507
    """,
    ("mistral-v3", None): """
        mistralai-Mistral-Nemo-Instruct-2407
    """,
    ("qwen3-xml", "qwen3"): """
        NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 Qwen3.5-4B StepFun3.5-Flash
    """,
    ("qwen3-xml", None): """
        Qwen3-Coder
    """,
    (None, "qwen3"): """
        HuggingFaceTB-SmolLM3-3B LFM2.5-Instruct MiniMax-M2 NVIDIA-Nemotron-Nano-v2
        ibm-granite-granite-3.3-2B-Instruct llama-cpp-rwkv-world openbmb-MiniCPM5-1B
    """,
    (None, None): """
        Apertus-8B-Instruct Apriel-1.6-15b-Thinker-fixed ByteDance-Seed-OSS Cohere2MoE
        CohereForAI-c4ai-command-r-plus-tool_use CohereForAI-c4ai-command-r7b-12-2024-tool_use
        GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B MiniMax-M1 MiniMax-M3 fireworks-ai-llama-3-firefunction-v2
        google-gemma-2-2b-it meetkai-functionary-medium-v3.1 meetkai-functionary-medium-v3.2
        microsoft-Phi-3.5-mini-instruct muse-glimmer tencent-Hy3 unsloth-Apriel-1.5 upstage-Solar-Open-100B
    """,
}
TOOL_MARKS = {
    "hermes": '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>',
    "qwen3-xml": "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>",
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>",
    "mistral": "[TOOL_CALLS]{{ name }}[ARGS]",
    "mistral-v3": "[TOOL_CALLS] [",
    "llama3": 'ipython {"name": function name, "parameters": dictionary} "parameters": ',
    None: "{% for message in messages %}{{ message.content }}{% endfor %}{{ tools }}",
}


@pytest.mark.parametrize("name", TOOL_MARKS)
def test_a_template_teaches_one_format(name: str | None) -> None:
    found = tool_format_of(TOOL_MARKS[name])
    assert (found and found.name) == name


def test_thinking_is_found_by_its_markers() -> None:
    for text, name in (("</think>", "qwen3"), ("[gMASK]</think>", "glm"), ("[THINK]", "mistral"), ("text", None)):
        found = reasoning_format_of(text)
        assert (found and found.name) == name


with_templates = pytest.mark.skipif(not FOLDER, reason="HEADWATER_CHAT_TEMPLATES names no folder of templates")


@with_templates
def test_formats_of_official_templates() -> None:
    names = {name: formats for formats, group in FORMATS.items() for name in group.split()}
    assert {tool for tool, _ in FORMATS} - {None} | {"pythonic"} == set(TOOL_FORMATS)
    assert {reasoning for _, reasoning in FORMATS} - {None} == set(REASONING_FORMATS)
    assert len(names) >= 60
    for name, formats in names.items():
        template = (Path(FOLDER or "") / f"{name}.jinja").read_text(encoding="utf-8")
        found = tool_format_of(template), reasoning_format_of(template)
        assert tuple(each and each.name for each in found) == formats, name


ARGUMENTS = {"city": "Rome", "days": 5}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "d"}, "days": {"type": "integer"}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
USER = {"role": "user", "content": "q"}
FUNCTION = {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call12345", "type": "function", "function": FUNCTION}],
}
# what a template writes of a past call is not what it teaches, or it refuses the call
WRITES_OTHERWISE = {"LFM2-8B-A1B", "Kimi-K2-Instruct", "Kimi-K2-Thinking"}


def written_call(template: str) -> str:
    """What the template makes of a call in the history."""
    chat_template = ChatTemplate(template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    whole = chat_template.render([USER, CALL], tools=[WEATHER], add_generation_prompt=False)
    prompts = [chat_template.render([USER], tools=[WEATHER], add_generation_prompt=adds) for adds in (True, False)]
    return next((whole.removeprefix(prompt) for prompt in prompts if whole.startswith(prompt)), whole)


@with_templates
def test_parsers_read_what_official_templates_write() -> None:
    for name in {name for (tool, _), group in FORMATS.items() if tool for name in group.split()} - WRITES_OTHERWISE:
        template = (Path(FOLDER or "") / f"{name}.jinja").read_text(encoding="utf-8")
        parser = AnswerParser(tool_format_of(template), None, tools=[Tool("get_weather", PARAMETERS)], holds_calls=True)
        parts = parser.feed(written_call(template)) + parser.finish()
        assert [part for part in parts if isinstance(part, CallStart)] == [CallStart("get_weather")], name
        arguments = "".join(part.text for part in parts if isinstance(part, CallArguments))
        assert json.loads(arguments) == ARGUMENTS, name
