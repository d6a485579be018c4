from pathlib import Path

import cv2
import numpy as np
import pytest

from preprocess.evidence.cuts import find_cuts

CLIPS = Path(__file__).parents[3].parent / "shared/data/synthetic/dev"


def scene(seed, size=(200, 300)):
    draw = np.random.default_rng(seed)
    image = np.full((*size, 3), draw.integers(40, 200, 3), np.uint8)
    for _ in range(60):
        center = (int(draw.integers(size[1])), int(draw.integers(size[0])))
        color = draw.integers(0, 255, 3).tolist()
        cv2.circle(image, center, int(draw.integers(5, 40)), color, -1, cv2.LINE_AA)
    return image


def pan(seed, count, speed):
    image = scene(seed)
    return [image[40:130, 10 + speed * t : 130 + speed * t] for t in range(count)]


def faded(frames, levels):
    return [(frame * level).astype(np.uint8) for frame, level in zip(frames, levels, strict=True)]


def test_a_cut_between_two_shots_is_found():
    assert find_cuts(np.stack(pan(0, 9, 2) + pan(1, 7, -1))) == [9]


def test_several_cuts_are_found_also_close_together():
    frames = pan(0, 6, 2) + pan(1, 2, 0) + pan(2, 4, 3)
    assert find_cuts(np.stack(frames)) == [6, 8]


@pytest.mark.parametrize("speed", [0, 3, 14])
def test_a_pan_or_still_has_no_cut(speed):
    assert find_cuts(np.stack(pan(0, 12, speed))) == []


def test_motion_starting_at_once_is_no_cut():
    image = scene(0)
    steps = [0] * 8 + [12 * t for t in range(8)]
    assert find_cuts(np.stack([image[40:130, 10 + s : 130 + s] for s in steps])) == []


def test_fades_and_dissolves_have_no_cut():
    frames = pan(0, 24, 2)
    levels = np.concatenate([np.linspace(1, 0, 12), np.linspace(0, 1, 12)])
    assert find_cuts(np.stack(faded(frames, levels))) == []
    mixed = [
        cv2.addWeighted(a, 1 - w, b, w, 0)
        for a, b, w in zip(frames, pan(1, 24, 1), np.linspace(0, 1, 24), strict=True)
    ]
    assert find_cuts(np.stack(mixed)) == []


def test_flicker_flash_and_alternating_frames_have_no_cut():
    frames = pan(0, 12, 2)
    assert find_cuts(np.stack(faded(frames, [1, 0.5] * 6))) == []
    flash = [f if t != 6 else np.full_like(f, 250) for t, f in enumerate(frames)]
    assert find_cuts(np.stack(flash)) == []
    alternating = [a if t % 2 else b for t, (a, b) in enumerate(zip(frames, pan(1, 12, 2)))]  # noqa: B905
    assert find_cuts(np.stack(alternating)) == []


@pytest.mark.parametrize("count", [2, 3])
def test_videos_too_short_for_two_shots_have_no_cut(count):
    assert find_cuts(np.stack([scene(t) for t in range(count)])) == []


def test_constant_and_one_pixel_frames_are_handled():
    assert find_cuts(np.zeros((6, 1, 1, 3), np.uint8)) == []
    assert find_cuts(np.full((6, 40, 3, 3), 128, np.uint8)) == []


@pytest.mark.skipif(not CLIPS.exists(), reason="needs ../shared/data/synthetic")
def test_rendered_clips_have_no_cut_and_their_seam_is_found():
    shake, occlusion = (np.load(CLIPS / f"{name}.npz")["video"] for name in ("dash", "fence"))
    assert find_cuts(shake) == []
    assert find_cuts(occlusion) == []
    assert find_cuts(np.concatenate([shake[:10], occlusion[:10]])) == [10]
