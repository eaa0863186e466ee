"""Packages that a flag needs and that may be missing: checked first, and without importing them."""

from importlib.util import find_spec

from headwater.launch.config import ServerArgs


def check_extras(args: ServerArgs) -> None:
    """ValueError that names the extra to install."""
    if args.enable_trace and find_spec("opentelemetry") is None:
        raise ValueError("--enable-trace needs OpenTelemetry: pip install 'headwater[otel]'")
