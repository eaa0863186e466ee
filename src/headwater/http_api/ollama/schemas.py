"""Bodies of Ollama's API. A null counts as left out."""

from typing import Any, ClassVar

from pydantic import Field

from headwater.generation.body import Body, Names
from headwater.generation.field_table import Refused
from headwater.generation.request_schemas import NamespaceFields
from headwater.generation.validation import (
    MinP,
    Name,
    NumLogprobs,
    Penalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Text,
    TopP,
)

_MEDIA = Refused("this server takes text only")
_REFUSED = {
    "images": _MEDIA,
    **dict.fromkeys(("width", "height", "steps"), _MEDIA),
    "template": Refused("the model's own template is used"),
    "suffix": Refused("text is continued, never inserted"),
    "context": Refused("send the conversation to /api/chat"),
}
_OTHER_NAMES = {"max_tokens": "options.num_predict", "response_format": "format", "input": "prompt"}
# name -> why an answer is the same without it
_IGNORED = {
    "keep_alive": "the model stays loaded",
    "truncate": "a prompt that is too long is refused, never cut",
    "shift": "an answer ends where the context does",
}
_LOADING = (
    "numa num_batch num_gpu main_gpu low_vram f16_kv logits_all vocab_only use_mmap use_mlock embedding_only num_thread"
)
_IGNORED_OPTIONS = {
    **dict.fromkeys(_LOADING.split(), "the model is loaded already"),
    "num_keep": "nothing is cut from a prompt",
    "penalize_newline": "penalties apply to all tokens",
    "mirostat_tau": "goes with mirostat, which is refused",
    "mirostat_eta": "goes with mirostat, which is refused",
}


class OllamaOptions(Body):
    """How tokens are chosen. Options for loading a model are accepted and ignored."""

    names: ClassVar[Names] = Names(
        refused={
            "mirostat": Refused("use temperature, top_p or min_p", neutral=(0,)),
            "tfs_z": Refused("use top_p or min_p", neutral=(1,)),
            "typical_p": Refused("use top_p or min_p", neutral=(1,)),
        },
        ignored=_IGNORED_OPTIONS,
        refuses_unknown=True,
    )
    temperature: Temperature | None = Field(default=None, description="0 is greedy.")
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1, description="0 or -1: from all tokens.")
    top_p: TopP | None = Field(default=None, description="Sample from the likeliest tokens with this probability.")
    min_p: MinP | None = Field(default=None, description="Least probability, relative to the likeliest token.")
    seed: Seed | None = Field(default=None, description="Same seed, same noise at each position.")
    stop: Stop | None = Field(default=None, description="Strings that end the answer; left out of it.")
    num_predict: int | None = Field(
        default=None, ge=-2, le=2**40, description="Most tokens of the answer; 0 or less: up to the context length."
    )
    num_ctx: int | None = Field(
        default=None, ge=1, description="Context length that the client needs; more than the server has is refused."
    )
    repeat_penalty: RepetitionPenalty | None = Field(default=None, description="Divides the scores of used tokens.")
    presence_penalty: Penalty | None = Field(default=None, description="Once for each token of the answer.")
    frequency_penalty: Penalty | None = Field(default=None, description="Per occurrence of a token in the answer.")
    repeat_last_n: int | None = Field(
        default=None, ge=-1, description="-1: the whole context. Other windows are refused beside a penalty."
    )


class OllamaRequest(NamespaceFields):
    """What both kinds of requests share; cache_salt, extra_key, rid and priority are extensions."""

    names: ClassVar[Names] = Names(refused=_REFUSED, other_names=_OTHER_NAMES, ignored=_IGNORED)
    model: str = Field(description="The served name, with or without `:latest`.")
    stream: bool = Field(default=True, description="Answer in lines of JSON as the text grows.")
    options: OllamaOptions = Field(default_factory=OllamaOptions, description="Sampling, length and stop strings.")
    format: str | dict[str, Any] = Field(default="", description="`json`, or a JSON schema that the answer must match.")
    think: bool | str | None = Field(
        default=None, description="Whether the model thinks first; low, medium and high are passed to its template."
    )
    logprobs: bool = Field(default=False, description="Report log-probabilities of the generated tokens.")
    top_logprobs: NumLogprobs = Field(default=0, description="Alternatives at each position; needs `logprobs`.")
    rid: Name | None = Field(default=None, description="Name of the request for /abort_request.")


class OllamaChatRequest(OllamaRequest):
    """Answer a conversation."""

    messages: list[dict[str, Any]] = Field(
        default=[],
        description="Objects with `role`, `content`, `thinking`, `tool_calls` and `tool_name`. None: only answers "
        "that the model is loaded.",
        json_schema_extra={"examples": [[{"role": "user", "content": "What is a radix tree?"}]]},
    )
    tools: list[dict[str, Any]] = Field(default=[], description="OpenAI's tool objects.")


class OllamaGenerateRequest(OllamaRequest):
    """Answer a prompt."""

    prompt: Text = Field(default="", description="The user's text. Empty: only answers that the model is loaded.")
    system: Text | None = Field(default=None, description="The system prompt.")
    raw: bool = Field(default=False, description="Continue the prompt as it is, without the chat template.")


class OllamaEmbedRequest(NamespaceFields):
    """Turn each text into a vector."""

    names: ClassVar[Names] = Names(other_names={"prompt": "input"}, ignored=_IGNORED)
    model: str = Field(description="The served name, with or without `:latest`.")
    input: Text | list[Text] = Field(description="A text, or a list of texts.")
    dimensions: int | None = Field(default=None, ge=1, description="Fewer numbers, from a Matryoshka model.")
    options: OllamaOptions = Field(default_factory=OllamaOptions, description="Ignored: nothing is sampled.")
    rid: Name | None = Field(default=None, description="Name of the request for /abort_request.")


class OllamaEmbeddingsRequest(NamespaceFields):
    """The older form for one text."""

    names: ClassVar[Names] = Names(other_names={"input": "prompt"}, ignored=_IGNORED)
    model: str = Field(description="The served name, with or without `:latest`.")
    prompt: Text = Field(description="The text.")
    options: OllamaOptions = Field(default_factory=OllamaOptions, description="Ignored: nothing is sampled.")
    rid: Name | None = Field(default=None, description="Name of the request for /abort_request.")


class OllamaShowRequest(Body):
    """The model to show."""

    model: str = Field(default="", description="The served name, with or without `:latest`.")
    name: str = Field(default="", description="Older name of model.")
    verbose: bool = Field(default=False, description="Ignored: the answer is the same.")
