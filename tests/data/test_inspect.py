"""`data inspect`: a sample as text, as characters in colour, as a PNG and as JSON, against what was written into the shard."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fusiontrain.cli import data_inspect
from fusiontrain.cli.data_inspect import UPPER_HALF, half_blocks
from fusiontrain.cli.main import main
from fusiontrain.data.inspect import SIDE, find_sample, inspect_sample
from fusiontrain.testing.shards import interleaved, png, write_shard
from fusiontrain.utils.errors import UserError


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def picture(seed: int = 1, size: tuple[int, int] = (12, 7)) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(seed, size))))


SAMPLES = [
    interleaved(["héllo [bold]x[/bold]", None, "then", None], [None, png(1, (12, 7)), None, png(2, (5, 9))]),
    {"txt": b"a caption", "jpg": png(3)[:40]},
    {"txt": b"latents", "latent.npy": npy(np.linspace(-1, 2, 64).reshape(4, 4, 4).astype(np.float16))},
    {"txt": b"codes", "vq.npy": npy(np.arange(6).reshape(2, 3))},
    {"json": b"{}"},
    {"txt": b"red \x1b[31m and \x00 bell \x07 \xe2\x80\xae end"},
]


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "shards" / "a.tar", SAMPLES, prefix="one")
    write_shard(tmp_path / "shards" / "b.tar", [{"txt": b"last"}], prefix="two")
    with tarfile.open(tmp_path / "shards" / "c.tar", "w") as tar:
        for name, content in (("12.txt", b"twelve"), ("007.txt", b"numbered")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(tmp_path / "shards")


def inspected(capsys, *argv: str) -> dict:
    assert main(["data", "inspect", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv: str) -> str:
    assert main(["data", "inspect", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_members_are_where_tarfile_finds_them_and_texts_are_whole(shards, capsys, tmp_path):
    found = inspected(capsys, shards, "--tokenizer", "bytes")
    with tarfile.open(f"{shards}/a.tar") as tar:
        expected = [(m.name.split(".", 1)[1], m.offset_data, m.size) for m in tar if m.name.startswith("one-0000.")]
    assert [(m["suffix"], m["offset"], m["bytes"]) for m in found["members"]] == expected
    assert found["pieces"] == [
        {"text": "héllo [bold]x[/bold]", "tokens": 21},
        {"image": "1.png", "about": "12 x 7 pixels"},
        {"text": "then", "tokens": 4},
        {"image": "3.png", "about": "5 x 9 pixels"},
    ]
    assert (found["sample"], found["key"]) == (0, "one-0000")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "b.tar", "c.tar", "shards"], "no index is built"


@pytest.mark.parametrize(
    ("wanted", "shard", "number", "key"),
    [("3", "a", 3, "one-0003"), ("6", "b", 0, "two-0000"), ("two-0000", "b", 0, "two-0000"), ("007", "c", 1, "007"), ("7", "c", 0, "12")],
)
def test_a_sample_is_found_by_number_and_by_key(shards, capsys, wanted, shard, number, key):
    found = inspected(capsys, shards, "--sample", wanted)
    assert (found["shard"], found["sample"], found["key"]) == (f"{shards}/{shard}.tar", number, key)


def test_what_is_not_there_is_one_sentence(shards, capsys, tmp_path):
    assert "--sample 9: the shards hold 9 samples, counted from 0" in refused(capsys, shards, "--sample", "9")
    assert "--sample one-9: the shards hold 9 samples, none with that key" in refused(capsys, shards, "--sample", "one-9")
    assert "no such shard" in refused(capsys, str(tmp_path / "none.tar"))
    assert "--png" in refused(capsys, shards, "--png", str(tmp_path))
    said = refused(capsys, shards, "--sample", "4")
    assert "sample 4 (one-0004): has no text" in said
    assert ".json of 2 bytes at offset" in said


def test_images_that_cannot_be_shown_are_told(shards, capsys):
    assert "not an image that can be read" in inspected(capsys, shards, "--sample", "1")["pieces"][1]["about"]
    assert inspected(capsys, shards, "--sample", "2")["pieces"][1]["about"] == "4 x 4 x 4 float16, from -1 to 2"
    assert inspected(capsys, shards, "--sample", "3")["pieces"][1]["about"] == "2 x 3 int64, from 0 to 5"


def test_without_a_terminal_there_is_text_and_no_color(shards, capsys):
    assert main(["data", "inspect", shards, "--tokenizer", "bytes"]) == 0
    out = capsys.readouterr().out
    for part in ("one-0000", "héllo [bold]x[/bold]", "21 tokens", "12 x 7 pixels", "then"):
        assert part in out
    assert "\x1b" not in out
    assert UPPER_HALF not in out


def test_what_a_shard_holds_does_not_steer_the_terminal(shards, capsys):
    assert main(["data", "inspect", shards, "--sample", "5"]) == 0
    assert r"red \x1b[31m and \x00 bell \x07 \u202e end" in capsys.readouterr().out


def test_a_terminal_shows_two_pixels_a_character_in_their_colors(shards, capsys, monkeypatch):
    def terminal(**options):
        return Console(force_terminal=True, color_system="truecolor", width=100, **options)

    monkeypatch.setattr("rich.console.Console", terminal)
    assert main(["data", "inspect", shards]) == 0
    out = capsys.readouterr().out
    pixels = picture()
    for column in range(12):
        upper, lower = (";".join(map(str, pixels[row, column])) for row in (2, 3))
        assert f"\x1b[38;2;{upper};48;2;{lower}m{UPPER_HALF}" in out
    assert out.count(UPPER_HALF) == 12 * 4 + 5 * 5
    assert main(["data", "inspect", shards, "--png", f"{shards}/x.png"]) == 0
    assert UPPER_HALF not in capsys.readouterr().out


@pytest.mark.parametrize(("height", "width", "shown"), [(7, 12, (4, 12)), (300, 500, (15, 50)), (1000, 10, (20, 1)), (1, 1, (1, 1))])
def test_a_picture_fits_into_its_characters(height, width, shown):
    lines = half_blocks(np.zeros((height, width, 3), np.uint8), 50, 20).plain.splitlines()
    assert (len(lines), len(lines[0])) == shown
    assert len({len(line) for line in lines}) == 1


def test_the_png_holds_every_picture_as_it_is(shards, tmp_path, capsys):
    file = tmp_path / "new" / "sheet.png"
    assert main(["data", "inspect", shards, "--png", str(file)]) == 0
    with Image.open(file) as image:
        assert image.format == "PNG"
        page = np.asarray(image)
    for expected in (picture(1, (12, 7)), picture(2, (5, 9))):
        height, width, _ = expected.shape
        windows = np.lib.stride_tricks.sliding_window_view(page, (height, width, 3))[:, :, 0]
        assert (windows == expected).all((2, 3, 4)).sum() == 1
    texts = (page.reshape(-1, 3) == 0).all(1).sum()
    assert main(["data", "inspect", shards, "--sample", "6", "--png", str(file)]) == 0
    assert 0 < (np.asarray(Image.open(file)).reshape(-1, 3) == 0).all(1).sum() < texts


def test_a_large_picture_is_scaled_down_in_its_shape(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [{"txt": b"x" * 100_000, "png": png(0, (1600, 400))}])
    inspection = inspect_sample(*find_sample([shard], "0"))
    height, width, _ = inspection.pieces[1].picture.shape
    assert 0.9 * SIDE**2 < height * width <= SIDE**2
    assert abs(width / height - 4) < 0.02
    assert inspection.pieces[1].about == "1600 x 400 pixels"


def test_a_damaged_shard_is_named(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [{"txt": b"a"}, {"txt": b"b"}])
    content = bytearray(shard.read_bytes())
    content[1024 + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar: damaged at offset 1024"):
        find_sample([shard], "1")


def test_long_texts_are_cut_in_the_terminal(tmp_path, capsys):
    shard = write_shard(tmp_path / "a.tar", [{"txt": b"x" * 5000}])
    assert main(["data", "inspect", str(shard)]) == 0
    out = capsys.readouterr().out
    assert f"and {5000 - data_inspect.LETTERS:,} characters more" in out
    assert out.count("x") < 2100
