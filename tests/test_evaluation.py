"Metrics against scikit-learn, pairing, and intervals that keep their promise."
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from aigid_repro.data.storage import InputError
from aigid_repro.detect.evaluation import (
    METRICS,
    accuracy,
    auc,
    average_precision,
    balanced_accuracy,
    best_threshold,
    bootstrap,
    calibration_error,
    groups,
    mean_over_generators,
    metric,
    over_runs,
    paired_difference,
    per_family,
    per_generator,
    resample,
    slope,
    thresholds,
    tpr_at_fpr,
)


def toy(generators=3, photos=20, crops=2, runs=1, seed=0, spread=1.):
    "Predictions: every photo went through every generator."
    rng = np.random.default_rng(seed)
    photo, rows = rng.normal(0, spread, (2, photos)), []
    for r in range(runs):
        for g in range(-1, generators):
            for p in range(photos):
                for c in range(crops):
                    name = "real" if g < 0 else f"g{g}"
                    logit = photo[0, p] + (g >= 0)*(1 + .5*g + photo[1, p]) + rng.normal()
                    family = "real" if g < 0 else f"f{g//2}"
                    rows.append((f"r{r}", f"{name}/{p}/{c}", int(g >= 0), name, family, f"p{p}", f"p{p}/{c}",
                                 "s", r, logit))
    return pd.DataFrame(rows, columns="run id label generator family source crop set subset logit".split())


@pytest.fixture(scope="module")
def pred(): return toy()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("digits", [0, 1, 9]) # from many ties to none
def test_metrics_equal_sklearn(seed, digits):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 200))
    y = np.r_[0, 1, rng.integers(0, 2, n)]
    s = np.round(rng.normal(size=n + 2) + y*rng.random(), digits)
    w = np.c_[rng.integers(0, 4, (n + 2, 3)), np.ones(n + 2)]
    w[:2] = 1 # both classes in every column
    for ours, theirs in ((average_precision, sk.average_precision_score), (auc, sk.roc_auc_score)):
        assert np.allclose(ours(y, s, w), [theirs(y, s, sample_weight=v) for v in w.T], atol=1e-12)
        assert np.isclose(ours(y, s), theirs(y, s), atol=1e-12) and np.isclose(ours(y, s), ours(y, 1/(1 + np.exp(-s))))
    for t in (0., .3):
        assert np.allclose(accuracy(y, s, w, t), [sk.accuracy_score(y, s > t, sample_weight=v) for v in w.T])
        assert np.allclose(balanced_accuracy(y, s, w, t),
                           [sk.balanced_accuracy_score(y, s > t, sample_weight=v) for v in w.T])
    for a in (.01, .05, .3):
        for k, v in enumerate(w.T):
            f, t, _ = sk.roc_curve(y, s, sample_weight=v, drop_intermediate=False)
            assert np.isclose(tpr_at_fpr(y, s, w, fpr=a)[k], t[f <= a + 1e-12].max())
    every = [metric(m, .1)(y, s, w) for m in METRICS]
    assert all(v.shape == (4,) and np.isclose(v[3], metric(m, .1)(y, s)) for m, v in zip(METRICS, every))


def test_weights_are_repetitions(pred):
    y, s = pred.label.to_numpy(), pred.logit.to_numpy()
    w = np.random.default_rng(0).integers(0, 3, len(y))
    for m in METRICS: assert np.isclose(metric(m)(y, s, w), metric(m)(np.repeat(y, w), np.repeat(s, w))), m


def test_extremes():
    y = np.r_[np.zeros(50, int), np.ones(50, int)]
    assert average_precision(y, y) == auc(y, y) == tpr_at_fpr(y, y) == balanced_accuracy(y, y - .5) == 1
    assert average_precision(y, np.zeros(100)) == auc(y, np.zeros(100)) == .5 and tpr_at_fpr(y, np.zeros(100)) == 0
    assert auc(y, -y) == 0 and np.isnan(auc(np.ones(3), np.arange(3))) and np.isnan(average_precision([0], [1.]))
    assert calibration_error(y, 100.*(2*y - 1)) < 1e-9 and calibration_error(1 - y, 100.*(2*y - 1)) == 1
    assert tpr_at_fpr(np.r_[np.zeros(300), 1], np.r_[np.zeros(297), 2, 2, 2, 1], fpr=.01) == 1 # 3 of 300 is 1 %


def test_threshold():
    assert best_threshold([0, 1], [0., 1.]) == .5
    assert best_threshold([1, 0], [0., 1.]) in (2., -1.) # calls nothing, or everything, generated
    with pytest.raises(InputError, match="one class"): best_threshold([1, 1], [0., 1.])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, s = np.r_[0, 1, rng.integers(0, 2, 30)], rng.integers(-3, 4, 32)
        best = balanced_accuracy(y, s, threshold=best_threshold(y, s))
        assert np.isclose(best, max(balanced_accuracy(y, s, threshold=t) for t in np.arange(-4.5, 5)))


def test_pairing(pred):
    some = pred[(pred.generator != "g1") | pred.source.isin(["p0", "p1", "p2"])]
    sizes = {how: {a["generator"]: len(at) for a, at in groups(some, how)} for how in ("paired", "all", "source")}
    assert sizes["paired"] == sizes["source"] == {"g0": 80, "g1": 12, "g2": 80} and sizes["all"]["g1"] == 46
    for about, at in groups(some):
        rows = some.iloc[at]
        assert set(rows[rows.label == 1].crop) == set(rows[rows.label == 0].crop) and about["run"] == "r0"
    table = per_generator(some).set_index("generator")
    assert table.n_real["g1"] == table.n_generated["g1"] == 6
    rows = some[(some.generator == "g2") | (some.label == 0)]
    assert np.isclose(table.ap["g2"], sk.average_precision_score(rows.label, rows.logit))


def test_reals_that_carry_a_generator(pred):
    public = pred.drop(columns="crop")
    half = public.source.str[1:].astype(int) < 10
    public = public[~((public.generator == "g0") & ~half) & ~((public.generator == "g1") & half)
                    & (public.generator != "g2")]
    public["generator"] = public.generator.where(public.label == 1, np.where(half.loc[public.index], "g0", "g1"))
    assert [len(at) for _, at in groups(public)] == [40, 40]
    assert [len(at) for _, at in groups(public, "all")] == [60, 60]


def test_refused(pred):
    lonely, gap = pred.drop(columns="crop"), pred.assign(logit=pred.logit.where(pred.index != 3))
    with pytest.raises(InputError, match="run r0, generator g0: no real images"): per_generator(lonely)
    with pytest.raises(InputError, match="no real images.*score real"): per_generator(pred[pred.label == 1])
    with pytest.raises(InputError, match="no generated images"): per_generator(pred[pred.label == 0])
    with pytest.raises(InputError, match="row 3.*finite"): per_generator(gap)
    with pytest.raises(InputError, match="twice"): per_generator(pd.concat([pred, pred[:1]]))
    with pytest.raises(InputError, match="no column logit"): per_generator(pred.drop(columns="logit"))
    with pytest.raises(InputError, match="neither 0 nor 1"): per_generator(pred.assign(label=2))
    with pytest.raises(InputError, match="no rows"): per_generator(pred[:0])
    with pytest.raises(InputError, match="unknown metric 'map'"): per_generator(pred, metrics=["map"])
    with pytest.raises(InputError, match="neither 'paired'"): per_generator(pred, reals="photo")
    with pytest.raises(InputError, match="one value only"): bootstrap(pred, cluster="set")
    with pytest.raises(InputError, match="no threshold for run 'r0'"): per_generator(pred, threshold={"r1": 0})


def test_means():
    pred = toy(runs=2)
    table = per_generator(pred, threshold=thresholds(pred))
    means, family = mean_over_generators(table), mean_over_generators(table, by="family")
    one = table[table.run == "r1"].set_index("generator").ap
    assert np.isclose(means.ap[1], one.mean()) and means.subset.tolist() == [0, 1] and means.worst_ap[1] == one.min()
    assert np.isclose(family.ap[1], ((one.g0 + one.g1)/2 + one.g2)/2) and means.n_generators.tolist() == [3, 3]
    assert per_family(table).n_generators.tolist() == [2, 1, 2, 1]
    assert np.isclose(bootstrap(pred, n=20).value, means.ap.mean())
    assert np.isclose(bootstrap(pred, n=20, by="family").value, family.ap.mean())
    assert np.isclose(bootstrap(pred, n=20, by="worst").value, means.worst_ap.mean())


def test_categoricals_give_the_same(pred):
    stored = pred.astype({c: "category" for c in ("run", "id", "generator", "family", "source", "crop", "set")})
    pd.testing.assert_frame_equal(per_generator(stored), per_generator(pred), check_dtype=False)
    assert bootstrap(stored, n=50) == bootstrap(pred, n=50)


def test_bootstrap_moves_photos_together():
    pred = toy(photos=12)
    doubled = pred.assign(run="again", logit=pred.logit) # another run with the same scores: no new information
    both = pd.concat([pred, doubled])
    assert np.allclose(bootstrap(both, n=100), bootstrap(pred, n=100))
    r = resample(both, n=100)
    assert np.allclose(r.samples[:3], r.samples[3:]) and r.n == 12
    shuffled = both.sample(frac=1, random_state=1)
    assert np.allclose(resample(shuffled, n=100).samples[0], resample(pred, n=100).samples[0])
    assert bootstrap(pred, n=100, seed=1) != bootstrap(pred, n=100) == bootstrap(pred, n=100)


def test_unpaired_sets_are_stratified():
    "Real and generated images of different photos: class sizes stay as they are in every resample."
    pred = toy().drop(columns="crop")
    pred["source"] = pred.id
    pred["generator"] = pred.generator.where(pred.label == 1, "g0")

    def generated(y, s, w=None): return 40. if w is None else (y[:, None]*w).sum(0)

    assert np.allclose(resample(pred[pred.generator == "g0"], generated, n=30).samples, 40)


def test_coverage():
    "Intervals over photos contain the truth about as often as they say; over crops much more rarely."
    truth = per_generator(toy(1, 6000, 1, seed=900), metrics=["ap"]).ap[0]
    hits = {c: 0 for c in ("source", "crop")}
    for seed in range(50):
        data = toy(1, 25, 4, seed=seed)
        for c in hits:
            e = bootstrap(data, "ap", n=150, cluster=c)
            hits[c] += e.low <= truth <= e.high
    assert 43 <= hits["source"] and hits["crop"] < hits["source"] - 2


def test_paired_difference(pred):
    better = pred.assign(logit=pred.logit + .5*pred.label).sample(frac=1, random_state=3)
    d = paired_difference(better, pred, n=200)
    apart = [bootstrap(p, n=200) for p in (better, pred)]
    assert np.isclose(d.value, apart[0].value - apart[1].value) and 0 < d.low < d.value < d.high and d.n == 20
    assert d.high - d.low < min(e.high - e.low for e in apart)
    flipped = paired_difference(pred, better, n=200)
    assert np.isclose(flipped.value, -d.value) and flipped.high < 0
    with pytest.raises(InputError, match="one detector only"): paired_difference(pred, pred[pred.generator != "g0"])


def test_over_runs():
    a, b = pd.Series([.8, .9, .7], index=list("abc")), pd.Series([.6, .75, .8], index=list("cab"))
    e = over_runs(a)
    assert np.allclose(e[1:3], stats.t.interval(.95, 2, a.mean(), stats.sem(a))) and np.isclose(e.sd, a.std())
    d = over_runs(a, b)
    assert np.allclose(d[1:3], stats.ttest_rel(a, b.reindex(a.index)).confidence_interval()) and d.n == 3
    assert np.allclose(over_runs(a, b, paired=False)[1:3], stats.ttest_ind(a, b, equal_var=False).confidence_interval())
    assert np.isnan(over_runs([.5])[1:3]).all() and np.isnan(over_runs([1, 2], [1], paired=False).low)
    with pytest.raises(InputError, match="same index"): over_runs(a, b.rename({"c": "d"}))
    with pytest.raises(InputError, match="same index"): over_runs([1, 2], [1, 2])
    with pytest.raises(InputError, match="finite"): over_runs([1, np.nan])


def test_slope():
    x, who, hits = np.tile([0., 2, 4], 30), np.repeat(np.arange(30), 3), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y = .5 + .02*x + rng.normal(0, .05, 30)[who] + rng.normal(0, .02, 90)
        e = slope(x, y, who, n=100)
        hits += e.low <= .02 <= e.high
    assert np.isclose(e.value, np.polyfit(x, y, 1)[0]) and e.n == 30 and hits >= 90
    alone = slope(x, y, np.arange(90)) # forgets that a subset's offset is shared
    assert e.high - e.low < alone.high - alone.low
    fit = stats.linregress(x, y := .5 + .02*x + rng.normal(0, .05, 90))
    assert abs(slope(x, y, np.arange(90)).se/fit.stderr - 1) < .2
    with pytest.raises(InputError, match="two different"): slope([1, 1], [0, 1], ["a", "b"])


def test_too_little_data_gives_no_verdict():
    tiny = toy(1, 2, 1)
    e = bootstrap(tiny, n=50)
    assert e.n == 2 and np.isfinite(e.value)
    assert np.isnan(slope([0, 1], [.5, .6], ["a", "a"]).low)
