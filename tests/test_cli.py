"""`lpn` as a user calls it: what it writes, what it tells, its exit codes, and that an interrupted run goes on."""

import asyncio
import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from pycocotools.coco import COCO

from app import cli
from app import photos as many
from app import video as video_module
from app.client import AsyncPoseClient, PoseError
from app.inference.scheduler import LaneLost
from tests.conftest import PHOTOS, ROOT, T_POSE_BOX, TWO_WOMEN_BOXES


def task_of(photos, folder):
    """A photo or a folder of photos → people.json in a folder, as `predict` is asked for it."""
    return many.Task(
        photos=many.photos_of([photos], None),
        options={},
        run={},
        out=folder / "people.json",
        form="coco",
        draw=None,
        max_bytes=10**8,
        max_pixels=10**8,
    )


def nobody(version=1):
    """The answer of a service that finds nobody, by that version of its model."""
    categories = [{"keypoints": ["nose"], "skeleton": []}]
    images = [{"width": 9, "height": 9}]
    info = {"model": "lpn50", "model_version": str(version)}
    return httpx.Response(200, json={"info": info, "images": images, "categories": categories, "annotations": []})


def problem(status, code):
    return httpx.Response(status, json={"type": f"/problems/{code}", "detail": "as it is told"})


def predict(task, answer, at_once=1):
    """The photos of a task that failed, asked of a service that answers so."""

    async def run():
        async with AsyncPoseClient(transport=httpx.MockTransport(answer)) as client:
            return await many.predict(task, client, at_once, lambda _: None)

    return asyncio.run(run())


@pytest.fixture
def lpn(tmp_path):
    """Run `lpn` in a folder of its own, as scripts/lpn does; its exit code, standard output and standard error."""

    def run(*arguments, **environment):
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "app.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=environment_of(**environment),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "Traceback" not in ran.stderr, ran.stderr
        return ran.returncode, ran.stdout, ran.stderr

    return run


@pytest.fixture
def in_a_shell(tmp_path):
    """Run a line of bash in a folder of its own, where `lpn` is a command; standard output is buffered, as a user's is."""

    def run(line):
        script = f'lpn() {{ {sys.executable} -P -m app.cli "$@"; }}; {line}'
        return subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment_of(PYTHONUNBUFFERED=""),
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def environment_of(**more):
    kept = {name: value for name, value in os.environ.items() if name[:5] != "POSE_"}
    return kept | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in more.items()}


@pytest.fixture
def server(service):
    return ["--server", str(service.client.base_url)]


@pytest.fixture
def photos(tmp_path):
    """A folder with two photos, one in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "women").mkdir(parents=True)
    shutil.copy(PHOTOS / "t_pose_cc0.jpg", folder)
    shutil.copy(PHOTOS / "two_women_outdoors_cc0.jpg", folder / "women")
    (folder / "README.md").write_text("no photo")
    return folder


@pytest.fixture
def boxes(tmp_path):
    """A COCO data set with the boxes of the people on them, the women's first."""
    file = tmp_path / "boxes.json"
    images = [{"id": 70, "file_name": "women/two_women_outdoors_cc0.jpg"}, {"id": 7, "file_name": "t_pose_cc0.jpg"}]
    people = [{"id": id_, "image_id": 70, "bbox": box} for id_, box in enumerate(TWO_WOMEN_BOXES, 1)]
    people.append({"id": 3, "image_id": 7, "bbox": T_POSE_BOX})
    people.append({"id": 4, "image_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    file.write_text(json.dumps({"images": images, "annotations": people}))
    return file


def test_predict_answers_as_the_service_does(lpn, service, two_women):
    code, out, err = lpn("predict", PHOTOS / "two_women_outdoors_cc0.jpg")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["images"] == [{"id": 0, "width": 1280, "height": 845, "file_name": "two_women_outdoors_cc0.jpg"}]
    answer = service.client.post("/v1/pose", content=two_women, headers={"Content-Type": "image/jpeg"}).json()
    assert told == answer | {"images": told["images"]}


def test_predict_writes_one_data_set_of_all_photos(lpn, server, photos, tmp_path):
    code, out, err = lpn("predict", "photos", "--out", "people.json", *server)
    assert (code, out, err) == (0, "", "")
    coco = COCO(tmp_path / "people.json")
    names = [image["file_name"] for image in coco.loadImgs(coco.getImgIds())]
    assert names == ["t_pose_cc0.jpg", "women/two_women_outdoors_cc0.jpg"]
    people = coco.loadAnns(coco.getAnnIds())
    assert {person["image_id"] for person in people} == {0, 1}
    assert [person["id"] for person in people] == list(range(1, len(people) + 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["people.json", "photos"]


def test_predict_with_boxes_keeps_the_ids(lpn, server, photos, boxes, tmp_path):
    code, _, err = lpn("predict", photos, "--boxes", boxes, "--format", "results", "--out", "results.json", *server)
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [person["image_id"] for person in results] == [7, 70, 70]
    assert [tuple(person["bbox"]) for person in results] == [T_POSE_BOX, *TWO_WOMEN_BOXES]
    lpn("predict", photos, "--boxes", boxes, "--out", "people.json", *server)
    assert len(COCO(tmp_path / "people.json").loadRes(str(tmp_path / "results.json")).anns) == 3
    scores = [person["keypoints"][2::3] for person in results]
    assert all(0 < score < 1.2 and score != 2 for person in scores for score in person)


def test_predict_wants_boxes_of_the_upright_photo(lpn, server, photos, boxes):
    content = json.loads(boxes.read_text())
    content["images"][0] |= {"width": 854, "height": 1280}
    boxes.write_text(json.dumps(content))
    code, out, err = lpn("predict", photos, "--boxes", boxes, *server)
    assert code == 1
    assert "outdoors_cc0.jpg: its boxes are of 854 × 1280 pixels, and upright it has 1280 × 845" in " ".join(err.split())
    assert len(json.loads(out)["images"]) == 1


def test_predict_has_the_options_of_a_request(lpn, server, photos):
    code, out, _ = lpn("predict", photos, "--max-people", 1, "--keypoint-threshold", 1, "--flip-test", *server)
    people = json.loads(out)["annotations"]
    assert (code, [person["image_id"] for person in people]) == (0, [0, 1])
    assert {person["num_keypoints"] for person in people} == {0}
    code, out, _ = lpn("predict", photos, "--keypoint-threshold", 0, *server)
    assert {person["num_keypoints"] for person in json.loads(out)["annotations"]} == {17}


def test_predict_draws(lpn, server, photos, tmp_path):
    blank = np.full((60, 80, 3), 128, np.uint8)
    cv2.imwrite(str(photos / "blank.bmp"), blank)
    assert lpn("predict", photos, "--draw", "drawn", *server)[0] == 0
    drawn = sorted(file.relative_to(tmp_path / "drawn").as_posix() for file in (tmp_path / "drawn").rglob("*.*"))
    assert drawn == ["blank.bmp.jpg", "t_pose_cc0.jpg", "women/two_women_outdoors_cc0.jpg"]
    changed = np.abs(
        cv2.imread(str(tmp_path / "drawn/t_pose_cc0.jpg")).astype(int) - cv2.imread(str(photos / "t_pose_cc0.jpg"))
    )
    assert 0.001 < (changed.max(axis=2) > 60).mean() < 0.1
    np.testing.assert_allclose(cv2.imread(str(tmp_path / "drawn/blank.bmp.jpg")), blank, atol=2)


def test_predict_leaves_a_bad_photo_out_and_says_so(lpn, server, photos):
    (photos / "broken.jpg").write_bytes((photos / "t_pose_cc0.jpg").read_bytes()[:20_000])
    code, out, err = lpn("predict", photos, *server)
    assert code == 1
    assert [image["file_name"] for image in json.loads(out)["images"]] == [
        "t_pose_cc0.jpg",
        "women/two_women_outdoors_cc0.jpg",
    ]
    told = err.strip().splitlines()
    assert told[0] == "1 of 3 photos failed:"
    assert told[1].startswith(f"{photos / 'broken.jpg'}: ")
    assert "images.0" not in told[1]


def test_predict_tells_of_photos_of_a_kind_that_is_not_read(lpn, server, photos):
    (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x24ftypheic" + bytes(100))
    shutil.move(photos / "t_pose_cc0.jpg", photos / "t_pose.jfif")
    code, out, err = lpn("predict", photos, *server)
    assert code == 1
    assert [image["file_name"] for image in json.loads(out)["images"]] == ["t_pose.jfif", "women/two_women_outdoors_cc0.jpg"]
    assert "IMG_1.HEIC: is a HEIC file, which is not read; send it as JPEG" in " ".join(err.split())


@pytest.mark.parametrize(("own", "stop"), [(True, signal.SIGINT), (False, signal.SIGTERM)], ids=["by itself", "by a server"])
def test_predict_goes_on_where_it_was_interrupted(lpn, server, photos, tmp_path, own, stop):
    for number in range(30):
        shutil.copy(photos / "t_pose_cc0.jpg", photos / f"{number:03}.jpg")
    command = ["predict", "photos", "--out", "people.json", "--draw", "drawn", *([] if own else server)]
    begun = subprocess.Popen(
        [sys.executable, "-m", "app.cli", *command], cwd=tmp_path, env=environment_of(), stderr=subprocess.PIPE, text=True
    )
    part = tmp_path / "people.json.part"
    until = time.monotonic() + 180
    while not part.exists() or part.read_bytes().count(b"\n") < 6:
        assert time.monotonic() < until
        time.sleep(0.01)
    begun.send_signal(stop)
    told = begun.communicate(timeout=60)[1].split("\n")
    assert begun.returncode == 128 + stop
    assert part.read_bytes().endswith(b"}\n")
    done = part.read_bytes().splitlines()[1:]
    assert told == ["", f"{len(done)} photos are done; the same command goes on from there.", "Aborted!", ""]
    assert 5 <= len(done) < 25
    with part.open("ab") as file:
        file.write(b'{"photo": "photos/059')  # as a power cut leaves it

    assert lpn(*command, "--flip-test")[0] == 2  # not the same run
    part.write_bytes(part.read_bytes().replace(b'"bbox_score":', b'"kept":true,"bbox_score":'))
    os.utime(photos / "000.jpg")  # one that was changed since is looked at again …
    again = {photo_of(line).name for line in done} & {"000.jpg"}
    lost = photo_of(done[-1]).name  # … and one whose drawn photo is gone
    (tmp_path / "drawn" / lost).unlink()
    again.add(lost)
    assert lpn(*command)[0] == 0
    data = json.loads((tmp_path / "people.json").read_text())
    assert [image["file_name"] for image in data["images"][:30]] == [f"{number:03}.jpg" for number in range(30)]
    assert len(data["images"]) == 32
    people = {image["id"]: [] for image in data["images"]}
    for person in data["annotations"]:
        people[person["image_id"]].append(person["keypoints"])
    assert all(people[number] == people[0] for number in range(31))
    kept = {person["image_id"] for person in data["annotations"] if "kept" in person}
    assert len(kept) == len(done) - len(again)
    assert len(list((tmp_path / "drawn").rglob("*.jpg"))) == 32
    assert not part.exists()


def photo_of(line):
    """The photo of a line of OUT.part."""
    return Path(os.fsdecode(bytes.fromhex(json.loads(line)["photo"][0])))


def test_predict_does_not_mix_the_answers_of_two_models(photos, tmp_path):
    """As where a service that is asked starts anew with another one."""
    versions = itertools.count(1)
    with pytest.raises(PoseError, match="answers with the model lpn50/2 now, and with lpn50/1 before"):
        predict(task_of(photos, tmp_path), lambda _: nobody(next(versions)))
    assert not (tmp_path / "people.json").exists()
    assert (tmp_path / "people.json.part").read_bytes().count(b"\n") == 2  # what it is of, and the first answer


def test_predict_does_not_write_on_what_it_reads(lpn, photos, boxes):
    before = {file: file.read_bytes() for file in (*photos.rglob("*.jpg"), boxes)}
    for arguments, told in (
        (["--draw", photos], "lies in a folder that is read"),
        (["--draw", photos / "drawn"], "lies in a folder that is read"),
        (["--out", photos / "t_pose_cc0.jpg"], "is one of the files that are read"),
        (["--boxes", boxes, "--out", boxes], "is one of the files that are read"),
        (["--out", "/dev/full"], "is no regular file"),
    ):
        code, _, err = lpn("predict", photos, *arguments)
        assert code == 2
        assert told in " ".join(err.split())
    shutil.copy(photos / "t_pose_cc0.jpg", photos / "a.bmp.jpg")
    shutil.copy(photos / "t_pose_cc0.jpg", photos / "a.bmp")
    assert "would take the place of others" in " ".join(lpn("predict", photos, "--draw", "drawn")[2].split())
    assert before == {file: file.read_bytes() for file in before}


def test_predict_leaves_nothing_of_a_run_that_was_refused(lpn, server, photos, tmp_path):
    code, _, err = lpn("predict", photos, "--out", "people.json", "--max-people", 1000, *server)
    assert (code, err) == (1, "Error: max_people is 1000; at most 100 is taken.\n")
    assert [file.name for file in tmp_path.iterdir()] == ["photos"]


def test_predict_takes_one_run_at_a_time(lpn, server, photos, tmp_path):
    with (tmp_path / "people.json.part").open("ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        code, _, err = lpn("predict", photos, "--out", "people.json", *server)
    assert code == 2
    assert "another run is writing it" in " ".join(err.split())


def test_predict_tells_of_every_kind_of_photo_that_it_cannot_take(lpn, photos):
    shutil.copy(photos / "t_pose_cc0.jpg", photos / "caf\udce9.jpg")
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(photos / "pipe.jpg")
    with (photos / "large.tif").open("wb") as file:
        file.truncate(2**30)
    code, out, err = lpn("predict", photos)
    assert code == 1  # none of them is away for a while: the folder of each is there
    assert len(json.loads(out)["images"]) == 2
    assert err.splitlines()[0] == "5 of 7 photos failed:"
    for reason in ("no UTF-8", "gone.jpg: No such file", "no regular file", "POSE_MAX_BODY_BYTES"):
        assert reason in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "is not a COCO data set"),
        ("no JSON", "is not a COCO data set"),
        ('{"images": [{"id": 1}], "annotations": []}', "KeyError: 'file_name'"),
        ('{"images": [], "annotations": []}', "has no image called t_pose_cc0.jpg; 2 of 2 are missing"),
        ('{"images": [], "annotations": [1]}', "AttributeError"),
        ('{"images": [{"id": 1, "file_name": ["a"]}], "annotations": []}', "TypeError"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [1, 2]}]}', "annotations.0.bbox"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}], "annotations": []}',
            "the same id or file_name",
        ),
    ],
)
def test_predict_wants_boxes_of_these_photos(lpn, photos, tmp_path, content, told):
    (tmp_path / "boxes.json").write_text(content)
    code, _, err = lpn("predict", photos, "--boxes", "boxes.json")
    assert code == 2
    assert told in " ".join(err.split())


def test_predict_wants_photos(lpn, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty holds no photos" in lpn("predict", "empty")[2]
    shutil.copy(photos / "t_pose_cc0.jpg", tmp_path)
    code, _, err = lpn("predict", photos, "t_pose_cc0.jpg")
    assert code == 2
    assert "are both called t_pose_cc0.jpg" in " ".join(err.split())


def test_no_service_there(lpn):
    code, out, err = lpn("predict", PHOTOS, "--server", "http://127.0.0.1:9")
    assert (code, out) == (75, "")
    assert err == "Error: http://127.0.0.1:9 gives no answer: All connection attempts failed\n"


class Capture:
    """A video of frames at those seconds, with so many by its own account, so many a second."""

    def __init__(self, seconds, count, rate=30.0):
        self._left, self._now = list(seconds), 0.0
        self._told = {cv2.CAP_PROP_FPS: rate, cv2.CAP_PROP_FRAME_COUNT: count}

    def get(self, name):
        return 1000 * self._now if name == cv2.CAP_PROP_POS_MSEC else self._told.get(name, 9)

    def read(self):
        if not self._left:
            return False, None
        self._now = self._left.pop(0)
        return True, np.zeros((9, 9, 3), np.uint8)


# Matroska that tells how long a frame is seen, Matroska that does not, FLV, MPEG-TS.
@pytest.mark.parametrize("begin", [b"\x1aE\xdf\xa3..\x23\xe3\x83", b"\x1aE\xdf\xa3", b"FLV\x01", b"G@\x11\x10\0B\xf0%"])
@pytest.mark.parametrize(
    ("seconds", "missing", "rate"),
    [
        ([*np.arange(60) / 30, *(2 + np.arange(30) / 10)], 0, 30.0),  # 5 s, of which OpenCV makes 150 frames
        ([*np.arange(60) / 30, *(2 + np.arange(10) / 10)], 60, 30.0),
        (np.arange(150) / 30, 0, 30.0),
        (np.arange(0, 5, 0.04), 0, 600.0),
        (np.arange(0, 5, 0.04), 0, 1000.0),  # milliseconds that are uneven are taken for its rate
    ],
)
def test_a_video_that_tells_no_number_of_frames_is_whole_where_its_time_is(tmp_path, seconds, missing, rate, begin, capsys):
    file = tmp_path / "phone.mkv"
    file.write_bytes(begin)
    frames = video_module.Frames(file, Capture(seconds, round(5 * rate), rate))
    assert frames.count == (3000 if begin.endswith(b"\x83") and rate == 600 else 150)  # a rate of its own is believed
    assert len(list(frames)) == len(seconds)
    assert frames.missing == missing
    assert video_module.told_missing(frames) == (missing > 0)
    assert "there is no frame" not in capsys.readouterr().err


def test_a_video_that_was_trimmed_is_whole_where_its_edit_list_says_so(video, tmp_path, capsys):
    """Here by hand: its first 8 frames are left out, as `ffmpeg -ss 0.32 -c copy` would do it."""
    content = video.read_bytes()
    edits = content.index(b"elst") + 12
    length, begin = struct.unpack_from(">Ii", content, edits)
    assert (length, begin) == (800, 0)  # milliseconds
    scale = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    trimmed = bytearray(content)
    struct.pack_into(">Ii", trimmed, edits, 480, scale * 8 // 25)
    begin, end = len(content) * 3 // 5, content.index(b"moov") - 4
    damaged = trimmed[:begin] + bytes(end - begin) + trimmed[end:]
    for name, file, whole in (("trimmed.mp4", trimmed, True), ("damaged.mp4", damaged, False)):
        (tmp_path / name).write_bytes(file)
        with video_module.frames_of(tmp_path / name) as frames:
            read = len(list(frames))
            assert (frames.count, read == 12) == (12, whole)
            assert video_module.told_missing(frames) == (not whole)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"damaged.mp4: {12 - read} of 12 frames could not be read.")


def test_a_video_that_tells_no_number_of_frames_goes_on_past_a_damaged_one(tmp_path):
    """Though by then more were read than its length and the usual rate make."""
    file = tmp_path / "phone.mkv"
    file.write_bytes(b"\x1aE\xdf\xa3")
    seconds = np.arange(300) / 60
    capture = Capture(seconds, 5000, 1000.0)
    read, calls = capture.read, itertools.count()
    capture.read = lambda: (False, None) if next(calls) == 200 else read()
    frames = video_module.Frames(file, capture)
    assert [place for place, *_ in frames] == [*range(200), *range(201, 301)]


def test_a_hole_in_a_video_that_tells_no_number_of_frames_is_told(tmp_path, capsys):
    """FFmpeg steps over damage in it without a word; but it may stand still there, so that it is no failure."""
    file = tmp_path / "phone.mkv"
    file.write_bytes(b"\x1aE\xdf\xa3")
    frames = video_module.Frames(file, Capture([*np.arange(60) / 30, *(4 + np.arange(30) / 30)], 150))
    list(frames)
    assert video_module.told_missing(frames) == 0
    assert capsys.readouterr().err == f"{file}: there is no frame between 2.0 and 4.0 s.\n"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_paths_that_are_not_utf_8_are_told_or_taken(lpn, video, photos, tmp_path):
    """Given such a path, OpenCV's videos end the process."""
    shutil.copy(video, tmp_path / os.fsdecode(b"caf\xe9.mp4"))
    (tmp_path / os.fsdecode(b"dr\xe9")).mkdir()
    for options in ([os.fsdecode(b"caf\xe9.mp4")], [video, "--draw", os.fsdecode(b"dr\xe9/drawn.mp4")]):
        code, out, err = lpn("track", *options)
        assert (code, out) == (2, "")
        assert "caf" in err or "drawn.mp4" in err
        assert "its path is not UTF-8, and videos are read and written by such alone" in err
    assert not list((tmp_path / os.fsdecode(b"dr\xe9")).iterdir())
    assert lpn("predict", photos, "--out", "people.json", "--draw", os.fsdecode(b"dr\xe9"))[0] == 0


def test_a_video_may_be_named_by_a_time(lpn, video, tmp_path):
    shutil.copy(video, tmp_path / "2024-01-01T12:30:45.mp4")
    code, out, _ = lpn("track", "2024-01-01T12:30:45.mp4", "--max-people", 1)
    assert (code, len(out.splitlines())) == (0, 20)


def test_a_key(lpn, start_service, photos):
    url = str(start_service(api_keys="sesame").client.base_url)
    code, _, err = lpn("predict", photos, "--server", url)
    assert (code, err) == (1, "Error: The service wants a key, and none or a wrong one was given: --key or LPN_KEY.\n")
    assert lpn("predict", photos, "--server", url, LPN_KEY="sesame")[0] == 0


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video of 20 frames, in which a camera moves over the two women."""
    file = tmp_path_factory.mktemp("video") / "pan.mp4"
    photo = cv2.imread(str(PHOTOS / "two_women_outdoors_cc0.jpg"))
    film = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 25, (1000, 800))
    for number in range(20):
        film.write(photo[20:820, 5 * number : 5 * number + 1000])
    film.release()
    return file


@pytest.mark.parametrize("late", [1, 99])
@pytest.mark.parametrize("how", [504, httpx.ReadTimeout("slow"), httpx.WriteTimeout("slow")])
def test_predict_asks_again_for_a_photo_that_was_late(tmp_path, monkeypatch, late, how):
    """And keeps what it has where it stays so, for the same command to go on."""
    monkeypatch.setattr(many, "_LATE_WAITS", (0, 0))
    left = itertools.count(1)

    def answer(request):
        if next(left) > late:
            return nobody()
        if isinstance(how, int):
            return httpx.Response(how)
        raise how

    assert len(predict(task_of(PHOTOS / "t_pose_cc0.jpg", tmp_path), answer)) == (late > 3)
    assert (tmp_path / "people.json.part").exists() == (late > 3)


@pytest.mark.parametrize(("status", "code"), [(408, "request_timeout"), (500, "internal_error")])
def test_predict_asks_again_for_what_may_have_an_answer_later(photos, tmp_path, status, code):
    asked = []

    def answer(request):
        asked.append(request)
        return problem(status, code) if len(asked) == 2 else nobody()

    (fault,) = predict(task_of(photos, tmp_path), answer)
    assert fault.passing
    assert len(json.loads((tmp_path / "people.json").read_text())["images"]) == 1
    assert predict(task_of(photos, tmp_path), answer) == []
    assert len(asked) == 3
    assert len(json.loads((tmp_path / "people.json").read_text())["images"]) == 2
    assert not (tmp_path / "people.json.part").exists()


@pytest.mark.parametrize("mounted", [False, True])
def test_predict_goes_on_where_a_disk_was_away(photos, tmp_path, mounted):
    """What it was mounted on may stay, as an empty folder."""
    task, asked, away = task_of(photos, tmp_path), [], tmp_path / "away"

    def answer(request):
        asked.append(request)
        if not away.exists():
            photos.rename(away)
            if mounted:
                photos.mkdir()
        return nobody()

    faults = predict(task, answer)
    assert [(str(fault).rpartition(": ")[2], fault.passing) for fault in faults] == [("No such file or directory", True)]
    if mounted:
        photos.rmdir()
    away.rename(photos)
    assert predict(task, lambda request: asked.append(request) or nobody()) == []
    assert len(asked) == 2


def test_a_photo_that_alone_is_gone_or_forbidden_does_not_keep_what_was_found(photos, tmp_path):
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "away.jpg").symlink_to("disk/photo.jpg")
    faults = {
        fault.args[0].partition(".jpg")[0].rpartition("/")[2]: fault
        for fault in predict(task_of(photos, tmp_path), lambda _: nobody())
    }
    assert {name: fault.passing for name, fault in faults.items()} == {"gone": False, "loop": False, "away": True}
    (photos / "away.jpg").unlink()
    assert not any(fault.passing for fault in predict(task_of(photos, tmp_path), lambda _: nobody()))
    assert not (tmp_path / "people.json.part").exists()


def test_predict_leaves_an_older_answer_where_no_photo_has_one_for_now(photos, tmp_path):
    assert predict(task_of(photos, tmp_path), lambda _: nobody()) == []
    before = (tmp_path / "people.json").read_bytes()
    assert [fault.passing for fault in predict(task_of(photos, tmp_path), lambda _: problem(500, "internal_error"))] == [
        True
    ] * 2
    assert (tmp_path / "people.json").read_bytes() == before
    assert len(predict(task_of(photos, tmp_path), lambda _: problem(422, "invalid_image"))) == 2
    assert json.loads((tmp_path / "people.json").read_text())["images"] == []  # which stays so


def test_predict_keeps_nothing_where_photos_are_bad_for_good(photos, tmp_path):
    """Most folders have such: what is kept would stay for ever, and stand in the way of a run with other options."""
    answers = iter((problem(422, "invalid_image"), nobody()))
    (fault,) = predict(task_of(photos, tmp_path), lambda _: next(answers))
    assert not fault.passing
    assert sorted(file.name for file in tmp_path.iterdir()) == ["people.json", "photos"]


def test_predict_keeps_whole_answers_where_the_disk_is_full(photos, tmp_path, capsys):
    for number in range(9):
        shutil.copy(photos / "t_pose_cc0.jpg", photos / f"{number}.jpg")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, most[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*people\.json\.part"):
            predict(task_of(photos, tmp_path), lambda _: nobody())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    part = (tmp_path / "people.json.part").read_bytes()
    assert part.endswith(b"\n")
    done = part.count(b"\n") - 1
    assert 1 < done < 9
    assert capsys.readouterr().err == f"\n{done} photos are done; the same command goes on from there.\n"


def test_predict_ends_well_where_somebody_has_deleted_its_part(photos, tmp_path):
    part = tmp_path / "people.json.part"
    assert predict(task_of(photos, tmp_path), lambda _: part.unlink(missing_ok=True) or nobody()) == []
    assert sorted(image["id"] for image in json.loads((tmp_path / "people.json").read_text())["images"]) == [0, 1]


def test_predict_holds_no_answers_in_memory(photos, tmp_path):
    """Neither those that come nor those that an interrupted run has left, the last of which broke off."""
    for number in range(98):
        (photos / f"{number}.jpg").write_bytes(b"x")
    answer = json.loads(nobody().content) | {"as_of_many_people": "x" * 100_000}
    answers = itertools.chain([problem(500, "internal_error")], itertools.repeat(httpx.Response(200, json=answer)))
    for failed in (1, 0):
        tracemalloc.start()
        assert len(predict(task_of(photos, tmp_path), lambda _: next(answers))) == failed
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000
        if failed:
            with (tmp_path / "people.json.part").open("ab") as part:
                part.write(b'{"photo": ["00')
    assert len(json.loads((tmp_path / "people.json").read_text())["images"]) == 100


def test_predict_needs_no_key_and_waits_for_its_own_service(lpn):
    code, out, err = lpn("predict", PHOTOS / "t_pose_cc0.jpg", POSE_API_KEYS="x", POSE_TIMEOUT_MS=1, POSE_QUEUE_CROPS=1)
    assert (code, len(json.loads(out)["images"])) == (0, 1), err


def test_track_tries_a_frame_again_whose_lane_was_lost(video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow, asked = video_module.Follower.follow, []

    async def follow_most(self, task, seconds):
        asked.append(seconds)
        if len(asked) in lost:
            raise LaneLost("The lane that ran this request's crops was lost.")
        return await follow(self, task, seconds)

    monkeypatch.setattr(video_module.Follower, "follow", follow_most)
    lost = {3}
    assert CliRunner().invoke(cli.main, ["track", str(video), "--out", "people.jsonl"]).exit_code == 0
    assert len(asked) == 21
    assert len((tmp_path / "people.jsonl").read_text().splitlines()) == 20
    asked.clear()
    lost = {3, 4}
    ran = CliRunner().invoke(cli.main, ["track", str(video), "--out", "others.jsonl"])
    assert (ran.exit_code, asked[2:]) == (1, [asked[2]] * 2)
    assert "frame 2: The lane that ran this request's crops was lost." in ran.output
    assert not (tmp_path / "others.jsonl").exists()


def test_track_follows_people_and_draws_them(lpn, video, tmp_path):
    code, out, err = lpn("track", video, "--out", "people.jsonl", "--draw", "drawn.mp4")
    assert (code, out, err) == (0, "", "")
    frames = [json.loads(line) for line in (tmp_path / "people.jsonl").read_text().splitlines()]
    assert [frame["images"][0]["id"] for frame in frames] == list(range(20))
    assert {frame["images"][0]["width"] for frame in frames} == {1000}
    assert [[person["track_id"] for person in frame["annotations"]] for frame in frames] == [[1, 2]] * 20
    noses = np.array([[person["keypoints"][:2] for person in frame["annotations"]] for frame in frames])
    np.testing.assert_allclose(noses[-1] - noses[0], [[-95, 0]] * 2, atol=15)
    plain, drawn = cv2.VideoCapture(str(video)), cv2.VideoCapture(str(tmp_path / "drawn.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FPS), drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == (25, 20)
    changed = np.abs(plain.read()[1].astype(int) - drawn.read()[1]).max(axis=2) > 60
    assert 0.001 < changed.mean() < 0.1


def test_track_writes_to_standard_output(lpn, video):
    code, out, _ = lpn("track", video, "--max-people", 1)
    assert code == 0
    assert [len(json.loads(line)["annotations"]) for line in out.splitlines()] == [1] * 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([ROOT / "README.md"], "README.md is no video that can be read."),
        (["VIDEO", "--draw", "drawn.gif"], "--draw drawn.gif: the video is written as .mp4."),
        (["VIDEO", "--draw", "VIDEO"], "VIDEO, --out and --draw must be different files."),
        (["VIDEO", "--out", "VIDEO"], "VIDEO, --out and --draw must be different files."),
        (["VIDEO", "--out", "/dev/full"], "/dev/full is there, and is no regular file."),
        (["VIDEO", "--max-people", 1000], "max_people is 1000; at most 100 is taken."),
        (["VIDEO", "--model", "vgg"], "There is no pose model 'vgg'"),
        (["missing.mp4"], "'missing.mp4' does not exist."),
    ],
)
def test_track_tells_what_it_cannot_do(lpn, video, arguments, told):
    code, out, err = lpn("track", *[video if argument == "VIDEO" else argument for argument in arguments])
    assert (code, out) == (2, "")
    assert told in " ".join(err.split())


def test_track_ends_where_a_video_does_however_long_it_claims_to_be(lpn, tmp_path):
    film = cv2.VideoWriter(str(tmp_path / "long.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(10):
        film.write(np.zeros((48, 64, 3), np.uint8))
    film.release()
    content = bytearray((tmp_path / "long.avi").read_bytes())
    stream = content.index(b"strh") + 40
    content[48:52] = content[stream : stream + 4] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "long.avi").write_bytes(content)
    code, out, err = lpn("track", "long.avi")
    assert (code, len(out.splitlines())) == (1, 10)
    assert err.endswith("frames could not be read.\n")
    assert int(err.split()[1]) > 10**6


def test_track_goes_on_past_damaged_frames_and_tells_how_many(lpn, video, tmp_path):
    content = bytearray(video.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    (tmp_path / "damaged.mp4").write_bytes(content)
    code, out, err = lpn("track", "damaged.mp4")
    read = len(out.splitlines())
    assert code == 1
    assert 5 < read < 18
    assert err == f"damaged.mp4: {20 - read} of 20 frames could not be read.\n"
    frames = [json.loads(line) for line in out.splitlines()]
    places = [frame["images"][0]["id"] for frame in frames]
    skipped = [frame["skipped"] for frame in frames]
    assert skipped == [place - before - 1 for place, before in zip(places, [-1, *places], strict=False)]
    assert sum(skipped) > 0


def test_track_tells_of_frames_that_are_too_large(lpn, video):
    code, _, err = lpn("track", video, POSE_MAX_IMAGE_PIXELS=1000)
    assert code == 1
    assert "1000 × 800 = 800,000 pixels; at most 1,000" in err


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (["--draw", "drawn.mp4"], "drawn.mp4 could not be written whole; is the disk full?"),
        (["--out", "people.jsonl"], "people.jsonl: File too large"),
    ],
)
def test_track_leaves_no_half_file_where_the_disk_is_full(in_a_shell, video, tmp_path, output, told):
    ran = in_a_shell(f"ulimit -f 16; lpn track {video} {' '.join(output)}")
    assert (ran.returncode, ran.stderr) == (1, f"Error: {told}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_track_leaves_no_half_file_where_it_is_stopped(video, tmp_path, stop):
    command = [sys.executable, "-m", "app.cli", "track", video, "--out", "people.jsonl", "--draw", "drawn.mp4"]
    begun = subprocess.Popen(command, cwd=tmp_path, env=environment_of(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*.tmp.mp4")):
        assert time.monotonic() < until
        time.sleep(0.01)
    begun.send_signal(stop)
    assert begun.communicate(timeout=60)[1].strip() == "Aborted!"
    assert begun.returncode == 128 + stop
    assert not list(tmp_path.iterdir())


def test_track_writes_where_a_link_leads(lpn, video, tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("people.jsonl", "drawn.mp4"):
        (tmp_path / name).symlink_to(f"disk/{name}")
    assert lpn("track", video, "--out", "people.jsonl", "--draw", "drawn.mp4")[0] == 0
    assert (tmp_path / "people.jsonl").is_symlink()
    assert (tmp_path / "drawn.mp4").is_symlink()
    assert len((tmp_path / "disk/people.jsonl").read_text().splitlines()) == 20
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == ["drawn.mp4", "people.jsonl"]


@pytest.mark.parametrize("option", ["--out", "--draw"])
@pytest.mark.parametrize(("folder", "told"), [("missing", "No such file or directory"), ("notes.txt", "Not a directory")])
def test_a_folder_that_is_none_is_told(lpn, video, tmp_path, option, folder, told):
    (tmp_path / "notes.txt").write_text("no folder")
    assert lpn("track", video, option, f"{folder}/x.mp4") == (1, "", f"Error: {folder}/x.mp4: {told}\n")


def test_links_that_go_round_are_told(lpn, video, tmp_path):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    photo = PHOTOS / "t_pose_cc0.jpg"
    for command in (["track", video, "--out"], ["track", video, "--draw"], ["predict", photo, "--out"]):
        code, out, err = lpn(*command, "loop.mp4")
        assert (code, out) == (2, "")
        assert err.endswith("Error: loop.mp4 is there, and is no regular file.\n")


@pytest.mark.parametrize("command", ["models", "--help"])
def test_standard_output_that_takes_nothing_is_told(in_a_shell, command):
    ran = in_a_shell(f"lpn {command} >/dev/full")
    assert (ran.returncode, ran.stderr) == (1, "Error: No space left on device\n")


def test_who_reads_no_more_is_told_nothing(in_a_shell, server):
    ran = in_a_shell(f"lpn predict {PHOTOS / 't_pose_cc0.jpg'} {' '.join(server)} | true; exit ${{PIPESTATUS[0]}}")
    assert (ran.returncode, ran.stderr) == (1, "")


def test_standard_output_that_is_closed_is_told(in_a_shell):
    ran = in_a_shell("lpn models >&-")
    assert (ran.returncode, ran.stderr) == (1, "Error: Standard output and standard error must not be closed.\n")


def test_models(lpn, service):
    code, out, _ = lpn("models")
    assert code == 0
    for model in service.client.get("/v1/models").json()["models"]:
        assert f"{model['name']}/{model['version']}: {model['network']}" in out
        assert model["sha256"] in out


def test_models_tells_of_a_damaged_one(lpn, tmp_path):
    shutil.copytree(ROOT / "model_store", tmp_path / "store")
    with (tmp_path / "store/lpn50/1/model.onnx").open("r+b") as file:
        file.write(b"x")
    code, _, err = lpn("models", POSE_MODEL_STORE="store")
    assert code == 1
    assert "model.onnx" in err
    assert "sha256" in err


def test_wrong_settings_are_told(lpn):
    code, _, err = lpn("models", POSE_LANES="many", POSE_PORT="1")
    assert code == 1
    assert err.startswith("POSE_LANES: ")


def test_serve_is_the_service(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=tmp_path,
        env=environment_of(POSE_PORT="0"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline().startswith("The LPN pose service listens on http://127.0.0.1:")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_help_names_the_commands(lpn):
    code, out, _ = lpn("--help")
    assert code == 0
    for command in ("models", "predict", "serve", "track"):
        assert f"\n  {command} " in out
        assert lpn(command, "--help")[0] == 0
