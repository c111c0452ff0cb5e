"""What a person wears, drawn at random: garments, painted or padded cloth, skin, hair and their colours.

Nobody is nude and nobody is bald: the trunk is always under cloth, and the scalp has the colour of hair.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.synthetic.garments import HAIR, HAT, SHOES, SUIT, Garment
from training.synthetic.mesh import CHECKS, DOTS, PLAIN, STRIPES, Material

OF_SKIN, OF_WHITE, OF_IRIS, OF_HAIR, OF_TOP, OF_LEGS, OF_SHOES, OF_SKIRT, OF_LIPS, OF_BROWS = range(10)  # materials
MATERIALS = 10  # of a person

# BGR, from light to dark; between them tones are mixed.
_SKINS = np.array(
    [[0.78, 0.86, 0.96], [0.62, 0.74, 0.90], [0.48, 0.62, 0.80], [0.32, 0.45, 0.64], [0.20, 0.29, 0.44], [0.11, 0.16, 0.25]]
)
# Black, brown, light brown, blond, red, grey.
_HAIRS = np.array(
    [[0.05, 0.05, 0.06], [0.08, 0.12, 0.18], [0.14, 0.22, 0.34], [0.30, 0.45, 0.60], [0.12, 0.22, 0.45], [0.60, 0.62, 0.64]]
)


@dataclass(frozen=True, slots=True)
class Outfit:
    """How a body is dressed. Cloth ends at shares of limbs: 0 shoulder or hip, 1 wrist or ankle; heights: over the pelvis."""

    sleeve: float
    leg: float
    collar: float  # height
    hem: float | None  # height of the lower edge of a skirt; None: no skirt
    shell: bool  # whether cloth stands off the skin; a suit of its own needs none
    loose: tuple[float, float]  # metres that it stands off more, above and below the waist
    barefoot: bool
    long_hair: bool  # a shell of hair down to the shoulders
    worn: list[tuple[int, int]]  # garments and their materials
    materials: list[Material]


def random_outfit(garments: list[Garment], female: bool, rng: np.random.Generator) -> Outfit:
    """What somebody wears."""
    suit = _one(garments, SUIT, 0.35, rng, "female_" if female else "male_")
    shoes = _one(garments, SHOES, 0.35, rng)
    hair = _one(garments, HAIR, 0.75 if female else 0.6, rng)
    hat = _one(garments, HAT, 0.06, rng)
    skirt = suit is None and female and rng.random() < 0.35
    sleeve = rng.choice([rng.uniform(0.15, 0.5), 1.0])
    leg = rng.choice([rng.uniform(0.2, 0.6), 1.0], p=[0.35, 0.65])
    collar = rng.uniform(0.45, 0.52)
    if suit is not None:  # what it leaves open is painted about the trunk, under it
        sleeve, leg, collar = 0.0, 0.2, 0.35
    elif skirt:
        leg = 0.25
    worn = [(suit, OF_TOP), (shoes, OF_SHOES), (hat, OF_SKIRT), (hair, OF_HAIR)]
    return Outfit(
        sleeve=float(sleeve),
        leg=float(leg),
        collar=float(collar),
        hem=float(rng.uniform(-0.65, -0.2)) if skirt else None,
        shell=suit is None,
        loose=(float(rng.uniform(-0.004, 0.02)), float(rng.uniform(-0.004, 0.025))),
        barefoot=bool(rng.random() < 0.12),
        long_hair=bool(hair is None and female and rng.random() < 0.6),
        worn=[(number, material) for number, material in worn if number is not None],
        materials=_materials(rng),
    )


def cloth(rng: np.random.Generator, plain: bool = False) -> Material:
    """A cloth of random colours, often grey, dark or pale, and pattern."""
    colours = rng.uniform(0.03, 0.95, (2, 3))
    for number in range(2):
        if rng.random() < 0.6:
            colours[number] = colours[number].mean() + rng.normal(0, 0.04, 3)
    pattern = PLAIN if plain else rng.choice([PLAIN, STRIPES, CHECKS, DOTS], p=[0.64, 0.14, 0.12, 0.1])
    waves = rng.uniform(6, 45) * (np.eye(3)[rng.integers(3)] if pattern == STRIPES else np.ones(3))
    return Material(colours[0], colours[1], int(pattern), waves, mottled=float(rng.uniform(0.03, 0.15)))


def _one(garments: list[Garment], kind: str, share: float, rng: np.random.Generator, start: str = "") -> int | None:
    """One of that kind whose name begins so, or none; as many numbers are drawn either way."""
    fitting = [number for number, each in enumerate(garments) if each.kind == kind and each.name.startswith(start)]
    chance, number = rng.random(), int(rng.integers(1 << 30))
    return fitting[number % len(fitting)] if fitting and chance < share else None


def _materials(rng: np.random.Generator) -> list[Material]:
    """In the order of the OF_ numbers."""
    skin = _mixed(_SKINS, rng)
    hair = _mixed(_HAIRS, rng) if rng.random() < 0.5 else _HAIRS[rng.integers(3)]
    top = cloth(rng)
    return [
        Material(skin, mottled=0.06),
        Material([0.85, 0.85, 0.87], mottled=0.0),
        Material(rng.uniform(0.02, 0.3, 3), mottled=0.0),
        Material(hair, hair * 0.6, STRIPES, [90, 15, 90], mottled=0.25),
        top,
        cloth(rng) if rng.random() < 0.85 else top,
        cloth(rng, plain=True),
        cloth(rng) if rng.random() < 0.6 else top,
        Material(skin * [0.72, 0.66, 0.95], mottled=0.0),
        Material(0.75 * hair + 0.25 * skin * 0.6, mottled=0.0),
    ]


def _mixed(colours: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    place = rng.uniform(0, len(colours) - 1)
    low = int(place)
    return np.asarray(colours[low] + (place - low) * (colours[low + 1] - colours[low]) + rng.normal(0, 0.015, 3))
