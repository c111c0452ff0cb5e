"""Clothes, shoes, hats and hair: meshes in MakeHuman's form (.obj and .mhclo), fitted to the vertices of the body."""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.files import DataError

SUIT, SHOES, HAT, HAIR = "suit", "shoes", "hat", "hair"
_QUAD = torch.tensor([[0, 1, 2], [0, 2, 3]])


@dataclass(frozen=True, slots=True)
class Garment:
    """A mesh that is worn: vertices are means of three body vertices each, moved by an offset in units of the body."""

    name: str
    kind: str
    vertices: Tensor  # [G, 3] of the body
    weights: Tensor  # [G, 3]
    offsets: Tensor  # [G, 3]
    scales: list[tuple[int, int, float]]  # for x, y, z: two body vertices and their distance in the base mesh
    triangles: Tensor  # [T, 3]
    hidden: Tensor  # [V] body vertices that the garment hides


def load_garments(file: Path, base_vertices: dict[int, int], vertices: int) -> list[Garment]:
    """All garments of an archive, by name. `base_vertices`: number in the base mesh → one of the body's `vertices`.

    Raises DataError that names the file.
    """
    texts: dict[str, str] = {}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith((".obj", ".mhclo")) else None
                if content is not None:
                    texts[member.name] = content.read().decode()
    except FileNotFoundError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # tar and lzma each have their own
        raise DataError(f"{file} is damaged: {error}") from error
    found = []
    for name in sorted(texts):
        if not name.endswith(".mhclo"):
            continue
        try:
            found.append(_garment(name, texts, base_vertices, vertices))
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise DataError(f"{name} of {file} is no garment for this body: {error!r}") from error
    if not found:
        raise DataError(f"{file} holds no garments")
    return found


def fitted(garment: Garment, rest: Tensor) -> Tensor:
    """The garment's vertices [N, G, 3] on bodies at rest [N, V, 3]."""
    gains = [(rest[:, a, axis] - rest[:, b, axis]).abs() / ref for axis, (a, b, ref) in enumerate(garment.scales)]
    between = (garment.weights[..., None] * rest[:, garment.vertices]).sum(2)
    return between + garment.offsets * torch.stack(gains, 1)[:, None]


def triangles_of(quads: npt.NDArray[np.int64]) -> Tensor:
    """Quads [Q, 4] → triangles [2Q, 3], the two of a quad beside each other."""
    return torch.tensor(quads)[:, _QUAD].reshape(-1, 3)


def _garment(name: str, texts: dict[str, str], of: dict[int, int], vertices: int) -> Garment:
    scales: dict[str, tuple[int, int, float]] = {}
    rows: list[list[float]] = []
    hidden = torch.zeros(vertices, dtype=torch.bool)
    section, obj = "", ""
    for line in texts[name].splitlines():
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if words[0] in ("verts", "delete_verts"):
            section = words[0]
        elif words[0] == "obj_file":
            obj = words[1]
        elif words[0] in ("x_scale", "y_scale", "z_scale"):
            scales[words[0]] = (of[int(words[1])], of[int(words[2])], float(words[3]))
        elif section == "verts" and words[0].isdigit():
            rows.append([float(word) for word in words] if len(words) == 9 else [float(words[0])] * 3 + [1, 0, 0, 0, 0, 0])
        elif section == "delete_verts" and words[0].isdigit():
            for vertex in _ranges(words):
                if vertex in of:
                    hidden[of[vertex]] = True
    values = torch.tensor(rows)
    quads = _quads(texts[str(Path(name).parent / obj)], len(rows))
    return Garment(
        name=Path(name).stem,
        kind=_kind(Path(name)),
        vertices=torch.tensor([[of[int(vertex)] for vertex in row[:3]] for row in rows]),
        weights=values[:, 3:6],
        offsets=values[:, 6:],
        scales=[scales[axis] for axis in ("x_scale", "y_scale", "z_scale")],
        triangles=triangles_of(quads),
        hidden=hidden,
    )


def _quads(mesh: str, vertices: int) -> npt.NDArray[np.int64]:
    """The faces [Q, 4] of an .obj of so many vertices; a triangle has its last corner twice. Raises ValueError."""
    lines = [line.split()[1:] for line in mesh.splitlines() if line.startswith("f ")]
    faces = [[int(word.split("/")[0]) - 1 for word in words] for words in lines]
    quads = np.array([face if len(face) == 4 else [*face, face[2]] for face in faces])
    if quads.min() < 0 or quads.max() >= vertices:
        raise ValueError(f"its mesh has faces of other vertices than the {vertices} that are fitted")
    return quads


def _ranges(words: list[str]) -> list[int]:
    """`12 15 - 18` → 12, 15, 16, 17, 18."""
    found: list[int] = []
    for place, word in enumerate(words):
        if word == "-":
            found += range(found[-1] + 1, int(words[place + 1]))
        else:
            found.append(int(word))
    return found


def _kind(path: Path) -> str:
    if path.parent.parent.name == "hair":
        return HAIR
    return next((kind for word, kind in (("suit", SUIT), ("shoes", SHOES)) if word in path.stem), HAT)
