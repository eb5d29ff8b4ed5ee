"""Tables with pictures in them, as Hugging Face's data sets come: parquet, read piece by piece by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit3_dist.config import DataConfig, require
from beit3_dist.data.compressed import FREE, MOST_FOLD
from beit3_dist.data.faults import BadSample, check_size
from beit3_dist.data.kinds import LeftOut, tables_below
from beit3_dist.data.tables import shown_columns
from beit3_dist.data.transforms import largest_file
from beit3_dist.opening import one_line, regular_size
from beit3_dist.optional import optional_module

ROWS_AT_ONCE = 16
"""Rows that are taken at a time; below them a page of the file is in memory, which may be a whole row group."""
READ_AT_ONCE = 1 << 20
"""Bytes of a column that are read ahead."""
REASON = 300
"""Letters of the library's reason that are told."""


class Row(NamedTuple):
    """A row, or rows that cannot be read."""

    place: str
    picture: bytes = b""
    captions: tuple[str, ...] | None = None
    """None: no column of captions was asked for."""
    label: int | None = None
    fault: str = ""


def parquet_files(paths: Sequence[Path], left_out: LeftOut) -> list[Path]:
    """The parquet files that are named, or lie in folders that are; what else lies there is counted. Raises ValueError
    where there is none."""
    found: list[Path] = []
    for path in paths:
        require(path.exists(), f"there is no file {path}")
        inside = list(tables_below(path, left_out)) if path.is_dir() else [path]
        require(bool(inside), f"no file below {path} ends in .parquet")
        found += inside
    return found


def picture_rows(path: Path, image: str, captions: Sequence[str], label: str) -> Iterator[Row]:
    """The rows of a file: pictures of the column `image` (bytes, or a struct of bytes and path), texts of the columns
    `captions`, numbers of the column `label` where one is named. Raises ValueError where the file is no such table."""
    arrow = optional_module("pyarrow", f"{path}", "pip install -e '.[data]' brings it")
    parquet = optional_module("pyarrow.parquet", f"{path}", "pip install -e '.[data]' brings it")
    regular_size(path)
    try:
        file = parquet.ParquetFile(path, buffer_size=READ_AT_ONCE, pre_buffer=False, page_checksum_verification=True)
        schema = file.schema_arrow
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is no parquet file: {one_line(error, REASON)}") from None
    with file:
        _check_columns(arrow.types, path, schema, image, captions, label)
        columns, first = [image, *captions, *([label] if label else [])], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if fault := _swollen(file.metadata.row_group(group)):
                yield Row(f"{path}, rows {first + 1} to {first + rows}", fault=fault)
            else:
                yield from _rows_of(arrow, file, group, columns, bool(label), f"{path}", first)
            first += rows


def _rows_of(
    arrow: Any, file: Any, group: int, columns: list[str], labelled: bool, path: str, first: int
) -> Iterator[Row]:
    """Those of a row group; where it is damaged, one row that tells of the rest."""
    number, last = first, first + file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            values = [batch.column(name) for name in columns]
            for row in range(batch.num_rows):
                number += 1
                yield _row(f"{path}, row {number}", [column[row] for column in values], labelled)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Row(f"{path}, rows {number + 1} to {last}", fault=f"damaged: {one_line(error, REASON)}")


def _row(place: str, values: list[Any], labelled: bool) -> Row:
    try:
        picture = _picture(values[0])
        texts = values[1:-1] if labelled else values[1:]
        told = [text for value in texts for text in _texts(value.as_py())]
        captions = tuple(filter(None, (" ".join(text.split()) for text in told))) if texts else None
        label = values[-1].as_py() if labelled else None
    except BadSample as bad:
        return Row(place, fault=str(bad))
    except UnicodeDecodeError:
        return Row(place, fault="invalid UTF-8 in the caption")
    if labelled and (label is None or label < 0):
        return Row(place, fault=f"the class {label} is no number of one")
    return Row(place, picture, captions, label)


def _picture(value: Any) -> bytes:
    """The bytes of a cell, the size of which is known before they are copied. Raises BadSample."""
    path = ""
    if hasattr(value, "keys") and value.is_valid:
        path = value["path"].as_py() if "path" in value else ""
        value = value["bytes"]
    if not value.is_valid:
        raise BadSample(f"no picture in it, only its name {one_line(path, 100)!r}" if path else "no picture in it")
    check_size("an image", value.as_buffer().size, largest_file(DataConfig.max_pixels))
    return value.as_py()


def _texts(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [text for text in value if text is not None]


def _swollen(group: Any) -> str:
    """Why a row group is not unpacked, by what the file says of its columns; empty if it may be."""
    for number in range(group.num_columns):
        column = group.column(number)
        packed, whole = column.total_compressed_size, column.total_uncompressed_size
        if whole > max(FREE, MOST_FOLD * packed):
            return f"{column.path_in_schema} unpacks to more than {MOST_FOLD} times its size: it holds no data"
    return ""


def _check_columns(types: Any, path: Path, schema: Any, image: str, captions: Sequence[str], label: str) -> None:
    """Raises ValueError where a column is missing or holds something else."""
    if image not in schema.names:
        tar = path.with_suffix(".tar")
        if tar.is_file():
            raise ValueError(
                f"{path} is img2dataset's table of {tar.name}, which has the pictures: a run reads that tar"
            )
        addresses = [name for name in schema.names if name.lower() in ("url", "image_url", "img_url")]
        if addresses:
            raise ValueError(
                f"{path} has addresses ({addresses[0]}) and no pictures; nothing is downloaded here: img2dataset "
                "makes tars of such a table (LAION's, DataComp's), and a run reads those as they are"
            )
    for name, option in ((image, "image"), *((name, "caption") for name in captions), (label, "label")):
        if name and schema.names.count(name) != 1:
            raise ValueError(
                f"{path} has {'two columns' if name in schema.names else 'no column'} {name!r}; its columns are "
                f"{shown_columns(schema.names)}: name one by --{option}"
            )
    kind = schema.field(image).type
    inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    fine = {image: types.is_binary(inner) or types.is_large_binary(inner)}
    for name in captions:
        of_texts = schema.field(name).type
        is_list = types.is_list(of_texts) or types.is_large_list(of_texts)
        of_text = of_texts.value_type if is_list else of_texts
        fine[name] = types.is_string(of_text) or types.is_large_string(of_text)
    if label:
        fine[label] = types.is_integer(schema.field(label).type)
    wanted = {image: "bytes, or a struct of bytes and path", label: "a number"}
    for name, good in fine.items():
        what = wanted.get(name, "text, or a list of texts")
        require(good, f"{path}: the column {name!r} is {one_line(str(schema.field(name).type), 100)}, not {what}")
