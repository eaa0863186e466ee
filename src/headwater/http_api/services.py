"""What routes work with: the state, and the parts made from it once the model has loaded."""

import asyncio
import copy
import itertools
import logging
from typing import Annotated, Any

from fastapi import Depends, Request

from headwater.client.engine_client import new_call_id
from headwater.generation.concurrency import Permit
from headwater.generation.errors import bad_request, loading
from headwater.generation.model_facts import ModelFacts
from headwater.generation.native import NativeApi
from headwater.generation.text_generation import GenerationObserver, TextGenerator
from headwater.generation.validation import timeout_seconds
from headwater.http_api.auth import Accounts, Keys, authorization_of
from headwater.http_api.control.vllm.transfer_engine import TransferEngine
from headwater.http_api.control.weights.receiver import WeightReceiver
from headwater.http_api.dashboard.watching import Watching
from headwater.http_api.engine_answers import EngineAnswers
from headwater.http_api.monitoring.health import Health
from headwater.http_api.monitoring.metrics import Metrics
from headwater.http_api.monitoring.request_record import RecordingObserver, RequestRecord, record_of
from headwater.http_api.response_store import ResponseStore
from headwater.http_api.state import ApiState
from headwater.messages.control import FlushCache, FlushResult
from headwater.messages.state import EngineState, GetState
from headwater.messages.two_phase import Change
from headwater.messages.wire import ToEngine
from headwater.tokenization.tokenizer import Tokenizer
from headwater.transports.carried import CarriedWeights

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # for calls the engine answers in its next turn


class Services:
    """One per app, copied for each HTTP request. Properties that need the model raise ApiError 503 while it loads."""

    def __init__(self, state: ApiState, accounts: Accounts | None = None) -> None:
        self.state = state
        self.accounts = accounts or Accounts(Keys())
        self._permit: Permit | None = None  # of the HTTP request
        self._record: RequestRecord | None = None  # the same
        self.metrics = Metrics()
        self._pin_numbers = itertools.count(1)
        self.health = Health(state)
        self.watching = Watching(state, self.metrics.latency)
        self.weights = WeightReceiver(state.client, state.staging, stages_on_gpu=state.stages_on_gpu)
        self.transfer_engine = TransferEngine()
        self.carried = CarriedWeights(state.staging)
        limits = state.limits
        self.responses = ResponseStore(
            max_responses=limits.max_stored_responses, max_bytes=limits.max_stored_response_bytes
        )

    def of(self, request: Request) -> "Services":
        """The services of one HTTP request: what it generates counts for its key."""
        own = copy.copy(self)
        own._record = record_of(request.scope)
        own._permit = Permit(self.accounts.of(authorization_of(request.headers)))
        return own

    @property
    def account(self) -> int:
        """The number of the key that the HTTP request was sent with."""
        return 0 if self._permit is None else self._permit.account.number

    @property
    def model(self) -> ModelFacts:
        return self.state.require_model()[1]

    @property
    def generator(self) -> TextGenerator:
        tokenizer, model = self.state.require_model()
        return TextGenerator(
            self.state.client,
            tokenizer,
            observer=self._observer(model, tokenizer),
            special_tokens=self.state.special_tokens,
            formats=self.state.formats,
            grammars=self.state.grammars,
            permit=self._permit,
        )

    def _observer(self, model: ModelFacts, tokenizer: Tokenizer) -> GenerationObserver:
        """Observes for the metrics, and for the record of the HTTP request."""
        metrics = self.metrics.observer(model.served_name)
        if self._record is None:
            return metrics
        self._record.model_name, self._record.tokenizer = model.served_name, tokenizer
        return RecordingObserver(metrics, self._record)

    @property
    def native_api(self) -> NativeApi:
        return NativeApi(self.generator, self.model, self.state.limits)

    def new_pin_id(self) -> str:
        """The same on every engine, also after a restart."""
        return f"pin-{next(self._pin_numbers)}"

    def require_loaded(self) -> None:
        """Raises ApiError 503 while the model loads."""
        if self.state.model is None:
            raise loading()

    def control_timeout_s(self, given: Any, *, default_s: float) -> float:
        """The time a control request may wait. InvalidRequest that names the range."""
        max_s = self.state.limits.max_control_timeout_s
        if given is None:
            return min(default_s, max_s)
        try:
            return timeout_seconds(given, max_s)
        except ValueError as error:
            raise bad_request("timeout", f"timeout: {error}") from None

    async def ask_all(self, message: ToEngine) -> EngineAnswers:
        """The answers of all engines to a call that they answer in their next turn."""
        return EngineAnswers(await self.state.client.call_all(message, timeout_s=CALL_TIMEOUT_S))

    async def ask_one(self, message: ToEngine, *, engine: int) -> EngineAnswers:
        """The same of one engine. InvalidRequest for one that does not exist."""
        client = self.state.client
        if engine not in client.engine_numbers:
            raise bad_request("dp_rank", f"dp_rank: must be one of {list(client.engine_numbers)}, got {engine}")
        call = client.call(message, engine=engine, timeout_s=CALL_TIMEOUT_S)
        return EngineAnswers(await asyncio.gather(call, return_exceptions=True), ranks=[engine])

    async def flush_all(self, message: FlushCache, *, arrived_s: float, has_timeout: bool) -> list[Any]:
        """The answers of all engines to a flush that waits up to `message.timeout_s` from `arrived_s` (loop time).

        A caller who gave a timeout is answered within a second of it; without one, a busy engine is waited for.
        """
        deadline_s = arrived_s + message.timeout_s
        answer_by_s = deadline_s if has_timeout else arrived_s + CALL_TIMEOUT_S
        answers = await self.state.client.call_all_by(message, deadline_s=deadline_s, answer_by_s=answer_by_s)
        if any(isinstance(answer, FlushResult) and answer.success for answer in answers):
            self.state.client.flushed(message)
        return answers

    async def change(
        self, message: Change, *, arrived_s: float, timeout_s: float | None = None, engines: list[int] | None = None
    ) -> EngineAnswers:
        """The outcome of a change that all engines make, or none, within a second of `timeout_s`.

        None: the caller gave no timeout, and engines that are busy with a step have 30 s.
        """
        deadline_s = arrived_s + (CALL_TIMEOUT_S if timeout_s is None else timeout_s)
        outcome = await self.state.client.change(message, deadline_s=deadline_s, engines=engines)
        return EngineAnswers.of_change(outcome)

    async def engine_states(self, *, timeout_s: float = 5.0) -> list[EngineState | Exception]:
        """A snapshot of each engine, or why there is none."""
        return await self.state.client.call_all(GetState(call_id=new_call_id()), timeout_s=timeout_s)


async def _services_of(request: Request) -> Services:
    """A coroutine: FastAPI calls a plain function in a thread, each time."""
    return request.app.state.services.of(request)


InjectedServices = Annotated[Services, Depends(_services_of)]  # the type of a route's parameter `services`
