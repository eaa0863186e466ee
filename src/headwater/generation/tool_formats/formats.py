"""All formats of tool calls, by name."""

from collections.abc import Mapping

from headwater.generation.tool_formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from headwater.generation.tool_formats.deepseek_dsml import DEEPSEEK_DSML
from headwater.generation.tool_formats.gemma4 import GEMMA4
from headwater.generation.tool_formats.glm import GLM
from headwater.generation.tool_formats.gpt_oss import GPT_OSS
from headwater.generation.tool_formats.hermes import HERMES
from headwater.generation.tool_formats.kimi_k2 import KIMI_K2
from headwater.generation.tool_formats.kimi_k3 import KIMI_K3
from headwater.generation.tool_formats.llama3 import LLAMA3
from headwater.generation.tool_formats.mistral import MISTRAL, MISTRAL_V3
from headwater.generation.tool_formats.pythonic import LFM2, PYTHONIC
from headwater.generation.tool_formats.qwen3_xml import QWEN3_XML
from headwater.generation.tool_formats.tool_format import ToolFormat

# the first whose marks a template has is its format, so those that share a mark with a later one come first
_ALL = (
    *(GPT_OSS, KIMI_K3, KIMI_K2, DEEPSEEK_DSML, DEEPSEEK_V3, DEEPSEEK_V31, GEMMA4, GLM, QWEN3_XML),
    *(MISTRAL, MISTRAL_V3, HERMES, LFM2, PYTHONIC, LLAMA3),
)

TOOL_FORMATS: Mapping[str, ToolFormat] = {each.name: each for each in _ALL}


def tool_format_of(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches, by its text; None: none that is known here."""
    return next((each for each in _ALL if each.is_of(chat_template)), None)
