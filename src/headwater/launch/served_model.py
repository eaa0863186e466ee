"""The facts about the loaded model that the APIs show, from the arguments and the engine's own words."""

from headwater.http_api.state import ModelFacts
from headwater.launch.config import ServerArgs
from headwater.messages.state import EngineReady


def tokenizer_path(args: ServerArgs) -> str:
    """Where the tokenizer comes from: the user's choice, else the model."""
    assert args.model is not None, "with_model comes first"
    return args.tokenizer or args.model


def model_facts(args: ServerArgs, ready: EngineReady) -> ModelFacts:
    assert args.model is not None, "with_model comes first"
    return ModelFacts.from_ready(
        ready,
        served_name=args.served_model_name or args.model,
        model_path=args.model,
        tokenizer_path=tokenizer_path(args),
        load_format=args.load_format,
    )
