"""GET /v1/models: what the service can run."""

from fastapi import APIRouter, Request

from app.api.schemas import ModelOut, ModelsOut
from app.inference.model_store import DetectorDescription, ModelDescription
from app.inference.pipeline import Pipeline

router = APIRouter()


@router.get("/v1/models", summary="Pose models and detector")
async def models(request: Request) -> ModelsOut:
    """Every pose model of the store, by name and version, and the detector."""
    pipeline: Pipeline = request.app.state.pipeline
    return ModelsOut(models=[_out(model, pipeline) for model in pipeline.models.descriptions])


@router.get("/v1/models/{name:path}", summary="One model")
async def model(request: Request, name: str) -> ModelOut:
    """The model of that name/version, or the latest of that name."""
    pipeline: Pipeline = request.app.state.pipeline
    detector = pipeline.models.detector.description if pipeline.models.detector else None
    if detector and name in (detector.name, detector.id):
        return _out(detector, pipeline)
    return _out(pipeline.models.find(name).description, pipeline)


def _out(model: ModelDescription | DetectorDescription, pipeline: Pipeline) -> ModelOut:
    pose = model if isinstance(model, ModelDescription) else None
    detector = model if isinstance(model, DetectorDescription) else None
    return ModelOut(
        kind="pose" if pose else "detector",
        name=model.name,
        version=model.version,
        network=model.network,
        precision=model.precision,
        sha256=model.sha256,
        default=model.id == pipeline.models.default or detector is not None,
        input_width=model.input.width,
        input_height=model.input.height,
        keypoints=list(pose.keypoints.names) if pose else [],
        skeleton=[list(pair) for pair in pose.keypoints.skeleton] if pose else [],
        keypoint_threshold=pose.keypoints.threshold if pose else None,
        detection_threshold=detector.detection.threshold if detector else None,
        accuracy=model.accuracy,
    )
