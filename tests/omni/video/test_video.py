import logging
import re
import subprocess
from fractions import Fraction

import av
import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from omni.errors import OmniError
from omni.video.masks import load_masks
from omni.video.source import open_video
from omni.video.writing import write_video

SIZE = (64, 96)


def coded_frame(number, size=SIZE):
    """A frame whose grey level is its number, also after lossy coding; the left edge is red."""
    frame = np.full((*size, 3), 10 + 8 * number, np.uint8)
    frame[:, : size[1] // 4] = (220, 30, 30)
    return frame


def frame_number(frame):
    return round((float(frame[:, frame.shape[1] // 2 :].mean()) - 10) / 8)


def write_av(path, codec, numbers, stamps=None, pixel_format="yuv420p"):
    """Encode coded frames; `stamps` are presentation times in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = SIZE
        stream.pix_fmt = pixel_format
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(coded_frame(number), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_folder(folder, names, size=SIZE):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(coded_frame(number, size)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    "name, codec, pixel_format",
    [
        ("clip.mp4", "libx264", "yuv420p"),
        ("clip.mov", "libx264", "yuv444p"),
        ("CLIP.AVI", "mjpeg", "yuvj420p"),
        ("clip.webm", "libvpx", "yuv420p"),
    ],
)
def test_every_container_yields_all_frames_in_order_twice(tmp_path, name, codec, pixel_format):
    path = write_av(tmp_path / name, codec, range(12), pixel_format=pixel_format)
    source = open_video(path)
    assert (source.num_frames, source.size, source.path) == (12, SIZE, path)
    assert source.fps == pytest.approx(25, rel=1e-3)
    for _ in range(2):
        frames = list(source)
        assert [frame_number(frame) for frame in frames] == list(range(12))
    assert frames[0].shape == (*SIZE, 3) and frames[0].dtype == np.uint8
    assert np.abs(frames[3][32, 8].astype(int) - (220, 30, 30)).max() < 25, "not RGB"


def test_range_and_stride_select_the_same_frames_of_file_and_folder(tmp_path):
    file = open_video(write_av(tmp_path / "a.mp4", "libx264", range(12)), 2, 11, 3)
    names = [f"{number}.png" for number in range(12)]
    folder = open_video(write_folder(tmp_path / "a", names), 2, 11, 3)
    for source, fps in ((file, 25), (folder, 24)):
        assert [frame_number(frame) for frame in source] == [2, 5, 8]
        assert source.num_frames == 3 and source.fps == pytest.approx(fps / 3)


@pytest.mark.parametrize("name, codec", [("v.mp4", "libx264"), ("v.webm", "libvpx")])
def test_variable_frame_rate_keeps_every_frame_and_reports_the_average(tmp_path, name, codec):
    stamps = [0, 20, 40, 60, 300, 320, 800, 820, 840, 1000]
    source = open_video(write_av(tmp_path / name, codec, range(10), stamps))
    assert [frame_number(frame) for frame in source] == list(range(10))
    assert source.fps == pytest.approx(9, rel=0.11)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path, turn):
    flat = write_av(tmp_path / "flat.mp4", "libx264", range(3))
    turned = tmp_path / "turned.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-display_rotation"]
    subprocess.run([*command, str(turn), "-i", flat, "-c", "copy", turned], check=True)
    expected = [np.rot90(frame, turn // 90) for frame in open_video(flat)]
    source = open_video(turned)
    assert source.size == expected[0].shape[:2]
    assert all(np.array_equal(a, b) for a, b in zip(source, expected, strict=True))


def test_folder_is_sorted_naturally_and_ignores_other_files(tmp_path):
    names = ["f1.png", "f2.PNG", "f9.jpg", "f10.JPG", "f011.jpeg", "f100.JPEG"]
    folder = write_folder(tmp_path / "clip", names)
    (folder / "notes.txt").write_text("no frame")
    (folder / "._f1.png").write_bytes(b"macOS leaves these")
    (folder / "thumbs").mkdir()
    source = open_video(folder)
    assert source.names == tuple(names) and source.fps == 24
    assert [frame_number(frame) for frame in source] == list(range(6))


def test_every_kind_of_image_becomes_8_bit_rgb(tmp_path):
    grey = np.arange(35 * 47, dtype=np.uint8).reshape(35, 47)
    color = np.dstack([grey, grey[::-1], grey[:, ::-1]])
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(color).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([color, np.full_like(grey, 9)])).save(tmp_path / "2.png")
    Image.fromarray(np.dstack([grey, np.full_like(grey, 9)])).save(tmp_path / "3.png")
    cv2.imwrite(str(tmp_path / "4.png"), deep)
    cv2.imwrite(str(tmp_path / "5.png"), color[..., ::-1].astype(np.uint16) * 257)
    Image.fromarray(grey).convert("P").save(tmp_path / "6.png")
    grey3 = np.repeat(grey[..., None], 3, axis=2)
    expected = [grey3, color, color, grey3, grey3, color, grey3]
    source = open_video(tmp_path)
    assert source.size == (35, 47), "odd sizes are kept"
    for name, frame, image in zip(source.names, source, expected, strict=True):
        np.testing.assert_array_equal(frame, image, err_msg=name)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(2):
        Image.fromarray(coded_frame(number)).save(tmp_path / f"{number}.jpg", exif=exif)
    source = open_video(tmp_path)
    frame = next(iter(source))
    assert source.size == frame.shape[:2] == SIZE[::-1]
    assert frame[4, 30, 0] > 180 > frame[80, 30, 0], "the red left edge is now on top"


def test_fingerprint_follows_content_and_selection_not_place_or_time(tmp_path):
    first = write_av(tmp_path / "a.mp4", "libx264", range(6))
    (tmp_path / "moved").mkdir()
    copy = tmp_path / "moved" / "b.mp4"
    copy.write_bytes(first.read_bytes())
    other = write_av(tmp_path / "c.mp4", "libx264", range(1, 7))
    prints = [open_video(first, 0, 6).fingerprint, open_video(first, 0, 6, 2).fingerprint]
    prints += [open_video(first, 1, 6).fingerprint, open_video(other).fingerprint]
    assert len(set(prints)) == 4
    assert open_video(copy).fingerprint == prints[0]
    folder = write_folder(tmp_path / "f", ["0.png", "1.png"])
    before = open_video(folder).fingerprint
    Image.fromarray(coded_frame(5)).save(folder / "1.png")
    assert open_video(folder).fingerprint != before


@pytest.mark.parametrize(
    "suffix, codec", [("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mjpeg")]
)
def test_video_that_breaks_off_gives_the_frames_that_decode_and_a_warning(
    tmp_path, caplog, suffix, codec
):
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    noise = np.random.default_rng(0).integers(0, 255, (24, *SIZE, 3), np.uint8)
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *SIZE, pixel_format
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    whole = list(open_video(path))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        source = open_video(path)
    assert "breaks off" in caplog.text
    assert 2 <= source.num_frames < len(whole)
    decoded = list(source)
    assert len(decoded) == source.num_frames
    assert all(np.array_equal(a, b) for a, b in zip(decoded[:-1], whole, strict=False))


@pytest.mark.parametrize(
    "selection, message",
    [
        ((-1, 0, 1), "negative"),
        ((0, 0, 0), "stride"),
        ((6, 0, 1), "has 6 frames"),
        ((0, 7, 1), "has 6 frames"),
        ((4, 5, 1), "fewer than 2"),
        ((4, 2, 1), "after start"),
        ((0, -2, 1), "after start"),
        ((0, 0, 6), "fewer than 2"),
    ],
)
def test_bad_ranges_are_one_sentence(tmp_path, selection, message):
    path = write_av(tmp_path / "a.mp4", "libx264", range(6))
    folder = write_folder(tmp_path / "f", [f"{number}.png" for number in range(6)])
    for source in (path, folder):
        check_error(lambda source=source: open_video(source, *selection), message)


def check_error(action, *parts):
    with pytest.raises(OmniError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert re.search(part, message), f"{part!r} not in {message!r}"


def test_paths_that_are_no_video_are_named(tmp_path):
    check_error(lambda: open_video(tmp_path / "gone.mp4"), "gone.mp4 does not exist")
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("this is no video\n" * 200)
        check_error(lambda name=name: open_video(tmp_path / name), name, "video")
    (tmp_path / "zero.mp4").write_bytes(b"")
    check_error(lambda: open_video(tmp_path / "zero.mp4"), "zero.mp4")
    whole = write_av(tmp_path / "whole.mp4", "libx264", range(6)).read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    check_error(lambda: open_video(tmp_path / "torn.mp4"), "torn.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        container.add_stream("pcm_s16le", rate=8000)
    check_error(lambda: open_video(tmp_path / "sound.wav"), "sound.wav")


def test_folders_without_frames_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    check_error(lambda: open_video(tmp_path / "empty"), "empty holds no jpg or png")
    (tmp_path / "empty" / "readme.txt").write_text("x")
    check_error(lambda: open_video(tmp_path / "empty"), "empty holds no jpg or png")
    one = write_folder(tmp_path / "one", ["0.png"])
    check_error(lambda: open_video(one), "fewer than 2")


def test_frames_of_different_sizes_name_the_file_and_both_sizes(tmp_path):
    folder = write_folder(tmp_path / "f", ["0.png", "1.png", "2.png"])
    Image.fromarray(coded_frame(0, (20, 30))).save(folder / "1.png")
    check_error(lambda: open_video(folder), "1.png", "30x20", "96x64")
    assert len(open_video(folder, stride=2)) == 2, "frames left out do not matter"


def test_undecodable_frame_is_named(tmp_path):
    names = ["0.jpg", "1.jpg", "2.jpg"]
    folder = write_folder(tmp_path / "f", names)
    (folder / "1.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-200])
    check_error(lambda: list(open_video(folder)), "1.jpg cannot be read")
    (folder / "1.jpg").write_text("no image")
    check_error(lambda: open_video(folder), "1.jpg cannot be read")


def save_indexed(path, labels):
    image = Image.fromarray(labels.astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([7 * i % 256 for i in range(768)])
    image.save(path)


def labels_of(number):
    labels = np.zeros(SIZE, np.uint8)
    labels[number : number + 5] = 3
    labels[40:, :7] = 255
    return labels


def test_indexed_masks_follow_the_names_of_selected_frames(tmp_path):
    folder = write_folder(tmp_path / "f", [f"x{number}.jpg" for number in range(8)])
    masks = tmp_path / "m"
    masks.mkdir()
    for number in (1, 2, 5, 7):
        save_indexed(masks / f"x{number}.png", labels_of(number))
    found = load_masks(masks, open_video(folder, 1, 8, 2))
    assert sorted(found) == [0, 2, 3]
    for index, number in ((0, 1), (2, 5), (3, 7)):
        np.testing.assert_array_equal(found[index], labels_of(number))
        assert found[index].dtype == np.uint8


def test_masks_of_a_file_follow_numbers_a_count_from_one_or_order(tmp_path):
    source = open_video(write_av(tmp_path / "a.mp4", "libx264", range(6)), 2, 6, 2)
    cases = {
        "numbers": {f"{number:05d}": number for number in range(6)},
        "sparse": {"mask_4": 4},
        "from one": {f"{number + 1:04d}": number for number in range(6)},
        "order": {letter: number for number, letter in enumerate("abcdef")},
    }
    for case, names in cases.items():
        masks = tmp_path / case
        masks.mkdir()
        for name, number in names.items():
            save_indexed(masks / f"{name}.png", labels_of(number))
        found = load_masks(masks, source)
        expected = {(n - 2) // 2: n for n in names.values() if n in (2, 4)}
        assert sorted(found) == sorted(expected), case
        for index, number in expected.items():
            np.testing.assert_array_equal(found[index], labels_of(number), err_msg=case)


@pytest.mark.parametrize("name, index", [("x4", 2), ("anything", 0), ("x3", 0)])
def test_single_mask_belongs_to_the_frame_of_its_name_or_the_first(tmp_path, name, index):
    folder = write_folder(tmp_path / "f", [f"x{number}.png" for number in range(6)])
    save_indexed(tmp_path / f"{name}.png", labels_of(1))
    found = load_masks(tmp_path / f"{name}.png", open_video(folder, stride=2))
    assert list(found) == [index]


def test_binary_and_soft_grey_masks_become_zero_and_one(tmp_path):
    source = open_video(write_folder(tmp_path / "f", ["0.png", "1.png", "2.png"]))
    box = np.zeros(SIZE, np.uint8)
    box[10:30, 20:50] = 255
    soft = cv2.GaussianBlur(box, (0, 0), 3)
    for case, image in {"hard": box, "soft": soft, "color": np.dstack([box] * 3)}.items():
        masks = tmp_path / case
        masks.mkdir()
        Image.fromarray(image).save(masks / "0.png")
        Image.fromarray(image * 0).save(masks / "1.png")
        Image.fromarray(box > 0).save(masks / "2.png")
        found = load_masks(masks, source)
        assert set(np.unique(found[0])) == {0, 1} and not found[1].any(), case
        assert np.abs((found[0] > 0).sum() - (box > 0).sum()) < 40, case
        np.testing.assert_array_equal(found[2], box > 0)


def test_grey_masks_with_small_values_are_labels(tmp_path):
    source = open_video(write_folder(tmp_path / "f", ["0.png", "1.png"]))
    Image.fromarray(labels_of(3)).save(tmp_path / "0.png")
    np.testing.assert_array_equal(load_masks(tmp_path / "0.png", source)[0], labels_of(3))


def test_bad_masks_are_one_sentence(tmp_path):
    source = open_video(write_folder(tmp_path / "f", ["0.png", "1.png"]))
    masks = tmp_path / "m"
    check_error(lambda: load_masks(masks, source), "m does not exist")
    masks.mkdir()
    check_error(lambda: load_masks(masks, source), "m holds no")
    save_indexed(masks / "9.png", labels_of(0))
    check_error(lambda: load_masks(masks, source), "no mask in .*m belongs")
    save_indexed(masks / "1.png", labels_of(0)[:20, :30])
    check_error(lambda: load_masks(masks, source), "1.png", "30x20", "96x64")
    Image.fromarray(coded_frame(1)).save(masks / "1.png")
    check_error(lambda: load_masks(masks, source), "1.png is a colour image")
    (masks / "1.png").write_bytes(b"x")
    check_error(lambda: load_masks(masks, source), "1.png cannot be read")


def test_written_video_plays_in_browsers_and_keeps_frames_colours_and_rate(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, (coded_frame(number, (63, 95)) for number in range(10)), fps=12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "plays while it loads"
    source = open_video(path)
    assert source.size == (64, 96) and source.fps == 12.5
    frames = list(source)
    assert [frame_number(frame) for frame in frames] == list(range(10))
    assert np.abs(frames[4][20, 10].astype(int) - (220, 30, 30)).max() < 6


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")

    def breaking():
        yield coded_frame(0)
        raise KeyError("the caller's own error")

    with pytest.raises(KeyError):
        write_video(path, breaking(), fps=10)
    frames = [coded_frame(0), coded_frame(1, (20, 30))]
    check_error(lambda: write_video(path, frames, fps=10), "30x20", "96x64")
    check_error(lambda: write_video(path, [], fps=10), "no frames")
    check_error(lambda: write_video(tmp_path / "no" / "x.mp4", frames, fps=10), "cannot write")
    check_error(lambda: write_video(tmp_path, frames, fps=10), "cannot write")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
