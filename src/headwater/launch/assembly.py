"""Builds an engine from the server's arguments: device, model, runner, KV memory, loop."""

import logging
import time
from collections.abc import Callable, Sequence

from headwater.cache.host_tier import HostTier, RestorePolicy, WritePolicy
from headwater.cache.storage.tier import PrefetchPolicy, StorageSettings
from headwater.clock import MonotonicClock
from headwater.control.ports import AdaptersPort
from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.kv_memory import KVLayout
from headwater.engine.kv_events_publisher import KvEventsSettings
from headwater.engine.loop import EngineLoop
from headwater.engine.wire import ZmqWire
from headwater.engine.wiring import EngineParts, wire_engine
from headwater.execution.runner import Runner
from headwater.execution.warm_up import Steps
from headwater.kv_events import endpoint_of
from headwater.launch.config import GB, ServerArgs
from headwater.launch.grammars import grammar_compiler, grammar_limits
from headwater.launch.placement import Placement, flags_in_errors, kv_dtype, open_placement
from headwater.launch.pooling_config import read_pooling
from headwater.launch.ranks.engine_gpus import choose_gpus
from headwater.launch.ranks.start import Ranks, num_pages_of, page_share, start_ranks
from headwater.launch.served_model import ModelInPlace, read_model, serve_model
from headwater.messages.adapters import AdapterState
from headwater.messages.state import EngineReady
from headwater.models.config import ModelConfig
from headwater.models.end_tokens import union, within
from headwater.models.loader import LoadedModel, tokenizer_end_ids
from headwater.models.sampling_defaults import read_sampling_defaults
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.prefill_pace import CPU_MAX_GAP_S, GPU_LEAST_TOKENS, LEAST_TOKENS
from headwater.scheduling.speculation.drafters import CPU_LIMITS, GPU_LIMITS, SpeculationSettings
from headwater.storage.errors import StorageError
from headwater.storage.page_key import Fingerprint, config_hash
from headwater.storage.registry import open_backend

_LOOK_S = 0.005  # between two looks at an adapter that is read

_log = logging.getLogger(__name__)


def build_engine(
    args: ServerArgs,
    endpoint: str,
    *,
    index: int = 0,
    weights: tuple[str, str] | None = None,
    cpus: Sequence[Sequence[int]] = (),
    rank_cpus: Sequence[tuple[tuple[int, ...], ...]] = (),
    last_words: Callable[[str], None] = lambda _: None,
) -> EngineLoop:
    """Load the model and return a loop that answers on `endpoint`; the caller calls its `run`.

    `args.model` is a path or hub id. `index`: the number of this engine, if there are several. `weights`: path and
    format of a complete checkpoint to load instead of the model's own weights, for example one that replaced them
    before a restart. `cpus[i]`: where compute thread i is kept, if the threads are to be pinned; `rank_cpus` are those
    of the other ranks, in processes that end with the loop. `last_words` gets the reason before an end by force: ranks
    on GPUs may hang. Raises `ValueError` or `OSError`, in words for the user, if the model cannot be served with these
    arguments.
    """
    args, gpus = choose_gpus(args, index=index)
    args, ranks = start_ranks(args, weights=weights, cpus=rank_cpus, gpus=gpus, last_words=last_words)
    try:
        return _build(args, endpoint, index=index, weights=weights, cpus=cpus, ranks=ranks, gpus=gpus)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise


def _build(
    args: ServerArgs,
    endpoint: str,
    *,
    index: int,
    weights: tuple[str, str] | None,
    cpus: Sequence[Sequence[int]],
    ranks: Ranks | None,
    gpus: tuple[int, ...],
) -> EngineLoop:
    started_s = time.monotonic()
    group = None if ranks is None else ranks.group
    placement = open_placement(args, cpus=cpus, ranks=group, gpu=gpus[0] if gpus and group is None else None)
    max_gap_s = _max_gap_s(args, placement.device.name)
    args = args.for_device(placement.device.name)
    model = read_model(args, placement, weights)
    max_context = _max_context(args, model.loaded)
    share = page_share(args, model.loaded)
    num_pages = num_pages_of(args, placement, model.loaded, share=share, max_context=max_context)
    if ranks is not None:
        ranks.wait_until_loaded(model.loaded)
        num_pages = min(num_pages, ranks.num_pages or num_pages)
    num_host_pages = _num_host_pages(args, num_pages, share.whole.page_bytes)
    runner, steps = _make_runner(
        args, placement, model.loaded, ranks=ranks, num_pages=num_pages, num_host_pages=num_host_pages,
        max_context=max_context,
    )  # fmt: skip
    load_s = time.monotonic() - started_s
    _log.info("model loaded in %.1f s; the KV cache holds %d tokens", load_s, num_pages * args.page_size)
    served, memory_bytes = serve_model(args, placement.device, model, runner), runner.memory_bytes()
    of_all_ranks = served if ranks is None else ranks.serve(served)
    check = (lambda: None) if ranks is None else ranks.processes.check
    adapters = _load_adapters(args, of_all_ranks.adapters, check=check)
    ready = _ready(
        args, model, runner, placement=placement, max_context=max_context, load_s=load_s, steps=steps,
        gpus=gpus, adapters=adapters,
    )  # fmt: skip
    host = _host_tier(args, placement, runner, num_pages=num_host_pages, ranks=ranks, share=share)
    parts = wire_engine(
        wire=ZmqWire(endpoint),
        runner=of_all_ranks,
        ready=ready,
        limits=_limits(args, max_context=max_context, max_gap_s=max_gap_s),
        clock=MonotonicClock(),
        policy=args.schedule_policy,
        is_cache_enabled=not args.disable_radix_cache,
        max_control_timeout_s=args.max_control_timeout,
        memory_bytes=memory_bytes if ranks is None else ranks.memory_bytes(memory_bytes),
        host=None if host is None else host[0],
        fingerprint=_fingerprint(model.loaded, share.whole),
        storage_settings=StorageSettings(policy=PrefetchPolicy(args.hicache_storage_prefetch_policy)),
        kv_events=_kv_events(args, index),
        grammar_compiler=grammar_compiler(args, ready),
        grammar_limits=grammar_limits(args),
        speculation=SpeculationSettings(
            args.speculation,
            num_draft_tokens=args.speculative_num_draft_tokens,
            limits=CPU_LIMITS if placement.device.name == "cpu" else GPU_LIMITS,
        ),
    )
    for adapter in adapters:
        parts.scheduler.adapters.put(
            adapter.name, adapter.path, adapter_id=adapter.adapter_id, rank=adapter.rank, num_bytes=adapter.num_bytes
        )
    parts.scheduler.begin_weights(model.loaded.weights_id, end_ids=model.end_ids)
    if host is not None:
        for close in host[1]:
            parts.loop.call_at_end(close)
    if ranks is not None:
        parts.loop.call_each_turn(ranks.processes.check)
        parts.loop.call_at_end(ranks.close, also_after_error=True)
    _attach_storage(args, parts)
    return parts.loop


def _make_runner(
    args: ServerArgs,
    placement: Placement,
    loaded: LoadedModel,
    *,
    ranks: Ranks | None,
    num_pages: int,
    num_host_pages: int,
    max_context: int,
) -> tuple[Runner, Steps]:
    """A warm runner, and what launches steps on it and on all other ranks."""
    _log.info("allocating %d pages of KV and running the first steps", num_pages)
    held_context = min(max_context, num_pages * args.page_size)  # larger page tables would only waste memory
    layout = loaded.kv_layout(page_size=args.page_size, dtype=kv_dtype(args))
    if ranks is not None:
        ranks.build_runners(loaded, num_pages=num_pages, max_context=held_context, num_host_pages=num_host_pages)
    with flags_in_errors():
        runner = placement.make_runner(args, loaded, layout=layout, num_pages=num_pages, max_context=held_context)
        steps = runner if ranks is None else ranks.start_steps(runner)
        placement.warm_up(args, runner, steps=steps, max_context=held_context)
        if ranks is not None:
            ranks.begin_capture()
        placement.capture_graphs(runner)
    return runner, steps


def _ready(
    args: ServerArgs,
    model: ModelInPlace,
    runner: Runner,
    *,
    placement: Placement,
    max_context: int,
    load_s: float,
    steps: Steps,
    gpus: tuple[int, ...],
    adapters: tuple[AdapterState, ...],
) -> EngineReady:
    """The facts that the engine reports once it can compute."""
    assert args.model is not None and args.max_running_requests is not None
    loaded, kv = model.loaded, runner.kv
    pooling = read_pooling(model.files.folder, gguf=model.files.gguf)
    return EngineReady(
        call_id="",
        model_name=args.served_model_name or args.model,
        architecture=loaded.config.architecture,
        dtype=loaded.dtype,
        vocab_size=loaded.config.vocab_size,
        max_context=min(max_context, kv.num_pages * args.page_size - 1),
        eos_token_ids=_end_ids(args, loaded.config),
        page_size=args.page_size,
        num_pages=kv.num_pages,
        page_bytes=loaded.whole_kv_layout(page_size=args.page_size, dtype=kv_dtype(args)).page_bytes,
        max_running=args.max_running_requests,
        weights_id=loaded.weights_id,
        weight_version=args.weight_version,
        load_s=load_s,
        device=placement.device.name,
        gpus=gpus,
        sampling_defaults=read_sampling_defaults(model.files.folder, gguf=model.files.gguf),
        compute=placement.compute_facts(runner, loaded, steps=steps),
        gpu_kernels=placement.gpu_kernels(args, loaded),
        hidden_size=loaded.config.hidden_size,
        pooling=pooling.mode,
        embedding_dimensions=pooling.dimensions,
        adapters=adapters,
        num_adapter_slots=0 if runner.adapters is None else runner.adapters.shape.num_slots - 1,
    )


def _load_adapters(
    args: ServerArgs, port: AdaptersPort | None, *, check: Callable[[], None]
) -> tuple[AdapterState, ...]:
    """Put the adapters of the command line into the first slots, in their order. ValueError if one does not fit.

    `check` raises where they would never be ready.
    """
    loaded: dict[str, AdapterState] = {}
    for name, path in args.adapters.items():
        assert port is not None
        staged = port.stage(path)
        while not staged.is_ready():
            check()
            time.sleep(_LOOK_S)
        if (error := staged.error()) is not None:
            raise ValueError(f"--lora-paths {name}: {error}")
        state = AdapterState(
            name=name, path=path, adapter_id=staged.adapter_id, rank=staged.rank, num_bytes=staged.num_bytes
        )
        contents = {it.adapter_id for it in loaded.values()}
        if state.adapter_id in contents:
            staged.abandon()
        else:
            port.place(1 + len(contents), staged)
        loaded[name] = state
    return tuple(loaded.values())


def _max_gap_s(args: ServerArgs, device: str) -> float | None:
    """By default a GPU's chunks are short anyway, and a size that was asked for holds."""
    if args.max_gap_ms is not None:
        return args.max_gap_ms / 1000
    return CPU_MAX_GAP_S if device == "cpu" and not args.chunked_prefill_size else None


def _limits(args: ServerArgs, *, max_context: int, max_gap_s: float | None) -> SchedulerLimits:
    assert args.max_running_requests is not None
    assert args.max_step_tokens is not None
    assert args.chunked_prefill_size is not None
    return SchedulerLimits(
        max_running=args.max_running_requests,
        max_step_tokens=args.max_step_tokens,
        prefill_chunk_tokens=args.chunked_prefill_size,
        max_queued=args.max_queued_requests,
        max_context=max_context,
        max_gap_s=max_gap_s,
        least_paced_tokens=LEAST_TOKENS if args.device == "cpu" else GPU_LEAST_TOKENS,
        max_queued_tokens=args.max_queued_tokens,
        max_queue_share=args.queue_share,
        queue_timeout_s=args.queue_timeout,
        request_timeout_s=args.request_timeout,
    )


def _num_host_pages(args: ServerArgs, num_pages: int, page_bytes: int) -> int:
    """Pages of the host tier that the arguments ask for; 0 without one."""
    if not args.enable_hierarchical_cache:
        return 0
    found = int(args.hicache_size * GB) // page_bytes if args.hicache_size else int(num_pages * args.hicache_ratio)
    if found < 1:
        raise ValueError(f"--hicache-size {args.hicache_size} holds no page: one takes {page_bytes} bytes")
    return found


def _host_tier(
    args: ServerArgs, placement: Placement, runner: Runner, *, num_pages: int, ranks: Ranks | None, share: PageShare
) -> tuple[HostTier, tuple[Callable[[], None], ...]] | None:
    """The host tier of `num_pages` pages, and functions that free its memory; None without pages."""
    if not num_pages:
        return None
    shared = None if ranks is None else ranks.share_host_memory(share, num_pages)
    memory, copier = placement.make_host_memory(runner, num_pages=num_pages, shared=shared)
    policy = WritePolicy(args.hicache_write_policy)
    tier = HostTier(
        num_pages=num_pages,
        copier=copier if ranks is None else ranks.over_all(copier),
        pages=memory,
        policy=policy,
        restore_policy=RestorePolicy(args.hicache_restore_policy),
        num_ready=lambda: memory.num_ready_pages,
    )
    return tier, (copier.close, memory.close)


def _fingerprint(loaded: LoadedModel, layout: KVLayout) -> Fingerprint:
    """The part of page names that identifies this model. The namespace identifies the weights."""
    return Fingerprint(
        weights_id="",
        model_config_hash=config_hash({"config": repr(loaded.config)}),
        kv_dtype=layout.dtype,
        page_size=layout.page_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
    )


def _attach_storage(args: ServerArgs, parts: EngineParts) -> None:
    """Attach the store that the arguments name. An unreachable store is tried again later, by itself."""
    kind = args.hicache_storage_backend
    if kind is None:
        return
    size = args.hicache_storage_size
    place = (kind, args.hicache_storage_dir, args.hicache_storage_url, None if size is None else int(size * GB))
    try:
        backend = open_backend(kind, directory=place[1], url=place[2], capacity_bytes=place[3])
    except StorageError as error:
        raise ValueError(f"--hicache-storage-backend {kind}: {error}") from error
    parts.storage.attach_backend(backend, place=place)


def _max_context(args: ServerArgs, loaded: LoadedModel) -> int:
    longest = loaded.config.max_context
    context = longest if args.context_length is None else args.context_length
    if context > longest:
        raise ValueError(f"--context-length must be at most {longest}, the model's own; got {context}")
    return context


def _end_ids(args: ServerArgs, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end an answer, from the model's files and from another tokenizer if one was named."""
    if args.tokenizer in (None, args.model):
        return config.eos_token_ids
    return union(config.eos_token_ids, within(tokenizer_end_ids(args.tokenizer), vocab_size=config.vocab_size))


def _kv_events(args: ServerArgs, index: int) -> KvEventsSettings | None:
    if args.kv_events_endpoint is None:
        return None
    replay = args.kv_events_replay_endpoint
    return KvEventsSettings(
        endpoint=endpoint_of(args.kv_events_endpoint, index),
        replay_endpoint=None if replay is None else endpoint_of(replay, index),
        num_kept=args.kv_events_kept,
        rank=index,
        topic=args.kv_events_topic,
        format=args.kv_events_format,
    )
