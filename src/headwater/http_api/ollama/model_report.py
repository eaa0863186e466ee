"""The served model as Ollama's clients see it: in their list, in detail, and as a running one."""

import datetime
import hashlib

from headwater.generation.answer_fields import Json
from headwater.generation.chat.formats import ChatFormats
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.ollama.conversion import LATEST
from headwater.http_api.services import Services
from headwater.messages.state import EngineState
from headwater.tokenization.tokenizer import Tokenizer

STATE_TIMEOUT_S = 2.0  # clients ask for the list often
NEVER = "9999-12-31T23:59:59Z"  # when the model is unloaded


async def list_entry(services: Services) -> Json:
    """The model in /api/tags."""
    model = services.model
    facts = await _weights(services)
    created = datetime.datetime.fromtimestamp(services.state.started_at_s, datetime.UTC)
    name = tagged(model.served_name)
    return {"name": name, "model": name, "modified_at": created.isoformat()} | facts | {"details": _details(model)}


async def running_entry(services: Services) -> Json:
    """The model in /api/ps."""
    model = services.model
    facts = await _weights(services)
    on_card = 0 if model.device.startswith("cpu") else facts["size"]
    return {
        "name": tagged(model.served_name),
        "model": tagged(model.served_name),
        **facts,
        "details": _details(model),
        "expires_at": NEVER,
        "size_vram": on_card,
        "context_length": model.max_context,
    }


def shown(model: ModelFacts, tokenizer: Tokenizer, formats: ChatFormats) -> Json:
    """The model in /api/show."""
    family = _family(model)
    template = tokenizer.chat_template_source(has_tools=False)
    has_tools = bool(template) and formats.tools is not None
    capabilities = {"completion": True, "tools": has_tools, "thinking": formats.reasoning is not None}
    return {
        "modelfile": f"FROM {model.model_path}",
        "parameters": "\n".join(f"{name} {value}" for name, value in model.sampling_defaults.items()),
        "template": template,
        "details": _details(model),
        "model_info": {
            "general.architecture": family,
            "general.basename": model.served_name,
            f"{family}.context_length": model.max_context,
            f"{family}.vocab_size": model.vocab_size,
        },
        "capabilities": [name for name, is_there in capabilities.items() if is_there],
    }


def tagged(name: str) -> str:
    """The name with a tag, as Ollama lists names."""
    return name if ":" in name else name + LATEST


def _details(model: ModelFacts) -> Json:
    formats = () if model.compute is None else model.compute.weight_formats
    family = _family(model)
    return {
        "parent_model": "",
        "format": "gguf" if model.model_path.endswith(".gguf") else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": formats[0] if formats else model.dtype,
    }


def _family(model: ModelFacts) -> str:
    """The kind of model as its files or its architecture name it, such as `llama`."""
    return model.model_type or model.architecture.removesuffix("ForCausalLM").lower()


async def _weights(services: Services) -> Json:
    """Size and digest of the weights, as far as an engine reports them in time."""
    states = [s for s in await services.engine_states(timeout_s=STATE_TIMEOUT_S) if isinstance(s, EngineState)]
    size = states[0].memory_bytes.get("weights", 0) if states else 0
    digest = hashlib.sha256(states[0].weights_id.encode()).hexdigest() if states else ""
    return {"size": size, "digest": digest}
