"""What a training run depends on, beside the data: one TOML file."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.augment import Augmentation
from training.files import DataError
from training.lpn import Depth


def table_in(file: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises DataError that names it and the fault."""
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not TOML: {error}") from error


class Table(BaseModel):
    """A table of a config: what it does not name is refused."""

    model_config = ConfigDict(extra="forbid")


class FromToml(Table):
    """The content of a TOML file, which holds nothing else."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises DataError that names the file and the fault."""
        return cls.of(table_in(file), file)

    @classmethod
    def of(cls, table: dict[str, Any], file: Path) -> Self:
        """What a table says that comes from that file. Raises DataError that names it and the fault."""
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            faults = [
                (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
            ]
            raise DataError(f"{file}: {'; '.join(': '.join(filter(None, fault)) for fault in faults)}") from error


def _some_share(sets: dict[str, float]) -> dict[str, float]:
    if not any(sets.values()):
        raise ValueError("no set has a share over 0")
    return sets


# How often what is in a set is drawn, by the set's name, relative to the others; an epoch of nothing would never end.
Shares = Annotated[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], AfterValidator(_some_share)]


class Ending(Table):
    """The last part of a stage, while the learning rate is low: what the network sees then it keeps best."""

    share: float = Field(gt=0, lt=1)  # of the stage's steps
    sets: Shares  # of the stage's; one that is left out is not drawn
    augmentation: Augmentation | None = None  # instead of the config's


class Stage(Table):
    """One run of the learning-rate schedule."""

    height: int = Field(gt=0, le=1024, multiple_of=64)  # ¾ of it, the width, must be a multiple of 16
    crops: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(ge=0, allow_inf_nan=False)
    sets: Shares | None = None  # instead of the config's
    ending: Ending | None = None
    sigma: float = Field(gt=0, allow_inf_nan=False)  # of the target Gaussians, in heatmap cells
    warm_up: int = Field(200, ge=0)  # steps, half of the stage's at most
    average: float = Field(0.998, ge=0, lt=1)  # of the weights, a step
    placement: float = Field(1.0, ge=0, allow_inf_nan=False)  # weight of the placement loss beside the squared error
    hardest: int = Field(17, ge=1, le=17)  # joints of a person that count: those furthest from their least loss

    @model_validator(mode="after")
    def _some_step(self) -> Self:
        if self.crops < self.batch:
            raise ValueError("crops are fewer than one batch")
        return self


class Distillation(Table):
    """A stored pose model whose heatmaps, with flip test, are targets beside the labels."""

    model: Path  # its folder in a store; it must take crops of every stage's height
    share: float = Field(gt=0, le=1)  # of the loss; the labels have the rest


class Rendered(Table):
    """People who are rendered while the training runs (training/synthetic), and take the places of others in each batch."""

    assets: Path  # folder of poses.npz, anny_compact.npz and the garments
    backgrounds: list[Path] = []  # COCO files of photos
    share: float = Field(gt=0, le=1)  # of each batch
    hdm05: bool = False  # poses_hdm05.npz too, whose licence is CC BY-SA 3.0


class Config(FromToml):
    """The content of a config file."""

    seed: int = Field(ge=0)
    depth: Depth
    attention: bool = True  # GC blocks; for ablations: the service's models have them
    sets: Shares
    augmentation: Augmentation = Augmentation()
    distillation: Distillation | None = None
    rendered: Rendered | None = None
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _endings_of_sets(self) -> Self:
        for number, stage in enumerate(self.stages):
            unknown = (stage.ending.sets if stage.ending else {}).keys() - (stage.sets or self.sets).keys()
            if unknown:
                raise ValueError(f"stages.{number}.ending.sets: no set of the stage: {', '.join(sorted(unknown))}")
        return self
