"""Bodies of the routes that read a text and write none: embeddings, scores, rerank. A null counts as left out."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from headwater.generation.body import Body, Names
from headwater.generation.field_table import REFUSED, Refused
from headwater.generation.prompt_schemas import ParseSpecialTokens
from headwater.generation.request_schemas import OptionFields
from headwater.generation.validation import LogprobTokenIds, Name, PromptIds, Text

_INSTRUCTION = Refused("put the instruction into the text, as the model's card says")
_POOLING_REFUSED = {
    **REFUSED,
    "normalize": Refused("embeddings have length 1", neutral=(True,), is_empty_neutral=False),
    "embed_dtype": Refused("embeddings are float32", neutral=("float32", "float")),
    "endianness": Refused("base64 is little-endian", neutral=("native", "little")),
    **dict.fromkeys(("input_type", "task_type", "instruction", "prompt_name"), _INSTRUCTION),
}


class PoolingFields(OptionFields):
    """The options that all these routes share."""

    stream: Literal[False] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=False, description="There is nothing to stream."
    )
    model: str = Field(default="default", description="The served name, or `default`.")
    rid: Name | None = Field(default=None, description="Name for /abort_request; for several texts, their prefix.")
    add_special_tokens: bool = Field(default=True, description="Add the tokens that the model expects around a text.")
    parse_special_tokens: ParseSpecialTokens = None


class EmbeddingRequest(PoolingFields):
    """Turn each text into a vector."""

    names: ClassVar[Names] = Names(
        refused=_POOLING_REFUSED,
        other_names={"text": "input", "texts": "input", "input_ids": "input", "prompt": "input", "messages": "input"},
    )
    input: Text | list[Text] | list[int] | list[list[int]] = Field(description="A text or token ids, or several.")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="`base64`: float32, little-endian."
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="Fewer numbers, from a Matryoshka model; a 400 for other models."
    )
    no_store: bool = Field(default=True, description="Leave nothing of the text in the cache, on any tier.")


class EncodeRequest(PoolingFields):
    """SGLang's form of the same."""

    names: ClassVar[Names] = Names(refused=_POOLING_REFUSED, other_names={"input": "text", "prompt": "text"})
    text: Text | list[Text] | None = Field(default=None, description="A text, or a list of texts.")
    input_ids: PromptIds | None = Field(default=None, description="The same as token ids.")
    dimensions: int | None = Field(default=None, ge=1, description="Fewer numbers, from a Matryoshka model.")
    sampling_params: Any = Field(default=None, description="Ignored, since nothing is sampled.")
    no_store: bool = Field(default=True, description="Leave nothing of the text in the cache, on any tier.")


class ScoreRequest(PoolingFields):
    """How probable some tokens are behind a query and each of several items."""

    names: ClassVar[Names] = Names(
        refused=REFUSED, other_names={"text_1": "query", "text_2": "items", "documents": "items"}
    )
    query: Text | list[int] = Field(description="A text or token ids, which all prompts share.")
    items: Text | list[Text] | list[list[int]] = Field(description="Texts, or token ids if the query is token ids.")
    label_token_ids: LogprobTokenIds = Field(description="The tokens whose probabilities are the scores of an item.")
    apply_softmax: bool = Field(default=False, description="Scores of an item add up to 1.")
    item_first: bool = Field(default=False, description="Each item comes before the query.")


class RerankRequest(Body):
    """A query and documents to sort."""

    query: Any = Field(default=None, description="A text.")
    documents: Any = Field(default=None, description="Texts.")
    top_n: Any = Field(default=None, description="The number of documents to return.")
    return_documents: Any = Field(default=None, description="Return the texts as well.")
    model: Any = Field(default=None, description="The served name.")
