"""A farm's photos: means of paddocks, time and place, a spreadsheet; killed runs and many photos included."""
import json
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from PIL import ExifTags, Image
from sources import ROOT
from test_goes_on import cut_short, linked, played, predict, whole, write_photos
from untrained import trusted_bundle

from biomass_kit.data.synthetic import paint_photo
from biomass_kit.data.targets import ENDS, KG_HA, TARGETS, BiomassError
from biomass_kit.inference import folder as folder_table
from biomass_kit.inference.bundle import read_bundle, sign_manifest
from biomass_kit.inference.means import mean_margins
from biomass_kit.inference.paddocks import paddocks_path
from biomass_kit.inference.physics import METHODS
from biomass_kit.inference.predict import predict_folder
from biomass_kit.predict import main as biomass_predict

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PADDOCKS = {"north": 5, "south/creek": 4, "west": 3}
TASMANIA = {1: "S", 2: (42.0, 30.0, 36.0), 3: "E", 4: (146.0, 30.0, 36.0)}


def write_farm(folder):
    "Three paddocks, in the last of which one photo is cut short and another has time and place."
    folder.mkdir()
    (folder / "south").mkdir()
    for i, (name, count) in enumerate(PADDOCKS.items()):
        write_photos(folder / name, [f"{i}{j}.jpg" for j in range(count)])
    cut = folder / "west/20.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2024:09:04 13:05:59"}
    exif[ExifTags.IFD.GPSInfo] = TASMANIA
    Image.fromarray(paint_photo((20, 5, 3), seed=7, height=64)).save(folder / "west/21.jpg", exif=exif)
    return folder


@pytest.fixture(scope="module")
def farm(tmp_path_factory): return write_farm(tmp_path_factory.mktemp("farm") / "photos")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    "A bundle that knows the errors of photos alone."
    work = tmp_path_factory.mktemp("earlier")
    seen = write_photos(work / "seen", [f"{i}.png" for i in range(6)])
    return trusted_bundle(work / "bundle", sorted(seen.iterdir()))


@pytest.fixture(scope="module")
def bundle(earlier, tmp_path_factory):
    "The same, knowing those of means too: in roots of grams 0.5 of one photo, 0.3 of two, 0.2 of four."
    folder = shutil.copytree(earlier, tmp_path_factory.mktemp("later") / "bundle")
    manifest = read_bundle(folder).manifest
    margins = {m: [[margin] * 5 for margin in (0.5, 0.3, 0.2)] for m in METHODS}
    manifest["trust"]["intervals"]["means"] = {"sizes": [1, 2, 4], "margins": margins}
    sign_manifest(folder, {k: v for k, v in manifest.items() if k != "sha256"})
    return folder


def told(weights, photos, out, *words):
    "The tables of photos and of paddocks that `biomass_predict --photos` writes."
    words = ["--weights", weights, "--photos", photos, "--out", out, "--device-type", "cpu", *words]
    biomass_predict([*map(str, words), "--no-cache", "--no-report-photos"])
    means = paddocks_path(out)
    return pd.read_csv(out, keep_default_na=False), pd.read_csv(means) if means.exists() else None


def roots(means, name, end): return np.sqrt(means[name + end]) - np.sqrt(means[name])


def test_subfolders_are_paddocks(bundle, farm, tmp_path, capsys):
    "Their means are of the photos that were read, in both units, and add up as photos do."
    table, means = told(bundle, farm, tmp_path / "grams.csv", "--quadrat-cm", 50, 50)
    assert table.paddock.tolist() == [name for name, count in PADDOCKS.items() for _ in range(count)]
    assert means.paddock.tolist() == [*PADDOCKS]
    assert means.photos.tolist() == [5, 4, 2] and means.not_read.tolist() == [0, 0, 1]
    read = table[~table.flag.str.startswith("training means")]
    assert means.flagged.tolist() == (read.flag != "").groupby(read.paddock, sort=False).sum().tolist()
    for name in (*TARGETS, *KG_HA):
        assert np.allclose(means[name], read.groupby("paddock", sort=False)[name].mean(), atol=1e-4), name
    assert np.allclose(means.GDM_g + means.Dry_Dead_g, means.Dry_Total_g, atol=1e-3)
    assert np.allclose(means[list(KG_HA)], means[list(TARGETS)] * 1e5 / 2500, rtol=1e-3, atol=0.1)
    margins = np.array([0.2, 0.2, 0.3]) * np.sqrt(2500 / 2100)  # by the photos behind each mean
    for end, sign in zip(ENDS, (-1, 1)):
        assert np.allclose(roots(means, "Dry_Total_g", end), sign * margins, atol=1e-3)
    report = (tmp_path / "grams_report.html").read_text()
    assert '<h2 id="paddocks">' in report and "south/creek" in report and "3 paddocks" in report
    said = capsys.readouterr().out
    assert "grams_paddocks.csv: 3 paddocks" in said and "as wide as" not in said


def test_a_bundle_without_errors_of_means_shares_the_whole_error(earlier, farm, tmp_path, capsys):
    table, means = told(earlier, farm, tmp_path / "grams.csv")
    read = table[~table.flag.str.startswith("training means")].groupby("paddock", sort=False)
    for name in TARGETS:
        for end in ENDS: assert np.allclose(means[name + end], read[name + end].mean(), atol=1e-4)
    assert "not of paddocks' means, so these get intervals as wide as" in capsys.readouterr().out


def test_a_folder_of_photos_alone_is_told_as_before(bundle, farm, tmp_path):
    told(bundle, farm, tmp_path / "grams.csv")
    table, means = told(bundle, farm / "north", tmp_path / "grams.csv")
    assert means is None and table.columns[-1] == "flag"
    assert "Paddocks" not in (tmp_path / "grams_report.html").read_text()


@pytest.mark.parametrize("kind", ["csv", "semicolons.csv", "xlsx"])
def test_a_table_names_paddocks(kind, bundle, farm, tmp_path, capsys):
    "Across subfolders, by path or by file; what has no match is said, and changes nothing else."
    photos = ["north\\00.jpg", "10.jpg", "west/21.jpg", "x.jpg"]
    rows = pd.DataFrame({"paddock": ["hill", "hill", "7", "hill"], "photo": photos})
    groups = tmp_path / f"groups.{kind}"
    if kind != "xlsx": rows.to_csv(groups, index=False, sep=",;"[kind != "csv"])
    else: pytest.importorskip("openpyxl") and rows.to_excel(groups, index=False)
    table, means = told(bundle, farm, tmp_path / "grams.csv", "--groups", groups)
    assert means.paddock.astype(str).tolist() == ["hill", "7"] and means.photos.tolist() == [2, 1]
    of = table.set_index("photo")
    hill = of.loc[["north/00.jpg", "south/creek/10.jpg"]]
    assert np.isclose(means.GDM_g[0], hill.GDM_g.mean(), atol=1e-4)
    assert of.paddock["west/21.jpg"] == "7" and of.paddock["west/22.jpg"] == ""
    said = capsys.readouterr().out
    assert "1 row without a photo" in said and "9 photos without a row" in said


REFUSED = {  # what is wrong -> (table, what is said of it)
    "twice": ("photo,paddock\n01.jpg,a\nnorth\\01.jpg,b\n", "line 3: photo 'north\\01.jpg' appears a second"),
    "several": ("photo,paddock\n00.jpg,a\n", "line 2: photo '00.jpg' may be north/00.jpg and west/00.jpg"),
    "no-paddock": ("photo,paddock\n01.jpg,\n", "line 2: paddock is empty"),
    "no-photo": ("photo,paddock\n,a\n", "line 2: photo is empty"),
    "half a row": ("photo,paddock\n01.jpg\n", "line 2: has 1 values for 2 columns"),
    "elsewhere": ("photo,paddock\ny.jpg,a\n", "line 2 'y.jpg': the folder has no such photo"),
    "column": ("photo,group\n01.jpg,a\n", "missing column paddock"),
    "grams_paddocks": ("photo,paddock\n01.jpg,a\n", "would write over it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_cannot_be_meant_is_refused_before_predicting(name, bundle, farm, tmp_path, capsys):
    photos = shutil.copytree(farm, tmp_path / "farm")
    shutil.copy(farm / "north/00.jpg", photos / "west/00.jpg")
    text, due = REFUSED[name]
    groups = tmp_path / f"{name}.csv"
    groups.write_text(text)
    with pytest.raises(SystemExit): told(bundle, photos, tmp_path / "grams.csv", "--groups", groups)
    said = capsys.readouterr().err
    assert due in said and groups.name in said and groups.read_text() == text
    assert not (tmp_path / "grams.csv").exists()


@pytest.mark.parametrize("words, due", [
    (["--data", ROOT, "--xlsx"], "are for --photos"),
    (["--data", ROOT, "--groups", "a.csv"], "are for --photos"),
    (["--photos", ROOT, "--dry-run", "--xlsx"], "--dry-run writes no table"),
])
def test_options_that_nobody_would_read_are_refused(words, due, bundle, capsys):
    with pytest.raises(SystemExit): biomass_predict(["--weights", str(bundle), *map(str, words)])
    assert due in capsys.readouterr().err


def test_time_and_place_are_columns_where_photos_have_them(bundle, farm, tmp_path):
    table, _ = told(bundle, farm, tmp_path / "grams.csv")
    assert table.columns[-4:].tolist() == ["paddock", "taken", "latitude", "longitude"]
    one = table.set_index("photo").loc["west/21.jpg"]
    assert one.taken == "2024-09-04 13:05:59"
    assert [float(one.latitude), float(one.longitude)] == [-42.51, 146.51]
    others = table[table.photo != "west/21.jpg"]
    assert (others[["taken", "latitude", "longitude"]] == "").all(axis=None)


def test_malformed_exif_never_stops_a_run(bundle, farm, tmp_path):
    "Bytes of noise in the place of EXIF: every photo is predicted."
    photos, rng = tmp_path / "noise", np.random.default_rng(0)
    photos.mkdir()
    plain = (farm / "west/21.jpg").read_bytes()
    start = plain.index(b"Exif") + 6
    for i in range(30):
        noise = bytearray(plain)
        for at in rng.integers(start, start + 150, 6): noise[at] = rng.integers(256)
        (photos / f"{i:02d}.jpg").write_bytes(noise)
    table, _ = told(bundle, photos, tmp_path / "grams.csv")
    assert len(table) == 30 and not table.flag.str.startswith("training means").any()


def test_a_spreadsheet_holds_the_same_tables(bundle, farm, tmp_path):
    "Names that begin as formulas do are text."
    openpyxl = pytest.importorskip("openpyxl")
    photos = shutil.copytree(farm, tmp_path / "farm")
    (photos / "@home").mkdir()
    shutil.copy(farm / "north/00.jpg", photos / "@home/00.jpg")
    for name in ("=1+1.jpg", "-2.jpg", "+3.jpg", "@4.jpg"): shutil.copy(farm / "north/00.jpg", photos / name)
    told(bundle, photos, tmp_path / "grams.csv", "--xlsx")
    book = openpyxl.load_workbook(tmp_path / "grams.xlsx")
    assert book.sheetnames == ["photos", "paddocks"]
    for name, path in (("photos", "grams.csv"), ("paddocks", "grams_paddocks.csv")):
        due = pd.read_csv(tmp_path / path)
        rows = list(book[name].iter_rows(values_only=True))
        assert list(rows[0]) == [*due.columns] and len(rows) == len(due) + 1
        found = pd.DataFrame(rows[1:], columns=rows[0])
        for column in due.select_dtypes("number"):
            assert np.allclose(found[column].astype(float), due[column], atol=1e-9, equal_nan=True), column
        assert found.iloc[:, 0].tolist() == due.iloc[:, 0].tolist()
    assert {cell.data_type for row in book["photos"].iter_rows() for cell in row} <= {"s", "n", "d"}


def test_without_openpyxl_a_spreadsheet_is_refused_at_the_start(bundle, farm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(BiomassError, match="grams.xlsx: needs the package openpyxl; pip install openpyxl"):
        predict_folder(bundle, farm, tmp_path / "grams.csv", device_type="cpu", xlsx=True)
    assert not (tmp_path / "grams.csv").exists()


def test_a_continued_run_has_the_same_tables(bundle, farm, tmp_path, monkeypatch):
    "Also where parts of the table are smaller; what is predicted so far is in both meanwhile."
    monkeypatch.setattr(predict, "COMPARED", 4)
    whole(bundle, farm, tmp_path / "due.csv")
    out, means = tmp_path / "grams.csv", tmp_path / "grams_paddocks.csv"
    cut_short(bundle, farm, out, 2)
    assert pd.read_csv(means).photos.sum() == 8
    monkeypatch.setattr(folder_table, "ROWS", 5)
    predict_folder(bundle, farm, out, device_type="cpu")
    for path in (out, means):
        assert path.read_bytes() == (tmp_path / path.name.replace("grams", "due")).read_bytes()


def test_a_run_that_fails_at_once_leaves_what_was_there(bundle, farm, tmp_path, monkeypatch):
    out, means = tmp_path / "grams.csv", tmp_path / "grams_paddocks.csv"
    means.write_text("of last year")

    def broken(*_, **__): raise RuntimeError("no device")

    monkeypatch.setattr(predict, "serve_all", broken)
    with pytest.raises(RuntimeError): predict_folder(bundle, farm, out, device_type="cpu")
    assert means.read_text() == "of last year" and not out.exists()


def test_memory_of_a_farms_photo_is_a_few_hundred_bytes(bundle, farm, tmp_path, monkeypatch):
    "As of photos in one folder, with a paddock, a time and a place for each."
    monkeypatch.setattr(predict, "serve_all", played)
    monkeypatch.setattr(folder_table, "ROWS", 64)
    monkeypatch.setattr(predict, "photo_p_values", lambda bundle, paths, **_: np.full(len(paths), 0.5))
    peaks = {}
    for count in (50, 50, 550):
        photos = tmp_path / f"{count}-{len(peaks)}"
        photos.mkdir()
        for name in ("a", "b"): linked(photos / name, farm / "west/21.jpg", count // 2)
        tracemalloc.start()
        table = predict_folder(bundle, photos, tmp_path / "grams.csv", device_type="cpu")
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(table) == count and table.latitude.notna().all()
    assert (peaks[550] - peaks[50]) / 500 < 900, peaks


def test_training_measures_the_errors_of_means(finished):
    "From the run's own out-of-fold predictions, for every method that has margins of photos."
    results = json.loads((finished / "results.json").read_text())
    intervals = results["intervals"]
    assert read_bundle(finished).trust["intervals"]["means"] == intervals["means"]
    assert intervals["means"]["margins"].keys() == intervals["margins"].keys()
    oof, method = pd.read_csv(finished / "oof.csv"), results["config"]["physics"]
    visits = (oof.Sampling_Date + oof.State + oof.Species).to_numpy()
    measured, predicted = (oof[[t + end for t in TARGETS]].to_numpy() for end in ("", "_pred"))
    again = mean_margins(measured, {method: predicted}, oof.Sampling_Date.to_numpy(), visits, 0.9)
    assert np.allclose(again["margins"][method], intervals["means"]["margins"][method], atol=1e-4)


@pytest.mark.skipif(not shutil.which("Rscript"), reason="R is not installed")
def test_the_lines_of_r_in_the_readme_plot_paddocks(bundle, farm, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = [block.partition("```")[0] for block in text.split("```r\n")[1:]]
    assert len(script.strip().splitlines()) <= 10
    told(bundle, farm, tmp_path / "farm.csv")
    done = subprocess.run(["Rscript", "-e", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "Rplots.pdf").stat().st_size > 3000 and "south/creek" in done.stdout
