"""From the files of a published dataset to native interleaved shards, a file at a time, by any number of processes.

A file's shards are whole once its report is there; a conversion that was broken off goes on with the files that have none. Neither the number
of processes nor a break changes a byte of what is written.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from fusiontrain.data.convert.layouts import ImagePosition, Picture, Record, layout_of
from fusiontrain.data.convert.pictures import PictureTable, build_table
from fusiontrain.data.convert.records import read_records, source_files
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import IMAGE_SUFFIXES, checked_text
from fusiontrain.data.modalities.image import image_size
from fusiontrain.utils.errors import UserError

VERSION = 1
FOLDER = ".convert"
"""Beside the shards: reports, lists of what was left out, and the table of pictures."""

MALFORMED, EMPTY, MISSING, UNREADABLE = "documents malformed", "documents empty", "pictures missing", "pictures unreadable"


@dataclass(frozen=True)
class Conversion:
    """What is to be made of every file. pictures: a hash of what is in the table of pictures, None where there is none."""

    out: Path
    format: str
    image_position: ImagePosition
    text_key: str
    documents_per_shard: int
    pictures: str | None

    @property
    def table(self) -> Path | None:
        return None if self.pictures is None else self.out / FOLDER / "pictures.sqlite"

    def identity(self, file: Path) -> str:
        """A hash of what the shards of a file follow from."""
        stat = file.stat()
        settings = {key: value for key, value in asdict(self).items() if key != "out"}
        return hashlib.sha256(repr((VERSION, file.name, stat.st_size, stat.st_mtime_ns, sorted(settings.items()))).encode()).hexdigest()


def convert(
    source: str, out: Path, form: str, pictures: Sequence[str] = (), image_position: ImagePosition = "before", text_key: str = "text",
    documents_per_shard: int = 1000, workers: int = 1,
) -> Iterator[tuple[Path, Counter[str], int]]:  # fmt: skip
    """(file, counts, number of files) of every file of `source` in order, converted unless its report is there already.

    counts: "documents" and "pictures" written, and what was left out by reason; `out/.convert/<file>.dropped.jsonl` names each of these.
    Raises UserError for files that cannot be read and for two whose shards would have one name.
    """
    files = source_files(source)
    names = Counter(_stem(file) for file in files)
    if max(names.values()) > 1:
        raise UserError(f"{source}: {names.most_common(1)[0][0]} is the name of several files, whose shards would have one name too; convert them apart")
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    listing = build_table(pictures, out / FOLDER / "pictures.sqlite") if pictures else None
    task = Conversion(out, form, image_position, text_key, documents_per_shard, listing)
    if workers <= 1:
        yield from ((file, _convert_file(task, file), len(files)) for file in files)
        return
    with ProcessPoolExecutor(min(workers, len(files)), multiprocessing.get_context("spawn")) as pool:
        try:
            yield from ((file, counts, len(files)) for file, counts in zip(files, pool.map(_convert_file, [task] * len(files), files), strict=True))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _convert_file(task: Conversion, file: Path) -> Counter[str]:
    report = task.out / FOLDER / f"{_stem(file)}.json"
    identity = task.identity(file)
    if report.is_file() and (before := json.loads(report.read_text()))["identity"] == identity:
        return Counter(before["counts"])
    report.unlink(missing_ok=True)
    for old in task.out.glob(f"{glob.escape(_stem(file))}-[0-9][0-9][0-9][0-9][0-9].tar"):
        old.unlink()
    with (task.out / FOLDER / f"{_stem(file)}.dropped.jsonl").open("w", encoding="utf-8") as dropped:
        converter = _Converter(task, file, dropped)
        try:
            for number, record in enumerate(read_records(file)):
                converter.add(number, record)
            converter.finish_shard()
        finally:
            converter.close()
    partial = report.with_suffix(".tmp")
    partial.write_text(json.dumps({"identity": identity, "file": str(file), "counts": converter.counts}, indent=1))
    os.replace(partial, report)
    return converter.counts


class _Converter:
    """Writes the documents of a file, and counts and names what it leaves out."""

    def __init__(self, task: Conversion, file: Path, dropped: IO[str]) -> None:
        self.task, self.stem, self.dropped = task, _stem(file), dropped
        self.layout = layout_of(task.format, task.image_position, task.text_key)
        self.pictures = PictureTable(task.table)
        self.counts: Counter[str] = Counter(documents=0, pictures=0)
        self._writer: Any = None
        self._parts = self._in_part = 0

    def add(self, number: int, record: Record | BadSample) -> None:
        try:
            if isinstance(record, BadSample):
                raise record
            members = self._members(number, record)
        except BadSample as error:
            self._drop(number, MALFORMED, str(error))
            return
        if members is None:
            self._drop(number, EMPTY, "holds neither text nor a picture that is there")
            return
        self._write({"__key__": f"{self.stem.replace('.', '_')}-{number:08d}", **members})
        self.counts["documents"] += 1
        self.counts["pictures"] += len(members) - 1

    def finish_shard(self) -> None:
        """Put the shard that is being written in its place, if there is one."""
        if self._writer is not None:
            self._writer.close()
            os.replace(self._partial, self.task.out / f"{self.stem}-{self._parts:05d}.tar")
            self._writer, self._parts, self._in_part = None, self._parts + 1, 0

    def close(self) -> None:
        """Leave nothing open; a shard that was not finished goes."""
        self.pictures.close()
        if self._writer is not None:
            try:
                self._writer.close()
            finally:  # also where the disk is full
                self._partial.unlink()

    def _members(self, number: int, record: Record) -> dict[str, bytes] | None:
        """The members of a native interleaved document; None where nothing is left of it."""
        texts: list[str | None] = []
        members: dict[str, bytes] = {}
        for slot in self.layout.slots(record, number):
            if isinstance(slot, str):
                if slot and texts and texts[-1] is not None:
                    texts[-1] += self.layout.separator + checked_text(slot)
                elif slot:
                    texts.append(checked_text(slot))
            elif (found := self._picture(number, slot)) is not None:
                suffix, data = found
                members[f"{len(texts)}.{suffix}"] = data
                texts.append(None)
        if not members and not any(text is not None and text.strip() for text in texts):
            return None
        names = iter(members)
        images = [next(names) if text is None else None for text in texts]
        document = {"texts": texts, "images": images, "source": f"{self.stem}:{number}"}
        return {"json": json.dumps(document, ensure_ascii=False).encode(), **members}

    def _picture(self, number: int, picture: Picture) -> tuple[str, bytes] | None:
        """(suffix, bytes) of a picture; None where it is missing or unreadable, which is counted."""
        data = self.pictures.find(picture)
        if not data:
            self._drop(number, MISSING, str(picture))
            return None
        try:
            suffix = image_suffix(data)
            image_size(suffix, data)
        except BadSample as error:
            self._drop(number, UNREADABLE, f"{picture}: {error}")
            return None
        return suffix, data

    def _drop(self, number: int, kind: str, why: str) -> None:
        self.counts[kind] += 1
        self.dropped.write(json.dumps({"record": number, "left out": kind, "why": why}, ensure_ascii=False) + "\n")

    def _write(self, sample: dict[str, Any]) -> None:
        from webdataset.writer import TarWriter

        if self._writer is None:
            # No .tar until it is whole, and no time of writing: the same input gives the same bytes.
            self._writer = TarWriter(str(self._partial), encoder=False, mtime=0, format="PAX_FORMAT")
        self._writer.write(sample)
        self._in_part += 1
        if self._in_part == self.task.documents_per_shard:
            self.finish_shard()

    @property
    def _partial(self) -> Path:
        return self.task.out / FOLDER / f"{self.stem}.tar.tmp"


def image_suffix(data: bytes) -> str:
    """The suffix for an image file of that content, whatever it was called before. Raises BadSample."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(image.format or "", (image.format or "").lower())
    except Exception as error:  # Pillow's readers, given damaged bytes, raise nearly anything
        raise BadSample("is not an image that can be read") from error
    if suffix not in IMAGE_SUFFIXES:
        raise BadSample(f"is a picture of format {suffix}, which is not supported")
    return suffix


def _stem(file: Path) -> str:
    """The file's name without what says that it is a dataset's."""
    name = file.name
    for suffix in (".gz", ".zip", ".jsonl", ".json", ".parquet", ".tar"):
        name = name.removesuffix(suffix)
    return name
