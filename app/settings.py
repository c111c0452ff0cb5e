"""Every setting of the service: environment variable POSE_<NAME>, its unit, its default and why."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_LEVEL = "(DEBUG|INFO|WARNING|ERROR)"
_MODEL_STORE = Path(__file__).parent.parent / "model_store"


class Settings(BaseSettings):
    """The settings, read from the environment; the descriptions are the documentation (app/README.md lists them)."""

    model_config = SettingsConfigDict(env_prefix="POSE_", extra="forbid", frozen=True)

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on. Only this machine, until you say otherwise."
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    model_store: Path = Field(_MODEL_STORE, description="Folder of the models, <name>/<version>/model.onnx.")
    default_model: str = Field("lpn50", description="The model of requests that name none: name or name/version.")
    detector: str = Field(
        "person-det", description="The detector of pictures without boxes: name or name/version; empty: none."
    )
    max_body_bytes: int = Field(
        32 * 2**20, ge=1024, description="Bytes of a request's body, counted on the wire. Two large camera photos."
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=2**31 - 1,
        description="Pixels of a picture, read from its header before decoding. 150 MB then, 300 to 640 MB meanwhile.",
    )
    max_images: int = Field(16, ge=1, description="Pictures in a request.")
    max_boxes: int = Field(100, ge=1, description="Boxes for a picture. More people than a photo shows at a useful size.")
    queue_crops: int = Field(
        400, ge=1, description="Crops admitted at once, over all requests. About two seconds of two cores."
    )
    queue_bytes: int = Field(
        128 * 2**20,
        ge=1024,
        description="Bytes of bodies held at once, over all requests, until answered; and of drawn answers, until read.",
    )
    timeout_ms: int = Field(10_000, ge=1, description="Deadline in milliseconds of a request that names none.")
    max_timeout_ms: int = Field(60_000, ge=1, description="Longest deadline in milliseconds that a request may name.")
    body_timeout_s: float = Field(
        15,
        gt=0,
        description="Seconds for a head, then for a body to arrive (32 MiB at 20 Mbit/s), and for an answer to be read.",
    )
    max_connections: int = Field(
        512,
        ge=1,
        description="Open connections; over it an idle one is closed. The limit of open files is raised to suit it.",
    )
    max_streams: int = Field(
        16,
        ge=0,
        description="Streams at once; their frames may hold queue_bytes besides: 2.8 MB a frame, three a stream. 0: none.",
    )
    drain_s: int = Field(20, ge=0, description="Seconds that a stopping service gives accepted requests to end.")
    max_batch_crops: int = Field(
        4,
        ge=1,
        le=64,
        description="Crops in one call of the network. Larger batches are no faster on a CPU, and less fair.",
    )
    lanes: int = Field(0, ge=0, le=1024, description="Threads that run networks; 0: one a core of the quota and affinity.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Keys that clients must send one of, separated by commas. None: everybody may ask."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may ask from a browser, separated by commas. None: no other origin."
    )
    log_level: str = Field(
        "INFO",
        description="Least level of log lines, then of single loggers: INFO,app.requests=WARNING.",
    )

    @property
    def max_frame_bytes(self) -> int:
        """Bytes of a frame: a stream holds one that comes, one that waits and one that is worked on, and all streams together
        as much as all bodies may."""
        return min(self.max_body_bytes, self.queue_bytes // (3 * max(1, self.max_streams)))

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if value and not parts:  # who writes "," wants keys: none would open the service to everybody
            raise ValueError("there is nothing between the commas")
        return parts

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
                raise ValueError(
                    f"{origin} is no origin: scheme and host in small letters without a slash, https://example.org"
                )
        return value

    @field_validator("log_level")
    @classmethod
    def _levels(cls, value: str) -> str:
        if not re.fullmatch(rf"{_LEVEL}(,[a-z_.]+={_LEVEL})*", value):
            raise ValueError("it is DEBUG, INFO, WARNING or ERROR, and more for single loggers: INFO,app.requests=WARNING")
        return value

    @field_validator("max_timeout_ms")
    @classmethod
    def _not_below_the_default(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("timeout_ms", 0):
            raise ValueError("it is less than POSE_TIMEOUT_MS")
        return value


def strange_settings(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: POSE_API_KEY, misspelt, would open the service to everybody."""
    prefix = Settings.model_config["env_prefix"]
    known = {prefix + name.upper() for name in Settings.model_fields}
    return sorted(name for name in environment if name.upper().startswith(prefix) and name.upper() not in known)
