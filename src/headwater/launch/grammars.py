"""Grammars as the server's arguments want them."""

from headwater.devices.cpu.topology import num_usable_cores
from headwater.grammars.compiler import GuidanceCompiler
from headwater.grammars.vocabulary import Vocabulary
from headwater.launch.config import ServerArgs
from headwater.messages.state import EngineReady
from headwater.scheduling.grammar_queue import GrammarLimits


def grammar_limits(args: ServerArgs) -> GrammarLimits:
    return GrammarLimits(
        max_bytes=args.grammar_max_bytes,
        compile_timeout_s=args.grammar_compile_timeout,
        max_cached=args.grammar_cache_size,
    )


_MAX_THREADS = 8  # the rows of a step are no more work than that


def grammar_compiler(args: ServerArgs, ready: EngineReady) -> GuidanceCompiler:
    """Compiles for the vocabulary of the model's tokenizer."""
    source = args.tokenizer or args.model
    assert source is not None, "the launcher resolves the default model"

    def load() -> Vocabulary:
        # imported here: an engine without grammars needs no tokenizer library
        from headwater.tokenization.grammar_vocabulary import grammar_vocabulary
        from headwater.tokenization.text_encoder import TextEncoder

        encoder = TextEncoder.load(source)  # without chat templates, whose library takes 5 MB
        return grammar_vocabulary(encoder, vocab_size=ready.vocab_size, end_ids=ready.eos_token_ids)

    num_threads = min(args.threads or num_usable_cores(), _MAX_THREADS)
    return GuidanceCompiler(load, vocab_size=ready.vocab_size, num_threads=num_threads)
