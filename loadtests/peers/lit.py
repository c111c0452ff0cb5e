"""LitServe, `python -m loadtests.peers.lit PORT THREADS WORKERS`.

THREADS are those of a call, 0 as ONNX Runtime comes; WORKERS are processes.
"""

import sys
from typing import Any

import litserve
from fastapi import Request

from loadtests.peers.work import HOST, onnx_work


class Api(litserve.LitAPI):
    """Photo and box in, joints out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe gives it
        """Open the network in a worker."""
        self.work = onnx_work(int(sys.argv[2]))

    def decode_request(self, request: Request) -> tuple[bytes, str]:
        """The form's parts."""
        return request["image"].file.read(), request["boxes"]  # type: ignore[index] - LitServe gives the form

    def predict(self, x: tuple[bytes, str]) -> dict[str, Any]:
        """The answer."""
        return self.work(*x)


if __name__ == "__main__":
    server = litserve.LitServer(Api(api_path="/v1/pose"), accelerator="cpu", workers_per_device=int(sys.argv[3]))
    server.run(host=HOST, port=int(sys.argv[1]), log_level="error", generate_client_file=False)
