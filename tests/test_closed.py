"""Heads in closed form: their tensors, batches and odd labels, and what scikit-learn says in their place."""
import json
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from sklearn import kernel_ridge, linear_model
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, DotProduct
from sklearn.preprocessing import RobustScaler, StandardScaler

from biomass_kit.data.targets import LINKS, LOG_TARGETS, BiomassError, from_link, to_link
from biomass_kit.model.closed import GaussianProcess, KernelRidge, Ridge, photo_rows
from biomass_kit.model.options import HEADS, KERNELS, SCALERS

DIMS = [5, 8]
KINDS = {  # every head with every kernel that it takes
    "ridge": (Ridge, {}),
    **{f"kernel_ridge {k}": (KernelRidge, {"kernel": k}) for k in KERNELS},
    **{f"gaussian_process {k}": (GaussianProcess, {"kernel": k}) for k in KERNELS},
}
every_kind = pytest.mark.parametrize("kind, options", KINDS.values(), ids=KINDS)


def photos(n, seed=0, dims=DIMS):
    "Features of one spec for each of `dims`, grams and dates of `n` synthetic photos."
    rng = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, 2, 2 + i, d, generator=rng) + 3 for i, d in enumerate(dims)]
    hidden = photo_rows(*features)[:, :5] - 3
    noise = torch.randn(n, 5, generator=rng)
    return features, (4 + 3 * hidden + 0.3 * noise).clamp_min(0) ** 2, np.arange(n) // 4


def fitted(kind, options, n=30, **more):
    "A head fitted to synthetic photos, and those."
    features, grams, dates = photos(n)
    head = kind(DIMS, **options, **more)
    head.fit(photo_rows(*features), grams, dates)
    return head, features, grams


def test_the_registry_names_them():
    assert [resolve_name(HEADS[name]) for name in ("ridge", "kernel_ridge", "gaussian_process")] == [
        Ridge, KernelRidge, GaussianProcess]


@every_kind
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("scaler", SCALERS)
def test_saved_and_built_again_it_says_the_same_bits(kind, options, link, scaler):
    head, features, _ = fitted(kind, options, link=link, scaler=scaler, log_targets="dead_clover")
    kept = json.loads(json.dumps(head.args))
    with torch.device("meta"):
        due = {name: (t.shape, t.dtype) for name, t in kind(**kept).state_dict().items()}
    assert due == {name: (t.shape, torch.float32) for name, t in head.state_dict().items()}
    again = kind(**kept)
    again.load_state_dict(load(save(head.state_dict())))
    assert torch.equal(again(*features), head(*features)) and again.args == head.args
    if kind is GaussianProcess:
        assert all(map(torch.equal, again.intervals(*features), head.intervals(*features)))


@every_kind
def test_fitted_twice_it_is_the_same(kind, options):
    (one, *_), (two, *_) = fitted(kind, options), fitted(kind, options)
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())


@every_kind
def test_a_photo_alone_gets_what_it_gets_among_many(kind, options):
    head, features, _ = fitted(kind, options)
    alone = torch.cat([head(*(f[i:i + 1] for f in features)) for i in range(30)])
    assert_close(alone, head(*features))
    half = [f.half() for f in features]
    assert_close(head(*half), head(*(f.float() for f in half)))


@every_kind
def test_new_labels_replace_the_old(kind, options):
    head, *_ = fitted(kind, options)
    features, grams, dates = photos(14, seed=1)
    fresh = kind(DIMS, **options)
    for either in (head, fresh): either.fit(photo_rows(*features), grams, dates)
    assert torch.equal(head(*features), fresh(*features)) and head.args == fresh.args
    assert head.args.get("rows", 14) == 14


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(1, 9), st.sampled_from(LINKS), st.sampled_from(SCALERS),
    st.sampled_from(("alike", "zero", "one heavy", "as they are")), st.sampled_from((0.0, 1e-30, 1.0, 1e4)),
    st.integers(1, 5))
def test_whatever_it_learned_from_it_answers(name, n, link, scaler, labels, size, dates):
    kind, options = KINDS[name]
    features, grams, _ = photos(n)
    if labels in ("alike", "zero"): grams = torch.full_like(grams, 20.0 if labels == "alike" else 0)
    if labels == "one heavy": grams[0] = 1e4
    head = kind(DIMS, link=link, scaler=scaler, **options)
    head.fit(size * photo_rows(*features), grams, np.arange(n) % dates)
    new = [torch.cat([f, 1e3 * f, 0 * f]) for f in features]
    said = torch.stack([head(*new), *(head.intervals(*new) if kind is GaussianProcess else ())])
    assert said.isfinite().all() and (said >= 0).all() and said.dtype == torch.float32
    if labels in ("alike", "zero"): assert_close(said[0], grams[0].expand(3 * n, 5))


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("link", LINKS)
def test_scikit_learn_says_the_same(link, scaler):
    features, grams, _ = photos(40)
    rows, channels, chosen = photo_rows(*features), sum(DIMS), LOG_TARGETS["dead_clover"]
    scale = {"standard": StandardScaler, "robust": RobustScaler}[scaler]()
    x = scale.fit_transform(rows.double().numpy())
    new_features, *_ = photos(20, seed=1)
    new = scale.transform(photo_rows(*new_features).double().numpy())
    labels = to_link(grams.double().numpy(), chosen, link)
    mean = labels.mean(0)
    theirs = {
        Ridge: linear_model.Ridge(0.3 * channels, fit_intercept=False),
        KernelRidge: kernel_ridge.KernelRidge(alpha=0.3, kernel="rbf", gamma=0.1 / channels),
    }
    for kind, model in theirs.items():
        head = kind(DIMS, link=link, scaler=scaler, log_targets="dead_clover")
        head.solve(rows, grams, 0.3, 0.1 if kind is KernelRidge else 1.0)
        due = from_link(model.fit(x, labels - mean).predict(new) + mean, chosen, link).clip(0)
        np.testing.assert_allclose(head(*new_features), due, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gaussian_process_deviates_as_scikit_learn_says(kernel):
    features, grams, _ = photos(40)
    channels, alpha = sum(DIMS), 0.3
    head = GaussianProcess(DIMS, link="identity", kernel=kernel)
    head.solve(photo_rows(*features), grams, alpha)
    new_features, *_ = photos(20, seed=1)
    x, new = head.rows.double().numpy(), head.scaled(new_features).numpy()
    shared, unit = RBF((channels / 2) ** 0.5), 1
    # theirs adds up products where ours takes their mean
    if kernel == "linear": shared, unit = DotProduct(0, "fixed"), channels
    y = grams.double().numpy()
    mean = y.mean(0)
    model = GaussianProcessRegressor(shared, alpha=alpha * unit, optimizer=None).fit(x, y - mean)
    due, curve = model.predict(new, return_std=True)
    np.testing.assert_allclose(head(*new_features), (due + mean).clip(0), rtol=1e-4, atol=1e-3)
    noisy = np.sqrt(curve**2 / unit + alpha) * head.deviation.numpy()
    np.testing.assert_allclose(head.deviations(head.scaled(new_features)), noisy, rtol=1e-4)
    matrix = shared(x) / unit + alpha * np.eye(40)
    likeliest = ((y - mean) * np.linalg.solve(matrix, y - mean)).mean(0)
    np.testing.assert_allclose(head.deviation**2, likeliest, rtol=1e-4)


@pytest.mark.parametrize("link", LINKS)
def test_intervals_hold_the_share_that_they_name(link):
    "Labels that are a Gaussian process in the link's space, so that its own words must be true of them."
    head, rng = GaussianProcess([1], link=link), np.random.default_rng(0)
    x = rng.normal(size=(400, 1))
    near = np.exp(-((x - x.T) ** 2)) + 0.1 * np.eye(400)
    space = 4 + np.linalg.cholesky(near) @ rng.normal(size=(400, 5))
    grams = torch.tensor(from_link(space, range(5), link)).float()
    features = torch.tensor(x).float()[:, None, None].expand(-1, 2, -1, -1)
    head.solve(photo_rows(features[:200]), grams[:200], 0.1)
    for level in (0.5, 0.9):
        low, high = head.intervals(features[200:], level=level)
        share = ((low <= grams[200:]) & (grams[200:] <= high)).float().mean()
        assert abs(share - level) < 0.05, (link, level, share)
    for level in (0, 1, 1.5):
        with pytest.raises(BiomassError, match="between 0 and 1"): head.intervals(features, level=level)


def test_views_of_a_photo_may_be_further_rows():
    "Each row three times weighs as a third of the strength."
    features, grams, _ = photos(20)
    rows = photo_rows(*features)
    one, three = KernelRidge(DIMS), KernelRidge(DIMS)
    one.solve(rows, grams, 0.1, 0.3)
    three.solve(rows.repeat(3, 1), grams.repeat(3, 1), 0.3, 0.3)
    np.testing.assert_allclose(one(*features), three(*features), rtol=1e-4, atol=1e-3)


@every_kind
def test_dates_stay_together_in_the_choice(kind, options):
    "Copies of a row under one date tell nothing of it; under dates of their own they give it away."
    features, grams, _ = photos(24)
    noise = torch.rand(24, 5, generator=torch.Generator().manual_seed(5)) * 50
    rows, grams = photo_rows(*features).repeat(2, 1), noise.repeat(2, 1)
    head = kind(DIMS, **options)
    together = head.choose(rows, grams, np.tile(np.arange(24) // 2, 2))
    apart = head.choose(rows, grams, np.arange(48) // 24)
    assert apart["inner_r2"] > together["inner_r2"] + 0.1
    assert head.choose(rows, grams, ["2015/9/4"] * 48)["inner_r2"] is None


HOSTILE = {
    "a channel less than none": {"dims": [-3, 5]},
    "no spec": {"dims": []},
    "a part of a channel": {"dims": [2.5]},
    "channels in words": {"dims": "12"},
    "more channels than an address": {"dims": [10**30]},
    "rows less than none": {"rows": -1},
    "a part of a row": {"rows": 1.5},
    "rows in words": {"rows": "7"},
    "rows beyond memory": {"rows": 2**62},
    "an option of another head": {"hidden_ratio": 0.5},
}


@pytest.mark.parametrize("wrong", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("kind", (KernelRidge, GaussianProcess))
def test_hostile_arguments_are_refused_without_memory(kind, wrong):
    with torch.device("meta"), pytest.raises((TypeError, RuntimeError, OverflowError)):
        kind(**{"dims": DIMS, "rows": 3, **wrong})


@every_kind
def test_unknown_names_are_refused(kind, options):
    for name, value in {"link": "cube", "scaler": None, "log_targets": ["all"]}.items():
        with pytest.raises(BiomassError, match="choose one of"): kind(DIMS, **{**options, name: value})
    if options:
        with pytest.raises(BiomassError, match="choose one of"): kind(DIMS, kernel="cosine")
    with pytest.raises(TypeError): GaussianProcess(DIMS, uncertainty=False)
