"""Flags of the HTTP server: address, keys, limits on what clients send."""

from typing import Annotated, Literal

from headwater.launch.flags import Flag
from headwater.launch.model_args import ModelArgs

HTTP = "HTTP server"
MIB = 1 << 20


class HttpArgs(ModelArgs, kw_only=True, frozen=True, omit_defaults=True):
    """The side that clients see."""

    host: Annotated[str, Flag("Address to listen on.", HTTP)] = "127.0.0.1"
    port: Annotated[int, Flag("Port to listen on; 0 takes a free one.", HTTP, low=0, high=65535)] = 30000
    api_key: Annotated[
        str | None,
        Flag(
            "Key that clients must send as a Bearer token, or several keys, separated by commas.",
            HTTP,
            env="HEADWATER_API_KEY",
            is_secret=True,
        ),
    ] = None
    admin_api_key: Annotated[
        str | None,
        Flag(
            "Key for the control routes (flush, pause, abort).",
            HTTP,
            env="HEADWATER_ADMIN_API_KEY",
            is_secret=True,
        ),
    ] = None
    allowed_origin: Annotated[
        str | None,
        Flag(
            "Origins of web pages that may use the server, such as https://chat.example, separated by commas, or *. "
            "Default: only the server's own pages.",
            HTTP,
        ),
    ] = None
    allowed_host: Annotated[
        str | None,
        Flag(
            "Additional host names of this server, separated by commas, or *. By default, names are checked only if "
            "the server listens on a loopback address without --api-key.",
            HTTP,
        ),
    ] = None
    max_body_bytes: Annotated[
        int, Flag("Largest accepted request body, in bytes.", HTTP, low=1024, high=1 << 30)
    ] = 4 * MIB
    allow_pickled_tensors: Annotated[
        bool,
        Flag(
            "Accept tensors in the pickles of SGLang's trainers (/update_weights_from_tensor). They are read without "
            "running anything of them. Needs --admin-api-key.",
            HTTP,
        ),
    ] = False
    staging_dir: Annotated[
        str,
        Flag("Folder in memory for weights that a trainer sends, until later ones replace them.", HTTP),
    ] = "/dev/shm"
    stage_weights_on_gpu: Annotated[
        Literal["auto", "never"],
        Flag(
            "Keep tensors from a trainer's GPU on a GPU until they are swapped in, beside the files in --staging-dir. "
            "auto: while its free memory also holds the engine's new weights; for one engine of one rank.",
            HTTP,
        ),
    ] = "auto"
    max_staged_weights_bytes: Annotated[
        int | None,
        Flag(
            "Most bytes of such weights. Default: three quarters of what is free in the folder.",
            HTTP,
            low=1 << 20,
            high=1 << 44,
        ),
    ] = None
    max_header_bytes: Annotated[
        int, Flag("Largest accepted total of a request's URL and headers, in bytes.", HTTP, low=1024, high=16 * MIB)
    ] = 64 << 10
    header_timeout: Annotated[
        float,
        Flag("Seconds within which a client must send the headers of a request.", HTTP, low=0.1, high=3600),
    ] = 10.0
    keep_alive_timeout: Annotated[
        float,
        Flag(
            "Seconds for which a connection without a request stays open. A client that keeps its connections longer "
            "can lose a request that it sends while the server closes one.",
            HTTP,
            low=0.1,
            high=86400,
        ),
    ] = 75.0
    max_connections: Annotated[
        int | None,
        Flag(
            "Most open connections; one more replaces an idle connection, or gets 503. Default: as many as the limit "
            "on open files permits, at most 16384.",
            HTTP,
            low=1,
            high=1_000_000,
        ),
    ] = None
    max_stored_responses: Annotated[
        int,
        Flag("Most responses that are kept for previous_response_id; 0: none.", HTTP, low=0, high=1_000_000),
    ] = 1000
    max_stored_response_bytes: Annotated[
        int, Flag("Most memory for kept responses, in bytes.", HTTP, low=0, high=1 << 40)
    ] = 64 * MIB
    max_control_timeout: Annotated[
        float,
        Flag("Longest timeout of a control request, in seconds.", HTTP, low=0, high=86400),
    ] = 3600.0
    flush_default_timeout: Annotated[
        float,
        Flag(
            "Seconds that a flush without `timeout` waits. For routers that send none; SGLang's servers do not wait.",
            HTTP,
            low=0,
            high=86400,
        ),
    ] = 0.0
    flush_default_mode: Annotated[
        Literal["idle", "now", "drain"], Flag("The mode of a flush without `mode`, as routers send it.", HTTP)
    ] = "idle"
    disable_dashboard: Annotated[bool, Flag("Do not serve the operating page at /dashboard.", HTTP)] = False
    dashboard_show_text: Annotated[
        bool,
        Flag(
            "Show the beginning of cached prompts on the operating page. By default it shows numbers and no text.", HTTP
        ),
    ] = False
    enable_trace: Annotated[
        bool,
        Flag(
            "Send a trace of each request by OpenTelemetry, to where its environment variables say "
            "(OTEL_EXPORTER_OTLP_ENDPOINT and others). Needs the extra `otel`.",
            HTTP,
        ),
    ] = False
    log_format: Annotated[
        Literal["human", "json"], Flag("Form of the log: lines to read, or one JSON object a line.", HTTP)
    ] = "human"
    log_prompts: Annotated[
        bool, Flag("Log the beginning of prompts and answers. By default the log has no text of clients.", HTTP)
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Flag("Lowest level of log messages.", HTTP)
    ] = "info"
