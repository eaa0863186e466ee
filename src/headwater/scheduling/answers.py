"""The answers of a request besides its tokens: why it cannot run, and how it ran."""

from headwater.messages.generation import Finish, OutputMeta
from headwater.scheduling.request import Request
from headwater.scheduling.speculation.drafting import Drafting

_MAX_ERROR_CHARS = 200

NOT_FINITE = Finish(
    type="abort",
    status=500,
    message="the model produced logits that are not finite",
    err_type="internal_server_error",
)


def engine_failed(error: Exception) -> Finish:
    """The step or the message of this request made the engine raise `error`."""
    message = f"the engine failed while it computed this request: {first_line(error)}"
    return Finish(type="abort", status=500, message=message, err_type="engine_error")


def first_line(error: Exception) -> str:
    """Kind and text of an error, short enough for an answer; the log has the whole text."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:_MAX_ERROR_CHARS]}" if lines else type(error).__name__


def refuse_rid(rid: str) -> Finish:
    """Two requests of one client cannot share a rid: an abort could not choose between them."""
    return _refuse(f"rid {rid!r} is already in use by a request that has not finished")


def refuse_adapter(name: str) -> Finish:
    """No adapter has this name, or none has it any more."""
    text = f"The adapter {name!r} does not exist."
    return Finish(type="abort", status=404, message=text, err_type="invalid_request_error", code="model_not_found")


def refuse_for_ever(request: Request, *, vocab_size: int, context: int, capacity: int) -> Finish | None:
    """Why `request` can never run. `context` and `capacity`: tokens of the model's context and of the KV cache."""
    num_tokens = request.num_prompt_tokens
    if num_tokens == 0:
        return _refuse("the prompt is empty; at least one token is needed")
    if not request.has_ids_below(vocab_size):
        return _refuse(f"the prompt holds out-of-vocabulary token ids; they must be from 0 to {vocab_size - 1}")
    generates = request.sampling.max_new_tokens > 0
    if num_tokens > min(context, capacity) - generates:
        room = ", with at least one for the answer" if generates else ""
        return _refuse(
            f"The input ({num_tokens} tokens) is longer than the model's context length ({context} tokens) "
            f"or than the KV cache ({capacity} tokens){room}"
        )
    return None


def refuse_queue(why: str, *, retry_after_s: int) -> Finish:
    """The client may try again."""
    return Finish(
        type="abort",
        status=429,
        message=f"the queue is full: {why}",
        err_type="rate_limit_error",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


def waited_too_long(timeout_s: float, *, retry_after_s: int) -> Finish:
    """Nothing was computed, so the client may repeat it. A 408 would mean that the client was too slow."""
    return Finish(
        type="abort",
        status=503,
        message=f"the request has waited in the queue for {timeout_s:g} s and was not started",
        err_type="service_unavailable",
        code="queue_timeout",
        retry_after_s=retry_after_s,
    )


def took_too_long(timeout_s: float) -> Finish:
    """The answer is not complete. To repeat it would take as long again."""
    message = f"the request has taken {timeout_s:g} s and was ended"
    return Finish(type="abort", status=504, message=message, err_type="timeout", code="request_timeout")


def end_after(request: Request, token_id: int) -> Finish | None:
    """The end that the newest token brings; None if the request goes on."""
    if request.is_stop_token(token_id):
        return Finish(type="stop", matched=token_id)
    if request.grammar is not None and request.grammar.is_complete:
        return Finish(type="stop")
    return Finish(type="length") if request.num_outputs >= request.max_new_tokens else None


def refuse_grammar(reason: str) -> Finish:
    """The request's grammar is none, or too complex."""
    return _refuse(f"the grammar cannot be used: {reason}")


def refuse_compilation() -> Finish:
    """The client may try again."""
    message = "too many grammars are being compiled"
    return Finish(type="abort", status=429, message=message, err_type="rate_limit_error")


def grammar_failed(reason: str) -> Finish:
    """A token was chosen that the request's grammar does not allow: the engine's fault."""
    message = f"a token was chosen that the grammar of this request does not allow: {reason}".rstrip(": ")
    return Finish(type="abort", status=500, message=message, err_type="engine_error")


def refuse_now(reason: str) -> Finish:
    """No new request is accepted now; another engine, or this engine later, may accept it."""
    return Finish(type="abort", status=503, message=reason, err_type="service_unavailable")


def describe(request: Request, *, generation: int, weight_version: str) -> OutputMeta:
    """Facts of the request so far: prompt tokens by tier, retractions, versions of the weights, time in the queue."""
    queued_s = 0.0 if request.started_s is None else request.started_s - request.arrived_s
    found, drafting = request.loading, request.drafting or Drafting()
    return OutputMeta(
        prompt_tokens=request.num_prompt_tokens,
        cached_device=found.num_cached_tokens - found.num_host_tokens - found.num_storage_tokens,
        cached_host=found.num_host_tokens,
        cached_storage=found.num_storage_tokens,
        num_retractions=request.num_retractions,
        cache_generation=generation,
        weight_version=weight_version,
        weights_versions=tuple(request.weights_versions) if len(request.weights_versions) > 1 else (),
        queue_time_s=queued_s,
        load_time_s=found.seconds,
        num_draft_steps=drafting.num_steps,
        num_drafted=drafting.num_drafted,
        num_accepted=drafting.num_accepted,
    )


def _refuse(message: str) -> Finish:
    return Finish(type="abort", status=400, message=message, err_type="invalid_request_error")
