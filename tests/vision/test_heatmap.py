"""Decoding against what the reference's own code makes of its heatmaps."""

from pathlib import Path

import numpy as np
import pytest

from app.vision import box, heatmap

MIRROR = np.array([0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15])


@pytest.fixture(scope="module")
def parity():
    with np.load(Path(__file__).parents[1] / "data/reference/parity.npz") as content:
        return dict(content)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", ["single", "flip"])
def test_keypoints_are_the_references(parity, kind, shift):
    boxes = parity["heatmap_boxes"]
    heatmaps = parity["heatmaps"]
    if kind == "flip":
        heatmaps = heatmap.average_with_mirrored(heatmaps, parity["heatmaps_of_flipped_input"], MIRROR, 1.0)
    found = heatmap.decode(heatmaps, float(parity["beta"]), shift)
    name = f"{kind}_bsa_{'shift' if shift else 'noshift'}"
    np.testing.assert_allclose(found[..., :2], parity[f"{name}_hm"][boxes], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[..., 2], parity[f"{kind}_bsa_score"][boxes], rtol=0, atol=1e-6)
    centres, sizes = box.centres_and_sizes(parity["box_xywh"][boxes], 192 / 256)
    places = box.to_picture(found[..., :2], centres, sizes, 48, 64)
    np.testing.assert_allclose(places, parity[f"{name}_img"][boxes], rtol=0, atol=0.01)


@pytest.mark.parametrize("shift", [True, False])
def test_synthetic_maps_with_ties_borders_and_two_peaks_decode_as_the_reference_does(parity, shift):
    found = heatmap.decode(parity["dec_heatmaps"], float(parity["beta"]), shift)
    np.testing.assert_allclose(found[..., :2], parity[f"dec_bsa_{'shift' if shift else 'noshift'}_hm"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found[..., 2], parity["dec_bsa_score"], rtol=0, atol=1e-6)


def test_each_crop_decodes_alone_as_it_does_in_a_batch(parity):
    together = heatmap.decode(parity["heatmaps"], 160.0, True)
    alone = np.concatenate([heatmap.decode(one[None], 160.0, True) for one in parity["heatmaps"]])
    np.testing.assert_array_equal(together, alone)


def test_the_highest_cell_is_found_and_the_first_of_equal_ones():
    maps = np.zeros((1, 3, 5, 4), np.float32)
    maps[0, 0, 3, 2] = 1
    maps[0, 1, 1, 3] = maps[0, 1, 4, 0] = 2
    assert heatmap.argmax(maps).tolist() == [[[2, 3], [3, 1], [0, 0]]]


@pytest.mark.parametrize("window", [None, 9])
def test_an_empty_batch_gives_no_keypoints(window):
    assert heatmap.decode(np.zeros((0, 17, 64, 48), np.float32), 160.0, True, window).shape == (0, 17, 3)


def test_a_heatmap_without_any_peak_gives_the_middle_and_its_low_score():
    found = heatmap.decode(np.zeros((1, 1, 64, 48), np.float32), 160.0, False)
    np.testing.assert_allclose(found, [[[23.5, 31.5, 0]]])


def _peaks(*places, height=1.0):
    """One heatmap [1, 1, 64, 48] with peaks of 2 cells' width at places (x, y)."""
    y, x = np.mgrid[:64, :48].astype(np.float32)
    return sum(height * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8) for px, py in places)[None, None].astype(np.float32)


@pytest.mark.parametrize(("x", "y"), [(20, 30), (20.5, 30.25), (19.6, 30.9), (3, 60.5)])
def test_places_between_cells_are_found_in_a_window(x, y):
    found = heatmap.decode(_peaks((x, y)), 15.0, False, 9)
    np.testing.assert_allclose(found[0, 0, :2], [x, y], atol=0.06)


@pytest.mark.parametrize("x", [20, 20.5, 19.6, 30.2])
def test_mirrored_maps_lie_on_the_others_where_cells_are_places_of_every_fourth_pixel(x):
    mirrored = _peaks(((191 - 4 * x) / 4, 30))
    both = heatmap.average_with_mirrored(_peaks((x, 30)), mirrored, np.array([0]), 0.75)
    np.testing.assert_allclose(heatmap.soft_argmax_in_window(both, 15.0, 9)[0, 0], [x, 30], atol=0.06)
    np.testing.assert_allclose((both[0, 0] * np.arange(48)).sum() / both.sum(), x, atol=0.001)
    by_a_cell = heatmap.average_with_mirrored(_peaks((x, 30)), mirrored, np.array([0]), 1.0)
    np.testing.assert_allclose((by_a_cell[0, 0] * np.arange(48)).sum() / by_a_cell.sum(), x + 1 / 8, atol=0.001)


def test_what_lies_outside_the_window_does_not_count():
    one, two = _peaks((20, 30)), np.maximum(_peaks((20, 30)), _peaks((20, 36), height=0.99))
    assert np.abs(heatmap.soft_argmax(two, 15.0) - [20, 30]).max() > 2
    np.testing.assert_allclose(
        heatmap.soft_argmax_in_window(two, 15.0, 5), heatmap.soft_argmax_in_window(one, 15.0, 5), atol=0.02
    )


@pytest.mark.parametrize("beta", [15.0, 160.0])
def test_a_window_as_large_as_the_map_is_the_map(parity, beta):
    everywhere = heatmap.soft_argmax_in_window(parity["heatmaps"], beta, 127)
    np.testing.assert_allclose(everywhere, heatmap.soft_argmax(parity["heatmaps"], beta), atol=1e-3)


@pytest.mark.parametrize("corner", [(0, 0), (47, 0), (0, 63), (47, 63)])
def test_a_window_ends_where_the_map_does(corner):
    maps = np.full((1, 1, 64, 48), -1, np.float32)
    maps[0, 0, corner[1], corner[0]] = 1
    np.testing.assert_allclose(heatmap.soft_argmax_in_window(maps, 15.0, 9), [[corner]], atol=1e-5)


def test_one_peak_spreads_by_its_width_and_two_by_their_distance():
    one, two = heatmap.spreads(_peaks((20, 30))), heatmap.spreads(_peaks((20, 10), (20, 50)))
    np.testing.assert_allclose(one, 2, rtol=0.02)  # the squared peak is narrower by the root of two, on each of two axes
    np.testing.assert_allclose(two, np.sqrt(20**2 + 2**2), rtol=0.02)
    np.testing.assert_allclose(heatmap.spreads(_peaks((20, 30), height=0.3)), one, rtol=0.02)


def test_a_map_without_any_peak_spreads_evenly_over_all():
    even = heatmap.spreads(np.full((1, 1, 64, 48), -0.1, np.float32))
    np.testing.assert_allclose(even, np.sqrt((64**2 + 48**2) / 12), rtol=0.01)


def test_expected_errors_follow_the_signs_of_each_joint():
    maps = np.concatenate([_peaks((20, 30)), _peaks((20, 10), (20, 50))], axis=1)
    signs = heatmap.error_signs(maps, np.array([[1.0, 0.5]], np.float32))
    found = heatmap.expected_errors(signs, np.array([0, 1], np.float32), np.array([-1, 2], np.float32))
    spread = heatmap.spreads(maps)[0]
    np.testing.assert_allclose(found, [[spread[0] ** 2, np.e * 2 * spread[1] ** 2]], rtol=1e-4)
