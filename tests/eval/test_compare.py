# SPDX-License-Identifier: Apache-2.0
import itertools
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.data import npz
from m2jax.eval import compare, figures, metrics, zero_shot
from m2jax.eval.compare import Saved
from tests.data.hostile import TERABYTES, archive


def saved(figure, questions="q"):
    found = {"x/top1": figure}
    return Saved(figures.flat(found), figures.examples(found), questions)


def answers(seed, count, right):
    return np.random.default_rng(seed).random(count) < right


def test_pairs_see_what_intervals_alone_do_not():
    """B answers as A does but for 8 of 400 questions, all of them gained: told only in pairs."""
    a = answers(0, 400, 0.5)
    b = a.copy()
    b[np.flatnonzero(~a)[:12]] = True
    [paired] = compare.compare(saved(figures.share(a)), saved(figures.share(b)))
    assert paired.paired
    assert paired.real
    assert paired.b - paired.a == pytest.approx(12 / 400)
    assert 0 < paired.low < 12 / 400 < paired.high
    [alone] = compare.compare(saved(figures.share(a)), saved(figures.share(b), "other"))
    assert not alone.paired
    assert not alone.real
    [same] = compare.compare(saved(figures.share(a)), saved(figures.share(a)))
    assert same.p == 1


def test_the_p_value_is_that_of_an_exact_test():
    """McNemar's exact test on the discordant pairs, an independent way to the same question."""
    a, b = answers(1, 500, 0.6), answers(2, 500, 0.6)
    b[:60] = True
    gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
    exact = scipy.stats.binomtest(min(gained, lost), gained + lost).pvalue
    [found] = compare.compare(saved(figures.share(a)), saved(figures.share(b)))
    assert found.p == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("total", "gained", "lost"), [(2, 2, 0), (1000, 5, 0), (50, 3, 0), (9, 4, 1)]
)
def test_few_discordant_pairs_tell_little(total, gained, lost):
    """A bootstrap called two questions gained of two real at p 0.0002; exact: 0.5."""
    a, b = np.zeros(total, bool), np.zeros(total, bool)
    b[:gained] = True
    a[gained : gained + lost] = True
    exact = scipy.stats.binomtest(lost, gained + lost).pvalue
    [found] = compare.compare(saved(figures.share(a)), saved(figures.share(b)))
    assert found.p == pytest.approx(exact, rel=1e-9)
    assert not found.real
    # The same as clusters of unlike sizes: not less than as many differing examples can tell.
    counts = np.arange(1, total + 1)
    one, other = (np.stack([x * counts, counts], -1)[:, None].astype(np.float32) for x in (a, b))
    [found] = compare.compare(saved(figures.ratios(one)), saved(figures.ratios(other)))
    assert found.p >= 2.0 ** (1 - gained - lost)
    assert not found.real


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=10))
@settings(deadline=None)
def test_sign_flips_equal_scipys_permutation_test(values):
    """Differences of several sizes, all flips counted; scipy gives the same by its own way."""
    found = compare.sign_flip(np.array(values, float))
    used = np.array(values, float)
    exact = scipy.stats.permutation_test(
        (used,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue
    assert found == pytest.approx(exact, rel=1e-9)


def test_clusters_are_flipped_whole_and_weigh_as_they_count():
    """Every exchange of the two models' answers to a picture, and the figures anew each time."""
    rng = np.random.default_rng(4)
    counts = rng.integers(1, 7, (8, 2))
    a, b = (np.stack([rng.binomial(counts, p), counts], -1).astype(float) for p in (0.45, 0.55))
    [found] = compare.compare(saved(figures.ratios(a)), saved(figures.ratios(b)))
    gaps = []
    for swapped in itertools.product([False, True], repeat=8):
        exchanged = np.array(swapped)[:, None, None]
        sums = [np.where(exchanged, *pair).sum(axis=0) for pair in ((b, a), (a, b))]
        first, second = ((s[:, 0] / s[:, 1]).mean() for s in sums)
        gaps.append(abs(second - first))
    assert found.p == pytest.approx(np.mean(np.array(gaps) >= gaps[0] - 1e-9), abs=1e-12)
    assert 0.01 < found.p < 0.5  # a case that can tell


def test_drawn_flips_come_near_all_of_them(monkeypatch):
    values = np.random.default_rng(0).normal(0.4, 1, 12).round(1)
    exact = compare.sign_flip(values)
    monkeypatch.setattr(compare, "ALL_FLIPS", 0)
    assert 0.02 < exact < 0.9
    assert compare.sign_flip(values, flips=50_000) == pytest.approx(exact, abs=0.01)


def test_the_interval_is_that_of_plainly_drawn_examples():
    rng = np.random.default_rng(5)
    a, b = rng.random(300) < 0.5, rng.random(300) < 0.6
    [found] = compare.compare(saved(figures.share(a)), saved(figures.share(b)))
    rows = rng.integers(0, 300, (4000, 300))
    plain = (b.astype(float) - a)[rows].mean(axis=1)
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(plain, [0.025, 0.975]), atol=0.01
    )


def test_five_thousand_examples_take_no_seconds():
    a, b = answers(0, 5000, 0.5), answers(1, 5000, 0.5)
    start = time.process_time()
    compare.compare(saved(figures.share(a)), saved(figures.share(b)))
    assert time.process_time() - start < 1.5  # drawing each example on its own took 5.9


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_model_that_is_always_right_or_always_wrong_is_compared(value):
    """Its ends were not written, so comparing ended in KeyError or left the figure out."""
    labels = np.arange(20) % 4
    right = np.full(20, value == 1)
    other = zero_shot.class_mean(np.arange(20) < 12, labels)
    for end in (zero_shot.class_mean(right, labels), figures.drawn(value, np.full(9, value), 20)):
        metrics_of = [figures.flat({"x/f": each}) for each in (end, other)]
        expected = metrics.wilson(20 * int(value), 20)
        assert (metrics_of[0]["x/f_low"], metrics_of[0]["x/f_high"]) == expected[1:]
        for first, second in (metrics_of, metrics_of[::-1]):
            [found] = compare.compare(Saved(first, {}), Saved(second, {}))
            assert found.key == "x/f"
    assert set(figures.flat({"chance": figures.exactly(0.5)})) == {"chance"}
    point = figures.Figure(metrics.Share(0.5, 0.5, 0.5))  # draws may all be alike elsewhere too
    assert set(figures.flat({"f": point})) == {"f", "f_low", "f_high"}
    with pytest.raises(UserError, match="no figure in common"):
        compare.compare(Saved({"f": 1.0, "f_low": 0.9}, {}), Saved(figures.flat({"f": end}), {}))


@pytest.mark.parametrize("value", [0, 1])
def test_ratios_at_an_end_keep_an_interval(value):
    examples = np.ones((30, 2, 2), np.float32)
    examples[..., 0] = value
    found = figures.ratios(examples).share
    assert found == metrics.wilson(30 * value, 30)
    examples[:, 1, 0] = 1 - value
    mixed = figures.ratios(examples).share
    assert mixed.value == 0.5
    assert mixed.high - mixed.low == pytest.approx(found.high - found.low)


def test_without_a_difference_few_are_called_real():
    """At a level of 5 % about one pair in twenty of equal models would be; never most of them."""
    called = []
    for seed in range(60):
        a, b = answers(seed, 200, 0.5), answers(seed + 1000, 200, 0.5)
        found = compare.compare(saved(figures.share(a)), saved(figures.share(b)), resamples=1000)
        called.append(found[0].real)
    assert sum(called) <= 8  # binomial(60, 0.05) is above with probability 0.002


def test_many_figures_are_corrected_together():
    rng = np.random.default_rng(0)
    one, other = (
        {f"x/f{i}": figures.share(rng.random(200) < 0.5) for i in range(40)} for _ in "ab"
    )
    both = [Saved(figures.flat(each), figures.examples(each)) for each in (one, other)]
    raw = [compare.compare(saved(one[k]), saved(other[k]), resamples=1000)[0].p for k in one]
    assert min(raw) < 0.05  # of forty some differ by chance
    assert not any(d.real for d in compare.compare(*both, resamples=1000))


def test_of_very_many_figures_a_plain_difference_is_still_told():
    a, b = np.zeros(50, bool), np.ones(50, bool)
    one, other = ({f"x/f{i}": figures.share(x) for i in range(300)} for x in (a, b))
    both = [Saved(figures.flat(each), figures.examples(each)) for each in (one, other)]
    assert all(d.real for d in compare.compare(*both))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None)
def test_holm_rejects_what_its_definition_rejects(raw):
    """Step down: the smallest p against level / m, the next against level / (m - 1), ..."""
    adjusted = compare.holm(raw)
    for level in (0.01, 0.05, 0.3):
        expected, order = set(), sorted(range(len(raw)), key=raw.__getitem__)
        for place, index in enumerate(order):
            if raw[index] * (len(raw) - place) >= level:
                break
            expected.add(index)
        assert {i for i, p in enumerate(adjusted) if p < level} == expected


def test_a_figure_without_examples_is_compared_by_its_interval():
    a, b = ({"m/map": v, "m/map_low": v - 0.01, "m/map_high": v + 0.01} for v in (0.5, 0.6))
    [found] = compare.compare(Saved(a, {}), Saved(b, {}))
    assert not found.paired
    assert found.real
    assert found.high - found.low == pytest.approx(2 * np.hypot(0.01, 0.01))
    [close] = compare.compare(Saved(a, {}), Saved({**a, "m/map": 0.505}, {}))
    assert not close.real


def test_clusters_and_means_of_ratios_are_compared_as_they_are_measured():
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 6, (100, 3))
    a = np.stack([rng.binomial(counts, 0.4), counts], -1).astype(np.float32)
    b = a.copy()
    b[:40, :, 0] = b[:40, :, 1]
    [found] = compare.compare(saved(figures.ratios(a)), saved(figures.ratios(b)))
    assert found.real
    assert found.low <= found.b - found.a <= found.high


def test_files_round_trip_and_the_verb_tells(tmp_path, capsys):
    a = answers(0, 300, 0.4)
    files = []
    for name, right in (("a", a), ("b", a | answers(9, 300, 0.2))):
        file = tmp_path / f"{name}.json"
        found = {"x/top1": figures.share(right)}
        import json

        file.write_text(json.dumps(figures.flat(found)))
        with compare.examples_file(file).open("wb") as out:
            compare.write_examples(out, figures.examples(found), "q")
        files.append(str(file))
    out = tmp_path / "c.json"
    assert main(["compare", *files, "--json", str(out)]) == 0
    assert "real" in capsys.readouterr().out
    assert '"real": true' in out.read_text()
    assert main(["compare", files[0], files[0]]) == 0
    assert "could be chance" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": "b"}', "[" * 100_000])
def test_what_is_no_evaluation_is_refused(tmp_path, text, capsys):
    file = tmp_path / "a.json"
    file.write_text(text)
    assert main(["compare", str(file), str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_examples_and_nothing_in_common_are_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"x/a": 0.5}')
    compare.examples_file(file).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="damaged"):
        compare.read(file)
    compare.examples_file(file).unlink()
    for text in ('{"x/a": NaN}', '{"x/a": Infinity}', '{"x/a": true}'):
        file.write_text(text)
        with pytest.raises(UserError, match="not what m2jax eval"):
            compare.read(file)
    with pytest.raises(UserError, match="no figure in common"):
        compare.compare(Saved({"x/a": 0.5}, {}), Saved({"x/b": 0.5}, {}))


GOOD = np.ones((4, 1, 2), np.float32)


@pytest.mark.parametrize(
    "row",
    [
        GOOD[:0],
        GOOD[..., :1],
        GOOD.astype(int),
        np.array([["a", "b"]]),
        GOOD * [1, np.nan],
        GOOD * [np.inf, 1],
        GOOD * [1, 0],
        GOOD * [1, -1],
    ],
)
def test_examples_that_are_no_ratios_are_refused(tmp_path, row):
    file = tmp_path / "a.json"
    file.write_text('{"x/a": 0.5}')
    with compare.examples_file(file).open("wb") as out:
        compare.write_examples(out, {"x/a": row}, "q")
    with pytest.raises(UserError, match=r"examples\.npz: damaged \(x/a: ") as error:
        compare.read(file)
    assert "\n" not in str(error.value)


def test_examples_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text('{"x/a": 0.5}')
    with compare.examples_file(file).open("wb") as out:
        compare.write_examples(out, {"x/a": np.ones((100_000, 1, 2), np.float32)}, "q")
    assert compare.examples_file(file).stat().st_size < 10_000
    monkeypatch.setattr(npz, "UNPACKED_BYTES", 100_000)
    monkeypatch.setattr(npz, "UNPACKED_TIMES", 1)
    with pytest.raises(UserError, match="unpacks to over 100,000 bytes"):
        compare.read(file)


def test_no_change_of_a_byte_escapes(tmp_path):
    """Whatever is damaged: read as it was, or refused in a line; never a traceback."""
    file = tmp_path / "a.json"
    file.write_text('{"x/a": 0.5}')
    path = compare.examples_file(file)
    with path.open("wb") as out:
        compare.write_examples(out, {"x/a": GOOD}, "q")
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            compare.read(file)
        except UserError:
            refused += 1
    assert refused > 200
    np.save(tmp_path / "x.npy", GOOD)
    path.write_bytes((tmp_path / "x.npy").read_bytes())  # an array where an archive is meant
    with pytest.raises(UserError, match="damaged"):
        compare.read(file)
    archive(path, TERABYTES)
    with pytest.raises(UserError, match=r"examples.npz: damaged \(claims float32 of shape"):
        compare.read(file)


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    values = np.random.default_rng(0).random((50, 2))
    whole = metrics.bootstrap(values, lambda sums: sums[..., 0] / sums[..., 1])
    monkeypatch.setattr(metrics, "BLOCK", 120)
    cut = metrics.bootstrap(values, lambda sums: sums[..., 0] / sums[..., 1])
    np.testing.assert_allclose(cut, whole, rtol=1e-12)
