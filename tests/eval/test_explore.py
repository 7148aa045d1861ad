# SPDX-License-Identifier: Apache-2.0
"""What the page of ``m2jax explore`` shows, and the page itself in a headless Chromium."""

import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from m2jax.cli import explore as verb
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.eval import explore, explore_page
from tests.eval.explore_server import Contrary, Model, serving
from tests.eval.pictures import COLOURS, save

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        for number in range(2):
            save(tmp_path / "pictures" / colour / f"{number}.png", colour)
    (tmp_path / "pictures" / "notes.txt").write_text("none")
    return tmp_path / "pictures"


@pytest.fixture
def gallery(folder):
    return explore.gather(folder, [("plain", Model()), ("contrary", Contrary())])


def test_words_and_pictures_find_their_like(gallery):
    for query in ("red", "红"):
        found = gallery.by_text(0, query, 3)
        assert [gallery.name(row) for row, _ in found[:2]] == ["red/0.png", "red/1.png"]
        assert found[0].score == pytest.approx(1, abs=1e-6)
        assert gallery.by_text(1, query, 6)[0].score < 0
    found = gallery.by_picture(0, Image.new("RGB", (5, 9), COLOURS["blue"]), 50)
    assert gallery.name(found[0].picture) == "blue/0.png"
    assert len(found) == 6


def test_labels_are_shares_in_either_language(gallery):
    found = gallery.label(0, Image.new("RGB", (8, 8), COLOURS["green"]), ["red", "绿"])
    assert found["绿"] > 0.99
    assert sum(found.values()) == pytest.approx(1)
    assert explore.split_labels(" a，b、c\nb, ") == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["", "one", ",,", "x" * 1001, ",".join(map(str, range(200)))])
def test_bad_labels_and_queries_are_refused(gallery, text):
    with pytest.raises(UserError, match="labels"):
        explore.split_labels(text)
    if text in ("", "x" * 1001):
        with pytest.raises(UserError, match="query"):
            gallery.by_text(0, text, 3)


def test_files_that_are_no_pictures_are_left_out_by_name(folder, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "bomb.png").write_bytes(bomb())
    found = explore.gather(folder, [("plain", Model())])
    assert len(found.pictures) == 6
    said = capsys.readouterr().err
    assert "bad.png" in said
    assert "decompression bomb" in said
    for name in ("red", "green", "blue"):
        shutil.rmtree(folder / name)
    with pytest.raises(UserError, match="holds no picture"):
        explore.gather(folder, [("plain", Model())])
    with pytest.raises(UserError, match="no such folder"):
        explore.gather(folder / "none", [])


def test_thumbnails_are_small_copies(tmp_path):
    Image.new("RGBA", (900, 30), (1, 2, 3, 200)).save(tmp_path / "wide.png")
    found = explore.gather(tmp_path, [])
    assert found.thumbnail(0).size == (explore.THUMBNAIL, 11)
    assert found.thumbnail(0).mode == "RGB"


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 4 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def test_only_uploads_are_opened(gallery, tmp_path):
    cache = tmp_path / "cache"
    inside = save(cache / "x" / "a.png", "red")
    assert explore_page._uploaded(str(cache), str(inside)).size == (8, 8)
    link = cache / "link.png"
    link.symlink_to(tmp_path / "pictures" / "red" / "0.png")
    for path in ("/etc/passwd", str(cache / ".." / "pictures" / "red" / "0.png"), str(link)):
        with pytest.raises(UserError, match="not an upload"):
            explore_page._uploaded(str(cache), path)
    with pytest.raises(UserError, match="none there"):
        explore_page._uploaded(str(cache), None)
    (cache / "bomb.png").write_bytes(bomb())
    with pytest.raises(UserError, match="decompression bomb"):
        explore_page._uploaded(str(cache), str(cache / "bomb.png"))


def test_the_verb_needs_gradio_and_two_models_at_most(folder, monkeypatch, capsys):
    words = ["explore", "--images", str(folder), "--model", "a"]
    assert main([*words, "--model", "b", "--model", "c"]) == 2
    assert main([*words, "--port", "99999"]) == 2
    monkeypatch.setattr(explore_page.importlib.util, "find_spec", lambda name: None)
    assert main(words) == 2
    assert 'pip install "m2jax[explore]"' in capsys.readouterr().err


def test_an_address_that_cannot_be_listened_at_is_refused_before_the_work(
    folder, monkeypatch, capsys
):
    """The page waited for ever for such a host, after the whole folder was encoded."""
    monkeypatch.setattr(explore, "gather", lambda *asked: pytest.fail("encoded"))
    words = ["explore", "--images", str(folder), "--model", "a"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for more in (["--host", "203.0.113.7"], ["--host", "no.invalid"], ["--port", port]):
            assert main([*words, *more]) == 2
            said = capsys.readouterr().err
            assert " ".join(more) in said
            assert said.count("\n") == 1
    explore_page.check("localhost")


def test_interrupting_ends_the_waiting(monkeypatch):
    event = threading.Event()
    monkeypatch.setattr(event, "wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    verb.wait(event)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def server(folder, tmp_path):
    """The address of the page over both models, and the folder that its cache lies in."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with serving(folder, cache) as (line, process):
        assert line.endswith("(Ctrl-C ends it)\n")
        yield line.split()[0], cache
    assert process.returncode == 0  # interrupted, as it is meant to be left


@pytest.fixture
def page(browser, server):
    """The page in a browser that notes what it asks of others than our server."""
    address, _ = server
    opened = browser.new_page(viewport={"width": 1300, "height": 1000})
    opened.elsewhere = []
    opened.on("request", lambda r: r.url.startswith(address) or opened.elsewhere.append(r.url[:80]))
    opened.goto(address)
    yield opened
    opened.close()


def captions(page, side):
    page.wait_for_selector(f"#found{side} img", timeout=20_000)
    return [each.inner_text() for each in page.query_selector_all(f"#found{side} .caption-label")]


@pytest.mark.slow
def test_the_page_in_a_browser(page, tmp_path):
    """Words, a dropped picture, labels; two models side by side; nothing asked of other hosts."""
    page.fill("#query textarea", "红")
    page.click("#find")
    assert captions(page, 0)[0].split() == ["1.000", "red/0.png"]
    assert not captions(page, 1)[0].split()[1].startswith("red")
    blue = save(tmp_path / "blue.png", "blue")
    page.set_input_files("#picture input[type=file]", str(blue))
    page.wait_for_function(
        "document.querySelector('#found0 .caption-label').innerText.includes('blue/0.png')"
    )
    page.fill("#labels textarea", "red, 蓝, green")
    page.click("#tell")
    page.wait_for_function("document.querySelector('#labels0').innerText.includes('100%')")
    assert page.inner_text("#labels0").split().count("蓝") >= 1
    assert not [url for url in page.elsewhere if not url.startswith(("data:", "blob:"))]
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)


@pytest.mark.slow
def test_hostile_uploads_are_refused_on_the_page(page, tmp_path):
    for name, data, message in (
        ("text.png", b"<svg onload=alert(1)>", "unreadable image"),
        ("bomb.png", bomb(), "decompression bomb"),
    ):
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#picture input[type=file]", str(tmp_path / name))
        page.wait_for_selector(f"text={message}", timeout=20_000)
        page.reload()


@pytest.mark.slow
def test_the_server_takes_no_large_upload(server):
    """Whoever sends it: the page asks first, but the server decides."""
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    for size, code in ((explore_page.UPLOAD + 1, 413), (1000, 200)):
        asked = urllib.request.Request(
            f"{server[0]}gradio_api/upload",
            head + b"x" * size + b"\r\n--b--\r\n",
            {"Content-Type": "multipart/form-data; boundary=b"},
        )
        try:
            answer = urllib.request.urlopen(asked, timeout=20)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            assert answer.status == code


@pytest.mark.slow
def test_the_server_hands_out_no_file_of_the_machine(folder, tmp_path):
    """Neither the folder's own files nor others; it listens here alone; nothing stays behind."""
    cache = tmp_path / "cache"
    cache.mkdir()
    before = sorted(folder.rglob("*"))
    with serving(folder, cache) as (line, process):
        address = urlsplit(line.split()[0])
        assert address.hostname == "127.0.0.1"
        for path in (folder / "red" / "0.png", Path("/etc/passwd")):
            for form in (f"gradio_api/file={path}", f"file={path}", f"static/../..{path}"):
                with pytest.raises(urllib.error.HTTPError) as error:
                    urllib.request.urlopen(f"{address.geturl()}{form}", timeout=10)
                error.value.close()
                assert error.value.code in (403, 404)
        assert list(cache.iterdir())
    assert process.returncode == 0
    assert not list(cache.iterdir())
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", address.port or 0), timeout=1)
