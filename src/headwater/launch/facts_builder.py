"""Builds `ModelFacts`, which the APIs report, from the server's arguments and the engine's report."""

from headwater.generation.model_facts import ModelFacts
from headwater.generation.sampling import usable_defaults
from headwater.launch.config import ServerArgs
from headwater.launch.default_model import packaged_at
from headwater.messages.state import EngineReady


def tokenizer_path(args: ServerArgs) -> str:
    """The source of the tokenizer: --tokenizer, or else the model."""
    assert args.model is not None, "with_model comes first"
    return args.tokenizer or args.model


def build_model_facts(args: ServerArgs, ready: EngineReady) -> ModelFacts:
    assert args.model is not None, "with_model comes first"
    return ModelFacts.from_ready(
        ready,
        served_name=args.served_model_name or args.model,
        model_path=args.model,
        tokenizer_path=tokenizer_path(args),
        load_format=args.load_format,
        sampling_defaults=_sampling_defaults(args, ready),
        pooling=(ready.pooling or "last") if args.pooling == "auto" else args.pooling,
    )


def _sampling_defaults(args: ServerArgs, ready: EngineReady) -> dict[str, float]:
    if args.sampling_defaults == "openai":
        return {}
    known = packaged_at(args.model)
    return usable_defaults(ready.sampling_defaults or (known.sampling_defaults if known is not None else {}))
