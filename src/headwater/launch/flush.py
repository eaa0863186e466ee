"""`headwater flush`: empty a running server's KV cache from the shell."""

from typing import Annotated

import httpx
import typer

from headwater.launch.chat import DEFAULT_URL, explain_transport_error


def flush(
    url: Annotated[str, typer.Option(help="Where the server is.")] = DEFAULT_URL,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the engine to be idle.", min=0.0)] = 0.0,
    admin_key: Annotated[
        str | None,
        typer.Option(help="The server's --admin-api-key (or --api-key).", envvar="HEADWATER_ADMIN_API_KEY"),
    ] = None,
) -> None:
    """Flush the KV cache of a running server. Exits with 1 when the server refuses."""
    headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        answer = httpx.post(
            url.rstrip("/") + "/flush_cache",
            params={"timeout": timeout},
            headers=headers,
            timeout=httpx.Timeout(10.0, read=timeout + 10.0),
            trust_env=False,
        )
    except httpx.TransportError as error:
        typer.secho(explain_transport_error(error, url), err=True, fg="red")
        raise typer.Exit(2) from None
    typer.echo(answer.text.rstrip())
    if answer.status_code >= 300:
        raise typer.Exit(1)
