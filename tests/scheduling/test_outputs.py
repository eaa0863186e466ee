"""What leaves a turn: one message per client, tokens at the interval, the end merged with the last token."""

from scheduler_steps import message

from headwater.messages.generation import Finish, LogprobParams, OutputMeta, TokenLogprob
from headwater.scheduling.outputs import OutputBuffer
from headwater.scheduling.request import Request

META = OutputMeta(prompt_tokens=6)
DONE = Finish(type="length")


def make(rid: str = "a", *, client: bytes = b"c", **kwargs) -> Request:
    return Request(message(rid, **kwargs), client=client, arrived_s=0.0)


def take_token(buffer: OutputBuffer, request: Request, token: int, *, meta=None, logprob=None) -> None:
    request.tokens.append(token)
    buffer.add_token(request, token, logprob=logprob, meta=meta)


def items(buffer: OutputBuffer) -> list:
    return [output for _, outputs in buffer.take() for output in outputs.items]


def test_each_client_gets_one_message_with_its_own_outputs():
    buffer = OutputBuffer()
    for client in (b"x", b"y"):
        for rid in ("a", "b"):
            take_token(buffer, make(rid, client=client), 5)
    taken = buffer.take()
    assert [(client, [o.rid for o in outputs.items]) for client, outputs in taken] == [
        (b"x", ["a", "b"]),
        (b"y", ["a", "b"]),
    ]
    assert buffer.take() == []


def test_the_end_and_the_last_token_are_one_output():
    buffer, request = OutputBuffer(), make()
    take_token(buffer, request, 5)
    buffer.finish(request, DONE, META)
    (only,) = items(buffer)
    assert (only.token_ids, only.finish, only.meta) == ((5,), DONE, META)


def test_the_end_is_an_output_of_its_own_when_another_request_spoke_last():
    buffer, one, two = OutputBuffer(), make("one"), make("two")
    take_token(buffer, one, 5)
    take_token(buffer, two, 6)
    buffer.finish(one, DONE, META)
    assert [(o.rid, o.token_ids, o.finish) for o in items(buffer)] == [
        ("one", (5,), None),
        ("two", (6,), None),
        ("one", (), DONE),
    ]


def test_a_refusal_does_not_swallow_the_end_of_a_request_under_the_same_rid():
    buffer, refused, ended = OutputBuffer(), make("a"), make("a")
    buffer.finish(refused, Finish(type="abort", status=400), META)
    buffer.finish(ended, DONE, META)
    assert [o.finish.type for o in items(buffer)] == ["abort", "length"]


def test_tokens_wait_for_their_interval_and_the_end_brings_the_rest():
    buffer, request = OutputBuffer(), make(output_interval=3)
    taken = []
    for token in range(10, 16):
        take_token(buffer, request, token)
        taken.append([o.token_ids for o in items(buffer)])
    assert taken == [[(10,)], [], [], [(11, 12, 13)], [], []]
    buffer.finish(request, DONE, META)
    assert [o.token_ids for o in items(buffer)] == [(14, 15)]


def test_an_output_with_facts_does_not_wait():
    """The first token after a retraction carries the facts again; clients count with them."""
    buffer, request = OutputBuffer(), make(output_interval=10)
    take_token(buffer, request, 1)
    items(buffer)
    take_token(buffer, request, 2, meta=META)
    assert [(o.token_ids, o.meta) for o in items(buffer)] == [((2,), META)]


def test_logprobs_stay_with_their_tokens():
    buffer, request = OutputBuffer(), make(output_interval=2)
    logprobs = [TokenLogprob(token_id=token, logprob=-0.5) for token in range(3)]
    for token, logprob in enumerate(logprobs):
        take_token(buffer, request, token, logprob=logprob)
    assert [o.logprobs for o in items(buffer)] == [(logprobs[0],), (logprobs[1], logprobs[2])]


def test_prompt_logprobs_come_once_with_the_first_token():
    buffer, request = OutputBuffer(), make(logprobs=LogprobParams(prompt_start=0))
    buffer.begin_prompt(request)
    take_token(buffer, request, 1)
    take_token(buffer, request, 2)
    first, second = items(buffer)
    assert first.prompt_logprobs == (TokenLogprob(token_id=0, logprob=None),)
    assert second.prompt_logprobs is None


def test_prompt_logprobs_come_with_the_end_where_no_token_was_asked_for():
    buffer, request = OutputBuffer(), make(num_tokens=0, logprobs=LogprobParams(prompt_start=0))
    buffer.begin_prompt(request)
    buffer.finish(request, DONE, META)
    (only,) = items(buffer)
    assert only.prompt_logprobs == (TokenLogprob(token_id=0, logprob=None),)


def test_a_prompt_that_is_computed_again_is_reported_once():
    buffer, request = OutputBuffer(), make(logprobs=LogprobParams(prompt_start=0))
    rest = (TokenLogprob(token_id=1, logprob=-1.0),)
    for _ in range(2):
        buffer.begin_prompt(request)
        buffer.add_prompt_logprobs(request, rest)
    take_token(buffer, request, 9)
    assert [o.prompt_logprobs for o in items(buffer)] == [(TokenLogprob(token_id=0, logprob=None), *rest)]


def test_a_prompt_reported_from_later_on_has_no_entry_for_its_first_token():
    buffer, request = OutputBuffer(), make(logprobs=LogprobParams(prompt_start=1))
    buffer.begin_prompt(request)
    assert request.unsent.prompt_logprobs == []
