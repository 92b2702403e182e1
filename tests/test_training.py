"""Training on three drawn classes: it learns, it stops, it repeats, it keeps quiet."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from cellstore.errors import UserInputError
from cellstore.ops.crops import CellBlock
from cellstore.ops.nets import FusionNet, NetShape, build_net
from cellstore.ops.scaling import Scaler
from cellstore.ops.training import EpochMetrics, FitConfig, fit, predict_batch

SHAPE = NetShape(n_classes=3, n_features=2, attention_width=16, projection_width=16, dropout=0.1)
CONFIG = FitConfig(learning_rate=2e-3, max_epochs=2, patience=2, device="cpu", seed=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cells(count: int, seed: int, size: int = 32) -> CellBlock:
    """Cells of three classes that differ in brightness, stripes and features."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = rng.normal(0, 0.1, (2, count, 4, size, size))
    stripes = np.sin(np.arange(size) * (1 + labels[:, None]))[:, None, None, :]
    crops = torch.from_numpy((noise + stripes + labels[:, None, None, None] - 1).astype(np.float32))
    features = np.stack([labels == 1, labels == 2], axis=1) + rng.normal(0, 0.1, (count, 2))
    return CellBlock(
        {"mask": crops[0], "flow": crops[1]},
        torch.from_numpy(features.astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
        torch.arange(count),
    )


def in_batches(block: CellBlock, size: int = 12) -> list[CellBlock]:
    return [block.take(index) for index in torch.arange(len(block)).split(size)]


class Tiny(FusionNet):
    """The same interface with one layer, for what does not depend on the network."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.shape = SHAPE
        self.layer = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 3))

    def forward(self, crops, features):
        return self.layer(features)


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.heavy
def test_the_published_network_learns_three_classes() -> None:
    train, validation = in_batches(cells(96, 1), 24), in_batches(cells(24, 2), 24)
    net = build_net(SHAPE, seed=0)
    config = dataclasses.replace(CONFIG, learning_rate=2e-4, max_epochs=4, patience=4)
    result = fit(net, lambda _: train, lambda _: validation, config)
    assert result.epochs[-1].train_loss < 0.8 * result.epochs[0].train_loss
    best = result.epochs[result.best_epoch - 1]
    assert best.validation_loss == min(epoch.validation_loss for epoch in result.epochs)
    assert best.validation_accuracy > 0.8
    net.load_state_dict(result.state)
    probabilities = np.concatenate([predict_batch(net, batch) for batch in validation])
    truth = cells(24, 2).labels.numpy()
    assert np.mean(probabilities.argmax(axis=1) == truth) == pytest.approx(best.validation_accuracy)


@pytest.mark.heavy
def test_same_seed_same_training() -> None:
    batch = cells(8, 1)

    def state(seed: int) -> dict[str, torch.Tensor]:
        config = dataclasses.replace(CONFIG, seed=seed, max_epochs=1)
        return fit(build_net(SHAPE, seed=0), lambda _: [batch], lambda _: [batch], config).state

    first, same, other = state(1), state(1), state(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_loss_is_label_smoothing_cross_entropy_and_rate_halves_every_five_epochs() -> None:
    batch = cells(12, 0)
    net = tiny()
    result = fit(
        net,
        lambda _: [batch],
        lambda _: [batch],
        dataclasses.replace(CONFIG, max_epochs=11, patience=99, learning_rate=1e-4),
    )
    rates = [epoch.learning_rate for epoch in result.epochs]
    assert rates == pytest.approx([1e-4] * 5 + [5e-5] * 5 + [2.5e-5])
    # By hand for the last epoch: 0.9 of the true class and 0.1 spread over all three.
    log = torch.log_softmax(net.eval()({}, batch.features), dim=1).detach()
    true = log[torch.arange(12), batch.labels]
    expected = -(0.9 * true + 0.1 * log.mean(dim=1)).mean()
    assert result.epochs[-1].validation_loss == pytest.approx(float(expected), rel=1e-5)


def test_running_statistics_are_means_over_the_first_batches() -> None:
    net = tiny()
    net.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3))
    block = cells(48, 0)
    batches = in_batches(block, 12)
    fit(net, lambda _: batches, lambda _: batches, dataclasses.replace(CONFIG, max_epochs=1))
    norm = net.layer[0]
    torch.testing.assert_close(norm.running_mean, block.features.mean(dim=0))
    variances = torch.stack([batch.features.var(dim=0) for batch in batches])
    torch.testing.assert_close(norm.running_var, variances.mean(dim=0))
    assert norm.momentum == 0.1
    # From the tenth batch on the usual rate holds: ten of one mean, then one of another.
    other = dataclasses.replace(batches[0], features=batches[0].features + 1)
    many = [batches[0]] * 10 + [other]
    fit(net, lambda _: many, lambda _: batches, dataclasses.replace(CONFIG, max_epochs=1))
    torch.testing.assert_close(norm.running_mean, batches[0].features.mean(dim=0) + 0.1)


def test_a_step_is_that_of_adam_with_weight_decay() -> None:
    batch = cells(12, 0)
    ours, plain = tiny(), tiny()
    config = dataclasses.replace(CONFIG, max_epochs=1, weight_decay=0.3)
    fit(ours, lambda _: [batch, batch], lambda _: [batch], config)
    torch.manual_seed(config.seed)
    optimizer = torch.optim.Adam(plain.parameters(), lr=2e-3, weight_decay=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        scores = plain({}, batch.features)
        torch.nn.functional.cross_entropy(scores, batch.labels, label_smoothing=0.1).backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_it_stops_early_and_gives_back_the_best_epoch() -> None:
    # Validation labels are turned by one: what is learned is wrong there, more so every epoch.
    train = cells(12, 0)
    validation = dataclasses.replace(train, labels=(train.labels + 1) % 3)
    seen: list[EpochMetrics] = []
    result = fit(
        tiny(),
        lambda _: [train] * 5,
        lambda _: [validation],
        dataclasses.replace(CONFIG, max_epochs=50, patience=3, learning_rate=0.05),
        seen.append,
    )
    assert result.stopped_early
    assert len(result.epochs) == result.best_epoch + 3
    assert seen == list(result.epochs)
    assert [epoch.epoch for epoch in seen] == list(range(1, len(seen) + 1))
    net = tiny()
    net.load_state_dict(result.state)
    probabilities = torch.from_numpy(predict_batch(net, validation))
    loss = torch.nn.functional.cross_entropy(
        probabilities.log(), validation.labels, label_smoothing=0.1
    )
    assert float(loss) == pytest.approx(seen[result.best_epoch - 1].validation_loss, rel=1e-5)


def test_epochs_are_counted_for_the_batches_and_metrics_are_per_cell() -> None:
    block, asked = cells(13, 0), []

    def batches(epoch: int) -> Iterator[CellBlock]:
        asked.append(epoch)
        yield from in_batches(block, 11)

    def whole(_: int) -> list[CellBlock]:
        return [block]

    uneven = fit(tiny(), batches, batches, CONFIG)
    assert asked == [0, 0, 1, 1]
    again = fit(tiny(), lambda _: in_batches(block, 11), whole, CONFIG)
    assert uneven.epochs[-1].validation_loss == pytest.approx(again.epochs[-1].validation_loss)
    assert math.isclose(uneven.epochs[0].validation_accuracy * 13 % 1, 0, abs_tol=1e-9)


def test_nothing_is_printed_or_written_and_random_numbers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    net = tiny()
    torch.manual_seed(7)
    fit(net, lambda _: [cells(6, 0)], lambda _: [cells(6, 1)], CONFIG)
    assert torch.equal(torch.rand(3), expected)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_comes_out() -> None:
    def stop(_: EpochMetrics) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), lambda _: [cells(6, 0)], lambda _: [cells(6, 1)], CONFIG, stop)


def test_what_cannot_be_trained_on_is_refused() -> None:
    good, one = cells(6, 0), cells(1, 0)
    unlabelled = dataclasses.replace(good, labels=good.labels - 1)
    endless = dataclasses.replace(good, features=good.features * math.inf)
    for train, validation, message in [
        ([], [good], "no cells on the training side"),
        ([good], [], "no cells on the validation side"),
        ([one], [good], "one cell"),
        ([unlabelled], [good], "no label"),
        ([endless], [good], "lower learning rate"),
    ]:
        with pytest.raises(UserInputError, match=message):
            fit(tiny(), lambda _, t=train: t, lambda _, v=validation: v, CONFIG)


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"learning_rate": 0},
        {"patience": 0},
        {"batch_size": 1},
        {"label_smoothing": 1.0},
        {"weight_decay": -1},
    ):
        with pytest.raises(UserInputError):
            FitConfig(**wrong)
    with pytest.raises(UserInputError, match="use auto, cpu or cuda"):
        fit(tiny(), lambda _: [], lambda _: [], FitConfig(device="abacus"))


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserInputError, match="No CUDA device"):
        fit(tiny(), lambda _: [], lambda _: [], FitConfig(device="cuda"))


def test_probabilities_add_to_one_and_training_state_does_not_matter() -> None:
    net, batch = tiny().train(), cells(5, 0)
    first = predict_batch(net, batch)
    assert first.shape == (5, 3)
    assert first.dtype == np.float64
    assert first.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-12)
    assert (predict_batch(net, batch) == first).all()
    assert predict_batch(net, batch.take(torch.arange(0))).shape == (0, 3)


def test_a_scaler_fitted_in_blocks_is_that_of_scikit_learn() -> None:
    rows = np.random.default_rng(0).normal([1e6, 0, 5], [1, 1e-3, 50], (100, 3))
    names = ("a", "b", "c")
    ours = Scaler.fit(names, [rows[:1], rows[1:1], rows[1:40], rows[40:]])
    theirs = StandardScaler().fit(rows)
    assert ours.mean == pytest.approx(theirs.mean_, rel=1e-12)
    assert ours.scale == pytest.approx(theirs.scale_, rel=1e-6)
    np.testing.assert_allclose(ours.transform(rows), theirs.transform(rows), atol=1e-4)
    assert Scaler.from_json(ours.to_json()) == ours


def test_a_column_that_never_varies_is_left_at_zero() -> None:
    scaler = Scaler.fit(("a",), [[[0.1]] * 3, [[0.1]] * 7])
    assert scaler.scale == (1.0,)
    assert scaler.transform([[0.1]])[0, 0] == pytest.approx(0, abs=1e-12)


def test_values_that_were_not_measured_are_named_and_not_made_up() -> None:
    with pytest.raises(UserInputError, match="no finite value of b;"):
        Scaler.fit(("a", "b"), [[[1.0, math.nan]]])
    with pytest.raises(UserInputError, match="no cells"):
        Scaler.fit(("a",), [])
    scaler = Scaler.fit(("a", "b"), [[[1.0, 2.0], [2.0, 3.0]]])
    with pytest.raises(UserInputError, match=r"shape \(cells, 2\)"):
        scaler.transform([[1.0]])
    for wrong in ({}, {"names": ["a"], "mean": [1], "scale": [0]}, {"names": [], "mean": [1]}):
        with pytest.raises(UserInputError):
            Scaler.from_json(wrong)


def test_a_scaler_of_gaps_ignores_what_was_not_measured() -> None:
    rows = np.array([[1.0, math.nan, 5.0], [math.nan, math.nan, 7.0], [4.0, math.nan, math.inf]])
    scaler = Scaler.fit(("a", "never", "b"), [rows[:1], rows[1:]], gaps=True)
    assert scaler.names == ("a", "b")
    np.testing.assert_allclose(scaler.mean, [2.5, 6.0])
    np.testing.assert_allclose(scaler.scale, [1.5, 1.0])
    scaled = scaler.transform([[4.0, math.nan], [math.nan, 5.0], [-math.inf, 6.0]])
    np.testing.assert_allclose(scaled, [[1, 0], [0, -1], [0, 0]])
    assert Scaler.from_json(scaler.to_json()) == scaler
    with pytest.raises(UserInputError, match="no cells"):
        Scaler.fit(("a",), [[[math.nan]]], gaps=True)
