"""Photos and folders as people have them: many suffixes, subfolders, held the other way, without an end."""
import io
import os
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from untrained import untrained_bundle

from biomass_kit.data import photos
from biomass_kit.data.photos import crop_of, list_photos, photo_names, photo_size, read_photo, split_pair
from biomass_kit.data.synthetic import paint_photo, write_dataset
from biomass_kit.data.table import read_test, read_train
from biomass_kit.data.targets import TARGETS, BiomassError
from biomass_kit.inference.issues import MEANS, summary_lines
from biomass_kit.inference.predict import predict_competition, predict_folder
from biomass_kit.predict import main as biomass_predict
from biomass_kit.training.config import TrainConfig
from biomass_kit.training.setup import prepare
from biomass_kit.validate import compare as biomass_compare

HEIC_HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # as an iPhone's file begins; its pixels are missing
PHOTO = paint_photo((30, 10, 5), seed=1, height=64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "Two untrained members on one tiny backbone."
    return untrained_bundle(tmp_path_factory.mktemp("bundle") / "bundle", grids=((2, 2),), folds=2)


def saved(path, photo=PHOTO, **options):
    "A photo as a file, its folders made; returns its path."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(path, **options)
    return path


def jpeg(photo=PHOTO, **options):
    out = io.BytesIO()
    Image.fromarray(photo).save(out, "JPEG", **options)
    return out.getvalue()


def decoded(jpeg): return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def predict_photos_by_command(bundle, folder, out):
    options = {"--weights": bundle, "--photos": folder, "--out": out, "--device-type": "cpu"}
    biomass_predict([*(str(word) for option in options.items() for word in option), "--no-cache"])


def no_heic(monkeypatch):
    "An installation without pillow-heif."
    plain = photos._has_decoder
    monkeypatch.setattr(photos, "_has_decoder", lambda kind: kind != "HEIC" and plain(kind))


# JPEGs without their end marker

JPEGS = {
    "baseline": {}, "progressive": {"progressive": True}, "full colour": {"subsampling": 0, "quality": 95},
    "restarts": {"restart_marker_blocks": 2}, "rows": {"restart_marker_rows": 1},
    "progressive restarts": {"progressive": True, "restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read_and_a_cut_one_refused(kind, tmp_path):
    "Cut at many places: read only where each pixel is right; also where zeros follow, as on a rescued card."
    whole, path = jpeg(PHOTO[:48, :96], **JPEGS[kind]), tmp_path / "photo.jpg"
    pixels, read = decoded(whole), []
    for cut in [1, 2, *range(3, len(whole) // 2, max(1, len(whole) // 600))]:
        for zeros in (0, 300):
            path.write_bytes(whole[:-cut] + bytes(zeros))
            try: photo = photos._decode(path)
            except OSError: continue
            right = (photo == pixels).all()
            assert right or pillow_reads(path), f"{cut} bytes are missing, {zeros} zeros follow"
            if right: read.append((cut, zeros))
    assert {(1, 0), (2, 0), (1, 300), (2, 300)} <= set(read)
    path.write_bytes(whole[: -len(whole) // 3])
    with pytest.raises(BiomassError, match=f"{path}: not a readable photo .*truncated"): read_photo(path)


def pillow_reads(path):
    "Whether Pillow takes a file for whole by itself."
    try: return decoded(path.read_bytes()) is not None
    except OSError: return False


def test_a_jpeg_cut_between_two_parts_is_refused(tmp_path):
    "Where a scan of a progressive one, or a part after a restart marker, is missing as a whole."
    path = tmp_path / "photo.jpg"
    begins = (("progressive", rb"\xff\xc4"), ("progressive", rb"\xff\xda"), ("rows", rb"\xff[\xd0-\xd7]"))
    for kind, marker in begins:
        whole = jpeg(**JPEGS[kind])
        places = [m.start() for m in re.finditer(marker, whole)][-3:]
        assert len(places) == 3
        for place in places:
            path.write_bytes(whole[:place])
            with pytest.raises(BiomassError, match="truncated"): read_photo(path)


# Kinds of photos

def test_every_suffix_is_read_by_its_content(tmp_path):
    "JPEG under all its suffixes; AVIF, JPEG 2000, HEIC where they can be decoded, also under a wrong name."
    for suffix in photos.FORMATS["JPEG"]:
        assert (read_photo(saved(tmp_path / f"a{suffix}", format="JPEG")) == decoded(jpeg())).all(), suffix
    for kind, name in {"AVIF": "AVIF", "JPEG 2000": "JPEG2000", "HEIC": "HEIF"}.items():
        if not photos._has_decoder(kind): continue
        upright = saved(tmp_path / f"{name}{photos.FORMATS[name][0].upper()}", format=name)
        photo = read_photo(upright)
        assert np.abs(photo.astype(float) - PHOTO).mean() < 12 and photo_size(upright) == (64, 128)
        assert (read_photo(upright.rename(tmp_path / f"{name}.jpg")) == photo).all()
        if name != "AVIF": continue  # Pillow writes no turned JPEG 2000, and pillow-heif no turned HEIC
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = saved(tmp_path / "turned.avif", np.rot90(PHOTO).copy(), exif=exif)
        assert np.abs(read_photo(turned).astype(float) - PHOTO).mean() < 12
        assert photo_size(turned) == (64, 128)


def test_heic_is_in_the_environment_of_the_tests():
    "The extra for HEIC is among what the tests are run with, so that the test above meets HEIC."
    pytest.importorskip("pillow_heif", reason="not in this environment yet: pip install pillow-heif")
    assert photos._has_decoder("HEIC")


AVIF_HEADER = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif"
HEADS = {"HEIC": HEIC_HEADER, "AVIF": AVIF_HEADER, "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n"}


@pytest.mark.parametrize("kind, head", HEADS.items())
def test_a_photo_without_its_decoder_is_called_what_it_is(kind, head, tmp_path, monkeypatch):
    "Whatever its name says; and what brings the decoder."
    monkeypatch.setattr(photos, "_has_decoder", lambda asked: asked != kind)
    path = tmp_path / "photo.jpg"
    path.write_bytes(head + bytes(200))
    for read in (read_photo, photo_size):
        with pytest.raises(BiomassError) as e: read(path)
        words = f"not a readable photo ({kind}: no decoder for it is installed; {photos.DECODERS[kind]})"
        assert str(e.value).startswith(f"{path}: {words}"), e.value


def test_only_listed_decoders_are_reached(tmp_path):
    "What a file claims to be never starts a decoder that starts a program."
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 128 64\n"
    for name, head in (("a.jpg", script), ("b.heic", b"GIF89a"), ("c.avif", b"\x89HDF\r\n\x1a\n")):
        (tmp_path / name).write_bytes(head + bytes(300))
        with pytest.raises(BiomassError, match="cannot identify"): read_photo(tmp_path / name)


# Folders

def phone_folder(folder):
    "What a phone, a card and a Mac leave: subfolders, equal names, HEIC, raw and hidden files."
    saved(folder / "IMG_1.JPG")
    saved(folder / "north/IMG_1.jpe", format="JPEG")
    saved(folder / "south/IMG_1.jfif", paint_photo((5, 20, 1), seed=2, height=64), format="JPEG")
    (folder / "south/IMG_2.HEIC").write_bytes(HEIC_HEADER)
    (folder / "south/IMG_3.jpg").write_bytes(HEIC_HEADER)
    others = ("south/IMG_4.dng", "film.MOV", "notes.txt")
    hidden = ("__MACOSX/._IMG_1.JPG", ".trash/IMG_9.jpg", "south/._IMG_1.jfif")
    for name in (*others, *hidden):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    return folder


MINE = ["IMG_1.JPG", "north/IMG_1.jpe", "south/IMG_1.jfif", "south/IMG_2.HEIC", "south/IMG_3.jpg"]


def test_a_phones_folder_by_command(bundle, tmp_path, monkeypatch, capsys):
    "Each photo is a row under its path, each HEIC with its reason; closing lines count what was not read."
    no_heic(monkeypatch)
    folder = phone_folder(tmp_path / "photos")
    untrained_bundle(folder / "runs/bundle", grids=((2, 2),), folds=1)
    saved(folder / "runs/bundle/reference/0.png")
    out = folder / "grams.csv"
    for _ in range(2):  # the second time beside its own table and report
        predict_photos_by_command(bundle, folder, out)
        said = capsys.readouterr().out
        assert "2 HEIC photos not read for lack of a decoder: pip install pillow-heif" in said
        assert "left out, as no photos that can be read: 1 .mov, 1 .dng" in said
    table = pd.read_csv(out, keep_default_na=False).set_index("photo")
    assert list(table.index) == MINE and list(pd.read_csv(folder / "grams_issues.csv")["photo"]) == MINE[3:]
    for name in MINE[3:]: assert table.flag[name].startswith(MEANS) and "HEIC: no decoder" in table.flag[name]
    assert (table.flag[MINE[:3]] == "").all()
    ways = table.loc[MINE[:3], list(TARGETS)].to_numpy()
    assert np.abs(ways[0] - ways[1]).max() < 1e-3 < np.abs(ways[0] - ways[2]).max(), "equal ones, and another"
    report = (folder / "grams_report.html").read_text(encoding="utf-8")
    assert all(f'aria-label="{name}"' in report for name in MINE)
    assert "1 .mov" in report and "2 HEIC photos not read" in report
    assert report.count('class="photo"') == 3 and str(folder / "south") not in report


def test_nothing_is_dropped_in_silence(tmp_path):
    "A folder without photos says what it holds; circles of links are counted; a broken link is a row."
    (tmp_path / "raw").mkdir()
    for i in range(3): (tmp_path / f"raw/{i}.CR2").touch()
    (tmp_path / "raw/card.txt").touch()
    words = r"raw: holds no photo, only 3 \.cr2, 1 \.txt; photos end in \.jpg"
    with pytest.raises(BiomassError, match=words): list_photos(tmp_path / "raw")
    (tmp_path / "empty").mkdir()
    words = "empty: holds no photo, and nothing else; "
    with pytest.raises(BiomassError, match=words): list_photos(tmp_path / "empty")
    with pytest.raises(BiomassError, match="no such folder"): list_photos(tmp_path / "gone")
    saved(tmp_path / "loop/in/a.png")
    (tmp_path / "loop/in/again").symlink_to(tmp_path / "loop")
    (tmp_path / "loop/self").symlink_to(tmp_path / "loop")
    (tmp_path / "loop/b.jpg").symlink_to(tmp_path / "lost.jpg")
    os.mkfifo(tmp_path / "loop/pipe.jpg")
    assert photo_names(tmp_path / "loop", list_photos(tmp_path / "loop")) == ["b.jpg", "in/a.png"]
    assert "2 linked folder" in photos.left_out(tmp_path / "loop")
    saved(tmp_path / "disk/c.png")
    (tmp_path / "loop/card").symlink_to(tmp_path / "disk")
    names = photo_names(tmp_path / "loop", list_photos(tmp_path / "loop"))
    assert names == ["b.jpg", "card/c.png", "in/a.png"]


# Photos of another shape

def test_a_photo_held_the_other_way_is_turned(bundle, tmp_path):
    "The same halves, the same grams, no flag; the closing lines say that it was turned, warnings nothing."
    saved(tmp_path / "photos/landscape.png")
    saved(tmp_path / "photos/portrait.png", np.rot90(PHOTO).copy())
    assert (split_pair(read_photo(tmp_path / "photos/portrait.png")) == split_pair(PHOTO)).all()
    assert crop_of(*photo_size(tmp_path / "photos/portrait.png")) == (True, 64, 0.0)
    cache = tmp_path / "cache"
    for _ in range(2):  # the second time features come out of the cache
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = tmp_path / "grams.csv"
            table = predict_folder(bundle, tmp_path / "photos", out, device_type="cpu", cache_dir=cache)
        grams = table[list(TARGETS)].to_numpy()
        assert np.abs(grams[0] - grams[1]).max() < 1e-3 and list(table.flag) == ["", ""]
        turned = "1 photo taller than wide, turned by 90 degrees clockwise: portrait.png"
        assert summary_lines(table)[1:] == [turned]


def test_a_photo_that_loses_much_says_how_much(bundle, tmp_path, capfd):
    "Square, 4:3, held 4:3, panorama, nearly 2:1: in the flag, in the report, in one line of the terminal."
    sizes = {"a_square": (64, 64, "50%"), "b_phone": (96, 128, "33%"), "c_held": (128, 96, "33%"),
             "d_wide": (64, 256, "50%"), "e_near": (64, 122, "")}
    for name, (height, width, _) in sizes.items():
        big = paint_photo((30, 10, 5), seed=3, height=128)
        saved(tmp_path / f"photos/{name}.png", np.asarray(Image.fromarray(big).resize((width, height))))
    out = tmp_path / "grams.csv"
    predict_photos_by_command(bundle, tmp_path / "photos", out)
    table = pd.read_csv(out, keep_default_na=False)
    flags = [lost and f"{lost} of its area is cut away to make it 2:1" for *_, lost in sizes.values()]
    assert list(table.flag) == flags
    said = capfd.readouterr()
    line = ("4 photos cropped to 2:1, more than 10% of the area cut away: "
            "a_square.png (50%), b_phone.png (33%), c_held.png (33%), d_wide.png (50%)")
    assert (said.out + said.err).count("cut away") == 1 and line in said.out
    report = (tmp_path / "grams_report.html").read_text(encoding="utf-8")
    assert line in report and "1 photo taller than wide, turned by 90 degrees clockwise: c_held.png" in report
    assert report.count("50% of its area is cut away") >= 2


def test_a_competitions_photos_are_told_of_too(bundle, tmp_path):
    "A submission has no flags; the closing lines say it."
    folder = write_dataset(tmp_path / "data", n_photos=2, n_test=3, seed=0, height=64)
    names = list(read_test(folder)[1])
    saved(folder / names[1], PHOTO[:, :64])
    table = predict_competition(bundle, folder, tmp_path / "submission.csv", device_type="cpu")
    assert [line for line in summary_lines(table) if "cut away" in line] == [
        f"1 photo cropped to 2:1, more than 10% of the area cut away: {names[1]} (50%)"]


def test_training_turns_photos_and_says_so_once(weights, tmp_path):
    "One line for the table; the smallest half, which bounds the grid, is that of the turned photo."
    folder = write_dataset(tmp_path / "data", n_photos=6, n_test=1, seed=0, height=96)
    table = read_train(folder)
    saved(folder / table.image_path[0], np.rot90(read_photo(table.path[0])).copy(), quality=95)
    saved(folder / table.image_path[1], read_photo(table.path[1])[:, :96], quality=95)
    c = TrainConfig(data=folder, out=tmp_path / "run", n_folds=2, backbone="test_efficientnet",
                    backbone_weights=weights, tile_size=32, device_type="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(c, {})
    said = [str(w.message) for w in caught if "degrees" in str(w.message) or "cut away" in str(w.message)]
    tall, square = table.image_path[:2]
    assert said == [f"1 photo taller than wide, turned by 90 degrees clockwise: {tall}",
                    f"1 photo cropped to 2:1, more than 10% of the area cut away: {square} (50%)"]


def test_two_folders_are_compared_with_their_subfolders(finished, data, tmp_path, capfd):
    "Photos of equal names are told apart by their folders, and a square one is told of once."
    folder = tmp_path / "new"
    for i, photo in enumerate(list_photos(data / "train")[:6]):
        saved(folder / f"day{i}/IMG_1.jpg", read_photo(photo) if i else read_photo(photo)[:, :96], quality=95)
    biomass_compare(["--weights", str(finished), "--first", str(data / "train"), "--second", str(folder)])
    said = capfd.readouterr()
    assert re.search(r"in second: (day\d/IMG_1\.jpg \(\d\.\d+\)(, )?)+\n", said.out), said.out
    assert said.err.count("cut away") == 1 and "day0/IMG_1.jpg (50%)" in said.err
