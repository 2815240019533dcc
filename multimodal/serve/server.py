"""Run the application with uvicorn, until a signal ends it."""

import uvicorn

from multimodal.api import Model
from multimodal.origin.credentials import Signer
from multimodal.serve.app import make_app
from multimodal.serve.engine.settings import Settings

KEEP_ALIVE = 30  # seconds that an idle connection stays


def make_server(
    model: Model, settings: Settings, host: str, port: int, signer: Signer | None = None
) -> uvicorn.Server:
    """A server that is not running yet."""
    config = uvicorn.Config(
        make_app(model, settings, signer),
        host=host,
        port=port,
        log_level="warning",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(settings.stop_timeout),
        server_header=False,
    )
    return uvicorn.Server(config)


def serve(
    model: Model, settings: Settings, host: str, port: int, signer: Signer | None = None
) -> None:
    """Answer requests. SIGINT and SIGTERM let running requests end, and then return.

    Raises:
        OSError: if the address is in use.
    """
    make_server(model, settings, host, port, signer).run()
