"""How the service stops: no connection is closed under a request that is on its way."""

import asyncio
import logging
import socket
from contextlib import suppress
from typing import Any

import uvicorn

from app.api.connections import LAST_REQUESTS_SECONDS
from app.inference.pipeline import Pipeline

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which says that it stops before it does: readiness goes off, and answers close their connections."""

    def __init__(self, config: uvicorn.Config, pipeline: Pipeline) -> None:
        super().__init__(config)
        self._pipeline = pipeline

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: no connection is closed under a request that is on its way."""
        self._pipeline.draining = True
        log.info("the service stops", extra={"connections": len(self.server_state.connections)})
        if self.server_state.connections:
            await asyncio.sleep(LAST_REQUESTS_SECONDS)
        for listener in sockets or []:
            await self._take_the_last(listener)
        await super().shutdown(sockets)
        log.info("the service has stopped")

    async def _take_the_last(self, listener: socket.socket) -> None:
        """Stop to listen, but take the connections that the kernel has made already: it would reset them."""
        waiting = []
        with suppress(OSError):  # no more of them, or no descriptor left
            while True:
                waiting.append(listener.accept()[0])
        with suppress(OSError):  # to macOS a listener is not connected; it is closed soon
            listener.shutdown(socket.SHUT_RDWR)
        for connection in waiting:
            connection.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made
