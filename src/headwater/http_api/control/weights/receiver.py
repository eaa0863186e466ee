"""Receives buckets into the staging area, and has the engines put whole transfers in place."""

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from headwater.client.engine_client import EngineClient, new_call_id
from headwater.client.errors import CallFailed
from headwater.generation.errors import ApiError, bad_request
from headwater.messages.weights import GetParameters, Parameters, UpdateWeights
from headwater.models.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from headwater.transports.bracket import Transfer, TransferRefused, Transfers
from headwater.transports.receivers import ReceiverGroups
from headwater.transports.staging import BucketError, BucketFile, StagingArea, StagingFull

_ASK_S = 30.0
_KEEP_MEMORY_S = 600.0  # of replaced weights, for the next update
_MARGIN_BYTES = 1 << 30  # of GPU memory, for what steps and other processes take meanwhile
Fill = Callable[[BucketFile], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """What a call says about its transfer. The last label of a bracket counts."""

    weight_version: str | None = None
    aborts_all: bool = False
    in_place: bool = False


class WeightReceiver:
    """One per app. Belongs to the event loop of its client."""

    def __init__(self, client: EngineClient, area: StagingArea, *, stages_on_gpu: bool = False) -> None:
        self._client = client
        self._area = area
        self._transfers = Transfers(new_id=lambda: f"transfer-{secrets.token_hex(4)}", drop=self._given_up)
        self.groups = ReceiverGroups()
        self._applying: set[str] = set()  # folders whose change has a caller
        self._model: Parameters | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._free_timer: asyncio.TimerHandle | None = None
        self._stages_on_gpu = stages_on_gpu
        self._tasks: set[asyncio.Task[None]] = set()

    def take_label(self, weight_version: str, *, aborts_all: bool) -> bool:
        """Whether a label waits for the end of the open bracket."""
        with _in_words():
            return self._transfers.take_label(weight_version, aborts_all=aborts_all, now_s=_now_s())

    def begin(self, *, timeout_s: float) -> Transfer:
        """Open a bracket that has to be ended within `timeout_s`."""
        now_s = _now_s()
        with _in_words():
            transfer = self._transfers.begin(deadline_s=now_s + timeout_s, now_s=now_s)
        self._watch()
        return transfer

    async def receive(self, fill: Fill, *, transfer_id: str | None, options: UpdateOptions) -> Transfer:
        """A bucket that `fill` writes. It joins the open bracket; without one, its transfer is complete with it.

        ApiError 400 for a bucket that is torn or does not fit the model: a bracket is broken then.
        """
        now_s = _now_s()
        with _in_words():
            transfer = self._transfers.bucket_begins(transfer_id, deadline_s=math.inf, now_s=now_s)
        async with self._arriving(transfer):
            model = await self._parameters()
            if transfer.folder is None:
                transfer.folder = self._area.folder()
                self._client.call_when_staged_in_use_changes(self.delete_unused)
            bucket = transfer.folder.bucket()
            try:
                await fill(bucket)
                received = bucket.finish()
            finally:
                bucket.discard()  # unless it is finished
        try:
            with _in_words():
                self._transfers.bucket_ends(transfer, received.tensors, model)
        except ApiError:
            if not transfer.is_bracket:
                self._transfers.give_up(transfer)
            raise
        transfer.weight_version = options.weight_version or transfer.weight_version
        transfer.aborts_all |= options.aborts_all
        transfer.in_place |= options.in_place
        if not transfer.is_bracket:
            self._transfers.seal(transfer)
        return transfer

    def end(self, transfer_id: str | None, *, options: UpdateOptions) -> Transfer:
        """Close the bracket: `update_of` has it put in place."""
        with _in_words():
            transfer = self._transfers.end(transfer_id, now_s=_now_s())
        transfer.weight_version = options.weight_version or transfer.weight_version
        transfer.aborts_all |= options.aborts_all
        transfer.in_place |= options.in_place
        return transfer

    def abort(self, transfer_id: str | None) -> Transfer | None:
        """Give the open bracket up; None if there is none."""
        with _in_words():
            return self._transfers.abort(transfer_id, now_s=_now_s())

    @property
    def open_id(self) -> str | None:
        """The `transfer_id` of the open bracket."""
        return self._transfers.open.transfer_id if self._transfers.open is not None else None

    def abort_if_open(self, transfer_id: str) -> None:
        """Give this bracket up, if it is still open."""
        if self.open_id == transfer_id:
            self.abort(transfer_id)

    @asynccontextmanager
    async def update_of(self, transfer: Transfer, *, timeout_s: float) -> AsyncIterator[UpdateWeights]:
        """The change that puts a complete transfer in place. Its folder stays while the weights do.

        The caller may leave at any time: from the change's beginning to its end, the fleet counts the folder as in use.
        """
        folder = transfer.folder
        folder.is_complete = True
        path = str(folder.path)
        self._applying.add(path)
        try:
            yield UpdateWeights(
                call_id=new_call_id(),
                path=path,
                load_format="safetensors",
                weight_version=transfer.weight_version,
                abort_all_requests=transfer.aborts_all,
                timeout_s=timeout_s,
                weights_id=secrets.token_hex(16),
                names=tuple(transfer.tensors),
                in_place=transfer.in_place,
            )
        finally:
            self._applying.discard(path)
            self.delete_unused()
            self._drop_from_gpu()

    @asynccontextmanager
    async def adapter_of(self, fill: Fill, config: bytes) -> AsyncIterator[str]:
        """The folder of a LoRA adapter in PEFT's layout, of tensors that `fill` writes. It stays while it is loaded.

        ApiError 400 for tensors that are torn, 413 if they do not fit.
        """
        folder = self._area.folder()
        self._client.call_when_staged_in_use_changes(self.delete_unused)
        path = str(folder.path)
        self._applying.add(path)
        try:
            with _bucket_errors():
                bucket = folder.bucket()
                try:
                    await fill(bucket)
                    bucket.finish(WEIGHTS_NAME)
                finally:
                    bucket.discard()  # unless it is finished
            (folder.path / CONFIG_NAME).write_bytes(config)
            yield path
        finally:
            folder.is_complete = True
            self._applying.discard(path)
            self.delete_unused()

    def spare_gpu_bytes(self, dtype: str) -> int:
        """What must stay free on a GPU beside received tensors, for the new weights of the engine; -1: none stay there.

        Within a bucket's filling: the model's tensors are known by then.
        """
        if not self._stages_on_gpu or self._model is None:
            return -1
        num_numbers = sum(math.prod(shape) for shape in self._model.shapes.values())
        return num_numbers * (4 if dtype == "float32" else 2) + _MARGIN_BYTES

    async def close(self) -> None:
        """Delete what was received, and end the processes that receive."""
        for timer in (self._timer, self._free_timer):
            if timer is not None:
                timer.cancel()
        await self.groups.close()
        self._area.close()

    def _given_up(self, transfer: Transfer) -> None:
        if transfer.folder is not None:
            transfer.folder.delete(keeps_memory=True)
            self._free_later()
            self._drop_from_gpu()

    def delete_unused(self) -> None:
        """Delete what no engine would read again. Its memory stays for the next update, for a while."""
        self._area.keep_only(self._client.staged_in_use | self._applying)
        self._free_later()

    def free_spare(self) -> None:
        """Give the memory back that is kept for the next update."""
        self._area.free_spare()

    def _free_later(self) -> None:
        if self._free_timer is not None:
            self._free_timer.cancel()
        self._free_timer = asyncio.get_running_loop().call_later(_KEEP_MEMORY_S, self.free_spare)

    def _drop_from_gpu(self) -> None:
        """What was received is in place or given up: its files suffice from now on."""
        if not self._stages_on_gpu:
            return
        task = asyncio.get_running_loop().create_task(self.groups.drop_from_gpu())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @asynccontextmanager
    async def _arriving(self, transfer: Transfer) -> AsyncIterator[None]:
        """A bucket that does not arrive whole breaks its transfer."""
        try:
            yield
        except BaseException as error:
            self._transfers.bucket_fails(transfer, str(error) or type(error).__name__)
            if not transfer.is_bracket:
                self._transfers.give_up(transfer)
            with _bucket_errors():
                raise

    async def _parameters(self) -> Parameters:
        """The model's tensors, which never change."""
        if self._model is None:
            answers = await self._client.call_all(GetParameters(call_id=new_call_id()), timeout_s=_ASK_S)
            errors = [answer for answer in answers if isinstance(answer, BaseException)]
            self._model = next((answer for answer in answers if isinstance(answer, Parameters)), None)
            if self._model is None:
                raise errors[0] if errors else CallFailed(answers[0])
        return self._model

    def _watch(self) -> None:
        """Drop an overdue bracket at its deadline, though no call comes."""
        if self._timer is not None:
            self._timer.cancel()
        at_s = self._transfers.next_look_s
        if at_s < math.inf:
            self._timer = asyncio.get_running_loop().call_at(at_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._transfers.tick(_now_s())
        self._watch()


@contextlib.contextmanager
def _bucket_errors():
    """The errors that a sender gets for tensors that did not arrive whole."""
    try:
        yield
    except StagingFull as error:
        raise ApiError(413, str(error), code="staging_full") from None
    except BucketError as error:
        raise bad_request("body", str(error), code="bad_bucket") from None


@contextlib.contextmanager
def _in_words():
    try:
        yield
    except TransferRefused as error:
        raise bad_request("transfer_id", str(error), code="transfer_refused") from None


def _now_s() -> float:
    return asyncio.get_running_loop().time()
