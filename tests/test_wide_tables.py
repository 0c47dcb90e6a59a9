"""Tables of one's own, one row per photo: read as what they mean, or refused with row and fix."""
import csv
import io
import warnings
from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from biomass_kit.data.folds import read_folds, write_folds
from biomass_kit.data.options import LabelsConfig
from biomass_kit.data.table import GROUP
from biomass_kit.data.targets import TARGETS, BiomassError, kg_per_ha
from biomass_kit.data.wide import read_labels

EXAMPLES = [
    pytest.param(150, id="short"),
    pytest.param(1500, id="long", marks=pytest.mark.long)]
THOROUGH = dict(
    deadline=None, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck))
PHOTOS = ("IMG_1.jpg", "IMG_2.jpg", "IMG_3.JPG")
GRAMS = np.array([  # green, dead, clover, GDM, total
    [12.5, 3.0, 0.0, 12.5, 15.5],
    [1234.5, 0.25, 4.0, 1238.5, 1238.75],
    [0.0, 2.0, 6.5, 6.5, 8.5]])
DAYS = (date(2024, 4, 3), date(2024, 4, 3), date(2024, 11, 30))
NAN = np.nan


def write_photos(folder, with_dates=()):
    "Photos of noise; some with the day on which a camera took them."
    (folder / "fotos").mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(PHOTOS):
        photo = Image.effect_noise((64, 32), 30 + i).convert("RGB")
        exif = photo.getexif()
        if i in with_dates: exif.get_ifd(0x8769)[36867] = DAYS[i].strftime("%Y:%m:%d 10:30:00")
        photo.save(folder / "fotos" / name, "JPEG", exif=exif)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_photos(tmp_path_factory.mktemp("wide"))


def read(folder, content, name="labels.csv", quadrat_cm=(70.0, 30.0), **options):
    "A table as the only one in its folder: (rows, warnings)."
    for old in folder.iterdir():
        if old.is_file(): old.unlink()
    if callable(content): content(folder / name)
    else: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = read_labels(folder, LabelsConfig(**options), quadrat_cm)
    return table, [str(w.message) for w in caught]


def lines(head, rows, mark=","): return "\n".join(mark.join(map(str, row)) for row in (head, *rows)) + "\n"


ENGLISH = lines(
    ("photo", "date", "Dry_Green_g", "Dry_Dead_g", "Dry_Clover_g"),
    [(p, d, *g[:3]) for p, d, g in zip(PHOTOS, DAYS, GRAMS)])
GERMAN = lines(
    ("Foto", "Datum", "Grün", "Tot", "Klee"),
    [(p, f"{d:%d.%m.%Y}", *(str(v).replace(".", ",") for v in g[:3]))
     for p, d, g in zip(PHOTOS, DAYS, GRAMS)],
    ";")
IN_GERMAN = dict(columns=("green=Grün", "dead=Tot", "clover=Klee", "date=Datum"))


def table_of(names, columns, days="%Y-%m-%d", mark=",", photos=PHOTOS):
    "A table of some targets under their own names."
    rows = [(p, f"{d:{days}}", *(g[c] for c in columns)) for p, d, g in zip(photos, DAYS, GRAMS)]
    return lines(("photo", "date", *names), rows, mark)


def dated(days): return table_of(TARGETS[:3], range(3), days)


PER_HA = np.round(kg_per_ha(GRAMS, (50, 50)), 4)
BY_AREA = lines(
    ("photo", "Sampling_Date", "Dry_Green_kg_ha", "Dry_Dead_kg_ha", "Dry_Clover_kg_ha"),
    [(p, d, *v[:3]) for p, d, v in zip(PHOTOS, DAYS, PER_HA)])
NO_DATE = lines(("photo", *TARGETS[:3]), [(p, *g[:3]) for p, g in zip(PHOTOS, GRAMS)])
PADDOCKS = lines(
    ("photo", "Paddock", *TARGETS[:3]), [(p, k, *g[:3]) for p, k, g in zip(PHOTOS, "AAB", GRAMS)])


def only(*known):
    "What is known where these targets were weighed and imply no other."
    return np.where(np.isin(np.arange(5), known), GRAMS, NAN)


FORMS = {  # name -> (content, options, grams where not all five are known)
    "commas and points": (ENGLISH, {}),
    "all five": (table_of(TARGETS, range(5)), {}),
    "semicolons and decimal commas": (GERMAN, IN_GERMAN),
    "Windows code page": (GERMAN.encode("cp1252"), IN_GERMAN),
    "byte-order mark": (GERMAN.encode("utf-8-sig"), IN_GERMAN),
    "Unicode text, tabs": (GERMAN.replace(";", "\t").encode("utf-16"), IN_GERMAN),
    "sep= and Windows line ends": (("sep=;\n" + GERMAN).replace("\n", "\r\n"), IN_GERMAN),
    "row numbers as R writes them": ("".join(
        f"{'' if i == 0 else i},{line}\n" for i, line in enumerate(ENGLISH.splitlines())), {}),
    "quoted decimal commas": (GERMAN.replace(",", "·").replace(";", '","').replace("·", ",")
                              .replace("\n", '"\n"').join(('"', "")).removesuffix('"'), IN_GERMAN),
    "day first": (dated("%d/%m/%Y"), {}),
    "month first": (dated("%m/%d/%Y"), {}),
    "year first, slashes": (dated("%Y/%m/%d"), {}),
    "points in dates": (dated("%d.%m.%Y"), {}),
    "names of months": (dated("%d %B %Y"), {}),
    "dates with a time": (dated("%Y-%m-%dT10:30:00"), {}),
    "empty lines": (ENGLISH.replace("\n", "\n\n"), {}),
    "kg DM/ha by name": (BY_AREA, dict(quadrat_cm=(50, 50))),
    "kg DM/ha by option": (BY_AREA.replace("_kg_ha", "_g"), dict(quadrat_cm=(50, 50), unit="kg_ha")),
    "photos without suffix": (table_of(TARGETS[:3], range(3), photos=[p[:-4] for p in PHOTOS]), {}),
    "paths of another machine": (
        table_of(TARGETS[:3], range(3), photos=[f"C:\\me\\{p}" for p in PHOTOS]), {}),
    "a column of another name": (ENGLISH.replace("photo", "Bild"), {}),
    "two columns of photos": (
        lines(("a", "b", *TARGETS[:3], "date"), [(p, p, *g[:3], d) for p, d, g in zip(PHOTOS, DAYS, GRAMS)]),
        dict(photo_column="b")),
    "total and GDM and green": (table_of([TARGETS[i] for i in (4, 3, 0)], (4, 3, 0)), {}),
    "total and dead and clover": (table_of([TARGETS[i] for i in (4, 1, 2)], (4, 1, 2)), {}),
    "total alone": (table_of(["DM"], [4]), dict(columns=("total=DM",)), only(4)),
    "green and dead": (table_of(TARGETS[:2], range(2)), {}, only(0, 1)),
    "names in small letters": (ENGLISH.replace("Dry_", "dry ").replace("_g", " G"), {}),
    "a train.csv of one's own": (ENGLISH, dict(name="train.csv")),
    "a table by its name": (ENGLISH, dict(name="a.txt", table="a.txt")),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_what_it_means(folder, form):
    content, options, *grams = FORMS[form]
    table, said = read(folder, content, **options)
    np.testing.assert_allclose(table[list(TARGETS)], grams[0] if grams else GRAMS, rtol=1e-6, atol=1e-6)
    assert [d.date() for d in table["Sampling_Date"]] == list(DAYS)
    assert table["image_path"].tolist() == [f"fotos/{p}" for p in PHOTOS]
    assert table["photo"].tolist() == [p[:-4] for p in PHOTOS] and GROUP not in table
    assert table["State"].tolist() == table["Species"].tolist() == [""] * 3
    expected = {"1000 g", "another folder"} if "machine" in form else {"1000 g"}
    assert all(any(words in line for words in expected) for line in said), said


def test_what_stands_beside_is_kept(folder):
    content = ENGLISH.replace("photo,", "photo,State,species,Pre_GSHH_NDVI,Note,")
    content = content.replace("jpg,", "jpg,Tas,Clover,0.5,x,")
    table, _ = read(folder, content.replace("JPG,", "JPG,Tas,Clover,,y,"))
    assert table["State"].tolist() == ["Tas"] * 3 and table["Species"].tolist() == ["Clover"] * 3
    np.testing.assert_array_equal(table["Pre_GSHH_NDVI"], [0.5, 0.5, NAN])
    assert table["Note"].tolist() == ["x", "x", "y"]


def test_rows_without_a_label_are_left_out_and_told(folder):
    content = table_of(TARGETS[:2], range(2)).replace("1234.5,0.25", "NA,")
    table, said = read(folder, content.replace("12.5,3.0", ","))
    assert table["photo"].tolist() == ["IMG_3"]
    assert any("labels.csv line 2: 2 rows without a label left out" in line for line in said), said


def test_missing_targets_are_not_numbers(folder):
    "And what two others imply is, in the rows where both are known."
    table, _ = read(folder, table_of(TARGETS[:3], range(3)).replace("0.25,4.0", "0.25,n/a"))
    due = GRAMS.copy()
    due[1, [2, 3, 4]] = NAN
    np.testing.assert_allclose(table[list(TARGETS)], due)


def test_folds_give_a_table_back(folder):
    table, _ = read(folder, PADDOCKS.replace("0.25,4.0", "0.25,"), group_column="Paddock")
    write_folds(folder / "folds.csv", table, np.arange(3))
    again, fold = read_folds(folder / "folds.csv")
    assert fold.tolist() == [0, 1, 2] and again[GROUP].tolist() == ["A", "A", "B"]
    np.testing.assert_array_equal(again[list(TARGETS)], table[list(TARGETS)])
    assert again["Sampling_Date"].isna().all()


@pytest.mark.parametrize("name, package", [("labels.xlsx", "openpyxl"), ("labels.parquet", "pyarrow")])
def test_tables_of_cells(folder, name, package):
    "Numbers and dates as such, and text among them."
    frame = pd.read_csv(io.StringIO(ENGLISH), parse_dates=["date"])

    def write(path):
        if path.suffix == ".xlsx": frame.to_excel(path, index=False)
        else: frame.to_parquet(path)

    pytest.importorskip(package)
    table, _ = read(folder, write, name)
    np.testing.assert_allclose(table[list(TARGETS)], GRAMS)
    assert [d.date() for d in table["Sampling_Date"]] == list(DAYS)
    frame.loc[1, "Dry_Dead_g"] = -1
    row = 3 if name.endswith("xlsx") else 2
    said = rf"{name} row {row}: Dry_Dead_g '-1(\.0)?' of fotos/IMG_2.jpg is negative"
    with pytest.raises(BiomassError, match=said):
        read(folder, write, name)


@pytest.mark.parametrize("name", ["labels.xlsx", "labels.parquet"])
def test_damaged_tables_of_cells_or_a_missing_package_are_told(folder, name):
    said = rf"{name}: (cannot be read|needs \w+, which is not installed; pip install)"
    with pytest.raises(BiomassError, match=said):
        read(folder, b"PK\3\4 no table", name)


@pytest.mark.parametrize("with_dates, days", [((0, 1, 2), DAYS), ((0, 1), None), ((), None)])
def test_without_dates_those_of_the_photos_serve(tmp_path, with_dates, days):
    table, said = read(write_photos(tmp_path, with_dates), NO_DATE)
    if days: assert [d.date() for d in table["Sampling_Date"]] == list(days)
    else: assert table["Sampling_Date"].isna().all()
    words = "those in the photos are used (EXIF), 2 dates" if days else (
        f"and {3 - len(with_dates)} of 3 photos have none either, first ")
    assert any(words in line for line in said), said
    assert days or any("scores are optimistically biased" in line for line in said), said


# Wrong ones: (content, options, what is said, with the row where there is one).

def with_date(text): return ENGLISH.replace("2024-04-03", text, 1)


WRONG = {
    "an ambiguous date": (dated("%d/%m/%Y").replace("30/11", "05/11"), {},
                          "line 2: date '03/04/2024' may begin with its day or its month"),
    "dates of two orders": (dated("%d/%m/%Y").replace("03/04", "04/30", 1), {},
                            "line 4: date '30/11/2024' has the day first, those before it have the month"),
    "a month that is none": (dated("%m/%d/%Y"), dict(day_first=True),
                             "line 4: date '11/30/2024' of fotos/IMG_3.JPG is not a date"),
    "both orders": (ENGLISH, dict(day_first=True, month_first=True), "give one of them"),
    "a year of two digits": (
        dated("%d/%m/%y"), {},
        "line 2: date '03/04/24' of fotos/IMG_1.jpg is not a date; write all four"),
    "a day number": (
        with_date("45385"), {},
        "line 2: date '45385' of fotos/IMG_1.jpg is not a date; format the column"),
    "words for a date": (
        with_date("spring"), {},
        "line 2: date 'spring' of fotos/IMG_1.jpg is not a date; write year-month"),
    "an empty date": (
        with_date(""), {},
        "line 2: date of fotos/IMG_1.jpg is empty; write the date, or give --group-column"),
    "no number": (
        ENGLISH.replace("12.5", "12.5 g"), {},
        "line 2: Dry_Green_g '12.5 g' of fotos/IMG_1.jpg is not a number"),
    "a dash": (
        ENGLISH.replace("12.5", "-"), {},
        "line 2: Dry_Green_g '-' of fotos/IMG_1.jpg is not a number"),
    "less than": (
        ENGLISH.replace("0.25", "<0.5"), {},
        "line 3: Dry_Dead_g '<0.5' of fotos/IMG_2.jpg is not a number"),
    "negative": (
        ENGLISH.replace("12.5", "-12.5"), {},
        "line 2: Dry_Green_g '-12.5' of fotos/IMG_1.jpg is negative"),
    "commas and points in numbers": (
        GERMAN.replace("12,5", "12.5"), IN_GERMAN,
        "line 2: Tot '3,0' has a decimal comma"),
    "a mark for thousands": (
        GERMAN.replace("1234,5", "1.234,5"), IN_GERMAN,
        "line 3: Grün '1.234,5' of fotos/IMG_2.jpg is not"),
    "a comma of two meanings": (
        lines(("photo", "date", "Dry_Total_g"), [(PHOTOS[0], DAYS[0], '"1,234"')]), {},
        "line 2: Dry_Total_g '1,234' may be a decimal or a thousand"),
    "labels that leave less than nothing": (
        lines(("photo", "date", "GDM_g", "Dry_Total_g"), [(PHOTOS[0], DAYS[0], 5, 4)]), {},
        "line 2: labels of fotos/IMG_1.jpg leave -1 g for Dry_Dead_g"),
    "a photo twice": (
        ENGLISH.replace("IMG_2.jpg", "IMG_1"), {},
        "line 3: photo fotos/IMG_1.jpg appears a second time"),
    "a photo that is not there": (ENGLISH.replace("IMG_2", "IMG_9"), {}, "line 3: photo IMG_9.jpg is not in"),
    "a photo that is empty": (
        ENGLISH.replace("IMG_2.jpg", ""), {},
        "line 3: photo is empty; name the photo or drop the row"),
    "a path that leaves": (
        ENGLISH.replace("IMG_2.jpg", "../x.jpg"), {},
        "line 3: image_path '../x.jpg' leaves the data folder"),
    "no photos": (
        ENGLISH.replace("IMG", "X").replace("photo", "plot"), {},
        "no column names photos of the folder"),
    "photos of two columns": (
        lines(("a", "b", "GDM_g"), [(p, p, 1) for p in PHOTOS]), {},
        "'a', 'b' name photos alike"),
    "no target": (ENGLISH.replace("Dry_", "Wet_"), {}, "no column is called Dry_Green_g or"),
    "no value at all": (
        lines(("photo", "date", "Dry_Total_g"), [(PHOTOS[0], DAYS[0], "NA")]), {},
        "no row has a value of 'Dry_Total_g'"),
    "a column that is not there": (
        ENGLISH, dict(columns=("green=Green",)),
        "has no column 'Green'; it has 'photo', 'date'"),
    "a word that is none": (
        ENGLISH, dict(columns=("grass=Dry_Green_g",)),
        "--columns grass=Dry_Green_g: write WORD=COLUMN"),
    "no word": (ENGLISH, dict(columns=("Dry_Green_g",)), "--columns Dry_Green_g: write WORD=COLUMN"),
    "a word twice": (
        ENGLISH, dict(columns=("green=Dry_Dead_g", "green=Dry_Clover_g")),
        "a second time; drop it"),
    "two columns of one name": (
        ENGLISH.replace("Dry_Dead_g", "dry green g"), {},
        "'Dry_Green_g', 'dry green g' may each be"),
    "a column twice": (
        ENGLISH.replace("Dry_Dead_g", "Dry_Green_g"), {},
        "line 1: column 'Dry_Green_g' appears twice"),
    "no such photo column": (ENGLISH, dict(photo_column="Bild"), "--photo-column Bild: "),
    "no such group column": (ENGLISH, dict(group_column="Paddock"), "--group-column Paddock: "),
    "an empty group": (
        PADDOCKS.replace(",B,", ",,"), dict(group_column="Paddock"),
        "line 4: Paddock of fotos/IMG_3.JPG is empty"),
    "a value without quotes": (ENGLISH.replace("12.5", "12,5"), {}, "line 2: has 6 values for 5 columns"),
    "a row cut short": (ENGLISH.replace(",6.5", ""), {}, "line 4: has 4 values for 5 columns"),
    "no rows": (ENGLISH.splitlines()[0], {}, "has a header but no rows"),
    "nothing": ("", {}, "is empty"),
    "no text": (b"\x89PNG\r\n\x1a\n\0", {}, "not a table of text"),
    "another table": (ENGLISH, dict(table="gone.csv"), "--table gone.csv: "),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_refused_with_row_and_fix(folder, fault):
    content, options, words = WRONG[fault]
    with pytest.raises(BiomassError) as refused: read(folder, content, **options)
    assert words in str(refused.value)
    assert "labels.csv" in str(refused.value) or "--" in str(refused.value)


def test_what_decides_an_ambiguous_date(folder):
    content = WRONG["an ambiguous date"][0]
    for options, month in ((dict(day_first=True), 4), (dict(month_first=True), 3)):
        assert read(folder, content, **options)[0]["Sampling_Date"].dt.month[0] == month


LONG = lines(("sample_id", "image_path", "Sampling_Date", "State", "Species", "target_name", "target"), [
    (f"{p[:5]}__{t}", f"fotos/{p}", f"{d:%Y/%m/%d}", "", "", t, v)
    for p, d, g in zip(PHOTOS, DAYS, GRAMS) for t, v in zip(TARGETS, g)])


def test_the_long_form_is_read_as_before_and_takes_no_option(folder):
    table, _ = read(folder, LONG, "train.csv")
    np.testing.assert_array_equal(table[list(TARGETS)], GRAMS)
    for options in (dict(unit="kg_ha"), dict(columns=("green=target",)), dict(day_first=True)):
        with pytest.raises(BiomassError, match="which needs no such option; drop it"):
            read(folder, LONG, "train.csv", **options)
    with pytest.raises(BiomassError, match="call it train.csv"): read(folder, LONG, "labels.csv")
    with pytest.raises(BiomassError, match="columns are separated by"):
        read(folder, LONG.replace(",", ";"), "train.csv")


def test_one_of_several_tables_must_be_named(folder):
    read(folder, ENGLISH)
    (folder / "other.tsv").write_text(ENGLISH)
    with pytest.raises(BiomassError, match="'labels.csv', 'other.tsv' are tables; say which"):
        read_labels(folder)
    (folder / "other.tsv").unlink()
    (folder / "~$labels.xlsx").write_text("a lock of a spreadsheet")
    (folder / "test.csv").write_text("sample_id,image_path,target_name\n")
    with pytest.warns(UserWarning, match="1000 g"): assert len(read_labels(folder)) == 3


# Hostile tables: harmless changes keep the meaning; random edits are refused, or mean what others read.

def shuffled(rows, draw): return [rows[0], *draw(st.permutations(rows[1:]))]


def columns_shuffled(rows, draw):
    order = draw(st.permutations(range(len(rows[0]))))
    return [[r[i] for i in order] for r in rows]


def own_column(rows, draw):
    name = draw(st.sampled_from(["Notes", "Größe", "index", "fold", "grams", "", "Height"]))
    if name in rows[0]: return rows
    values = st.sampled_from(["", "x", "1.5", 'say "hm"', "a;b,c"])
    return [[*rows[0], name], *([*r, draw(values)] for r in rows[1:])]


def other_numbers(rows, draw):
    "The same grams in another way."
    i = rows[0].index(draw(st.sampled_from(TARGETS[:3])))
    form = draw(st.sampled_from(["{:.4f}", "{:e}", "+{:.3f}", "{!r}"]))
    return [rows[0], *([*r[:i], form.format(float(r[i])), *r[i + 1:]] for r in rows[1:])]


def one_date_otherwise(rows, draw):
    i, n = rows[0].index("date"), draw(st.integers(1, len(rows) - 1))
    form = draw(st.sampled_from(
        ["%Y/%m/%d", "%Y%m%d", "%d.%m.%Y", "%d %b %Y", "%d-%B-%Y", "%Y-%m-%d 10:30", "%d/%m/%Y"]))
    if form == "%d/%m/%Y": n = next(k for k, r in enumerate(rows) if r[i].endswith("-30"))
    day = date.fromisoformat(rows[n][i])
    return [[*r[:i], day.strftime(form), *r[i + 1:]] if k == n else r for k, r in enumerate(rows)]


def other_names(rows, draw):
    i = rows[0].index("photo")
    change = draw(st.sampled_from(
        [str.lower, str.upper, "fotos/{}".format, "fotos\\{}".format, lambda p: p.partition(".")[0]]))
    return [rows[0], *([*r[:i], change(r[i]), *r[i + 1:]] for r in rows[1:])]


HARMLESS = {
    "rows": shuffled, "columns": columns_shuffled, "a column of one's own": own_column,
    "numbers": other_numbers, "a date": one_date_otherwise, "names": other_names}


def written(rows, draw):
    "Records as some program writes them."
    mark = draw(st.sampled_from(",;\t"))
    comma = draw(st.booleans())
    grams = [rows[0].index(t) for t in TARGETS[:3]]
    def said(i, value): return value.replace(".", ",") if comma and i in grams else value

    rows = [rows[0], *([said(i, v) for i, v in enumerate(r)] for r in rows[1:])]
    out = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    csv.writer(out, delimiter=mark, lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "cp1252", "utf-16"])))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_harmless_changes_keep_the_meaning(folder, examples):
    plain = list(csv.reader(io.StringIO(ENGLISH)))
    met = set()

    @settings(max_examples=examples, **THOROUGH)
    @given(st.data())
    def case(data):
        rows = plain
        for name in data.draw(st.lists(st.sampled_from(sorted(HARMLESS)), max_size=3, unique=True)):
            rows = HARMLESS[name](rows, data.draw)
            met.add(name)
        table, _ = read(folder, written(rows, data.draw))
        table = table.set_index("photo").loc[["IMG_1", "IMG_2", "IMG_3"]]
        np.testing.assert_allclose(table[list(TARGETS)], GRAMS, rtol=1e-5)
        assert [d.date() for d in table["Sampling_Date"]] == list(DAYS)

    case()
    assert met == set(HARMLESS)


JUNK = list(',;"\n\r\t .0123456789-/eE+abTas\0é')


def edited(content, rng):
    "One or two cuts, insertions, replacements and repetitions of a few characters, all over the file."
    for _ in range(rng.integers(1, 3)):
        at, length = rng.integers(len(content)), rng.integers(3)
        junk = "".join(rng.choice(JUNK, rng.integers(1, 4)))
        kinds = [junk, "", junk + content[at: at + length], 2 * content[at: at + length]]
        content = content[:at] + kinds[rng.integers(4)] + content[at + length:]
    return content


def meant(content):
    "Grams by photo as another reader sees them: pandas and float()."
    other = pd.read_csv(io.StringIO(content), dtype=str, keep_default_na=False, index_col=False)
    other.columns = other.columns.str.strip()
    return {name: [float(v) if (v := str(other[name][i]).strip()) else NAN for i in range(len(other))]
            for name in other if name in TARGETS}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_whatever_is_read_is_what_another_reader_reads(folder, examples):
    "Random edits of a table's text: refused by its name, or the very grams that pandas reads."
    seen = {"read": 0, "refused": 0}

    @settings(max_examples=examples, **THOROUGH)
    @given(st.integers(0, 2**32))
    def case(seed):
        content = edited(table_of(TARGETS, range(5)), np.random.default_rng(seed))
        try: table, said = read(folder, content)
        except BiomassError as e:
            seen["refused"] += 1
            assert "labels.csv" in str(e) and str(e).partition(": ")[2], e
            return
        seen["read"] += 1
        if any("left out" in line for line in said): return
        for name, values in meant(content).items():
            known = ~np.isnan(values)
            np.testing.assert_array_equal(table[name][known], np.array(values)[known])

    case()
    assert min(seen.values()) > examples / 8, seen
