"""`from headwater import Engine`: an engine in the user's process, without HTTP."""

import asyncio
import atexit
import contextlib
import threading
import traceback
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from headwater.client.engine_client import EngineClient, new_call_id
from headwater.client.errors import CallFailed, EngineGone
from headwater.generation.answer_fields import Json
from headwater.generation.errors import from_validation
from headwater.generation.model_facts import RequestLimits
from headwater.generation.native import NativeApi, NativeBatch
from headwater.generation.native_schemas import GenerateRequest
from headwater.generation.text_generation import TextGenerator
from headwater.launch.assembly import build_engine
from headwater.launch.config import ServerArgs
from headwater.launch.facts_builder import build_model_facts, tokenizer_path
from headwater.launch.model_choice import with_model
from headwater.launch.private_directory import private_directory
from headwater.messages.adapters import AdapterLoaded, AdapterUnloaded, LoadAdapter, UnloadAdapter
from headwater.messages.base import is_timeout, pack_ids
from headwater.messages.control import FlushCache, FlushResult
from headwater.messages.state import EngineReady, EngineState, GetState, Shutdown
from headwater.tokenization.tokenizer import Tokenizer

T = TypeVar("T")

# a batch from Python may be as large as memory allows, since no other client uses this process
LIMITS = RequestLimits(max_batch=1_000_000)


class Engine:
    """A loaded model with its scheduler and KV cache. Its answers are those of the server's /generate.

    The engine loop runs in one thread of this process and its client in another, so the caller's event loop stays
    free. Use an `Engine` as a context manager, or call `shutdown`; otherwise it ends with the interpreter. All methods
    may be called from any thread.
    """

    def __init__(self, model: str | None = None, **server_args: Any) -> None:
        """Load a model. `server_args` are the fields of `ServerArgs`, e.g. `page_size=16, threads=2`.

        Raises `ValueError` and `OSError` for the errors that `headwater serve` reports, `TypeError` for unknown
        arguments.
        """
        self.args = with_model(ServerArgs(model=model, **server_args))
        if self.args.dp_size != 1:
            raise ValueError(f"dp_size must be 1 here, got {self.args.dp_size}: several engines need the server")
        self._resources = contextlib.ExitStack()
        try:
            self.directory = self._resources.enter_context(private_directory())
            endpoint = f"ipc://{self.directory / 'engine.sock'}"
            self.tokenizer = Tokenizer.load(tokenizer_path(self.args))
            self._engine = build_engine(self.args, endpoint)
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
            self._loop_thread.start()
            self._client = EngineClient([endpoint])
            self._engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
            self._engine_thread.start()
            self.ready: EngineReady = self._wait(self._connect())
        except BaseException:
            self._resources.close()
            raise
        generator = TextGenerator(self._client, self.tokenizer, special_tokens=self.args.parse_special_tokens)
        self._grammars = generator.grammars
        facts = replace(build_model_facts(self.args, self.ready), adapters=self._client.adapters)
        self._api = NativeApi(generator, facts, LIMITS)
        self._is_running = True
        atexit.register(self.shutdown)

    # --- generation --------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: Json | list[Json] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Generate for one prompt or a batch, given as text or as token ids.

        `sampling_params` are those of /generate (`temperature`, `max_new_tokens`, ...), and so are `options`
        (`return_logprob`, `top_logprobs_num`, `cache_salt`, ...). Returns a dict with `text`, `output_ids` and
        `meta_info`, or a list of such dicts for a batch. With `stream=True` it returns an iterator of dicts with
        cumulative text; those of a batch carry their `index`. Raises `ValueError` that names a wrong parameter.
        """
        request = _request(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._iterate(request)
        return self._wait(self._collect(request))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: Json | list[Json] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """`generate` for the caller's event loop; with `stream=True` it returns an asynchronous iterator."""
        request = _request(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._iterate_async(request)
        return await self._submit(self._collect(request))

    # --- text --------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    # --- control -----------------------------------------------------------------------------------

    def flush_cache(
        self,
        *,
        timeout: float = 0.0,
        mode: Literal["idle", "now", "drain"] = "idle",
        tiers: Sequence[str] = (),
        cache_salt: str | None = None,
        extra_key: str | None = None,
        prefix_ids: list[int] | None = None,
        hold: bool = False,
        dry_run: bool = False,
    ) -> FlushResult:
        """Make cached KV unreachable, as /flush_cache does (docs/flush.md); `success` is whether it was flushed.

        Raises `ValueError` that names a wrong parameter.
        """
        if not is_timeout(timeout, max_s=self.args.max_control_timeout):
            raise ValueError(f"timeout must be from 0 to {self.args.max_control_timeout:g} seconds, got {timeout}")
        if mode not in ("idle", "now", "drain"):
            raise ValueError(f"mode must be idle, now or drain, got {mode!r}")
        message = FlushCache(
            call_id=new_call_id(),
            timeout_s=timeout,
            mode=mode,
            tiers=tuple(tiers),
            cache_salt=cache_salt,
            extra_key=extra_key,
            prefix_ids=None if prefix_ids is None else pack_ids(prefix_ids),
            hold=hold,
            dry_run=dry_run,
        )
        try:
            return self._wait(self._client.call(message))
        except CallFailed as error:
            raise ValueError(error.failed.message) from None

    def load_lora_adapter(self, lora_name: str, lora_path: str, *, load_inplace: bool = False) -> AdapterLoaded:
        """Serve an adapter under a name, as /v1/load_lora_adapter does (docs/lora.md). ValueError if it is refused."""
        call = LoadAdapter(call_id=new_call_id(), name=lora_name, path=lora_path, load_inplace=load_inplace)
        try:
            return self._wait(self._client.call(call))
        except CallFailed as error:
            raise ValueError(error.failed.message) from None

    def unload_lora_adapter(self, lora_name: str) -> AdapterUnloaded:
        """Serve no adapter under this name any more. ValueError if there is none."""
        try:
            return self._wait(self._client.call(UnloadAdapter(call_id=new_call_id(), name=lora_name)))
        except CallFailed as error:
            raise ValueError(error.failed.message) from None

    def get_state(self) -> EngineState:
        """The requests, pages by owner and counters of the engine, between two turns of its loop."""
        return self._wait(self._client.call(GetState(call_id=new_call_id())))

    def get_server_info(self) -> Json:
        """The arguments in effect, the loaded model, and a snapshot of the engine."""
        state = self.get_state()
        return {
            **self.args.public(),
            "model_name": self.ready.model_name,
            "architecture": self.ready.architecture,
            "max_context": self.ready.max_context,
            "weights_id": self.ready.weights_id,
            "internal_states": [{name: getattr(state, name) for name in state.__struct_fields__}],
        }

    def shutdown(self) -> None:
        """End running requests and free everything. Repeated calls do nothing."""
        if not self._is_running:
            return
        self._is_running = False
        atexit.unregister(self.shutdown)
        with contextlib.suppress(EngineGone, TimeoutError):
            # a message wakes a sleeping loop, which would notice a flag only later
            self._wait(self._client.call(Shutdown(call_id=new_call_id()), timeout_s=10.0))
        self._engine.stop()
        self._engine_thread.join(timeout=10.0)
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join(timeout=5.0)
        self._grammars.close()
        self._loop.close()
        self._resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # --- threads -----------------------------------------------------------------------------------

    def _run_engine(self) -> None:
        """The engine's thread. If the loop dies, all callers that wait for an answer get an error."""
        try:
            self._engine.run()
        except BaseException as error:  # noqa: BLE001  the clients must get any error
            reason = f"the engine loop failed: {type(error).__name__}: {error}"
            traceback.print_exc()
            self._loop.call_soon_threadsafe(self._client.engine_gone, 0, reason)

    async def _connect(self) -> EngineReady:
        await self._client.start()
        return (await self._client.wait_ready())[0]

    async def _collect(self, request: GenerateRequest) -> Any:
        batch = await self._api.start(request)
        try:
            return await batch.collect()
        finally:
            batch.close()

    def _iterate(self, request: GenerateRequest) -> Iterator[Json]:
        batch: NativeBatch = self._wait(self._api.start(request))
        chunks = batch.stream()
        try:
            while (chunk := self._wait(_next(chunks))) is not None:
                yield chunk
        finally:
            self._loop.call_soon_threadsafe(batch.close)

    async def _iterate_async(self, request: GenerateRequest) -> AsyncIterator[Json]:
        batch: NativeBatch = await self._submit(self._api.start(request))
        chunks = batch.stream()
        try:
            while (chunk := await self._submit(_next(chunks))) is not None:
                yield chunk
        finally:
            self._loop.call_soon_threadsafe(batch.close)

    def _submit(self, work: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _request(
    prompt: str | list[str] | None,
    sampling_params: Json | list[Json] | None,
    input_ids: list[int] | list[list[int]] | None,
    stream: bool,
    options: Json,
) -> GenerateRequest:
    """The body of /generate for a call. An unknown option is a `TypeError`, as in any Python call."""
    if unknown := options.keys() - GenerateRequest.model_fields.keys():
        raise TypeError(f"generate() got unexpected arguments: {', '.join(sorted(unknown))}")
    body = {
        "text": prompt,
        "input_ids": input_ids,
        "sampling_params": sampling_params,
        "stream": stream,
        **options,
    }
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return GenerateRequest.model_validate(given)
    except ValidationError as error:
        raise from_validation(error.errors()) from None


async def _next(chunks: AsyncIterator[Json]) -> Json | None:
    return await anext(chunks, None)
