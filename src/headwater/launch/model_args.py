"""Flags of the model: files, formats, device, defaults of its requests."""

from typing import Annotated, Literal

import msgspec

from headwater.launch.flags import Flag
from headwater.messages.choices import ReasoningFormatName, ToolFormatName, ToolPromptName

MODEL = "Model"


class ModelArgs(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What is served, and how it is loaded and run."""

    model: Annotated[
        str | None,
        Flag(
            "A Hugging Face folder or hub id, or a .gguf file. Default: SmolLM2-135M-Instruct.",
            MODEL,
            also=("--model-path",),
        ),
    ] = None
    served_model_name: Annotated[str | None, Flag("The model's name in the APIs. Default: from --model.", MODEL)] = None
    tokenizer: Annotated[
        str | None,
        Flag("Load the tokenizer from here instead of --model.", MODEL, also=("--tokenizer-path",)),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag("Data type of weights and activations. auto: bfloat16 where it is fast, else float32.", MODEL),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "int4", "fp8"],
        Flag(
            "Quantise the matrices of the weights when they are loaded: int8 and int4 to blocks of 8 or 4 bits, fp8 on "
            "a GPU to 8-bit floats. Blocks of a GGUF file and quantised weights are not quantised again.",
            MODEL,
        ),
    ] = "none"
    attention_backend: Annotated[
        Literal["auto", "triton", "fa3"],
        Flag("Attention kernels for long prompts on a GPU. auto: fa3 if it is available.", MODEL),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Flag(
            "The same bits for a request whatever else runs, and however it is cut into steps. On a GPU slower "
            "(docs/deterministic.md); a CPU computes so anyway.",
            MODEL,
        ),
    ] = False
    cuda_graph_max_bs: Annotated[
        int | None,
        Flag(
            "Largest decode batch captured as a CUDA graph. Default: --max-running-requests.",
            MODEL,
            low=1,
            high=4096,
        ),
    ] = None
    disable_cuda_graph: Annotated[bool, Flag("Run every step without CUDA graphs.", MODEL)] = False
    load_format: Annotated[
        Literal["auto", "safetensors", "gguf", "dummy"],
        Flag("Format of the weights. dummy: random weights from a config.json, for benchmarks.", MODEL),
    ] = "auto"
    weights_cache_size: Annotated[
        float, Flag("GB on disk for packed weights, which later starts on a CPU map. 0: none are kept.", MODEL, low=0)
    ] = 16.0
    keep_weights_on_host: Annotated[
        bool,
        Flag("Keep released weights in host memory, and resume them from there.", MODEL),
    ] = False
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Flag("Where the model runs. auto: an NVIDIA GPU if there is one.", MODEL)
    ] = "auto"
    context_length: Annotated[
        int | None,
        Flag(
            "Longest prompt plus output, in tokens. Default: the model's own. It decides between the factors of "
            "LongRoPE.",
            MODEL,
            low=1,
        ),
    ] = None
    random_seed: Annotated[int, Flag("Seed of dummy weights.", MODEL, low=0, high=2**63 - 1)] = 0
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Flag(
            "Sampling parameters of /v1 requests that do not set them. model: the recommendation in the model's files "
            "(generation_config.json, GGUF metadata). openai: temperature 1 and nothing else.",
            MODEL,
        ),
    ] = "model"
    pooling: Annotated[
        Literal["auto", "last", "mean"],
        Flag(
            "How the hidden states of a text become its embedding. auto: as the model's files say "
            "(1_Pooling/config.json, or pooling_type of a GGUF file), else last.",
            MODEL,
        ),
    ] = "auto"
    parse_special_tokens: Annotated[
        Literal["never", "prompts", "always"],
        Flag(
            "Where the spelling of a control token (<|im_end|>) in a request becomes that token. prompts: in text "
            "prompts, but not in chat messages. A request's own parse_special_tokens wins.",
            MODEL,
        ),
    ] = "prompts"
    tool_call_parser: Annotated[
        ToolFormatName,
        Flag(
            "Format of the model's tool calls (see docs/tools.md). auto: from the chat template. none: calls stay in "
            "the text.",
            MODEL,
        ),
    ] = "auto"
    tool_prompt: Annotated[
        ToolPromptName,
        Flag(
            "Where a chat template has no place for tools. auto: the server describes them in the system message. "
            "off: a request with tools gets 400.",
            MODEL,
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningFormatName,
        Flag(
            "Format of the model's thinking (see docs/tools.md). auto: from the chat template. none: thinking stays in "
            "the content.",
            MODEL,
        ),
    ] = "auto"
    weight_version: Annotated[str, Flag("Your label for the weights, reported in answers.", MODEL)] = "default"

    enable_lora: Annotated[
        bool, Flag("Serve LoRA adapters beside the model (docs/lora.md). Implied by --lora-paths.", MODEL)
    ] = False
    lora_paths: Annotated[
        str | None,
        Flag(
            "LoRA adapters to load at the start: NAME=PATH, separated by commas; PATH is a folder of PEFT or a hub id.",
            MODEL,
            also=("--lora-modules",),
        ),
    ] = None
    max_loras_per_batch: Annotated[
        int,
        Flag("Most LoRA adapters that are loaded at the same time.", MODEL, low=1, high=1024, also=("--max-loras",)),
    ] = 8
    max_lora_rank: Annotated[
        int, Flag("Largest rank of a LoRA adapter. On a GPU it decides the memory of each.", MODEL, low=1, high=512)
    ] = 64

    allow_hub: Annotated[
        bool,
        Flag(
            "Let /update_weights_from_disk and /v1/load_lora_adapter fetch hub ids from the network. Implied when "
            "--model is a hub id.",
            MODEL,
        ),
    ] = False
