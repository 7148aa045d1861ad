# SPDX-License-Identifier: Apache-2.0
"""The page of a search: what it leaves out it says, and names are text."""

from m2jax.tasks.video import page, search


def test_the_page_says_where_its_frames_end(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 2)
    match = search.Match("a", 0, 5, 1, 6, 0.9)
    document = {"query": "q", "seconds": 9.0, "rate": 1.0, "model": "m", "method": "TN"}
    document["matches"] = [match._replace(score=s)._asdict() for s in (0.9, 0.8, 0.7)]
    text = page.render(document, tmp_path / "gone.mp4", {"a": (tmp_path / "x.mp4", 10.0)})
    assert "3 segments of 1 videos, frames of the first 2." in text
    assert text.count("<span>query</span><span>reference</span>") == 2
    assert text.count("<h3>") == 3


def test_the_page_shows_hostile_names_as_text(tmp_path):
    match = search.Match("<script>", 0, 5, 1, 6, 0.9)
    document = {
        **{"query": "<b>q</b>", "seconds": 9.0, "rate": 1.0, "model": "m", "method": "TN"},
        "matches": [match._asdict()],
    }
    text = page.render(document, tmp_path / "gone.mp4", {"<script>": (tmp_path / "x.mp4", 10.0)})
    assert "<script>" not in text
    assert "<b>q" not in text
    assert "class=none" in text  # the files are gone, the times are not
    assert "query 0:00.0 to 0:05.0, reference 0:01.0 to 0:06.0" in text
