"""train.csv and test.csv as spreadsheets, scripts and strangers leave them: read as what they mean, or refused with file, line and fix."""
import csv
import io
import re
import shutil
import warnings
from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from biomass_kit.data.folds import make_folds, read_folds, write_folds
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import PLAUSIBLE_GRAMS, TEST_COLUMNS, TRAIN_COLUMNS, read_test, read_train
from biomass_kit.data.targets import TARGETS, BiomassError

EXAMPLES = [pytest.param(100, id="short"), pytest.param(1100, id="long", marks=pytest.mark.long)]  # of each of the two properties
THOROUGH = dict(deadline=None, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
METADATA = ("Sampling_Date", "State", "Species")
MEASURED = ("Pre_GSHH_NDVI", "Height_Ave_cm")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "Four drawn photos, the tables of which are written anew for every case; links that lead out; what the tables say."
    folder = write_dataset(tmp_path_factory.mktemp("tables") / "data", n_photos=4, n_test=3, seed=4, height=32)
    (folder / "sample_submission.csv").unlink()  # its order would be that of test.csv's rows
    shutil.copy(next((folder / "train").iterdir()), folder.parent / "outside.jpg")
    (folder / "train/linked.jpg").symlink_to(folder.parent / "outside.jpg")
    (folder / "train/attic").symlink_to(folder.parent)
    (folder / "elsewhere").symlink_to(folder / "train")
    return folder, {name: list(csv.reader((folder / name).open(newline="", encoding="utf-8"))) for name in ("train.csv", "test.csv")}


def meant(records):  # the header and rows of a sound train.csv
    "One dict a photo: what the table says, read in another way."
    rows = [dict(zip(records[0], r)) for r in records[1:]]
    photos = {}
    for r in rows:
        day = date(*map(int, day_of(r["Sampling_Date"])))
        known = {"State": r["State"], "Species": r["Species"], "Sampling_Date": day}
        known |= {c: float(r[c]) if r[c].casefold() not in ("", "na", "nan") else None for c in MEASURED}
        p = photos.setdefault(r["image_path"], known)
        p[r["target_name"]] = float(r["target"])
    return photos


def lies(folder, written):
    "Where a photo lies, written rightly or as another machine would; all names in the folder differ."
    if (folder / written).is_file(): return folder / written
    name = re.split(r"[/\\]", written)[-1].casefold()
    return next(p for p in sorted(folder.rglob("*.jpg")) if p.name.casefold() == name)


def check_train(table, photos, folder):
    "The table says what the photos' dicts say, to the last bit, in their order; and folds.csv gives it back."
    inside = [p if (folder / p).is_file() else str(lies(folder, p).relative_to(folder)) for p in photos]
    assert list(table["image_path"]) == inside
    for row, path, p in zip(table.to_dict("records"), photos, photos.values()):
        assert row["path"] == str(lies(folder, path)) and row["Sampling_Date"].date() == p["Sampling_Date"]
        assert {k: row[k] for k in ("State", "Species", *TARGETS)} == {k: p[k] for k in ("State", "Species", *TARGETS)}
        assert {k: None if np.isnan(row[k]) else row[k] for k in MEASURED} == {k: p[k] for k in MEASURED}
    write_folds(folder / "folds.csv", table, np.arange(len(table)))
    again = read_folds(folder / "folds.csv")[0]
    assert all(list(again[c]) == list(table[c]) for c in again)


def check_test(rows, photos, records, folder):
    "One row a line, in order, and where each photo lies."
    lines = [dict(zip(records[0], r)) for r in records[1:]]
    assert [[r[c] for c in TEST_COLUMNS] for r in lines] == rows[list(TEST_COLUMNS)].to_numpy().tolist()
    assert photos == {r["image_path"]: lies(folder, r["image_path"]) for r in lines}


def as_text(records, mark=",", newline="\n", quoting=csv.QUOTE_MINIMAL):
    out = io.StringIO()
    csv.writer(out, delimiter=mark, lineterminator=newline, quoting=quoting).writerows(records)
    return out.getvalue()


# Mutations. A harmless one changes records or bytes and keeps their meaning (or changes both alike); a harmful one says what must be said of it.

def at(records, draw, column):
    "A row and the column's place."
    return draw(st.integers(1, len(records) - 1)), records[0].index(column)


def reorder_columns(records, draw):
    order = draw(st.permutations(range(len(records[0]))))
    return [[r[i] for i in order] for r in records]


def reorder_rows(records, draw): return [records[0], *draw(st.permutations(records[1:]))]


def own_column(records, draw):
    name = draw(st.sampled_from(["photo", "path", "index", "grams", "Notes", "fold", "Größe", "Dry_Total_g", "image_path ."]))
    return ([[*r, name if i == 0 else draw(st.sampled_from(["", "x", "1.5", "a,b", 'say "hm"', "two\nlines"]))] for i, r in enumerate(records)]
            if name not in records[0] else records)


def drop_a_photo(records, draw):
    photos = sorted({r[records[0].index("image_path")] for r in records[1:]})
    gone = draw(st.sampled_from(photos[1:])) if len(photos) > 1 else None
    return [r for r in records if r[records[0].index("image_path")] != gone]


def one_photo(records, draw):
    i = records[0].index("image_path")
    return [records[0], *(r for r in records[1:] if r[i] == records[1][i])]


def for_photo(column, value):
    "Give one photo another value in all of its rows."
    def change(records, draw):
        if column not in records[0]: return records
        row, i = at(records, draw, column)
        path, new = records[row][records[0].index("image_path")], draw(value)
        return [[*r[:i], new(r[i]) if callable(new) else new, *r[i + 1 :]] if r[records[0].index("image_path")] == path else r for r in records]
    return change


def other_number(text):
    "The same grams or others, as programs write them."
    return st.sampled_from([f"{float(text):.3f}", f"{float(text):e}", repr(float(text)), f"+{float(text):.2f}", f"{float(text):.0f}.",
                            "0", "0.0", "1E+2", ".5", "158", "1000", "1000.0001", "25000", "1e-300", "-0.0"])


TIMES = ("T00:00:00", " 00:00:00", "T23:59:59Z", " 08:30+10:00", "T08:30:15.25-03:30")


def with_time(time):
    return lambda text: "-".join(f"{int(part):02d}" for part in day_of(text)) + time


def day_of(text): return re.split("[/T -]", text)[:3]


def numbers(records, draw):
    if "target" not in records[0]: return records
    row, i = at(records, draw, "target")
    return [[*r[:i], draw(other_number(r[i])), *r[i + 1 :]] if n == row else r for n, r in enumerate(records)]


text = st.text(st.characters(blacklist_categories=("Cs", "Zs", "Zl", "Zp", "Cc")), min_size=1, max_size=8)
HARMLESS = {
    "columns reordered": reorder_columns, "rows reordered": reorder_rows, "a column of one's own": own_column,
    "a photo less": drop_a_photo, "one photo": one_photo,
    "a date with dashes": for_photo("Sampling_Date", st.just(lambda d: d.replace("/", "-"))),
    "a date with zeros": for_photo("Sampling_Date", st.just(lambda d: with_time("")(d).replace("-", "/"))),
    "an ISO date with a time": for_photo("Sampling_Date", st.sampled_from([with_time(t) for t in TIMES])),
    "Windows separators": for_photo("image_path", st.just(lambda p: p.replace("/", "\\"))),
    "another case of letters": for_photo("image_path", st.sampled_from([str.upper, str.swapcase])),
    "no folder": for_photo("image_path", st.just(lambda p: re.split(r"[/\\]", p)[-1])),
    "another folder": for_photo("image_path", st.sampled_from([r"C:\me\{}".format, "gone/{}".format])),
    "another state": for_photo("State", text), "no state": for_photo("State", st.just("")),
    "another species": for_photo("Species", st.one_of(text, st.sampled_from(["NA", "1e5", "007", "nan", "a;b", "true"]))),
    "another NDVI, or none": for_photo(
        MEASURED[0], st.sampled_from(["", "NA", "nan", "NaN", "0.5", ".25", "1e-1", "-0.0"])),
    "another height, or none": for_photo(MEASURED[1], st.sampled_from(["", "na", "12", "+3.5", "1E+2"])),
    "numbers": numbers,
}
BYTES = {  # of the same records
    "plain": lambda r: as_text(r).encode(), "byte-order mark": lambda r: as_text(r).encode("utf-8-sig"), "CRLF": lambda r: as_text(r, newline="\r\n").encode(),
    "CR": lambda r: as_text(r, newline="\r", quoting=csv.QUOTE_ALL).encode(),
    "empty lines": lambda r: as_text(r).replace("\n", "\n\n").encode() if not any("\n" in v for row in r for v in row) else as_text(r).encode(),
    "blanks": lambda r: as_text([[f" {v}\t" for v in row] for row in r]).encode(), "quotes": lambda r: as_text(r, quoting=csv.QUOTE_ALL).encode(),
    "commas at the ends": lambda r: as_text([[*row, "", ""] for row in r]).encode(), "no line end": lambda r: as_text(r).rstrip("\n").encode(),
}


def cell(column, *values, words):
    "One cell that is wrong."
    def change(records, draw):
        row, i = at(records, draw, column)
        new = draw(st.sampled_from(values))
        out = [list(r) for r in records]
        out[row][i] = new(out[row][i]) if callable(new) else new
        return out, words, row
    return change


def header(change, words):
    "A header that is wrong."
    return lambda records, draw: ([change(list(records[0]), draw), *records[1:]], words, 0)


def drop_column(columns):
    def change(records, draw):
        name = draw(st.sampled_from(columns))
        i = records[0].index(name)
        return [[*r[:i], *r[i + 1 :]] for r in records], f"missing column {name}", 0
    return change


def rename_column(columns):
    def change(records, draw):
        name = draw(st.sampled_from(columns))
        new = draw(st.sampled_from([name.upper() + "S", name[:-1], "", name.replace("_", " ") + "."]))
        return [[new if v == name else v for v in records[0]], *records[1:]], f"missing column {name}", 0
    return change


def double_column(columns):
    def change(records, draw):
        i = records[0].index(draw(st.sampled_from(columns)))
        return [[*r, r[i]] for r in records], f"column '{records[0][i]}' appears twice", 0
    return change


def double_row(words):
    def change(records, draw):
        row = draw(st.integers(1, len(records) - 1))
        return [*records, list(records[row])], words, len(records)
    return change


def missing_row(records, draw):
    row = draw(st.integers(1, len(records) - 1))
    path = records[row][records[0].index("image_path")]
    rest = [r for n, r in enumerate(records) if n != row]
    return rest, "has no row for " + records[row][records[0].index("target_name")], next(n for n, r in enumerate(rest) if path in r)


def short_row(records, draw):
    row, i = draw(st.integers(1, len(records) - 1)), draw(st.integers(0, len(records[0]) - 1))
    return [[*r[:i], *r[i + 1 :]] if n == row else r for n, r in enumerate(records)], "values for", row


def decimal_comma(records, draw):
    row, i = at(records, draw, "target")
    out = [list(r) for r in records]
    out[row][i] = draw(st.sampled_from(["12,5", "1,234", "1.234,5"]))
    return out, "is not a number; write grams with a decimal point", row


def bare_comma(records, draw):
    (out, _, row), i = decimal_comma(records, draw), records[0].index("target")
    return out, "not 12,5", row, lambda r: as_text(r).replace(f'"{out[row][i]}"', out[row][i]).encode()


def region(mark):
    def change(records, draw):
        with_comma = draw(st.booleans())
        return records, "columns are separated by", 0, lambda r: as_text(
            [[v.replace(".", ",") if with_comma and "/" not in v else v for v in row] for row in r], mark).encode()
    return change


def whole(words, *contents):
    return lambda records, draw: (records, words, None, lambda r, new=draw(st.sampled_from(contents)): new(r) if callable(new) else new)


def second_name(records, draw):
    "One photo's rows once more, under another name of the same file."
    i, row = records[0].index("image_path"), draw(st.integers(1, len(records) - 1))
    name = draw(st.sampled_from(["./", "train/../", "train/./../"])) + records[row][i]
    more = [[*r[:i], name, *r[i + 1 :]] for r in records[1:] if r[i] == records[row][i]]
    return [*records, *more], "is the same photo as", len(records)


OUT = ("../../etc/passwd", "/etc/passwd", "..", "train/../../x.jpg", "", "../data/train/../../x.jpg",
       "..\\..\\etc\\passwd", "train\\..\\..\\x.jpg", "\\etc\\passwd")
LINKS = ("train/linked.jpg", "train/attic/outside.jpg", "elsewhere/linked.jpg",
         "train/../elsewhere/attic/outside.jpg", "TRAIN\\Linked.JPG", "linked.jpg")
GONE = ("train/gone.jpg", "train", "C:\\train\\x.jpg", "train/\0.jpg", "train/" + "x" * 5000, "train/\u202eGPJ.jpg", "~/x.jpg", "https://example.org/x.jpg")
ANYWHERE = {
    "a column twice": double_column(TEST_COLUMNS), "a column gone": drop_column(TEST_COLUMNS), "a column renamed": rename_column(TEST_COLUMNS),
    "a path that leaves": cell("image_path", *OUT, words="leaves the data folder; use a path inside"),
    "a link that leads out": cell("image_path", *LINKS, words="leads out of the data folder through a link"),
    "an unknown target": cell("target_name", "Dry_Green", "", "total", "dry_green_g", "Dry_Gre\u0301en_g", words="is none of"), "a row cut short": short_row,
    "semicolons": region(";"), "tabs": region("\t"),
    "no rows": whole("has a header but no rows", lambda r: as_text(r[:1]).encode(), lambda r: as_text(r[:1]).encode() + b",,,\n\n"),
    "no text": whole("not a UTF-8 comma-separated table", lambda r: as_text(r).encode("utf-16"), lambda r: as_text(r).encode() + "é\n".encode("latin-1"),
                     lambda r: as_text(r).encode() + b'"open', b"\x89PNG\r\n\x1a\n\0"),
    "no table": whole("line 1: ", b"", b"\n\n", b"\0", b"{}", lambda r: as_text(r[1:]).encode()),
}
IN_TRAINING = ANYWHERE | {
    "a column twice": double_column(TRAIN_COLUMNS), "a column gone": drop_column(TRAIN_COLUMNS), "a column renamed": rename_column(TRAIN_COLUMNS),
    "no number": cell("target", "", "NaN", "nan", "n/a", "-", "inf", "0x1F", "1_0", "１２", "1 000", "12g", "1e", "2\0", "True",
                      words="is not a number; write grams with a decimal point"),
    "no NDVI": cell(MEASURED[0], "-", "n/a", "inf", "0,5", "0.5 ndvi", "None",
                    words="is not a number; write one with a decimal point, or leave it empty"),
    "too high": cell(MEASURED[1], "1e99", "-1e400", words="is more than can be counted"),
    "two heights": lambda r, draw: cell(MEASURED[1], "99.25", words="Height_Ave_cm '")(r, draw)[:2] + (None,),
    "too much": cell("target", "1e308", "1e400", "3.5e38", words="is more than can be counted"),
    "negative": cell("target", "-1", "-1e308", "-0.001", words="is negative"),
    "decimal comma": decimal_comma, "decimal comma without quotes": bare_comma,
    "no date": cell("Sampling_Date", "4/9/2015", "9/15/2015", "15/9/4", "2015/13/1", "2015/2/30", "spring", "", "20150904", "42251", "2015/9",
                    "2015/9/4 12:00", "2015.9.4", "2015-09-04T", "2015-09-04T25:00:00",
                    "2015-9-4T10:00", "2015-02-30T10:00", "2015-09-04 noon",
                    words="is not a date; write year/month/day"),
    "metadata that differ": lambda r, draw: (
        lambda c: cell(c, lambda v: {"Sampling_Date": "1999/1/1"}.get(c, v + "x"), words=f"{c} '")(r, draw)[:2] + (None,))(draw(st.sampled_from(METADATA))),
    "a photo that is not there": cell("image_path", *GONE, words="is not in"), "a row twice": double_row("appears a second time; keep one row"),
    "a target gone": missing_row, "a photo under two names": second_name,
}
IN_TEST = ANYWHERE | {"a row twice": double_row("appears a second time; keep one row"), "no id": cell("sample_id", "", words="is empty")}


def line_of(data, row):
    "The line on which a row begins, whatever line breaks its values and its file have."
    reader, last = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")), 0
    begins = []
    for values in reader:
        if any(v.strip() for v in values): begins.append(last + 1)
        last = reader.line_num
    return begins[row]


def read_case(folder, name, data):
    "What the library makes of a file, or what it says; anything but a BiomassError is a failure of the test."
    (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # labels that do not add up any more
        try: return (read_train if name == "train.csv" else read_test)(folder), None
        except BiomassError as e: return None, str(e)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_what_is_harmless_is_read_and_what_is_not_is_refused(room, name, examples):
    "Some harmless mutations, in any encoding of the same table; and, in two cases of three, one that must be refused, by its own line."
    folder, plain = room
    harmful = IN_TRAINING if name == "train.csv" else IN_TEST
    met, pick = set(), st.sampled_from(sorted(harmful) * 2 + [None] * len(harmful))

    @settings(max_examples=examples, **THOROUGH)
    @given(st.data())
    def case(data):
        draw, records, row, encode = data.draw, plain[name], None, BYTES[data.draw(st.sampled_from(sorted(BYTES)))]
        for harmless in draw(st.lists(st.sampled_from(sorted(HARMLESS)), max_size=3)): records = HARMLESS[harmless](records, draw)
        wrong, good = draw(pick), records
        if wrong: records, words, row, *other = harmful[wrong](records, draw)
        content = (other[0] if wrong and other else encode)(records)
        found, said = read_case(folder, name, content)
        met.add((wrong, said is None))
        if wrong is None:
            assert said is None, said
            if name == "train.csv": check_train(found, meant([[v.strip() for v in r] for r in good]), folder)
            else: check_test(*found, [[v.strip() for v in r] for r in good], folder)
        else:
            assert said is not None, f"{wrong}: read as\n{found}"
            assert str(folder / name) in said and words in said, (wrong, said)
            if row is not None and name in said and f"{name}: none of" not in said:
                assert f"{name} line {line_of(content, row)}: " in said, (wrong, said, row)

    case()
    if examples > 500: assert {w for w, _ in met} == {None, *harmful}, "every mutation was met"


JUNK = list(',;"\n\r\t .0123456789-/eE+abTas\0é')


def edited(content, rng):
    "One or two cuts, insertions, replacements and repetitions of a few characters, all over the file."
    for _ in range(rng.integers(1, 3)):
        at, length, junk = rng.integers(len(content)), rng.integers(3), "".join(rng.choice(JUNK, rng.integers(1, 4)))
        content = content[:at] + [junk, "", junk + content[at : at + length], 2 * content[at : at + length]][rng.integers(4)] + content[at + length :]
    return content.encode()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_whatever_is_read_is_what_another_reader_reads(room, examples):
    "Random edits of train.csv's bytes: refused by the file's name, or the very table that pandas and float() read from them."
    folder, plain = room
    seen = {"read": 0, "refused": 0}

    @settings(max_examples=examples, **THOROUGH)
    @given(st.integers(0, 2**32))
    def case(seed):
        content = edited(as_text(plain["train.csv"]), np.random.default_rng(seed))
        table, said = read_case(folder, "train.csv", content)
        seen["read" if said is None else "refused"] += 1
        if said is not None: return check_words(said, folder)
        other = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
        records = [list(other.columns), *other.to_numpy().tolist()]
        check_train(table, meant([[v.strip() for v in r] for r in records if any(v.strip() for v in r)]), folder)

    case()
    assert min(seen.values()) > examples / 8, seen


HEADER = "sample_id,image_path,target_name\n"


def lines_of(*paths): return HEADER + "".join(f"{p}__{t},{p},{t}\n" for p in paths for t in TARGETS)


SEVERAL = [  # what is written, and the file that is meant, or None where several fit alike
    ("one.jpg", None), ("c/one.jpg", None), ("B\\ONE.jpg", "b/one.jpg"), ("x/b/one.jpg", "b/one.jpg"),
    ("c/two.jpg", "a/two.jpg"),
]


@pytest.mark.parametrize("written, meant", SEVERAL)
def test_paths_that_fit_one_file_or_several(room, tmp_path, written, meant):
    "The file that agrees with most of the path is taken, with a warning where a folder is ignored."
    for name in ("a/one.jpg", "b/one.jpg", "a/two.jpg", "a/three.jpg"): copied(room[0], tmp_path / name)
    (tmp_path / "test.csv").write_text(lines_of("a/three.jpg", written))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        photos = read_test(tmp_path)[1]
    said = [str(w.message) for w in caught]
    assert photos[written] == tmp_path / (meant or written)
    ignored = written[0] in "xc"
    words = f"found in another folder than is written: 1 photo, first '{written}' at {meant}" if ignored else ""
    if meant is None: words = f"cannot be told from others, first: '{written}' fits several files (a/one.jpg, b/one.jpg)"
    assert len(said) == bool(words) and all(words in line for line in said), said


def test_a_lost_photo_gets_no_other_photos_file(room, tmp_path):
    "Neither one that the table names rightly, whatever way, nor one that fits two lost photos alike."
    for name in ("a/one.jpg", "a/two.jpg", "b/x"): copied(room[0], tmp_path / name)
    alike = ("a/one.jpg", "c/two.jpg", "d/two.jpg")
    for named, *lost in (("a/two.jpg", "c/two.jpg"), ("b/../a/two.jpg", "c/two.jpg"), alike):
        (tmp_path / "test.csv").write_text(lines_of(named, *lost))
        assert read_test(tmp_path)[1] == {p: tmp_path / p for p in (named, *lost)}


def test_training_refuses_a_path_that_fits_several_files(room, tmp_path):
    "And reads it when one of them is gone, under the path where it lies."
    for name in ("a/one.jpg", "b/one.jpg"): copied(room[0], tmp_path / name)
    rows = "".join(f"x__{t},one.jpg,2015/9/4,Tas,,{t},{g}\n" for t, g in zip(TARGETS, (1, 2, 3, 4, 6)))
    (tmp_path / "train.csv").write_text(",".join(TRAIN_COLUMNS) + "\n" + rows)
    words = r"line 2: image_path 'one.jpg' fits several files \(a/one.jpg, b/one.jpg\); write the path"
    with pytest.raises(BiomassError, match=words): read_train(tmp_path)
    shutil.rmtree(tmp_path / "b")
    table = read_train(tmp_path)
    assert table.image_path[0] == "a/one.jpg" and table.Species[0] == ""


def copied(folder, path):
    "Some photo under another name."
    path.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(next((folder / "train").glob("ID*.jpg")), path)


def test_photos_of_equal_names_are_told_apart(room, tmp_path):
    "What a photo is called says which it is."
    folder, _ = room
    for name in ("north/1.jpg", "south/1.jpg"): copied(folder, tmp_path / name)
    rows = "".join(f"{p}__{t},{p},2015/9/4,Tas,,{t},{g}\n" for p in ("north/1.jpg", "south/1.jpg")
                   for t, g in zip(TARGETS, (1, 2, 3, 4, 6)))
    (tmp_path / "train.csv").write_text(",".join(TRAIN_COLUMNS) + "\n" + rows)
    assert list(read_train(tmp_path).photo) == ["north/1", "south/1"]


def test_heavy_quadrats_are_warned_of_once_and_missing_columns_explained(room):
    "A square metre of tall grass trains; State and Species must be there, and may be empty."
    folder, plain = room
    i = plain["train.csv"][0].index("target")
    header, *rows = plain["train.csv"]
    heavy = [[*r[:i], f"{100 * float(r[i]) + 2000}", *r[i + 1 :]] for r in rows]
    (folder / "train.csv").write_text(as_text([header, *heavy]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (read_train(folder)[list(TARGETS)] > PLAUSIBLE_GRAMS).all(axis=None)
    assert len([w for w in caught if "20 targets over 1000 g, first line 2" in str(w.message)]) == 1
    for gone, also in (("State", True), ("Species", True), ("target", False)):
        j = plain["train.csv"][0].index(gone)
        (folder / "train.csv").write_text(as_text([[*r[:j], *r[j + 1 :]] for r in plain["train.csv"]]))
        with pytest.raises(BiomassError, match=f"missing column {gone}; found ") as e: read_train(folder)
        assert (f"values of {gone} may be empty, the column must be there" in str(e.value)) == also


def check_words(said, folder): assert said.startswith(f"{folder / 'train.csv'}") and re.search("[;,] \\w", said), said


def test_one_group_is_refused_with_the_reason(room):
    "A table of one date, one state or one photo: each strategy that cannot work says so."
    folder, plain = room
    i = plain["train.csv"][0].index("Sampling_Date")
    (folder / "train.csv").write_text(as_text([plain["train.csv"][0], *([*r[:i], "2015/9/4", *r[i + 1 :]] for r in plain["train.csv"][1:])]))
    table = read_train(folder)
    for cv in ("group_date", "group_month", "leave_one_month_out"):
        with pytest.raises(BiomassError, match=f"--cv {cv}: the data has a single group, so nothing would be left to train on; use another --cv"):
            make_folds(table, cv)
    assert set(make_folds(table, "random", 2)) == {0, 1}
    for cv in ("random", "leave_one_state_out"):
        with pytest.raises(BiomassError, match="single group"): make_folds(table[:1], cv)


def test_a_link_to_the_whole_folder_works(room, tmp_path):
    "The folder itself may be a link, and so may train/ in it."
    folder, plain = room
    for name, records in plain.items(): (folder / name).write_text(as_text(records))
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "test.csv", "train", "test"): (tmp_path / "data" / name).symlink_to(folder / name)
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    check_train(read_train(tmp_path / "linked"), meant(plain["train.csv"]), tmp_path / "linked")
    check_test(*read_test(tmp_path / "linked"), plain["test.csv"], tmp_path / "linked")
