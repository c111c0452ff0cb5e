"""The OpenAPI document: FastAPI's, and what it cannot know: the bodies, the problems, the headers and the keys."""

from typing import Any

from fastapi import FastAPI

from app.api.bodies import PICTURE_TYPES
from app.api.middleware import OPEN_PATHS
from app.api.problems import PROBLEMS
from app.api.schemas import JsonBody, Options, ProblemOut
from app.settings import Settings

_JSON = "application/json"
_SCHEMAS = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}
_ANYWHERE = ("malformed_body", "request_timeout", "body_too_large", "internal_error", "not_ready")
# path → the problems that it is answered with, beside those that any request may meet
_PROBLEMS_OF: dict[str, tuple[str, ...]] = {
    "/v1/pose": tuple(
        code
        for code in PROBLEMS
        if code not in ("unauthorized", "origin_not_allowed", "not_found", "method_not_allowed", *_ANYWHERE)
    ),
    "/v1/models": (),
    "/v1/models/{name}": ("model_not_found",),
    "/livez": (),
    "/readyz": ("shutting_down",),
    "/metrics": (),
}
_HEADERS = {
    "X-Request-ID": {
        "description": "The request's own where it is 1 to 128 of A-Za-z0-9._-, else one made here; also in the log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Server-Timing": {
        "description": "Milliseconds of each stage: total;dur=… and, of an answered pose request, all those before it.",
        "schema": {"type": "string"},
    },
}
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds until it is worth asking again.", "schema": {"type": "integer", "minimum": 1}}
}
_CHALLENGE = {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}}
_KEYS = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}


def document_of(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The document of the app with these settings. To be called once: FastAPI keeps its own, which is changed."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    schemas |= _json_body(settings)
    document["paths"]["/v1/pose"]["post"] |= _pose_request(settings)
    schemas["ProblemOut"] = ProblemOut.model_json_schema(ref_template=_SCHEMAS)
    schemas |= schemas["ProblemOut"].pop("$defs")
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of problems
        schemas.pop(unused, None)
    if settings.api_keys:
        document["components"]["securitySchemes"] = _KEYS
    for path, operations in document["paths"].items():
        locked = bool(settings.api_keys) and path not in OPEN_PATHS
        for operation in operations.values():
            answers = {"200": operation["responses"]["200"]} | _problems(_PROBLEMS_OF[path], locked)
            for answer in answers.values():
                answer["headers"] = _HEADERS | answer.get("headers", {})
            operation["responses"] = answers
            if locked:
                operation["security"] = [{name: []} for name in _KEYS]
    return document


def _problems(codes: tuple[str, ...], locked: bool) -> dict[str, Any]:
    """An answer for each status of the problems."""
    answers: dict[str, Any] = {}
    for code, (status, title) in PROBLEMS.items():
        if code not in (*codes, *_ANYWHERE) and not (locked and code == "unauthorized"):
            continue
        answer = answers.setdefault(str(status), {"description": "", "content": {}, "headers": {}})
        answer["description"] = "; ".join(filter(None, (answer["description"], f"{code}: {title}")))
        answer["content"] = {"application/problem+json": {"schema": {"$ref": _SCHEMAS.format(model="ProblemOut")}}}
        if status in (429, 503):
            answer["headers"] = _RETRY_AFTER
        elif code == "unauthorized":
            answer["headers"] = _CHALLENGE
    return answers


def _json_body(settings: Settings) -> dict[str, Any]:
    """The schemas of the JSON body of POST /v1/pose. They have names, by which generated clients call their types."""
    body = JsonBody.model_json_schema(ref_template=_SCHEMAS)
    image = body.pop("$defs")["JsonImage"]
    body["properties"]["images"]["maxItems"] = settings.max_images
    for schema in image["properties"]["boxes"]["anyOf"]:
        if schema.get("type") == "array":
            schema["maxItems"] = settings.max_boxes
    _limit_options(body["properties"], settings)
    for schema in (*body["properties"].values(), *image["properties"].values()):
        schema.pop("default", None)  # see _without_null
    body["examples"] = [{"images": [{"data": "the picture file in base64"}]}]  # else tools make one that is refused
    return {"JsonBody": body, "JsonImage": image}


def _pose_request(settings: Settings) -> dict[str, Any]:
    """The options and bodies of POST /v1/pose, which are read in bodies.py and so unknown to FastAPI."""
    properties = Options.model_json_schema()["properties"]
    _limit_options(properties, settings)
    options = {name: _without_null(schema) for name, schema in properties.items()}
    boxes = {
        "type": "string",
        "description": "The people: x,y,w,h joined by ; or repeated, or one JSON list of [x, y, w, h], in pixels of the "
        "upright picture from its top left corner; of several pictures a JSON list with such a list (or null) for each. "
        "Left out: the service finds the people. Empty: there is nobody. Beside JSON: not taken; each picture has its own.",
        "examples": ["120,40,180,380"],
    }
    pictures = {"type": "array", "items": _BINARY, "minItems": 1, "maxItems": settings.max_images}
    form = {  # its other fields are not named: generated clients and the page would fill them in as well as the query
        "type": "object",
        "description": "Options may be fields here instead of in the query. boxes of several pictures are a JSON list with a "
        "list (or null) for each.",
        "required": ["image"],
        "properties": {"image": pictures},
    }
    content: dict[str, Any] = {kind: {"schema": _BINARY} for kind in PICTURE_TYPES}
    content |= {"multipart/form-data": {"schema": form}, _JSON: {"schema": {"$ref": _SCHEMAS.format(model="JsonBody")}}}
    parameters = [
        {"in": "query", "name": name, "schema": schema, "description": schema["description"]}
        for name, schema in {"boxes": boxes, **options}.items()
    ]
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def _limit_options(properties: dict[str, Any], settings: Settings) -> None:
    """Write the limits that settings give into the schemas of optional numbers."""
    for name, most in (("timeout_ms", settings.max_timeout_ms), ("max_people", settings.max_boxes)):
        properties[name]["anyOf"][0]["maximum"] = most


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an option as a text, which knows no null: it is left out instead. Nor has it a default, which clients
    would send, to be refused where the body names the option too."""
    kept = {name: value for name, value in schema.items() if name != "default"}
    (value, *_) = kept.pop("anyOf", [{}])
    return {**value, **kept}
