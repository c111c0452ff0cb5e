"""A posed body → a dressed person: what of the body is skin, what is cloth or hair, and which meshes are worn over it.

Nobody is nude and nobody is bald: skin that a garment's region covers takes the cloth's colour also where no mesh hides it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from training.synthetic.assets import GROUPS, Assets, Body, Garment
from training.synthetic.body import Posed, wear
from training.synthetic.mesh import CHECKS, DOTS, PLAIN, STRIPES, Material, Mesh, joined, surface

# BGR, from light to dark; between them tones are mixed.
_SKINS = np.array(
    [[0.78, 0.86, 0.96], [0.62, 0.74, 0.90], [0.48, 0.62, 0.80], [0.32, 0.45, 0.64], [0.20, 0.29, 0.44], [0.11, 0.16, 0.25]]
)
_HAIRS = np.array(
    [[0.05, 0.05, 0.06], [0.08, 0.12, 0.18], [0.14, 0.22, 0.34], [0.30, 0.45, 0.60], [0.12, 0.22, 0.45], [0.60, 0.62, 0.64]]
)
_WAIST = 0.10  # metres above the pelvis of the mean body
_SKIN, _WHITE, _IRIS, _HAIR, _TOP, _LEGS, _SHOES, _SKIRT, _LIPS = range(9)


@dataclass(frozen=True, slots=True)
class Regions:
    """Where each triangle of the body lies on the mean body: [T] each; what is known of the mean body holds for all."""

    arm: npt.NDArray[np.float64]  # 0 at the shoulder … 1 at the wrist, nan elsewhere
    leg: npt.NDArray[np.float64]  # 0 at the hip … 1 at the ankle, nan elsewhere
    height: npt.NDArray[np.float64]  # metres above the pelvis
    scalp: npt.NDArray[np.bool_]
    iris: npt.NDArray[np.bool_]
    brows: npt.NDArray[np.bool_]
    lips: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, body: Body) -> "Regions":
        """The regions of this body's triangles."""
        names = np.array(body.bone_names)
        strongest = names[body.skin.argmax(1).numpy()][body.triangles[:, 0].numpy()]
        centre = body.mean[body.triangles].mean(1).double().numpy()
        heads = dict(zip(body.bone_names, body.bone_mean.double().numpy(), strict=True))
        arm, leg = np.full((2, len(centre)), np.nan)
        for side in "LR":
            start, end = heads[f"upperarm01.{side}"], heads[f"wrist.{side}"]
            on_arm = _named(strongest, side, "upperarm", "lowerarm", "wrist", "finger", "metacarpal")
            arm[on_arm] = (centre[on_arm] - start) @ (end - start) / ((end - start) ** 2).sum()
            hip, ankle = heads[f"upperleg01.{side}"][1], heads[f"foot.{side}"][1]
            on_leg = _named(strongest, side, "upperleg", "lowerleg", "foot", "toe")
            leg[on_leg] = (hip - centre[on_leg, 1]) / (hip - ankle)
        x, y, z = np.abs(centre[:, 0]), centre[:, 1] - heads["eye.L"][1], centre[:, 2] - heads["eye.L"][2]
        head = body.part == "head"
        eyes = np.isin(body.group, (1, 2))
        front = np.zeros(len(centre), bool)
        if eyes.any():
            front[eyes] = centre[eyes, 2] > np.quantile(centre[eyes, 2], 0.6)
        return cls(
            arm=arm,
            leg=leg,
            height=centre[:, 1] - heads["root"][1],
            scalp=head & ((y > 0.07) | ((z < -0.09) & (y > -0.06))),
            iris=front,
            brows=head & (y > 0.017) & (y < 0.029) & (x > 0.012) & (x < 0.05) & (z > -0.02),
            lips=head & (y > -0.087) & (y < -0.066) & (x < 0.024) & (z > 0.0),
        )


def _named(strongest: npt.NDArray[np.str_], side: str, *starts: str) -> npt.NDArray[np.bool_]:
    own = np.char.endswith(strongest, side)
    return np.asarray(own & np.logical_or.reduce([np.char.startswith(strongest, start) for start in starts]))


def dressed(assets: Assets, regions: Regions, posed: Posed, person: int, female: bool, rng: np.random.Generator) -> Mesh:
    """Body `person` of `posed` as a mesh of that owner, with clothes, shoes and hair that are drawn at random."""
    body = assets.body
    materials = _materials(rng)
    material = np.full(len(body.triangles), _SKIN)
    drawn = np.isin(body.group, (0, 1, 2))
    suit = _one(assets.suits, rng, 0.35, "female_" if female else "male_")
    skirt = suit is None and female and rng.random() < 0.35
    sleeve, length = rng.choice([rng.uniform(0.15, 0.5), 1.0]), rng.choice([rng.uniform(0.2, 0.6), 1.0], p=[0.35, 0.65])
    collar = rng.uniform(0.45, 0.52)
    if suit is not None:  # what it does not cover itself is bare, but for what shows through it about the trunk
        sleeve, length, collar = 0.0, 0.2, 0.35
    elif skirt:
        length = 0.25
    covered_arm, covered_leg = regions.arm < sleeve, regions.leg < length
    torso = np.isnan(regions.arm) & np.isnan(regions.leg) & (body.part != "head") & (regions.height < collar)
    material[covered_arm | (torso & (regions.height >= _WAIST))] = _TOP
    material[covered_leg | (torso & (regions.height < _WAIST))] = _SKIRT if skirt else _LEGS
    tights = body.group == GROUPS.index("tights")
    if suit is None:
        drawn |= tights & (covered_arm | covered_leg | torso)
    if skirt:
        on_skirt = body.group == GROUPS.index("skirt")
        drawn |= on_skirt & (regions.height > rng.uniform(-0.65, -0.2))
        material[on_skirt] = _SKIRT
    material[np.isin(body.part, ("foot.L", "foot.R"))] = _SHOES if rng.random() < 0.85 else _SKIN
    material[np.isin(body.part, ("mouth_cavity", "tongue"))] = _LIPS
    material[np.isin(body.group, (1, 2))] = _WHITE
    material[regions.iris] = _IRIS
    material[regions.scalp | regions.brows] = _HAIR
    material[regions.lips] = _LIPS
    worn = [(suit, _TOP), (_one(assets.shoes, rng, 0.3), _SHOES), (_one(assets.hats, rng, 0.06), _SKIRT)]
    hair = _one(assets.hair, rng, 0.75 if female else 0.6)
    if hair is None and female and rng.random() < 0.6:
        shell = body.group == GROUPS.index("hair")
        drawn |= shell
        material[shell] = _HAIR
    hidden = np.zeros(len(body.mean), bool)
    for garment in (suit, worn[1][0]):
        if garment is not None:
            hidden |= garment.hidden
    drawn &= ~hidden[body.triangles.numpy()].all(1)
    kept = torch.tensor(drawn)
    meshes = [
        surface(
            posed.vertices[person],
            posed.rest[person],
            body.triangles[kept],
            person,
            torch.tensor(material)[kept],
            materials,
        )
    ]
    for garment, colour in [*worn, (hair, _HAIR)]:
        if garment is not None:
            meshes.append(_worn(garment, posed, person, colour, materials, body))
    return joined(meshes)


def _worn(garment: Garment, posed: Posed, person: int, colour: int, materials: list[Material], body: Body) -> Mesh:
    rest, points = wear(garment, posed, person)
    material = torch.full((len(garment.triangles),), colour)
    if colour == _TOP:
        pelvis = body.bone_mean[0, 1] * (posed.rest[person, :, 1].amax() / body.mean[:, 1].amax())
        material[rest[garment.triangles].mean(1)[:, 1] < pelvis + _WAIST] = _LEGS
    return surface(points, rest, garment.triangles, person, material, materials)


def _one(garments: list[Garment], rng: np.random.Generator, share: float, start: str = "") -> Garment | None:
    fitting = [garment for garment in garments if garment.name.startswith(start)]
    chance, number = rng.random(), int(rng.integers(1 << 30))
    return fitting[number % len(fitting)] if fitting and chance < share else None


def _materials(rng: np.random.Generator) -> list[Material]:
    """By number: skin, white of the eye, iris, hair, top, legs, shoes, skirt, lips."""
    skin = _mixed(_SKINS, rng)
    hair = _mixed(_HAIRS, rng) if rng.random() < 0.5 else _HAIRS[rng.integers(3)]
    top = cloth(rng)
    return [
        Material(_f(skin), _f(skin), mottled=0.06),
        Material(_f([0.9, 0.9, 0.92]), _f([0.9, 0.9, 0.92]), mottled=0.0),
        Material(_f(rng.uniform(0.02, 0.3, 3)), _f([0, 0, 0]), mottled=0.0),
        Material(_f(hair), _f(hair * 0.6), STRIPES, _f([90, 15, 90]), mottled=0.25),
        top,
        cloth(rng) if rng.random() < 0.85 else top,
        cloth(rng, plain=True),
        cloth(rng) if rng.random() < 0.6 else top,
        Material(_f(skin * [0.75, 0.7, 0.95]), _f(skin), mottled=0.0),
    ]


def cloth(rng: np.random.Generator, plain: bool = False) -> Material:
    """A cloth of random colours, often grey, dark or pale, and pattern."""
    colours = rng.uniform(0.03, 0.95, (2, 3))
    for number in range(2):
        if rng.random() < 0.45:
            colours[number] = colours[number].mean() + rng.normal(0, 0.03, 3)
    pattern = PLAIN if plain else rng.choice([PLAIN, STRIPES, CHECKS, DOTS], p=[0.6, 0.16, 0.12, 0.12])
    waves = rng.uniform(6, 45) * (np.eye(3)[rng.integers(3)] if pattern == STRIPES else np.ones(3))
    return Material(_f(colours[0]), _f(colours[1]), int(pattern), _f(waves), mottled=float(rng.uniform(0.03, 0.15)))


def _mixed(colours: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    place = rng.uniform(0, len(colours) - 1)
    low = int(place)
    return np.asarray(colours[low] + (place - low) * (colours[low + 1] - colours[low]) + rng.normal(0, 0.015, 3))


def _f(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.clip(np.asarray(values, np.float32), 0, None)
