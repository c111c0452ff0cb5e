"""A person of boxes in the layout of the real assets: small, and with keypoints that can be told by hand."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from training.synthetic.assets import Assets, load_assets

# Bone: its head, its parent, the joint of the pose skeleton that drives it.
BONES = {
    "root": ((0, 1.0, 0), -1, 0),
    "head": ((0, 1.5, 0), 0, 15),
    "eye.L": ((0.03, 1.65, 0.1), 1, 15),
    "upperarm01.L": ((0.2, 1.4, 0), 0, 16),
    "wrist.L": ((0.7, 1.4, 0), 3, 20),
    "upperarm01.R": ((-0.2, 1.4, 0), 0, 17),
    "wrist.R": ((-0.7, 1.4, 0), 5, 21),
    "upperleg01.L": ((0.1, 0.9, 0), 0, 1),
    "foot.L": ((0.1, 0.1, 0), 7, 7),
    "upperleg01.R": ((-0.1, 0.9, 0), 0, 2),
    "foot.R": ((-0.1, 0.1, 0), 9, 8),
}
# Box: from, to, bone.
BOXES = (
    ((-0.2, 0.9, -0.1), (0.2, 1.45, 0.1), "root"),
    ((-0.1, 1.5, -0.1), (0.1, 1.75, 0.1), "head"),
    ((0.2, 1.35, -0.05), (0.75, 1.45, 0.05), "upperarm01.L"),
    ((-0.75, 1.35, -0.05), (-0.2, 1.45, 0.05), "upperarm01.R"),
    ((0.02, 0.0, -0.08), (0.18, 0.9, 0.08), "upperleg01.L"),
    ((-0.18, 0.0, -0.08), (-0.02, 0.9, 0.08), "upperleg01.R"),
)
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19]
KEYPOINT_BOXES = (1, 1, 1, 1, 1, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5)  # the box that a keypoint is in
HALF_TURN = (0.0, 0.0, 1.0, 0.0)


def box_faces() -> np.ndarray:
    """The six outer faces of a box whose corner numbers are 4x + 2y + z."""
    return np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])


def write_assets(folder: Path) -> None:
    """All files: two poses, facing the camera and turned away; one body and a slightly larger one; a suit, shoes, hair."""
    names = list(BONES)
    vertices, bones, faces = [], [], []
    for number, (low, high, bone) in enumerate(BOXES):
        for x in (low[0], high[0]):
            for y in (low[1], high[1]):
                vertices += [[x, y, z] for z in (low[2], high[2])]
        bones += [names.index(bone)] * 8
        faces.append(box_faces() + 8 * number)
    v, f = np.array(vertices, np.float32), np.concatenate(faces)
    heads = np.array([place for place, _, _ in BONES.values()], np.float32)
    basis = np.stack([v - heads[0], 0 * v])
    q = np.zeros((2, 22, 4))
    q[..., 0] = 1
    q[1, 0] = HALF_TURN
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "poses.npz",
        q=np.round(q * 32767).astype(np.int16),
        posture=np.zeros(2, np.uint8),
        posture_weight=np.array([0.6, 0.15, 0.12, 0.08, 0.05], np.float32),
    )
    np.savez(
        folder / "anny_compact.npz",
        v_mean=v,
        v_basis=np.round(basis / 0.001).astype(np.int16),
        v_basis_scale=np.float32(0.001),
        shape_coef=np.array([[0, 0], [0.1, 0]], np.float16),
        pheno=np.array([[0.0], [1.0]], np.float16),
        pheno_names=np.array(["gender"]),
        j_mean=heads,
        j_basis=np.stack([heads - heads[0], 0 * heads]),
        bone_names=np.array(names),
        bone_parent=np.array([parent for _, parent, _ in BONES.values()], np.int16),
        bone_joint_a=np.array([joint for _, _, joint in BONES.values()], np.int16),
        bone_joint_b=np.array([joint for _, _, joint in BONES.values()], np.int16),
        bone_mix=np.zeros(len(BONES), np.float32),
        bone_twist_joint=np.full(len(BONES), -1, np.int16),
        bone_twist_gain=np.zeros(len(BONES), np.float32),
        twist_axis=np.tile(np.float32([1, 0, 0]), (22, 1)),
        rest_align=np.tile(np.float32([1, 0, 0, 0]), (22, 1)),
        pose_parent=np.array(PARENTS, np.int16),
        skin_idx=np.array(bones, np.uint8)[:, None].repeat(6, 1) * np.uint8([1, 0, 0, 0, 0, 0]),
        skin_w=np.tile(np.uint8([255, 0, 0, 0, 0, 0]), (len(v), 1)),
        faces=f.astype(np.uint16),
        face_group=np.zeros(len(f), np.uint8),
        face_part=np.array([1 if BOXES[number // 6][2] == "head" else 0 for number in range(len(f))], np.uint8),
        part_names=np.array(["body", "head"]),
        base_vertex_id=np.arange(len(v), dtype=np.uint16),
        kp_ptr=np.arange(0, 24 * 8, 8).astype(np.int32),
        kp_vid=np.concatenate([np.arange(8) + 8 * (KEYPOINT_BOXES[k] if k < 17 else 0) for k in range(23)]).astype(np.uint16),
        kp_w=np.full(23 * 8, 1 / 8, np.float32),
        kp_slack=np.full(17, 0.12, np.float32),
    )

    garments = {
        "clothes/male_suit": (0, "body"),
        "clothes/female_suit": (0, "body"),
        "clothes/shoes": (5, ""),
        "hair/short": (1, ""),
    }
    with tarfile.open(folder / "makehuman_clothes_hair.tar.xz", "w:xz") as archive:
        for name, (box, hidden) in garments.items():
            for ending, text in garment(box, bool(hidden)).items():
                path = f"makehuman/{name}/{name.split('/')[1]}{ending}"
                member = tarfile.TarInfo(path)
                content = text.replace("NAME", name.split("/")[1]).encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def garment(box: int, hides: bool) -> dict[str, str]:
    """The files of a garment: the box of the body, each corner moved outwards by 2 cm of the mean body."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    first = 8 * box
    rows = [f"{first + i} {first} {first} 1 0 0 " + " ".join(f"{0.2 * v:.3f}" for v in c) for i, c in enumerate(corners)]
    scale = [f"{axis}_scale {first} {first + far} {10 * (BOXES[box][1][n] - BOXES[box][0][n]):.4f}"
             for n, (axis, far) in enumerate((("x", 4), ("y", 2), ("z", 1)))]  # fmt: skip
    deleted = ["delete_verts", f"{first} - {first + 6} {first + 7}"] if hides else []
    fit = ["# a garment", "obj_file NAME.obj", *scale, "verts 0", *rows, "material stray.mhmat", *deleted]
    mesh = [f"v {x} {y} {z}" for x, y, z in corners] + [
        "f " + " ".join(f"{i + 1}/1" for i in f) for f in box_faces().tolist()
    ]
    return {".mhclo": "\n".join(fit), ".obj": "\n".join(mesh)}


@pytest.fixture(scope="session")
def assets_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    return folder


@pytest.fixture(scope="session")
def assets(assets_folder) -> Assets:
    return load_assets(assets_folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch takes one thread for each of the command's own, as the command has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
