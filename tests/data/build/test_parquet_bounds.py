# SPDX-License-Identifier: Apache-2.0
"""What a Parquet file may make Arrow build is known from its pages' headers, not its footer."""

import contextlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2jax.config import UserError
from m2jax.data.build import readers
from m2jax.data.build.readers import parquet, parquet_pages
from m2jax.data.build.readers.base import Source, Unit
from tests.data.build.test_readers import good, read, reasons, texts


@contextlib.contextmanager
def counted():
    """Arrow's memory, counted from here."""
    default, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(default)


def lists_of(counts, values=("a red cat",)):
    """A column of lists of ``counts`` texts each, as indices of ``values``."""
    indices = pa.array(np.arange(sum(counts), dtype=np.int32) % len(values))
    each = pa.DictionaryArray.from_arrays(indices, pa.array(values))
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(counts)), pa.int32()), each)


def written(file, captions, **options):
    table = pa.table({"jpg": [b"image"] * len(captions), "caption": captions})
    pq.write_table(table, file, **{"store_schema": False, "compression": "zstd", **options})
    return file


def number(value, width=0):
    """A number as Thrift's compact protocol has it, at least so many bytes wide."""
    value, out = value << 1, []
    while value >= 128 or len(out) < width - 1:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def with_footer_that_lies(file, count):
    """The footer says one value where the page's header says ``count``."""
    data = bytearray(file.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    true, claimed = number(count), number(1, len(number(count)))
    while (place := data.find(true, footer)) >= 0:
        data[place : place + len(true)] = claimed
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_row_of_a_million_texts_is_not_built(tmp_path, lies, version, monkeypatch):
    monkeypatch.setattr(parquet, "LIST_TEXTS", 2**16)
    count = 2**20 + 12_345
    file = written(tmp_path / "t.parquet", lists_of([count]), data_page_version=version)
    assert file.stat().st_size < 2000
    if lies:
        with_footer_that_lies(file, count)
        chunks = [pq.ParquetFile(file).metadata.row_group(0).column(i) for i in range(2)]
        assert 1 in [c.num_values for c in chunks if c.path_in_schema.startswith("caption")]
    with counted() as pool:
        found = read("parquet", file)
        peak = pool.max_memory()
    assert reasons(found) == [("t.parquet#0", "decompression bomb")]
    assert f"{count:,} texts" in found[0].detail
    assert peak < 2**20


def test_many_copies_of_one_long_text_cost_their_row_alone(tmp_path):
    values = ["x" * 2**20, "a red cat"]
    indices = np.array([1] + [0] * 3000 + [1] * 5 + [0, 1])
    each = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))
    ends = pa.array([0, 1, 3001, 3006, 3008], pa.int32())
    file = written(tmp_path / "t.parquet", pa.ListArray.from_arrays(ends, each))
    with counted() as pool:
        found = read("parquet", file)
        peak = pool.max_memory()
    assert peak < 2**26  # the second row as it is read elsewhere: 2**31.5
    assert [texts(one) for one in good(found)][:2] == [
        [("a red cat", "en")],
        [("a red cat", "en")] * 5,
    ]
    assert reasons(found) == [("t.parquet#0.1", "text too long")]
    assert found[1].detail == "caption: 3,000 texts of 3,145,728,000 bytes"


def test_a_list_of_too_many_texts_costs_its_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LIST_ROWS", 2)  # rows that lie in different batches
    file = written(tmp_path / "t.parquet", lists_of([2, parquet.ROW_TEXTS + 2, 0, 2], "ab"))
    found = read("parquet", file)
    assert [[text for text, _ in texts(one)] for one in good(found)] == [
        ["a", "b"],
        [],
        ["a", "b"],
    ]
    assert reasons(found) == [("t.parquet#0.1", "text too long")]


def test_pages_that_grow_when_they_are_unpacked(tmp_path, monkeypatch):
    same = pa.ListArray.from_arrays(pa.array([0, 4], pa.int32()), pa.array(["x" * 2**20] * 4))
    file = written(tmp_path / "t.parquet", same, use_dictionary=False)
    assert reasons(read("parquet", file)) == []
    monkeypatch.setattr(parquet, "LIST_BYTES", 2**21)
    with counted() as pool:
        found = read("parquet", file)
        assert pool.max_memory() < 2**20
    assert reasons(found) == [("t.parquet#0", "decompression bomb")]
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "PAGE_BYTES", 2**20)
    assert reasons(read("parquet", file)) == [("t.parquet#0", "decompression bomb")]


def test_texts_told_by_what_they_share_are_read_one_by_one_or_not_at_all(tmp_path):
    options = {"use_dictionary": False, "column_encoding": {"caption": "DELTA_BYTE_ARRAY"}}
    file = written(tmp_path / "t.parquet", pa.array(["a red cat", "a red hat"]), **options)
    assert [texts(one)[0][0] for one in good(read("parquet", file))] == ["a red cat", "a red hat"]
    options["column_encoding"] = {"caption.list.element": "DELTA_BYTE_ARRAY"}
    file = written(tmp_path / "t.parquet", pa.array([["a red cat", "a red hat"]]), **options)
    found = read("parquet", file)
    assert reasons(found) == [("t.parquet#0", "decompression bomb")]
    assert "write another encoding" in found[0].detail


def test_a_row_group_is_not_read_at_once(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(2**20) for _ in range(48)]
    table = pa.table({"jpg": images, "caption": ["a red cat"] * 48})
    file = tmp_path / "t.parquet"
    pq.write_table(table, file, write_batch_size=4, use_dictionary=False)
    source = Source("s", "parquet", (file,))
    # Files are read into Arrow's own pool, whichever one is set.
    pool, held, found = pa.default_memory_pool(), [], []
    before = pool.bytes_allocated()
    for one in readers.reader("parquet").read(Unit(0, 0, file, {"group": 0}), source):
        held.append(pool.bytes_allocated() - before)
        found.append(getattr(one, "image", b""))
    assert found == images
    assert max(held) < 2**24  # 48 MB, were it read at once


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.string_view())])
def test_lists_as_other_writers_type_them(tmp_path, kind):
    said = pa.array([["一只猫", None, "a cat"], [], None, ["a dog"]], kind)
    file = written(tmp_path / "t.parquet", said, store_schema=True)
    found = [[text for text, _ in texts(one)] for one in read("parquet", file)]
    assert found == [["一只猫", "a cat"], [], [], ["a dog"]]


@pytest.mark.parametrize("name", ["caption", "jpg"])
def test_columns_of_other_shapes_are_one_line(tmp_path, name):
    columns = {"jpg": [b"image"], "caption": ["a cat"], name: [[["deep"]]]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    message = rf"t\.parquet: column {name} \(list<.*rewrite or rename it"
    with pytest.raises(UserError, match=message):
        read("parquet", tmp_path / "t.parquet")


def test_of_an_image_object_only_bytes_and_path_are_read(tmp_path):
    image = {"bytes": b"image", "path": None, "extra": [[1, 2]] * 9}
    rows = pa.table({"image": [image], "en": ["a red cat"]})
    pq.write_table(rows, tmp_path / "t.parquet")
    (found,) = read("parquet", tmp_path / "t.parquet")
    assert (found.image, texts(found)) == (b"image", [("a red cat", "en")])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_headers_say_what_the_footer_of_an_honest_file_says(tmp_path, version, dictionary):
    texts = [[f"text {n} {m}" for m in range(n % 4)] for n in range(3000)]
    options = {"data_page_version": version, "use_dictionary": dictionary, "data_page_size": 4096}
    file = written(tmp_path / "t.parquet", pa.array(texts), write_page_checksum=True, **options)
    group = pq.ParquetFile(file).metadata.row_group(0)
    with file.open("rb") as opened:
        for column in range(group.num_columns):
            chunk = group.column(column)
            found = list(parquet_pages.pages(opened, chunk))
            data = [page for page in found if page.kind != parquet_pages.DICTIONARY]
            assert sum(page.values for page in data) == chunk.num_values
            headers = chunk.total_uncompressed_size - sum(page.size for page in found)
            assert 0 < headers < 100 * len(found)
            assert (len(found) > len(data)) == dictionary


class Chunk:
    path_in_schema, dictionary_page_offset = "c", 0
    data_page_offset, total_compressed_size, num_values = 4, 90, 9


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x15\x00\x15",  # cut off
        b"\x15" + b"\xff" * 20,  # a number without end
        b"\x1c" * 30,  # structs in structs
        b"\x19\xff" + b"\xff" * 9 + b"\x01",  # a list of 2**63
        b"\x18" + b"\xff" * 9 + b"\x01",  # a text of 2**63 bytes
        b"\x15\x00\x15\x01\x15\x02\x00",  # a size below 0
        b"\x15\x00\x15\x02\x15\x02\x2c\x15\x00\x15\x00\x00\x00" * 9,  # pages of no value
    ],
)
def test_damaged_headers_are_told_and_end(header):
    with pytest.raises(ValueError, match=r"c: |file ends|without end|too deep|of kind"):
        list(parquet_pages.pages(io.BytesIO(b"PAR1" + header), Chunk))
