"""train.csv and test.csv as spreadsheets, scripts and strangers leave them:
read as what they mean, or refused with file, line and fix."""
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
from mutated_tables import BYTES, HARMLESS, IN_TEST, IN_TRAINING, MEASURED, as_text, day_of

from biomass_kit.data.folds import make_folds, read_folds, write_folds
from biomass_kit.data.synthetic import write_dataset
from biomass_kit.data.table import PLAUSIBLE_GRAMS, TEST_COLUMNS, TRAIN_COLUMNS, read_test, read_train
from biomass_kit.data.targets import TARGETS, BiomassError

# of each of the two properties
EXAMPLES = [pytest.param(100, id="short"), pytest.param(1100, id="long", marks=pytest.mark.long)]
THOROUGH = dict(
    deadline=None, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Four synthetic photos, the tables of which are written anew for every case; links that lead out;
    what the tables say."""
    folder = write_dataset(
        tmp_path_factory.mktemp("tables") / "data", n_photos=4, n_test=3, seed=4, height=32)
    (folder / "sample_submission.csv").unlink()  # its order would be that of test.csv's rows
    shutil.copy(next((folder / "train").iterdir()), folder.parent / "outside.jpg")
    (folder / "train/linked.jpg").symlink_to(folder.parent / "outside.jpg")
    (folder / "train/attic").symlink_to(folder.parent)
    (folder / "elsewhere").symlink_to(folder / "train")
    return folder, {
        name: list(csv.reader((folder / name).open(newline="", encoding="utf-8")))
        for name in ("train.csv", "test.csv")}


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
        assert {k: row[k] for k in ("State", "Species", *TARGETS)} == {
            k: p[k] for k in ("State", "Species", *TARGETS)}
        assert {k: None if np.isnan(row[k]) else row[k] for k in MEASURED} == {k: p[k] for k in MEASURED}
    write_folds(folder / "folds.csv", table, np.arange(len(table)))
    again = read_folds(folder / "folds.csv")[0]
    assert all(list(again[c]) == list(table[c]) for c in again)


def check_test(rows, photos, records, folder):
    "One row a line, in order, and where each photo lies."
    lines = [dict(zip(records[0], r)) for r in records[1:]]
    assert [[r[c] for c in TEST_COLUMNS] for r in lines] == rows[list(TEST_COLUMNS)].to_numpy().tolist()
    assert photos == {r["image_path"]: lies(folder, r["image_path"]) for r in lines}


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


def check_table(name, found, records, folder):
    if name == "train.csv": check_train(found, meant(records), folder)
    else: check_test(*found, records, folder)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_what_is_harmless_is_read_and_what_is_not_is_refused(work, name, examples):
    """Some harmless mutations, in any encoding of the same table;
    and, in two cases of three, one that must be refused, by its own line."""
    folder, plain = work
    harmful = IN_TRAINING if name == "train.csv" else IN_TEST
    met, pick = set(), st.sampled_from(sorted(harmful) * 2 + [None] * len(harmful))

    @settings(max_examples=examples, **THOROUGH)
    @given(st.data())
    def case(data):
        draw, records, row = data.draw, plain[name], None
        encode = BYTES[draw(st.sampled_from(sorted(BYTES)))]
        for harmless in draw(st.lists(st.sampled_from(sorted(HARMLESS)), max_size=3)):
            records = HARMLESS[harmless](records, draw)
        wrong, good = draw(pick), records
        if wrong: records, words, row, *other = harmful[wrong](records, draw)
        content = (other[0] if wrong and other else encode)(records)
        found, said = read_case(folder, name, content)
        met.add((wrong, said is None))
        if wrong is None:
            assert said is None, said
            check_table(name, found, [[v.strip() for v in r] for r in good], folder)
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
        at = rng.integers(len(content))
        length = rng.integers(3)
        junk = "".join(rng.choice(JUNK, rng.integers(1, 4)))
        piece = content[at : at + length]
        new = [junk, "", junk + piece, 2 * piece][rng.integers(4)]
        content = content[:at] + new + content[at + length :]
    return content.encode()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_whatever_is_read_is_what_another_reader_reads(work, examples):
    """Random edits of train.csv's bytes:
    refused by the file's name, or the very table that pandas and float() read from them."""
    folder, plain = work
    seen = {"read": 0, "refused": 0}

    @settings(max_examples=examples, **THOROUGH)
    @given(st.integers(0, 2**32))
    def case(seed):
        content = edited(as_text(plain["train.csv"]), np.random.default_rng(seed))
        table, said = read_case(folder, "train.csv", content)
        seen["read" if said is None else "refused"] += 1
        if said is not None: return check_words(said, folder)
        other = pd.read_csv(
            io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
        records = [list(other.columns), *other.to_numpy().tolist()]
        check_train(
            table, meant([[v.strip() for v in r] for r in records if any(v.strip() for v in r)]), folder)

    case()
    assert min(seen.values()) > examples / 8, seen


HEADER = "sample_id,image_path,target_name\n"


def lines_of(*paths): return HEADER + "".join(f"{p}__{t},{p},{t}\n" for p in paths for t in TARGETS)


SEVERAL = [  # what is written, and the file that is meant, or None where several fit alike
    ("one.jpg", None), ("c/one.jpg", None), ("B\\ONE.jpg", "b/one.jpg"), ("x/b/one.jpg", "b/one.jpg"),
    ("c/two.jpg", "a/two.jpg"),
]


@pytest.mark.parametrize("written, meant", SEVERAL)
def test_paths_that_fit_one_file_or_several(work, tmp_path, written, meant):
    "The file that agrees with most of the path is taken, with a warning where a folder is ignored."
    for name in ("a/one.jpg", "b/one.jpg", "a/two.jpg", "a/three.jpg"): copied(work[0], tmp_path / name)
    (tmp_path / "test.csv").write_text(lines_of("a/three.jpg", written))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        photos = read_test(tmp_path)[1]
    said = [str(w.message) for w in caught]
    assert photos[written] == tmp_path / (meant or written)
    ignored = written[0] in "xc"
    words = ""
    if ignored: words = f"found in another folder than is written: 1 photo, first '{written}' at {meant}"
    if meant is None:
        words = f"cannot be told from others, first: '{written}' fits several files (a/one.jpg, b/one.jpg)"
    assert len(said) == bool(words) and all(words in line for line in said), said


def test_a_lost_photo_gets_no_other_photos_file(work, tmp_path):
    "Neither one that the table names rightly, whatever way, nor one that fits two lost photos alike."
    for name in ("a/one.jpg", "a/two.jpg", "b/x"): copied(work[0], tmp_path / name)
    alike = ("a/one.jpg", "c/two.jpg", "d/two.jpg")
    for named, *lost in (("a/two.jpg", "c/two.jpg"), ("b/../a/two.jpg", "c/two.jpg"), alike):
        (tmp_path / "test.csv").write_text(lines_of(named, *lost))
        assert read_test(tmp_path)[1] == {p: tmp_path / p for p in (named, *lost)}


def test_training_refuses_a_path_that_fits_several_files(work, tmp_path):
    "And reads it when one of them is gone, under the path where it lies."
    for name in ("a/one.jpg", "b/one.jpg"): copied(work[0], tmp_path / name)
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


def test_photos_of_equal_names_are_told_apart(work, tmp_path):
    "What a photo is called says which it is."
    folder, _ = work
    for name in ("north/1.jpg", "south/1.jpg"): copied(folder, tmp_path / name)
    rows = "".join(f"{p}__{t},{p},2015/9/4,Tas,,{t},{g}\n" for p in ("north/1.jpg", "south/1.jpg")
                   for t, g in zip(TARGETS, (1, 2, 3, 4, 6)))
    (tmp_path / "train.csv").write_text(",".join(TRAIN_COLUMNS) + "\n" + rows)
    assert list(read_train(tmp_path).photo) == ["north/1", "south/1"]


def test_heavy_quadrats_are_warned_of_once_and_missing_columns_explained(work):
    "A square metre of tall grass trains; State and Species must be there, and may be empty."
    folder, plain = work
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


def check_words(said, folder):
    assert said.startswith(f"{folder / 'train.csv'}") and re.search("[;,] \\w", said), said


def test_one_group_is_refused_with_the_reason(work):
    "A table of one date, one state or one photo: each strategy that cannot work says so."
    folder, plain = work
    i = plain["train.csv"][0].index("Sampling_Date")
    (folder / "train.csv").write_text(
        as_text(
            [plain["train.csv"][0], *([*r[:i], "2015/9/4", *r[i + 1 :]] for r in plain["train.csv"][1:])]))
    table = read_train(folder)
    for cv in ("group_date", "group_month", "leave_one_month_out"):
        with pytest.raises(BiomassError, match=f"--cv {cv}: the data has a single group, so nothing would be "
                                               "left to train on; use another --cv"):
            make_folds(table, cv)
    assert set(make_folds(table, "random", 2)) == {0, 1}
    for cv in ("random", "leave_one_state_out"):
        with pytest.raises(BiomassError, match="single group"): make_folds(table[:1], cv)


def test_a_link_to_the_whole_folder_works(work, tmp_path):
    "The folder itself may be a link, and so may train/ in it."
    folder, plain = work
    for name, records in plain.items(): (folder / name).write_text(as_text(records))
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "test.csv", "train", "test"):
        (tmp_path / "data" / name).symlink_to(folder / name)
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    check_train(read_train(tmp_path / "linked"), meant(plain["train.csv"]), tmp_path / "linked")
    check_test(*read_test(tmp_path / "linked"), plain["test.csv"], tmp_path / "linked")
