"""Photos as disks, mail and strangers leave them: decoded to uint8 [H, W, 3] or refused by name;
no crash, no hang, bounded memory."""
import io
import json
import resource
import signal
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import python
from PIL import Image

from biomass_kit.data.photos import MAX_PIXELS, _has_decoder, photo_size, read_photo
from biomass_kit.data.targets import BiomassError

# bytes beyond what the process has before: a photo of MAX_PIXELS in Pillow's four bytes a pixel, twice, and
# its three as an array
MEMORY = 1.3e9
SECONDS = 10  # of the processor, for one file; the largest that is decoded takes two
HANGS = 120  # seconds on the wall, on a busy machine


def encoded(array, kind, **options):
    "An image as the bytes of a file."
    out = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(out, kind, **options)
    return out.getvalue()


def seeds():
    "Sound photos of many kinds, 128x64: name -> bytes."
    rng = np.random.default_rng(0)
    rgb = np.asarray(Image.fromarray(rng.integers(0, 255, (16, 32, 3), dtype=np.uint8)).resize((128, 64)))
    turned, image = Image.Exif(), Image.fromarray(rgb)
    turned[0x0112] = 6
    turned[0x010F] = "a camera"
    rare = {"AVIF": ("a.avif", "AVIF"), "JPEG 2000": ("a.jp2", "JPEG2000"), "HEIC": ("a.heic", "HEIF")}
    here = [of for kind, of in rare.items() if _has_decoder(kind)]
    return {name: encoded(rgb, form, quality=95) for name, form in here} | {
        "unended.jpg": encoded(rgb, "JPEG")[:-2], "a.jfif": encoded(rgb, "JPEG"),
        "baseline.jpg": encoded(rgb, "JPEG", quality=90),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "subsampled.jpeg": encoded(rgb, "JPEG", subsampling=2, restart_marker_blocks=2),
        "turned.jpg": encoded(np.rot90(rgb).copy(), "JPEG", exif=turned),
        "grey.jpg": encoded(image.convert("L"), "JPEG"), "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "rgb.png": encoded(rgb, "PNG"), "rgba.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.png": encoded(image.quantize(200), "PNG", transparency=3),
        "grey.png": encoded(image.convert("L"), "PNG"),
        "deep.png": encoded(rgb[..., 0].astype(np.uint16) * 257, "PNG"),
        "turned.png": encoded(np.rot90(rgb).copy(), "PNG", exif=turned),
        "text.png": encoded(rgb, "PNG", pnginfo=text_chunks()),
        "png-named.jpg": encoded(rgb, "PNG"), "jpg-named.png": encoded(rgb, "JPEG"),
        "a.tif": encoded(rgb, "TIFF", compression="tiff_lzw"), "a.webp": encoded(rgb, "WEBP"),
        "a.bmp": encoded(rgb, "BMP"),
    }


def text_chunks():
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "grass " * 50, zip=True)
    return info


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height, extra=b"", data=b"\0" * 1000, depth=8, colour=2):
    "A PNG that claims a size; its pixels are mostly missing."
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


SIZE = {"a.jp2": (64, 128), "a.avif": (128, 64)}  # in the order in which each form writes it


def bombs(plain):
    "Small files that ask for much: (name, bytes)."
    jpeg = bytearray(plain["baseline.jpg"])
    size = jpeg.index(b"\xff\xc0") + 5
    for side in (20_000, 65_500):
        jpeg[size : size + 4] = struct.pack(">HH", side, side)
        yield f"claims-{side}.jpg", bytes(jpeg)
    for name in SIZE.keys() & plain.keys():
        lying = plain[name].replace(struct.pack(">II", *SIZE[name]), struct.pack(">II", 40_000, 40_000))
        assert lying != plain[name]
        yield f"claims-{name}", lying
    yield "one-pixel.png", encoded(np.zeros((1, 1, 3), np.uint8), "PNG")
    yield "one-pixel.jpg", encoded(np.zeros((1, 1, 3), np.uint8), "JPEG")
    most = 2**31 - 1
    for width, height in ((8000, 8000), (12_000, 9000), (30_000, 30_000), (most, most), (0, 0), (most, 1)):
        yield f"{width}x{height}.png", bomb(width, height)
    yield "full.png", bomb(8000, 8000, data=b"\0" * (8000 * 24001))
    yield "full-deep.png", bomb(8000, 8000, data=b"\0" * (8000 * 16001), depth=16, colour=0)
    yield "text.png", bomb(128, 64, extra=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 100_000_000)))
    yield "profile.png", bomb(128, 64, extra=chunk(b"iCCP", b"p\0\0" + zlib.compress(b"a" * 100_000_000)))
    yield "script.jpg", (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 128 64\n%%EndComments\n(/etc/passwd) run\nshowpage\n")
    yield "empty.jpg", b""


def damaged(plain, rng):
    """One photo cut short, with flipped bits, overwritten, spliced with another,
    or with its header's numbers changed; and its name."""
    name = rng.choice(sorted(plain))
    data, other = bytearray(plain[name]), plain[rng.choice(sorted(plain))]
    at = int(rng.integers(len(data)))
    how = rng.choice(["cut", "bits", "header bits", "overwrite", "splice", "swap", "repeat", "extreme"])
    if how == "cut": del data[at:]
    if how in ("bits", "header bits"):
        for i in rng.integers(0, len(data) if how == "bits" else min(400, len(data)), rng.integers(1, 12)):
            data[i] ^= 1 << int(rng.integers(8))
    if how == "overwrite": data[at : at + 64] = rng.bytes(64)
    if how == "splice": data[at:] = other[int(rng.integers(len(other))):]
    if how == "swap": name = rng.choice(sorted(plain))
    if how == "repeat": data[at:at] = data[at // 2 : at]
    if how == "extreme":
        data[at % 300 : at % 300 + 4] = rng.choice(
            [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\0\0"])
    if name.endswith("png") and rng.random() < 0.7: data = repaired(bytes(data))
    return how, str(name), bytes(data)


def repaired(data):
    "A PNG with its checksums made right again, so that what lies behind them is met."
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I", data[at : at + 4])[0], data[at + 4 : at + 8]
        out += chunk(kind, data[at + 8 : at + 8 + length])
        at += 12 + length
    return bytes(out)


def one(path, data):
    "Read one file: 'read' or 'refused', and the processor's seconds; anything else ends the process."
    path.write_bytes(data)
    signal.alarm(HANGS)  # nobody catches it: a hang ends the process
    start = time.process_time()
    try: photo, what = read_photo(path), "read"
    except BiomassError as e:
        assert str(path) in str(e), e
        what = "refused"
    else:
        assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3
        assert photo.shape[0] * photo.shape[1] <= MAX_PIXELS, photo.shape
    seconds = time.process_time() - start
    try: size = photo_size(path)
    except BiomassError as e: assert str(path) in str(e) and what == "refused", e
    else: assert what == "refused" or size == photo.shape[:2], (size, photo.shape)
    signal.alarm(0)
    return what, seconds


def main(folder, cases):
    "Read damaged photos within a bounded memory; the last line says how it went."
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # as every command does
    plain, rng, counts, worst = seeds(), np.random.default_rng(int(cases)), {}, (0, "")
    for name, data in plain.items(): assert one(folder / name, data)[0] == "read", name
    used = 0
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if used: resource.setrlimit(resource.RLIMIT_AS, (int(used + MEMORY), int(used + MEMORY)))
    some = [damaged(plain, rng) for _ in range(int(cases))]
    for how, name, data in [("bomb", *b) for b in bombs(plain)] + some:
        (folder / "last").write_text(f"{how} {name}")
        what, seconds = one(folder / name, data)
        counts[f"{how} {what}"] = counts.get(f"{how} {what}", 0) + 1
        worst = max(worst, (seconds, f"{how} {name}"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(json.dumps({"counts": counts, "seconds": worst, "megabytes": grown}))


@pytest.mark.parametrize("cases", [200, pytest.param(2200, marks=pytest.mark.long)])
def test_damaged_photos_in_a_process_with_little_memory(cases, tmp_path):
    """Truncations, flips, splices, lies about sizes, bombs:
    the process lives, each file is read or refused by its name, and Pillow prints nothing."""
    done = python(__file__, tmp_path, cases, timeout=1500)
    assert done.returncode == 0, (done.returncode, (tmp_path / "last").read_text(), done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert sum(found["counts"].values()) >= cases and found["seconds"][0] < SECONDS
    assert found["megabytes"] < MEMORY / 1e6, found
    assert {"bits read", "bits refused", "cut refused", "swap read", "bomb refused"} <= set(found["counts"])
    assert "bomb read" not in found["counts"], found
    assert "DecompressionBomb" not in done.stderr and "Traceback" not in done.stderr, done.stderr


LOSSLESS = ("deep.png", "rgba.png", "png-named.jpg", "turned.png", "a.tif", "a.bmp", "text.png")


def test_what_each_kind_of_photo_looks_like(tmp_path):
    "All kinds of the one picture decode to it."
    plain = seeds()
    (tmp_path / "rgb.png").write_bytes(plain["rgb.png"])
    rgb = read_photo(tmp_path / "rgb.png").astype(float)
    for name, data in plain.items():
        (tmp_path / name).write_bytes(data)
        photo, deep = read_photo(tmp_path / name).astype(float), name == "deep.png"
        like = rgb[..., :1] if deep else rgb @ [[0.299], [0.587], [0.114]] if "grey" in name else rgb
        assert photo.shape == rgb.shape, name
        assert np.abs(photo - like).mean() < (0.01 if name in LOSSLESS else 12), name


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2])
