"""How families of models mark their thinking, as data, and how it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headwater.generation.tool_formats.gpt_oss import GPT_OSS
from headwater.generation.tool_formats.kimi_k3 import KIMI_K3
from headwater.generation.tool_formats.reading.call_writer import CallWriter
from headwater.generation.tool_formats.reading.reader import Parse, Reader
from headwater.generation.tool_formats.tool_format import ToolFormat


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Where thinking begins and ends. `markers`: pairs of them; the first pair is what the model's template writes.

    `begins_open`: the answer is thinking from its first character, unless the prompt has closed it.
    `needs_special_tokens`: the markers are special tokens, so the text must show them.
    """

    name: str
    description: str
    markers: tuple[tuple[str, str], ...]
    is_of: Callable[[str], bool]  # does a chat template with this text use it?
    begins_open: bool = False
    whole: ToolFormat | None = None  # marks content as well, and therefore reads the whole answer
    needs_special_tokens: bool = False

    @property
    def start(self) -> str:
        return self.markers[0][0]

    @property
    def end(self) -> str:
        return self.markers[0][1]

    def opened_by(self, prompt: str) -> str:
        """The markers at a prompt's end, which the answer continues: none, the first, or both."""
        written = prompt.rstrip()
        for start, end in self.markers:
            if written.endswith(end.rstrip()):
                return start + end
            if written.endswith(start.rstrip()):
                return start
        return self.start if self.begins_open else ""

    def read(self, reader: Reader, writer: CallWriter, other_ends: tuple[str, ...] = ()) -> Parse[None]:
        """Take the thinking with which the answer begins, if it does. Space around it belongs to nothing.

        `other_ends`: texts that end thinking that was left open; they are not taken.
        """
        space = yield from reader.whitespace()
        starts = dict(self.markers)
        start = yield from reader.take(*starts)
        if not start:
            writer.content(space)
            return
        yield from reader.whitespace()
        yield from reader.take(start)  # the prompt's, and the model's own
        yield from reader.whitespace()
        thinking = _WithoutLastSpace(writer.reasoning)
        end = yield from reader.until((starts[start], *other_ends), thinking.add)
        if not end:
            thinking.flush()
        elif end in other_ends:
            reader.position -= len(end)
        yield from reader.whitespace()


class _WithoutLastSpace:
    """Hands text on, but holds whitespace back until something follows it."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._space = ""

    def add(self, text: str) -> None:
        kept = text.rstrip()
        if kept:
            self._emit(self._space + kept)
            self._space = ""
        self._space += text[len(kept) :]

    def flush(self) -> None:
        self._emit(self._space)
        self._space = ""


_THINK = ("<think>", "</think>")


def _is_of_deepseek(template: str) -> bool:
    return "<｜Assistant｜>" in template and "</think>" in template


# the first whose marks a template has is its format
_ALL = (
    ReasoningFormat(
        name="gpt-oss",
        description="gpt-oss: the channel `analysis`",
        markers=(("<|channel|>analysis<|message|>", "<|end|>"),),
        is_of=lambda template: "<|channel|>" in template and "analysis" in template,
        needs_special_tokens=True,
        whole=GPT_OSS,
    ),
    ReasoningFormat(
        name="kimi-k3",
        description="Kimi K3: the element `think`",
        markers=(("<|open|>think<|sep|>", "<|close|>think<|sep|>"),),
        is_of=lambda template: "<|open|>" in template and "think" in template,
        needs_special_tokens=True,
        whole=KIMI_K3,
    ),
    ReasoningFormat(
        name="gemma4",
        description="Gemma 4: the channel `thought`",
        markers=(("<|channel>thought\n", "<channel|>"),),
        is_of=lambda template: "<|channel>" in template,
        needs_special_tokens=True,
    ),
    ReasoningFormat(
        name="mistral",
        description="Magistral and Ministral: `[THINK]`, or `<think>` in 2025's first",
        markers=(("[THINK]", "[/THINK]"), _THINK),
        is_of=lambda template: "[THINK]" in template or ("[INST]" in template and "<think>" in template),
        needs_special_tokens=True,
    ),
    ReasoningFormat(
        name="deepseek-v3",
        description="DeepSeek V3.1 and later: `<think>`, opened or closed by the prompt",
        markers=(_THINK,),
        is_of=lambda template: _is_of_deepseek(template) and "thinking" in template,
    ),
    ReasoningFormat(
        name="deepseek-r1",
        description="DeepSeek R1: `<think>`; the answer begins inside it, even where nothing has opened it",
        markers=(_THINK,),
        is_of=_is_of_deepseek,
        begins_open=True,
    ),
    ReasoningFormat(
        name="glm",
        description="GLM 4.5 and later: `<think>`",
        markers=(_THINK,),
        is_of=lambda template: "[gMASK]" in template and "</think>" in template,
    ),
    ReasoningFormat(
        name="qwen3",
        description="Qwen 3 and all others that write `<think>`",
        markers=(_THINK,),
        is_of=lambda template: "</think>" in template,
    ),
)

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {each.name: each for each in _ALL}


def reasoning_format_of(chat_template: str) -> ReasoningFormat | None:
    """The format of thinking that a chat template uses, by its text; None: none that is known here."""
    return next((each for each in _ALL if each.is_of(chat_template)), None)
