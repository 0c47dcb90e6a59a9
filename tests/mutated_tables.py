"""Changes of a table's records or bytes:
harmless ones keep their meaning, harmful ones say what must be said of them."""
import csv
import io
import re

from hypothesis import strategies as st

from biomass_kit.data.table import TEST_COLUMNS, TRAIN_COLUMNS

METADATA = ("Sampling_Date", "State", "Species")
MEASURED = ("Pre_GSHH_NDVI", "Height_Ave_cm")


def as_text(records, mark=",", newline="\n", quoting=csv.QUOTE_MINIMAL):
    out = io.StringIO()
    csv.writer(out, delimiter=mark, lineterminator=newline, quoting=quoting).writerows(records)
    return out.getvalue()


# Mutations. A harmless one changes records or bytes and keeps their meaning (or changes both alike); a
# harmful one says what must be said of it.

def at(records, draw, column):
    "A row and the column's place."
    return draw(st.integers(1, len(records) - 1)), records[0].index(column)


def reorder_columns(records, draw):
    order = draw(st.permutations(range(len(records[0]))))
    return [[r[i] for i in order] for r in records]


def reorder_rows(records, draw): return [records[0], *draw(st.permutations(records[1:]))]


def own_column(records, draw):
    names = ["photo", "path", "index", "grams", "Notes", "fold", "Größe", "Dry_Total_g", "image_path ."]
    name = draw(st.sampled_from(names))
    if name in records[0]: return records
    values = st.sampled_from(["", "x", "1.5", "a,b", 'say "hm"', "two\nlines"])
    return [[*records[0], name], *([*r, draw(values)] for r in records[1:])]


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
        return [
            [*r[:i], new(r[i]) if callable(new) else new, *r[i + 1 :]]
            if r[records[0].index("image_path")] == path else r for r in records]
    return change


def other_number(text):
    "The same grams or others, as programs write them."
    grams = float(text)
    same = [f"{grams:.3f}", f"{grams:e}", repr(grams), f"+{grams:.2f}", f"{grams:.0f}."]
    others = ["0", "0.0", "1E+2", ".5", "158", "1000", "1000.0001", "25000", "1e-300", "-0.0"]
    return st.sampled_from([*same, *others])


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
    "another species": for_photo(
        "Species", st.one_of(text, st.sampled_from(["NA", "1e5", "007", "nan", "a;b", "true"]))),
    "another NDVI, or none": for_photo(
        MEASURED[0], st.sampled_from(["", "NA", "nan", "NaN", "0.5", ".25", "1e-1", "-0.0"])),
    "another height, or none": for_photo(MEASURED[1], st.sampled_from(["", "na", "12", "+3.5", "1E+2"])),
    "numbers": numbers,
}
BYTES = {  # of the same records
    "plain": lambda r: as_text(r).encode(), "byte-order mark": lambda r: as_text(r).encode("utf-8-sig"),
    "CRLF": lambda r: as_text(r, newline="\r\n").encode(),
    "CR": lambda r: as_text(r, newline="\r", quoting=csv.QUOTE_ALL).encode(),
    "empty lines": lambda r: as_text(r).replace("\n", "\n\n").encode()
    if not any("\n" in v for row in r for v in row) else as_text(r).encode(),
    "blanks": lambda r: as_text([[f" {v}\t" for v in row] for row in r]).encode(),
    "quotes": lambda r: as_text(r, quoting=csv.QUOTE_ALL).encode(),
    "commas at the ends": lambda r: as_text([[*row, "", ""] for row in r]).encode(),
    "no line end": lambda r: as_text(r).rstrip("\n").encode(),
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
    return rest, "has no row for " + records[row][records[0].index("target_name")], next(
        n for n, r in enumerate(rest) if path in r)


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
            [[v.replace(".", ",") if with_comma and "/" not in v else v for v in row] for row in r],
            mark).encode()
    return change


def whole(words, *contents):
    return lambda records, draw: (
        records, words, None, lambda r, new=draw(st.sampled_from(contents)): new(r) if callable(new) else new)


def other_metadata(records, draw):
    column = draw(st.sampled_from(METADATA))

    def other(value): return "1999/1/1" if column == "Sampling_Date" else value + "x"

    return *cell(column, other, words=f"{column} '")(records, draw)[:2], None


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
GONE = (
    "train/gone.jpg", "train", "C:\\train\\x.jpg", "train/\0.jpg", "train/" + "x" * 5000,
    "train/\u202eGPJ.jpg", "~/x.jpg", "https://example.org/x.jpg")
ANYWHERE = {
    "a column twice": double_column(TEST_COLUMNS), "a column gone": drop_column(TEST_COLUMNS),
    "a column renamed": rename_column(TEST_COLUMNS),
    "a path that leaves": cell("image_path", *OUT, words="leaves the data folder; use a path inside"),
    "a link that leads out": cell("image_path", *LINKS, words="leads out of the data folder through a link"),
    "an unknown target": cell(
        "target_name", "Dry_Green", "", "total", "dry_green_g", "Dry_Gre\u0301en_g", words="is none of"),
    "a row cut short": short_row,
    "semicolons": region(";"), "tabs": region("\t"),
    "no rows": whole(
        "has a header but no rows", lambda r: as_text(r[:1]).encode(),
        lambda r: as_text(r[:1]).encode() + b",,,\n\n"),
    "no text": whole(
        "not a UTF-8 comma-separated table", lambda r: as_text(r).encode("utf-16"),
        lambda r: as_text(r).encode() + "é\n".encode("latin-1"),
        lambda r: as_text(r).encode() + b'"open', b"\x89PNG\r\n\x1a\n\0"),
    "no table": whole("line 1: ", b"", b"\n\n", b"\0", b"{}", lambda r: as_text(r[1:]).encode()),
}
IN_TRAINING = ANYWHERE | {
    "a column twice": double_column(TRAIN_COLUMNS), "a column gone": drop_column(TRAIN_COLUMNS),
    "a column renamed": rename_column(TRAIN_COLUMNS),
    "no number": cell("target", "", "NaN", "nan", "n/a", "-", "inf", "0x1F", "1_0", "１２", "1 000", "12g",
                      "1e", "2\0", "True",
                      words="is not a number; write grams with a decimal point"),
    "no NDVI": cell(MEASURED[0], "-", "n/a", "inf", "0,5", "0.5 ndvi", "None",
                    words="is not a number; write one with a decimal point, or leave it empty"),
    "too high": cell(MEASURED[1], "1e99", "-1e400", words="is more than can be counted"),
    "two heights": lambda r, draw: cell(MEASURED[1], "99.25", words="Height_Ave_cm '")(r, draw)[:2] + (None,),
    "too much": cell("target", "1e308", "1e400", "3.5e38", words="is more than can be counted"),
    "negative": cell("target", "-1", "-1e308", "-0.001", words="is negative"),
    "decimal comma": decimal_comma, "decimal comma without quotes": bare_comma,
    "no date": cell("Sampling_Date", "4/9/2015", "9/15/2015", "15/9/4", "2015/13/1", "2015/2/30", "spring",
                    "", "20150904", "42251", "2015/9",
                    "2015/9/4 12:00", "2015.9.4", "2015-09-04T", "2015-09-04T25:00:00",
                    "2015-9-4T10:00", "2015-02-30T10:00", "2015-09-04 noon",
                    words="is not a date; write year/month/day"),
    "metadata that differ": other_metadata,
    "a photo that is not there": cell("image_path", *GONE, words="is not in"),
    "a row twice": double_row("appears a second time; keep one row"),
    "a target gone": missing_row, "a photo under two names": second_name,
}
IN_TEST = ANYWHERE | {
    "a row twice": double_row("appears a second time; keep one row"),
    "no id": cell("sample_id", "", words="is empty")}
