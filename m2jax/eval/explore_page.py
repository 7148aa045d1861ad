# SPDX-License-Identifier: Apache-2.0
"""The page of ``m2jax explore``, in Gradio: type words or drop a picture, see what models find.

Bound to loopback unless told otherwise. Uploads are limited in size by the server, opened by
``open_image`` alone, and lie in a folder of this process that goes when it ends; of the user's
folder only thumbnails are served.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from m2jax.config import UserError
from m2jax.data.image import open_image
from m2jax.eval import explore
from m2jax.eval.explore import Gallery

MISSING = 'explore: needs Gradio: pip install "m2jax[explore]"'
UPLOAD = 20 * 2**20  # bytes of a dropped picture
SHOWN = 12  # pictures at first

CSS = """
footer {display: none !important}
.caption-label {font-size: 0.7rem; left: 0; max-width: none; white-space: normal}
"""


@contextmanager
def served(gallery: Gallery, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves the page while the block runs; gives its address.

    Args:
        gallery: what is searched.
        host: the address to listen at; others than loopback let others on the network look.
        port: the port; 0: the first free one from 7860 on.

    Raises:
        UserError: Gradio is not installed, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="m2jax-explore-") as cache, _set(cache):
        gradio = _gradio()  # only now: it makes a folder as it is imported
        page = _page(gradio, gallery, cache)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port or None,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=UPLOAD,
                footer_links=[],
                ssr_mode=False,
                css=CSS,
                # No fonts from elsewhere: the page needs no network.
                theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )
        except OSError as error:
            raise UserError(f"--port {port}: {error}: choose another") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def check(host: str = "127.0.0.1", port: int = 0) -> None:
    """Says what the page lacks before any long work is done for it.

    Args:
        host: the address to listen at.
        port: the port; 0: any.

    Raises:
        UserError: Gradio is not installed, or nothing can listen there.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(MISSING)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {error}: use an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as tried:
        # As the server will: a port that was left a moment ago is free.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(address)
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: {error.strerror}: use an address of this machine "
                "and a free port"
            ) from error


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    try:
        import gradio
    except ImportError:
        raise UserError(MISSING) from None
    return gradio


@contextmanager
def _set(cache: str) -> Iterator[None]:
    """Uploads and thumbnails go to ``cache`` (Gradio reads the variable as components are made)."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = cache
    try:
        yield
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before


def _page(gradio: Any, gallery: Gallery, cache: str) -> Any:
    """Components and what they call."""
    sides = range(len(gallery.sides))
    with gradio.Blocks(title="m2jax explore", analytics_enabled=False) as page:
        gradio.Markdown(
            f"### {len(gallery.pictures):,} pictures · {len(gallery.pictures):,} 张图片"
        )
        with gradio.Row():
            with gradio.Column(scale=2):
                query = gradio.Textbox(
                    label="Words, 文字", placeholder="a red apple, 一只猫", elem_id="query"
                )
                count = gradio.Slider(
                    1, explore.MOST_SHOWN, value=SHOWN, step=1, label="Pictures shown, 显示数量"
                )
                find = gradio.Button("Search, 搜索", variant="primary", elem_id="find")
            picture = gradio.Image(
                label="or a picture, 或图片",
                type="filepath",
                sources=["upload", "clipboard"],
                elem_id="picture",
                height=220,
            )
            # Gradio would open the file itself, in its own way and without our limits.
            picture.preprocess = lambda sent: sent.path if sent else None
        with gradio.Row():
            labels = gradio.Textbox(
                label="Labels for the picture above, 给上图选标签",
                placeholder="cat, dog, 苹果",
                elem_id="labels",
                scale=4,
            )
            tell = gradio.Button("Label, 分类", elem_id="tell", scale=1)
        with gradio.Row():
            shown, labelled = [], []
            for side in sides:
                with gradio.Column():
                    gradio.Markdown(f"**{gallery.sides[side].name}**")
                    shown.append(
                        gradio.Gallery(
                            columns=4,
                            height="auto",
                            show_label=False,
                            buttons=[],
                            elem_id=f"found{side}",
                        )
                    )
                    labelled.append(gradio.Label(label="Labels, 标签", elem_id=f"labels{side}"))
        by_words = _handler(gradio, functools.partial(_by_words, gallery))
        by_picture = _handler(gradio, functools.partial(_by_picture, gallery, cache))
        query.submit(by_words, [query, count], shown)
        find.click(by_words, [query, count], shown)
        picture.upload(by_picture, [picture, count], shown)
        told = _handler(gradio, functools.partial(_label, gallery, cache))
        tell.click(told, [picture, labels], labelled)
        labels.submit(told, [picture, labels], labelled)
    return page


def _handler(gradio: Any, answer: Callable[..., list[Any]]) -> Callable[..., Any]:
    """A callback whose bad input is shown on the page in one line."""

    def called(*values: Any) -> Any:
        try:
            found = answer(*values)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return found if len(found) > 1 else found[0]

    return called


Ranked = list[list[tuple[Any, str]]]


def _by_words(gallery: Gallery, query: str, count: float) -> Ranked:
    return [
        _shown(gallery, gallery.by_text(side, query, int(count)))
        for side in range(len(gallery.sides))
    ]


def _by_picture(gallery: Gallery, cache: str, path: str | None, count: float) -> Ranked:
    image = _uploaded(cache, path)
    return [
        _shown(gallery, gallery.by_picture(side, image, int(count)))
        for side in range(len(gallery.sides))
    ]


def _label(gallery: Gallery, cache: str, path: str | None, text: str) -> list[dict[str, float]]:
    image, labels = _uploaded(cache, path), explore.split_labels(text)
    return [gallery.label(side, image, labels) for side in range(len(gallery.sides))]


def _uploaded(cache: str, path: str | None) -> Any:
    """The dropped picture; a path that leads elsewhere is refused, whoever sent it."""
    if not path:
        raise UserError("picture: none there: drop one first")
    real, root = os.path.realpath(path), os.path.realpath(cache)
    if os.path.commonpath([real, root]) != root:
        raise UserError("picture: not an upload: drop the file on the page")
    return open_image(real, "the picture")


def _shown(gallery: Gallery, found: list[explore.Found]) -> list[tuple[Any, str]]:
    return [(gallery.thumbnail(row), f"{score:.3f}  {gallery.name(row)}") for row, score in found]
