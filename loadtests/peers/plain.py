"""The endpoint of every tutorial, `python -m loadtests.peers.plain PORT THREADS`: FastAPI runs it on its own threads.

THREADS are those of a call: 0 as ONNX Runtime comes, "torch" for PyTorch in its place, as that comes.
"""

import sys
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Form, UploadFile

from app.inference.model_store import load_model
from loadtests.peers.work import HOST, MODEL, Work, onnx_work, work_of


def torch_work() -> Work:
    """With the weights in PyTorch, as it comes."""
    import torch

    from training.lpn import LPN

    network = LPN(50)
    network.load_state_dict(torch.load(MODEL / "weights.pth", weights_only=True))
    network.eval()
    preparation = load_model(MODEL).description.input
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preparation.mean, preparation.std))

    def heatmaps_of(crops: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network((torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()

    return work_of(heatmaps_of)


def serve(work: Work, port: int) -> None:
    """Until a signal."""
    app = FastAPI()

    @app.post("/v1/pose")
    def pose(image: UploadFile, boxes: Annotated[str, Form()]) -> dict[str, Any]:
        return work(image.file.read(), boxes)

    uvicorn.run(app, host=HOST, port=port, log_level="error")


if __name__ == "__main__":
    serve(torch_work() if sys.argv[2] == "torch" else onnx_work(int(sys.argv[2])), int(sys.argv[1]))
