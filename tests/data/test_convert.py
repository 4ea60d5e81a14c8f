"""Published interleaved datasets become native shards: everything in its order, and what is left out counted and named."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import pytest

from fusiontrain.cli.main import main
from fusiontrain.data.convert.convert import FOLDER, convert
from fusiontrain.data.convert.layouts import Picture, layout_of
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.build import build_index
from fusiontrain.testing.shards import png, write_shard
from fusiontrain.utils.errors import UserError

URLS = [f"https://site.org/pictures/{n}.jpg?w=1" for n in range(6)]


def slots(form, record, number=0, **settings):
    """A text as it is, a picture as "<its URL or name>"."""
    return [slot if isinstance(slot, str) else f"<{slot.name or slot.url}>" for slot in layout_of(form, **settings).slots(record, number)]


# ---------------------------------------------------------------- the layouts, as they are published


def obelics(texts, images):
    """A row as in the dataset's card; `metadata` and `general_metadata` are strings."""
    about = [None if image is None else {"src": image, "alt_text": ""} for image in images]
    return {"images": images, "metadata": json.dumps(about), "general_metadata": json.dumps({"url": "https://site.org"}), "texts": texts}


def test_obelics_is_in_the_order_of_its_lists():
    record = obelics([None, "one\n\ntwo", None, None], [URLS[0], None, None, URLS[1]])
    assert slots("obelics", record) == [f"<{URLS[0]}>", "one\n\ntwo", f"<{URLS[1]}>"]
    assert slots("obelics", obelics([], [])) == []


MMC4 = {
    "image_info": [
        {"face_detections": None, "image_name": "b9.jpg", "matched_sim": 0.27, "matched_text_index": 2, "raw_url": "http://x/90.jpg"},
        {"face_detections": None, "image_name": "db.jpg", "matched_sim": 0.32, "matched_text_index": 1, "raw_url": "http://x/91.jpg"},
        {"face_detections": None, "image_name": "dc.jpg", "matched_sim": 0.32, "matched_text_index": 1, "raw_url": "http://x/92.jpg"},
    ],
    "similarity_matrix": [[0.1, 0.2, 0.3]] * 3,
    "text_list": ["first", "second", "third"],
    "url": "http://x/doc.html",
    "could_have_url_duplicate": 0,
}
"""As in the README of Multimodal C4; there are more pictures matched to a sentence than sentences between."""


def test_mmc4_puts_pictures_beside_their_sentence():
    assert slots("mmc4", MMC4) == ["first", "<db.jpg>", "<dc.jpg>", "second", "<b9.jpg>", "third"]
    assert slots("mmc4", MMC4, image_position="after") == ["first", "second", "<db.jpg>", "<dc.jpg>", "third", "<b9.jpg>"]


def test_mmc4_draws_the_side_by_record_and_picture():
    drawn = [slots("mmc4", MMC4, number, image_position="random") for number in range(200)]
    assert drawn == [slots("mmc4", MMC4, number, image_position="random") for number in range(200)]
    before = sum(order.index("<b9.jpg>") < order.index("third") for order in drawn)
    assert 70 < before < 130
    assert len({tuple(order) for order in drawn}) == 8
    for order in drawn:
        assert [slot for slot in order if not slot.startswith("<")] == MMC4["text_list"]
        assert abs(order.index("<db.jpg>") - order.index("second")) in (1, 2)


def moscar(order, texts=2, images=2):
    """As in the paper's release: nodes with an index each, their order in the metadata."""
    return {
        "images": [{"img_idx": f"#{n:06d}", "sha512": "0", "url": URLS[n]} for n in range(images)],
        "text": [{"text": f"node {n}", "text_idx": f"#{n:06d}"} for n in range(texts)],
        "metadata": [{"canonical_link": "", "node_order": order, "url": "u", "warc_identifier": "w"}],
    }


def test_moscar_is_in_the_order_of_its_nodes():
    assert slots("moscar", moscar("img_#000001|txt_#000000|txt_#000001|img_#000000")) == [f"<{URLS[1]}>", "node 0", "node 1", f"<{URLS[0]}>"]


MALFORMED = {
    "obelics: lists of two lengths": ("obelics", obelics(["a", None], [None, URLS[0]]) | {"images": [None]}, "2 places and 'images' 1"),
    "obelics: both": ("obelics", obelics(["a"], [URLS[0]]), "both a text and an image"),
    "obelics: no texts": ("obelics", {"images": []}, "no list 'texts'"),
    "obelics: a number": ("obelics", obelics([3], [None]), "holds a int"),
    "mmc4: no such sentence": ("mmc4", MMC4 | {"text_list": ["one"]}, "image 0 is matched to text 2 of 1"),
    "mmc4: not matched": ("mmc4", MMC4 | {"image_info": [{"image_name": "x"}]}, "matched to text None"),
    "mmc4: bytes that are not base64": ("mmc4", MMC4 | {"image_info": [{"matched_text_index": 0, "image_base64": "#"}]}, "not base64"),
    "mmc4: null": ("mmc4", MMC4 | {"text_list": None}, "no list 'text_list'"),
    "moscar: unknown node": ("moscar", moscar("txt_#000000|txt_#000009"), "txt_#000009, which is not there"),
    "moscar: a node left out": ("moscar", moscar("txt_#000000"), "names 1 of its 4"),
    "moscar: no order": ("moscar", {"text": [], "images": [], "metadata": []}, "no 'node_order'"),
    "moscar: no objects": ("moscar", moscar("txt_#000000") | {"text": ["a"]}, "no list of objects"),
    "jsonl: no text": ("jsonl", {"content": "a"}, "'text' holds a NoneType"),
}


@pytest.mark.parametrize(("form", "record", "why"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_record_of_another_layout_says_why(form, record, why):
    with pytest.raises(BadSample, match=why):
        layout_of(form).slots(record, 0)


# ---------------------------------------------------------------- whole conversions


def img2dataset_tar(path, urls, bad=()):
    """A shard as img2dataset leaves it: pictures under numbers, their URL in the .json."""
    samples = [
        {"jpg": b"\xff\xd8 no picture" if url in bad else png(URLS.index(url)), "txt": b"", "json": json.dumps({"url": url, "status": "success"}).encode()}
        for url in urls
    ]
    return write_shard(path, samples, prefix="00000")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema(
        [("images", pyarrow.list_(pyarrow.string())), ("metadata", pyarrow.string()), ("general_metadata", pyarrow.string()),
         ("texts", pyarrow.list_(pyarrow.string()))]
    )  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=2)


def documents_of(folder):
    """[(key, pieces)] of every shard, read as training reads them: texts, and the bytes of images."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        index = build_index(path, "auto", "pixels")
        assert index.bad == ()
        with tarfile.open(path) as tar:
            for row in range(len(index)):
                key = index.key(row)
                data = {suffix: tar.extractfile(f"{key}.{suffix}").read() for suffix in index.members(row)}
                pieces = read_sample("auto", data, data.__getitem__, "pixels").pieces
                found.append((key, [piece.text if piece.text is not None else data[piece.image] for piece in pieces]))
    return found


def run(source, out, form, **settings):
    total: dict[str, int] = {}
    for _, counts, _ in convert(str(source), out, form, **settings):
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def dropped(out, stem):
    return [json.loads(line) for line in (out / FOLDER / f"{stem}.dropped.jsonl").read_text().splitlines()]


def test_obelics_meets_its_pictures_by_url_and_counts_what_is_missing(tmp_path):
    rows = [
        obelics(["a", None, "b", None], [None, URLS[0], None, URLS[1]]),
        obelics(["left", None, "right"], [None, URLS[5], None]),  # was never fetched
        obelics([None, None], [URLS[2], URLS[3]]),
        obelics([None], [URLS[4]]),  # fetched, but no picture
        obelics([], []),
        obelics(["a"], [URLS[0]]),
        obelics([" \n", None], [None, None]),
        obelics([None, "end"], [None, None]),
    ]
    write_parquet(tmp_path / "in" / "train-00000.parquet", rows)
    img2dataset_tar(tmp_path / "pictures" / "00000.tar", URLS[:3])
    img2dataset_tar(tmp_path / "pictures" / "00001.tar", URLS[3:5], bad=URLS[4:])
    counts = run(tmp_path / "in", tmp_path / "out", "obelics", pictures=[str(tmp_path / "pictures")])
    pictures = [png(n) for n in range(4)]
    assert documents_of(tmp_path / "out") == [
        ("train-00000-00000000", ["a", pictures[0], "b", pictures[1]]),
        ("train-00000-00000001", ["left\n\nright"]),
        ("train-00000-00000002", [pictures[2], pictures[3]]),
        ("train-00000-00000007", ["end"]),
    ]
    assert counts == {"documents": 4, "pictures": 4, "pictures missing": 1, "pictures unreadable": 1, "documents empty": 3, "documents malformed": 1}
    assert [(line["record"], line["left out"]) for line in dropped(tmp_path / "out", "train-00000")] == [
        (1, "pictures missing"), (3, "pictures unreadable"), (3, "documents empty"), (4, "documents empty"), (5, "documents malformed"),
        (6, "documents empty"),
    ]  # fmt: skip
    assert URLS[5] in dropped(tmp_path / "out", "train-00000")[0]["why"]


def mmc4_files(folder, kind):
    """The same two documents in every way that Multimodal C4 is passed on."""
    lines = [dict(MMC4), MMC4 | {"image_info": MMC4["image_info"][:1], "url": "two"}]
    folder.mkdir()
    text = "\n".join(map(json.dumps, lines)).encode()
    if kind == "zip":
        with zipfile.ZipFile(folder / "docs.jsonl.zip", "w") as archive:
            archive.writestr("docs.jsonl", text)
    elif kind == "gzip":
        (folder / "docs.jsonl.gz").write_bytes(gzip.compress(text))
    elif kind == "lines":
        (folder / "docs.jsonl").write_bytes(text)
    else:
        numbers = {"b9.jpg": 0, "db.jpg": 1, "dc.jpg": 2}
        for line in lines:
            line["image_info"] = [
                info | {"image_base64": base64.b64encode(png(numbers[info["image_name"]], format="JPEG")).decode()} for info in line["image_info"]
            ]
        write_shard(folder / "docs.tar", [{"json": json.dumps(line).encode()} for line in lines])


@pytest.mark.parametrize("kind", ["zip", "gzip", "lines", "tar with base64"])
def test_mmc4_meets_its_pictures_by_name_or_carries_them(tmp_path, kind):
    mmc4_files(tmp_path / "in", kind)
    pictures = [png(n, format="JPEG") for n in range(3)]
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name, picture in zip(["b9.jpg", "deep/db.jpg", "dc.jpg"], pictures, strict=True):
        (tmp_path / "pictures" / name).write_bytes(picture)
    given = [] if kind.startswith("tar") else [str(tmp_path / "pictures")]
    counts = run(tmp_path / "in", tmp_path / "out", "mmc4", pictures=given)
    assert documents_of(tmp_path / "out") == [
        ("docs-00000000", ["first", pictures[1], pictures[2], "second", pictures[0], "third"]),
        ("docs-00000001", ["first second", pictures[0], "third"]),
    ]
    assert counts == {"documents": 2, "pictures": 4}


def test_a_tar_of_named_pictures_is_found_by_name(tmp_path):
    mmc4_files(tmp_path / "in", "lines")
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for number, name in enumerate(["x/b9.jpg", "x/db.jpg"]):
            info = tarfile.TarInfo(name)
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    counts = run(tmp_path / "in", tmp_path / "out", "mmc4", pictures=[str(tmp_path / "p.tar")])
    assert counts == {"documents": 2, "pictures": 3, "pictures missing": 1}
    assert documents_of(tmp_path / "out")[0][1] == ["first", png(1), "second", png(0), "third"]


def test_moscar_and_lines_of_text_become_shards(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(moscar("txt_#000001|img_#000000|txt_#000000|img_#000001")))
    img2dataset_tar(tmp_path / "p.tar", URLS[:1])
    counts = run(tmp_path / "m.jsonl", tmp_path / "out", "moscar", pictures=[str(tmp_path / "p.tar")])
    assert documents_of(tmp_path / "out") == [("m-00000000", ["node 1", png(0), "node 0"])]
    assert counts == {"documents": 1, "pictures": 1, "pictures missing": 1}
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"body": "x"}\n\n{\n{"body": "\\ud800"}\n[1]\n{"body": "y"}'))
    counts = run(tmp_path / "t.jsonl.gz", tmp_path / "texts", "jsonl", text_key="body")
    assert documents_of(tmp_path / "texts") == [("t-00000000", ["x"]), ("t-00000004", ["y"])]
    assert counts == {"documents": 2, "pictures": 0, "documents malformed": 3}


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def lines_of(count, first=0):
    return "\n".join(json.dumps({"text": f"number {n}"}) for n in range(first, first + count))


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    for file in range(3):
        (tmp_path / f"f{file}.jsonl").write_text(lines_of(7, 10 * file))
    one = run(tmp_path / "f*.jsonl", tmp_path / "one", "jsonl", documents_per_shard=3)
    two = run(tmp_path / "f*.jsonl", tmp_path / "two", "jsonl", documents_per_shard=3, workers=2)
    assert one == two == {"documents": 21, "pictures": 0}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == [f"f{file}-{part:05d}.tar" for file in range(3) for part in range(3)]


def test_a_conversion_that_broke_off_goes_on_and_ends_the_same(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(5).encode()))
    begin = gzip.compress((lines_of(3, 10) + "\n").encode())
    whole = begin + gzip.compress(lines_of(2, 13).encode())
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(whole[: len(begin) + 5])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: cannot be read to its end"):
        run(tmp_path / "in", out, "jsonl", documents_per_shard=2)
    assert not (out / FOLDER / "b.json").exists()
    begun = {name: data for name, data in contents(out).items() if name.startswith("b-")}
    assert "b-00000.tar" in begun and "b-00002.tar" not in begun
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("a-*.tar")}
    assert len(times) == 3
    (out / "b-00009.tar").write_bytes(b"left by another attempt")
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(whole)
    assert run(tmp_path / "in", out, "jsonl", documents_per_shard=2) == {"documents": 10, "pictures": 0}
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("a-*.tar")} == times
    run(tmp_path / "in", tmp_path / "fresh", "jsonl", documents_per_shard=2)
    assert contents(out) == contents(tmp_path / "fresh")
    assert begun.items() <= contents(out).items(), "only whole shards were left"


def test_other_settings_or_more_pictures_convert_anew(tmp_path):
    mmc4_files(tmp_path / "in", "lines")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "b9.jpg").write_bytes(png(0))
    settings = {"pictures": [str(tmp_path / "p")]}
    assert run(tmp_path / "in", tmp_path / "out", "mmc4", **settings)["pictures"] == 2
    (tmp_path / "p" / "db.jpg").write_bytes(png(1))
    assert run(tmp_path / "in", tmp_path / "out", "mmc4", **settings)["pictures"] == 3
    before = contents(tmp_path / "out")
    run(tmp_path / "in", tmp_path / "out", "mmc4", image_position="after", **settings)
    assert contents(tmp_path / "out") != before


def test_what_would_mix_things_up_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of(1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="a is the name of several files"):
        run(tmp_path, tmp_path / "out", "jsonl")
    for folder in ("x", "y"):
        (tmp_path / "p" / folder).mkdir(parents=True)
        (tmp_path / "p" / folder / "1.png").write_bytes(png(0))
    with pytest.raises(UserError, match="same name"):
        run(tmp_path / "a.jsonl", tmp_path / "out", "jsonl", pictures=[str(tmp_path / "p")])
    with pytest.raises(UserError, match="neither tars nor pictures"):
        run(tmp_path / "a.jsonl", tmp_path / "out", "jsonl", pictures=[str(tmp_path / "out")])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="not parquet or damaged"):
        run(tmp_path / "b.parquet", tmp_path / "out", "obelics")
    with pytest.raises(UserError, match=r"not one of \.parquet"):
        (tmp_path / "b.csv").write_text("")
        run(tmp_path / "b.csv", tmp_path / "out", "obelics")


def test_the_command_reports_what_it_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(lines_of(4) + "\n{")
    assert main(["data", "convert", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--format", "jsonl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["documents malformed"], report["files"]) == (4, 1, 1)
    assert main(["data", "index", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4


def test_what_gives_not_one_document_is_an_error(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(lines_of(3))
    assert main(["data", "convert", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--format", "obelics"]) == 2
    assert "not one document as --format obelics (3 documents malformed)" in capsys.readouterr().err


def test_a_disk_that_is_full_is_one_sentence_and_leaves_no_half_shard(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of(400))
    limited = "import resource, sys; from fusiontrain.cli.main import main; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main())"
    command = [sys.executable, "-c", limited, "data", "convert", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "out: could not be written to its end" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.tar*"))


def test_a_picture_names_itself():
    assert str(Picture(url="u", name="n")) == "u"
    assert str(Picture(name="n")) == "n"
