"""GET /v1/models: what the service can run."""

from fastapi import APIRouter, Request

from app.api.schemas import ModelOut, ModelsOut, ProblemOut
from app.inference.model_store import ModelDescription
from app.inference.pipeline import Pipeline

router = APIRouter()


@router.get("/v1/models", summary="All models")
async def models(request: Request) -> ModelsOut:
    """Every model of the store, by name and version."""
    pipeline: Pipeline = request.app.state.pipeline
    return ModelsOut(models=[_out(model.description, pipeline) for model in pipeline.models])


@router.get("/v1/models/{name:path}", summary="One model", responses={404: {"model": ProblemOut}})
async def model(request: Request, name: str) -> ModelOut:
    """The model of that name/version, or the latest of that name."""
    pipeline: Pipeline = request.app.state.pipeline
    return _out(pipeline.find(name).description, pipeline)


def _out(model: ModelDescription, pipeline: Pipeline) -> ModelOut:
    return ModelOut(
        name=model.name,
        version=model.version,
        network=model.network,
        precision=model.precision,
        sha256=model.sha256,
        default=model.id == pipeline.default,
        input_width=model.input.width,
        input_height=model.input.height,
        keypoints=list(model.keypoints.names),
        skeleton=list(model.keypoints.skeleton),
        keypoint_threshold=model.keypoints.threshold,
        accuracy=model.accuracy,
    )
