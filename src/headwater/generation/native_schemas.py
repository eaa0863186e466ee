"""Bodies of the native API, with SGLang's names. A null counts as left out; `field_table` has the other names."""

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from headwater.generation.body import Body, Names
from headwater.generation.field_table import OTHER_NAMES_IN_GENERATE, OTHER_NAMES_IN_SAMPLING_PARAMS, REFUSED
from headwater.generation.grammar.fields import GrammarFields
from headwater.generation.prompt_schemas import ParseSpecialTokens
from headwater.generation.request_schemas import OptionFields, SamplingFields
from headwater.generation.validation import LogprobTokenIds, Name, NumLogprobs, NumTokens, PromptIds, Seed, Text


class SamplingInput(GrammarFields, SamplingFields):
    """How tokens are chosen and when generation ends. An unknown name is a 400."""

    names: ClassVar[Names] = Names(refused=REFUSED, other_names=OTHER_NAMES_IN_SAMPLING_PARAMS, refuses_unknown=True)
    max_new_tokens: NumTokens = Field(
        default=128, description="Reduced to what fits the context; 0 only computes the KV of the prompt."
    )
    min_new_tokens: NumTokens = Field(default=0, description="No end of text and no stop token before this many.")
    sampling_seed: Seed | None = Field(default=None, description="Same seed, same noise at each position.")


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "dict"


SamplingInputs = Annotated[
    Annotated[SamplingInput, Tag("dict")] | Annotated[list[SamplingInput], Tag("list")],
    Discriminator(_one_or_list),
]


_BELONG_INTO_SAMPLING_PARAMS = {name: f"sampling_params.{name}" for name in SamplingInput.model_fields}
_SAMPLING_DEFAULTS = {name: field.default for name, field in SamplingInput.model_fields.items()}


class GenerateRequest(OptionFields):
    """Continue a prompt, or each prompt of a batch."""

    names: ClassVar[Names] = Names(
        refused=REFUSED,
        other_names=OTHER_NAMES_IN_GENERATE | _BELONG_INTO_SAMPLING_PARAMS,
        defaults=_SAMPLING_DEFAULTS,
    )
    text: Text | list[Text] | None = Field(
        default=None,
        description="A prompt, or a list of prompts.",
        json_schema_extra={"examples": ["A radix tree is"]},
    )
    input_ids: PromptIds | None = Field(default=None, description="The same as token ids.")
    sampling_params: SamplingInputs = Field(
        default_factory=SamplingInput, description="How tokens are chosen; a list has one item for each prompt."
    )
    rid: Name | list[Name] | None = Field(
        default=None, description="Name for /abort_request; for a batch, a list of names or their prefix."
    )
    return_logprob: bool = Field(default=False, description="Report log-probabilities of the generated tokens.")
    logprob_start_len: int = Field(
        default=-1, ge=-1, description="First prompt position whose log-probability is reported; -1: none."
    )
    top_logprobs_num: NumLogprobs = Field(default=0, description="Report this many alternatives at each position.")
    token_ids_logprob: LogprobTokenIds = Field(
        default=[], description="Report these ids at each position; for a batch, one list for all or one for each."
    )
    return_text_in_logprobs: bool = Field(default=False, description="Report the text of each of these tokens.")
    return_prompt_token_ids: bool = Field(default=False, description="Report the token ids of the prompt.")
    lora_path: Name | list[Name | None] | None = Field(
        default=None, description="Name of a LoRA adapter; for a batch, one for all or a list with null for none."
    )
    add_special_tokens: bool = Field(default=True, description="Prepend BOS to a text if the model expects it.")
    parse_special_tokens: ParseSpecialTokens = None
    model: Any = Field(default=None, description="Ignored, since one model is served.")


class DetokenizeRequest(Body):
    """Token ids to decode, one list or several."""

    tokens: list[int] | list[list[int]] = Field(description="Token ids, or several lists of them.")
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")
    model: Any = Field(default=None, description="Ignored, since one model is served.")
