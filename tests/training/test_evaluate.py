"""Evaluation: COCO's measures and the reference's suppression against the reference's own figures; sets from files."""

import io
import json
import shutil
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from app.inference.pose import PoseModel
from training import accuracy, evaluate, oks, sheet
from training.data import Picture
from training.estimators import decoder_of, local_estimator, server_estimator
from training.files import DataError

REFERENCE = Path(__file__).parents[1] / "data/reference"
STORED = Path(__file__).parents[2] / "model_store/lpn50/1"


@pytest.fixture(scope="module")
def reference_results():
    return json.loads((REFERENCE / "coco_results_after_oks_nms.json").read_text())


def test_the_references_results_get_the_references_ap(reference_results):
    truth = json.loads((REFERENCE / "annotations_mini.json").read_text())
    measures, _ = oks.evaluate_results(truth, reference_results)
    assert measures["ap"] == pytest.approx(0.8308580858, abs=1e-9)
    assert measures["ap50"] == pytest.approx(0.917, abs=5e-4)
    assert measures["ar"] == pytest.approx(0.925, abs=5e-4)


def test_the_reference_keeps_seven_of_eight_and_so_do_we(reference_results):
    with np.load(REFERENCE / "parity.npz") as parity:
        predictions, boxes = parity["all_preds"].astype(np.float64), parity["all_boxes"]
        image_ids = parity["image_id"]
    scores = evaluate.person_scores(predictions, boxes[:, 5])
    results = [
        {"image_id": int(image), "category_id": 1, "keypoints": joints.ravel().tolist(), "score": float(score)}
        for image, joints, score in zip(image_ids, predictions, scores, strict=True)
    ]
    kept = oks.suppress_twins(results, boxes[:, 4].tolist())
    assert len(kept) == 7
    found = sorted((person["image_id"], round(person["score"], 4)) for person in kept)
    assert found == sorted((person["image_id"], round(person["score"], 4)) for person in reference_results)


def test_labelled_boxes_are_clipped_as_the_reference_clips_them():
    people = [
        {"bbox": [-10, 5, 50, 20], "num_keypoints": 3},
        {"bbox": [90, 70, 30, 30], "num_keypoints": 3},
        {"bbox": [0, 0, 9, 9], "num_keypoints": 0},
        {"bbox": [0, 0, 9, 9], "num_keypoints": 5, "iscrowd": 1},
    ]
    boxes = evaluate.labelled_boxes(Picture({"width": 100, "height": 80}, people, b""))
    np.testing.assert_array_equal(boxes.places, [[0, 5, 49, 19], [90, 70, 9, 9]])


def test_torso_hits_count_joints_within_a_fifth_of_the_torso():
    labels = np.zeros((17, 3))
    labels[[5, 12, 9]] = [[0, 0, 2], [30, 40, 2], [60, 0, 2]]  # the torso is 50 long
    found = np.zeros((1, 17, 3))
    found[0, [5, 12, 9], :2] = [[0, 9.9], [30, 40], [60, 10.1]]
    person = {"keypoints": labels.ravel().tolist(), "num_keypoints": 3}
    expected = np.full((1, 17), np.nan)
    expected[0, [5, 9, 12]] = [1, 0, 1]
    np.testing.assert_array_equal(evaluate.torso_hits([person], found), expected)


def test_the_torso_goes_across_the_other_way_where_a_joint_is_unlabelled():
    labels = np.zeros((17, 3))
    labels[[6, 11, 12]] = [[0, 0, 2], [30, 40, 2], [0, 40, 2]]
    found = np.zeros((1, 17, 3))
    found[0, [6, 11, 12], :2] = [[9.9, 0], [30, 50.1], [0, 40]]
    person = {"keypoints": labels.ravel().tolist(), "num_keypoints": 3}
    np.testing.assert_array_equal(evaluate.torso_hits([person], found)[0, [6, 11, 12]], [1, 0, 1])


def test_someone_outside_the_picture_leaves_the_others_with_their_boxes():
    outside = {"id": 1, "bbox": [120, 5, 50, 20], "num_keypoints": 3}
    inside = {"id": 2, "bbox": [10, 5, 50, 20], "num_keypoints": 3}
    people, boxes = evaluate.labelled_people(Picture({"width": 100, "height": 80}, [outside, inside], b""))
    assert [person["id"] for person in people] == [2]
    np.testing.assert_array_equal(boxes, [[10, 5, 49, 19]])


@pytest.mark.parametrize("spoilt", [{"score": float("nan")}, {"keypoints": [float("nan")] * 51}])
def test_places_that_are_no_numbers_are_not_taken_for_perfect(reference_results, spoilt):
    truth = json.loads((REFERENCE / "annotations_mini.json").read_text())
    with pytest.raises(DataError, match="not finite"):
        oks.evaluate_results(truth, [*reference_results, reference_results[0] | spoilt])


@pytest.mark.parametrize("extra", [{"num_keypoints": 0, "keypoints": [0] * 51}, {}, {"iscrowd": 1}])
def test_people_without_keypoints_and_crowds_count_for_nothing(reference_results, extra):
    truth = json.loads((REFERENCE / "annotations_mini.json").read_text())
    image = truth["images"][0]["id"]
    truth["annotations"].append(
        {"id": 99, "image_id": image, "category_id": 1, "bbox": [0, 0, 90, 90], "area": 5000, **extra}
    )
    assert oks.evaluate_results(truth, reference_results)[0]["ap"] == pytest.approx(0.8308580858, abs=1e-9)


def test_annotations_may_be_numbered_from_nought(reference_results):
    truth = json.loads((REFERENCE / "annotations_mini.json").read_text())
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = number
    assert oks.evaluate_results(truth, reference_results)[0]["ap"] == pytest.approx(0.8308580858, abs=1e-9)


def test_pictures_are_taken_a_few_at_a_time_and_given_in_their_order():
    taken = []

    def pictures():
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = evaluate.in_order(pool, lambda number: -number, pictures(), ahead=3)
        assert next(results) == 0
        assert len(taken) == 4
        assert list(results) == [-number for number in range(1, 20)]


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory):
    """A user's own COCO folder: one photo whose labels are what the shipped model finds, so that AP must be 1."""
    folder = tmp_path_factory.mktemp("coco")
    photo = REFERENCE / "astronaut_384.png"
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(photo.read_bytes())
    model = PoseModel.load(STORED)
    box = [60.0, 10.0, 250.0, 360.0]
    clipped = [60.0, 10.0, 249.0, 359.0]
    crops = model.cut(cv2.imread(str(photo)), np.array([clipped]))
    joints = model.to_picture(model.plain.run(crops.pixels).values, crops)[0, :, :3]
    joints[:, 2] = 2
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 45000.0, "iscrowd": 0}
    person |= {"num_keypoints": 17, "keypoints": joints.ravel().tolist()}
    images = [{"id": 1, "file_name": "1.png", "width": 384, "height": 384}]
    content = {"images": images, "annotations": [person], "categories": [{"id": 1, "name": "person"}]}
    (folder / "people.json").write_text(json.dumps(content))
    (folder / "boxes.json").write_text(
        json.dumps([{"image_id": 1, "category_id": 1, "bbox": clipped, "score": 0.9}, {"image_id": 1, "category_id": 2}])
    )
    return folder


def measure(monkeypatch, folder: Path, *options: str, store: Path = STORED.parents[1]) -> None:
    """The command on such a folder."""
    monkeypatch.chdir(folder)
    command = ["evaluate", "--annotations", "people.json", "--images", "images", "--store", str(store)]
    monkeypatch.setattr("sys.argv", [*command, *options])
    evaluate.main()


def test_pck_is_told_for_each_kind_of_joint(coco_folder):
    truth = json.loads((coco_folder / "people.json").read_text())["annotations"][0]["keypoints"]
    found = np.array(truth).reshape(1, 17, 3)
    found[0, [0, 13], :2] += 1000  # the nose and the left knee
    ways = evaluate.evaluate_set(
        coco_folder / "people.json", coco_folder / "images", evaluate.labelled_boxes, lambda *_: {"": found}
    )
    by_joint = ways[""].by_joint
    assert (by_joint.pop("nose"), by_joint.pop("knee")) == (0, 0.5)
    assert len(by_joint) == 7
    assert set(by_joint.values()) == {1}
    assert ways[""].measures["pck"] == pytest.approx(15 / 17)


@pytest.mark.parametrize("detections", [[], ["--detections", "boxes.json"]])
def test_a_folder_of_ones_own_is_measured(coco_folder, monkeypatch, capsys, detections):
    measure(monkeypatch, coco_folder, *detections)
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| people | 1 | 1.000 [1.000, 1.000] | 1.000 |")
    assert rows[3].startswith("| people, flip test | 1 |")


def test_a_running_service_is_measured_without_the_model_at_hand(coco_folder, service, monkeypatch, capsys, tmp_path):
    measure(monkeypatch, coco_folder, "--server", str(service.client.base_url), store=tmp_path)
    assert capsys.readouterr().out.splitlines()[2].startswith("| people | 1 | 1.000 [1.000, 1.000] |")


@pytest.mark.parametrize(("flip_test", "orientation"), [(False, 1), (True, 1), (False, 3)])
def test_the_service_finds_what_the_stored_model_finds(service, flip_test, orientation):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = orientation  # 3: the service turns the picture half round, and labels are of the picture before
    Image.open(REFERENCE / "astronaut_384.png").convert("RGB").save(file, "JPEG", exif=exif)
    picture = Picture({"file_name": "1.jpg", "width": 384, "height": 384}, [], file.getvalue())
    boxes = np.array([[60.25, 10.0, 249.0, 359.0], [-20.0, 30.5, 180.0, 300.0]])
    model = PoseModel.load(STORED)
    ((_, local),) = local_estimator(model, [decoder_of(model)], [flip_test])(picture, boxes).items()
    ((_, served),) = server_estimator(service.client, "lpn50", [flip_test])(picture, boxes).items()
    np.testing.assert_allclose(served[..., :2], local[..., :2], rtol=0, atol=0.0051)  # two decimals
    np.testing.assert_allclose(served[..., 2], local[..., 2], rtol=0, atol=0.000051)  # four


@pytest.mark.parametrize("side", [1152, 1149])
def test_a_large_photo_gives_the_same_through_the_service(service, side):
    file = io.BytesIO()
    Image.open(REFERENCE / "astronaut_384.png").convert("RGB").resize((side, side)).save(file, "JPEG")
    picture = Picture({"file_name": "1.jpg", "width": side, "height": side}, [], file.getvalue())
    boxes = np.array([[180.75, 30.0, 747.0, 1077.0], [-60.0, 91.5, 540.0, 900.0]])  # decoded four times smaller
    model = PoseModel.load(STORED)
    ((_, local),) = local_estimator(model, [decoder_of(model)], [False])(picture, boxes).items()
    ((_, served),) = server_estimator(service.client, "lpn50", [False])(picture, boxes).items()
    np.testing.assert_allclose(served[..., :2], local[..., :2], rtol=0, atol=0.0051)


def test_figures_are_recorded_in_model_toml_beside_those_of_other_sets(tmp_path):
    file = tmp_path / "model.toml"
    file.write_text('name = "x"\n\n[accuracy."old"]\nap = 0.1\n\n[accuracy."coco, flip test"]\nap = 0.2\n')
    evaluate.record(file, {"coco, flip test": {"people": 2.0, "ap": 0.25, "ap_medium": -1.0}})
    assert file.read_text() == (
        'name = "x"\n\n[accuracy."old"]\nap = 0.1\n\n[accuracy."coco, flip test"]\npeople = 2.0\nap = 0.25\n'
    )


def test_the_name_of_any_set_can_be_recorded_and_read(tmp_path):
    file = tmp_path / "model.toml"
    file.write_text('name = "x"\n')
    evaluate.record(file, {'höhe "😀"': {"ap": 0.25}})
    assert tomllib.loads(file.read_text())["accuracy"] == {'höhe "😀"': {"ap": 0.25}}


@pytest.fixture(scope="module")
def crowd():
    """Twelve pictures of one to three people, found more or less well, some of them twice, some not at all."""
    rng = np.random.default_rng(1)
    images, people, results = [], [], []
    for image in range(1, 13):
        images.append({"id": image, "width": 500, "height": 500, "file_name": f"{image}.png"})
        for _ in range(rng.integers(1, 4)):
            joints = np.concatenate([rng.uniform(0, 400, (17, 2)), np.full((17, 1), 2)], axis=1)
            person = {"id": len(people) + 1, "image_id": image, "category_id": 1, "iscrowd": 0, "num_keypoints": 17}
            people.append(person | {"bbox": [0, 0, 400, 400], "area": 80000.0, "keypoints": joints.ravel().tolist()})
            for spread in rng.uniform(0, 60, rng.integers(0, 3)):
                found = joints + np.concatenate([rng.normal(0, spread, (17, 2)), np.zeros((17, 1))], axis=1)
                result = {"image_id": image, "category_id": 1, "score": float(rng.random())}
                results.append(result | {"keypoints": found.ravel().tolist()})
    return {"images": images, "annotations": people, "categories": [{"id": 1, "name": "person"}]}, results


def _drawn(content, results, times):
    """The data set and the results with each picture as often as it was drawn, under numbers of their own."""
    copies = [
        (image["id"], image["id"] + 100 * n) for image, t in zip(content["images"], times, strict=True) for n in range(t)
    ]
    images = [{"id": new, "width": 500, "height": 500, "file_name": ""} for _, new in copies]
    people, found = (
        [each | {"image_id": new} for old, new in copies for each in all_ if each["image_id"] == old]
        for all_ in (content["annotations"], results)
    )
    people = [person | {"id": number} for number, person in enumerate(people, 1)]
    return content | {"images": images, "annotations": people}, found


def test_ap_over_drawn_pictures_is_what_cocoeval_makes_of_them(crowd):
    content, results = crowd
    _, draws = oks.evaluate_results(content, results)
    for draw in (0, 1, 7, 500, 999):
        ap = oks.evaluate_results(*_drawn(content, results, accuracy.picture_draws(12)[draw]))[0]["ap"]
        assert draws[draw] == pytest.approx(ap, abs=1e-9)


def test_the_interval_holds_the_figure_and_is_the_same_each_time(crowd):
    measures, draws = oks.evaluate_results(*crowd)
    low, high = accuracy.interval(draws)
    assert low < measures["ap"] < high
    np.testing.assert_array_equal(draws, oks.evaluate_results(*crowd)[1])


def test_a_difference_is_told_with_the_interval_of_the_basic_bootstrap():
    """Draws that lie above the figure on the whole move the interval below it."""
    one = accuracy.Accuracy(9, {"ap": 0.6}, {"ap": np.linspace(0.6, 0.64, 1001)}, {})
    other = accuracy.Accuracy(9, {"ap": 0.5}, {"ap": np.full(1001, 0.5)}, {})
    assert accuracy.difference(one, other) == "+0.100 [+0.061, +0.099]"
    assert accuracy.difference(one, one) == ""


def test_the_share_of_hits_is_drawn_by_pictures():
    draws = accuracy.share_draws([np.array([True, True]), np.array([], bool), np.array([False])])
    times = accuracy.picture_draws(3)
    np.testing.assert_allclose(draws, 2 * times[:, 0] / np.maximum(2 * times[:, 0] + times[:, 2], 1))


def test_the_same_heatmaps_are_decoded_in_every_way(coco_folder, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "_DRAWS", 20)  # of 32 ways
    measure(monkeypatch, coco_folder, "--ablation")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[4:]]
    by_name = {row[0]: row[1:] for row in rows if row}
    assert len(by_name) == 24
    assert by_name[f"{decoder_of(PoseModel.load(STORED)).name}, kept"][:4] == ["1.000", "1.000", "1.000", ""]
    assert float(by_name["Beta-Soft-Argmax, β = 20"][0]) < 1
    assert by_name["Beta-Soft-Argmax, β = 20"][3].startswith("-")
    assert "argmax, quarter shift" in by_name
    assert "Beta-Soft-Argmax, β = 40, 13×13 cells" in by_name


def _with(folder, part, **fields):
    content = json.loads((folder / "people.json").read_text())
    content[part][0] |= fields
    (folder / "people.json").write_text(json.dumps(content))


def _detect(folder, **fields):
    detection = {"image_id": 1, "category_id": 1, "bbox": [9, 9, 99, 99], "score": 0.5} | fields
    (folder / "boxes.json").write_text(json.dumps([detection]))


def _without(folder, part, field):
    content = json.loads((folder / "people.json").read_text())
    del content[part][0][field]
    (folder / "people.json").write_text(json.dumps(content))


def test_other_categories_and_missing_counts_of_joints_are_no_matter(coco_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(coco_folder, folder)
    content = json.loads((folder / "people.json").read_text())
    (person,) = content["annotations"]
    del person["num_keypoints"]
    person["category_id"] = 7
    content["annotations"].append({"id": 2, "image_id": 1, "category_id": 8, "bbox": [0, 0, 9, 9], "area": 81})
    content["categories"] = [{"id": 8, "name": "dog"}, {"id": 7, "name": "person"}]
    (folder / "people.json").write_text(json.dumps(content))
    measure(monkeypatch, folder)
    assert capsys.readouterr().out.splitlines()[2].startswith("| people | 1 | 1.000 [1.000, 1.000] | 1.000 |")
    detected = [each for each in json.loads((folder / "boxes.json").read_text()) if "bbox" in each]
    dogs = [each | {"bbox": [0, 0, 9, 9], "category_id": 8} for each in detected]
    (folder / "boxes.json").write_text(json.dumps([*dogs, *(each | {"category_id": 7} for each in detected)]))
    measure(monkeypatch, folder, "--detections", "boxes.json")
    assert capsys.readouterr().out.splitlines()[2].startswith("| people | 1 | 1.000 [1.000, 1.000] | 1.000 |")


@pytest.mark.parametrize(
    "options",
    [
        ["--data", ".", "--detections", "boxes.json"],
        ["--annotations", "people.json", "--detections", "boxes.json", "--write"],
        ["--annotations", "people.json", "--server", "http://127.0.0.1:1", "--write"],
    ],
)
def test_options_that_would_mix_up_figures_are_refused(monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["evaluate", *options])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "error: --" in capsys.readouterr().err


def test_a_model_of_other_joints_is_not_measured_as_cocos(coco_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(STORED, tmp_path / "lpn50/1")
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace('"left_eye", "right_eye"', '"right_eye", "left_eye"'))
    with pytest.raises(SystemExit, match=r"^lpn50/1 knows other joints than COCO's 17"):
        measure(monkeypatch, coco_folder, store=tmp_path)


def test_ctrl_c_ends_a_measurement_without_a_word(coco_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_set", interrupted)
    with pytest.raises(SystemExit) as ended:
        measure(monkeypatch, coco_folder)
    assert ended.value.code == 130


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, capsys, threads):
    monkeypatch.setattr("sys.argv", ["evaluate", f"--threads={threads}"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert f"argument --threads: {threads} is no whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("server", ["http://127.0.0.1:1", "127.0.0.1:8000"])
def test_a_service_that_is_not_there_is_told_in_one_line(coco_folder, monkeypatch, server):
    with pytest.raises(SystemExit, match=f"^{server} gives no answer: [^\n]+$"):
        measure(monkeypatch, coco_folder, "--server", server)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "images/1.png").write_bytes(b"no picture"), "1.png is not a picture"),
        (lambda folder: (folder / "images/1.png").write_bytes(b""), "1.png is not a picture"),
        (lambda folder: (folder / "images/1.png").unlink(), "1.png of images cannot be read"),
        (lambda folder: (folder / "people.json").unlink(), "people.json cannot be read"),
        (lambda folder: (folder / "people.json").write_text('{"images": ['), "people.json is not JSON"),
        (lambda folder: (folder / "people.json").write_text("[]"), "people.json is not a COCO file"),
        (lambda folder: (folder / "people.json").write_text('{"images": [], "annotations": []}'), "people.json holds nobody"),
        (lambda folder: _without(folder, "images", "width"), "people.json: an image or annotation has no 'width'"),
        (lambda folder: _without(folder, "annotations", "image_id"), "people.json: an image or annotation has no 'image_id'"),
        (lambda folder: _with(folder, "annotations", area=0), "people.json: annotation 1 has keypoints and no area over 0"),
        (
            lambda folder: _with(folder, "annotations", keypoints=[1] * 63),
            "annotation 1 has a keypoints that is not 51 numbers",
        ),
        (lambda folder: _with(folder, "annotations", bbox=[1, 2, 3]), "annotation 1 has a bbox that is not 4 numbers"),
        (lambda folder: _with(folder, "images", width=300), "1.png has 384 × 384 pixels before any turn"),
        (lambda folder: (folder / "boxes.json").write_text('[{"image_id": 1}]'), "boxes.json is no list of detections"),
        (lambda folder: (folder / "boxes.json").write_text("[]"), "boxes.json has no detections of category 1, people in"),
        (lambda folder: (folder / "boxes.json").write_text("{"), "boxes.json is no list of detections"),
        (lambda folder: _detect(folder, bbox=[1, 2, "wide", 4]), "boxes.json is no list of detections"),
        (
            lambda folder: _detect(folder, bbox=[1, 2, float("nan"), 4]),
            "boxes.json is no list of detections: box [1, 2, nan, 4]",
        ),
        (lambda folder: _detect(folder, score=None), "boxes.json is no list of detections: box"),
        (lambda folder: _detect(folder, bbox=[9, 9, 0, 0]), "no box in any picture of people.json"),
        (lambda folder: _with(folder, "annotations", area=None), "people.json: annotation 1 has area None"),
        (lambda folder: _with(folder, "annotations", num_keypoints="3"), "people.json: annotation 1 has num_keypoints '3'"),
        (lambda folder: _with(folder, "annotations", bbox=[1e300, 1, 2, 3]), "annotation 1 has a bbox that reaches beyond"),
        (lambda folder: _with(folder, "images", width="320"), "people.json: image 1 has no file_name, or no width"),
        (lambda folder: _with(folder, "images", zip=5), "people.json: image 1 has no file_name, or no width"),
    ],
)
def test_a_bad_file_is_named_in_one_line(coco_folder, tmp_path, monkeypatch, spoil, named):
    folder = tmp_path / "mine"
    shutil.copytree(coco_folder, folder)
    spoil(folder)
    with pytest.raises(SystemExit) as ended:
        measure(monkeypatch, folder, "--detections", "boxes.json")
    assert named in ended.value.code
    assert "\n" not in ended.value.code


def test_a_sheet_shows_people_with_their_similarity(coco_folder, tmp_path, monkeypatch):
    out = tmp_path / "sheet.jpg"
    command = ["sheet", "--store", str(STORED.parents[1]), "--annotations", str(coco_folder / "people.json")]
    monkeypatch.setattr("sys.argv", [*command, "--images", str(coco_folder / "images"), "--out", str(out)])
    sheet.main()
    assert cv2.imread(str(out)).shape == (256, 6 * 192, 3)
    people = sheet.people_of(PoseModel.load(STORED), coco_folder / "people.json", coco_folder / "images")
    assert [round(person.similarity, 3) for person in people] == [1.0]  # the labels are what the model found
