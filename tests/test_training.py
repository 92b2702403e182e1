"""Training on three drawn classes: it learns, it stops, it repeats, it keeps quiet."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from training_loop import PLAIN, fit

from cellstore.errors import StorageError, UserInputError
from cellstore.learn.augmentation import seed_of
from cellstore.learn.crops import CellBlock
from cellstore.learn.networks import FusionNet, NetShape, build_net
from cellstore.learn.normalising import Scaler
from cellstore.learn.trained_models import predict_batch
from cellstore.learn.training import (
    EpochMetrics,
    FocalLoss,
    TrainingState,
    balanced_weights,
    check_device,
    make_loss,
    rate_factor,
)

SHAPE = NetShape(n_classes=3, n_features=2, attention_width=16, projection_width=16, dropout=0.1)
CONFIG = PLAIN


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
    train, validation = in_batches(cells(36, 1), 12), in_batches(cells(24, 2), 24)
    net = build_net(SHAPE, seed=0)
    config = dataclasses.replace(CONFIG, learning_rate=5e-4, epochs=3, patience=3)
    result = fit(net, lambda _: train, lambda _: validation, config)
    assert result.epochs[-1].train_loss < 0.8 * result.epochs[0].train_loss
    best = result.epochs[result.best]
    assert best.validation_loss == min(epoch.validation_loss for epoch in result.epochs)
    assert best.validation_accuracy > 0.6  # chance is a third
    net.load_state_dict(result.best_state)
    probabilities = np.concatenate([predict_batch(net, batch) for batch in validation])
    truth = cells(24, 2).labels.numpy()
    assert np.mean(probabilities.argmax(axis=1) == truth) == pytest.approx(best.validation_accuracy)


@pytest.mark.heavy
def test_same_seed_same_training() -> None:
    batch = cells(8, 1)

    def state(seed: int) -> dict[str, torch.Tensor]:
        config = dataclasses.replace(CONFIG, seed=seed, epochs=1)
        net = build_net(dataclasses.replace(SHAPE, backbone="shufflenet_v2_x0_5"), seed=0)
        return fit(net, lambda _: [batch], lambda _: [batch], config).best_state

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
        dataclasses.replace(CONFIG, epochs=11, patience=99, learning_rate=1e-4),
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
    fit(net, lambda _: batches, lambda _: batches, dataclasses.replace(CONFIG, epochs=1))
    norm = net.layer[0]
    torch.testing.assert_close(norm.running_mean, block.features.mean(dim=0))
    variances = torch.stack([batch.features.var(dim=0) for batch in batches])
    torch.testing.assert_close(norm.running_var, variances.mean(dim=0))
    assert norm.momentum == 0.1
    # From the tenth batch on the usual rate holds: ten of one mean, then one of another.
    other = dataclasses.replace(batches[0], features=batches[0].features + 1)
    many = [batches[0]] * 10 + [other]
    fit(net, lambda _: many, lambda _: batches, dataclasses.replace(CONFIG, epochs=1))
    torch.testing.assert_close(norm.running_mean, batches[0].features.mean(dim=0) + 0.1)


def test_a_step_is_that_of_adam_with_weight_decay() -> None:
    batch = cells(12, 0)
    ours, plain = tiny(), tiny()
    config = dataclasses.replace(CONFIG, epochs=1, weight_decay=0.3)
    fit(ours, lambda _: [batch, batch], lambda _: [batch], config)
    torch.manual_seed(seed_of(config.seed, 0, 0))
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
        dataclasses.replace(CONFIG, epochs=50, patience=3, learning_rate=0.05),
        lambda epoch, _: seen.append(epoch),
    )
    assert result.stopped_early
    assert len(result.epochs) == result.best + 4
    assert seen == result.epochs
    assert [epoch.epoch for epoch in seen] == list(range(1, len(seen) + 1))
    net = tiny()
    net.load_state_dict(result.best_state)
    probabilities = torch.from_numpy(predict_batch(net, validation))
    loss = torch.nn.functional.cross_entropy(
        probabilities.log(), validation.labels, label_smoothing=0.1
    )
    assert float(loss) == pytest.approx(seen[result.best].validation_loss, rel=1e-5)


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
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), lambda _: [cells(6, 0)], lambda _: [cells(6, 1)], CONFIG, stop)


def test_what_cannot_be_trained_on_is_refused() -> None:
    good, one = cells(6, 0), cells(1, 0)
    unlabelled = dataclasses.replace(good, labels=good.labels - 1)
    endless = dataclasses.replace(good, features=good.features * math.inf)
    for train, validation, message in [
        ([], [good], "no cells in the training subset"),
        ([good], [], "no cells in the validation subset"),
        ([one], [good], "one cell"),
        ([unlabelled], [good], "no label"),
        ([endless], [good], "lower learning rate"),
    ]:
        with pytest.raises(UserInputError, match=message):
            fit(tiny(), lambda _, t=train: t, lambda _, v=validation: v, CONFIG)


def test_a_training_goes_on_from_any_epoch_as_if_there_had_been_no_break() -> None:
    block = cells(24, 0)
    config = dataclasses.replace(CONFIG, epochs=5, patience=9, schedule="cosine")
    kept: list[bytes] = []

    def run(start: TrainingState | None = None, net: Tiny | None = None):
        return fit(
            net or with_norm(),
            lambda _: in_batches(block, 5),
            lambda _: [block],
            config,
            lambda _, training: kept.append(training.state().to_bytes()),
            start=start,
        )

    whole = run()
    for epoch in (1, 4, 5):  # 5: only what is done at the end was left
        again = run(TrainingState.from_bytes(kept[epoch - 1]))
        torch.testing.assert_close(again.best_state, whole.best_state, rtol=0, atol=0)
        assert without_time(again.epochs) == without_time(whole.epochs)
        assert again.best == whole.best
    with pytest.raises(StorageError, match="another network"):
        run(TrainingState.from_bytes(kept[0]), tiny())
    for damaged in (b"", kept[0][:-9], b"\xff" * 99):
        with pytest.raises(StorageError, match="damaged"):
            TrainingState.from_bytes(damaged)


def with_norm() -> Tiny:
    net = tiny()
    net.layer = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 3)
    )
    return net


def without_time(epochs: list[EpochMetrics]) -> list[EpochMetrics]:
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs]


def test_the_best_epoch_is_that_of_the_monitor() -> None:
    # Labels of validation are turned by one and then back again: the loss is lowest at the start,
    # the accuracy after all was learned.
    train, config = cells(12, 0), dataclasses.replace(CONFIG, learning_rate=0.05, epochs=4)
    turned = dataclasses.replace(train, labels=(train.labels + 1) % 3)
    sides = [train, turned, turned, train]
    config = dataclasses.replace(config, patience=4)

    def best(monitor: str) -> EpochMetrics:
        chosen = dataclasses.replace(config, monitor=monitor)
        result = fit(tiny(), lambda _: [train] * 20, lambda epoch: [sides[epoch]], chosen)
        key = {"loss": lambda e: -e.validation_loss, "accuracy": lambda e: e.validation_accuracy}
        found = max(result.epochs, key=key[monitor])
        assert result.best + 1 == found.epoch
        return found

    assert best("accuracy").validation_accuracy == 1
    best("loss")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("step", 12, 0, 5, 0.5), [1] * 5 + [0.5] * 5 + [0.25] * 2),
        (("step", 4, 1, 2, 0.1), [0.5, 1, 0.1, 0.1]),
        (("cosine", 4), [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        (("cosine", 5, 3), [0.25, 0.5, 0.75, 1, 0.5]),
        (("constant", 4, 2), [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_rates_of_the_schedules(given: tuple, expected: list[float]) -> None:
    names = ("schedule", "epochs", "warmup_epochs", "step_size", "gamma")
    params = dataclasses.replace(CONFIG, **dict(zip(names, given, strict=False)))
    found = [rate_factor(params, epoch) for epoch in range(params.epochs)]
    assert found == pytest.approx(expected)


def test_a_focal_loss_without_focus_is_cross_entropy_and_with_it_forgets_the_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn((9, 3), generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, -1, 2, 0, 1])
    weights = (0.5, 2.0, 1.0)
    plain = FocalLoss(0.1, torch.tensor(weights), focus=0.0)(scores, labels)
    torch.testing.assert_close(plain, make_loss("cross-entropy", 0.1, weights)(scores, labels))
    # By hand, as in Lin et al. 2017: (1 - p) ** 2 * -log p of the true class.
    known = labels >= 0
    p = torch.softmax(scores[known], dim=1)[torch.arange(8), labels[known]]
    expected = ((1 - p) ** 2 * -p.log()).mean()
    torch.testing.assert_close(make_loss("focal", 0.0)(scores, labels), expected)


def test_weights_balance_the_classes_and_losses_are_means_over_weights() -> None:
    assert balanced_weights([6, 2, 0]) == pytest.approx((8 / 12, 2.0, 1.0))
    block = cells(13, 0)
    block = dataclasses.replace(block, labels=(torch.arange(13) > 8).long())
    short = dataclasses.replace(CONFIG, epochs=1)
    weights = (0.5, 4.0, 1.0)

    def parts(size: int):
        return lambda _: in_batches(block, size)

    loss = [
        fit(tiny(), lambda _: [block], parts(n), short, class_weights=weights)
        .epochs[0]
        .validation_loss
        for n in (13, 5)
    ]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_every_recipe_trains(precision: str) -> None:
    block = cells(12, 0)
    config = dataclasses.replace(
        CONFIG,
        loss="focal",
        schedule="cosine",
        warmup_epochs=1,
        augment=("flips", "rotations", "intensity"),
        precision=precision,
        epochs=8,
        patience=8,
        learning_rate=0.05,
    )
    result = fit(tiny(), lambda _: [block] * 3, lambda _: [block], config)
    assert result.epochs[-1].validation_accuracy == 1
    assert {value.dtype for value in result.best_state.values()} == {torch.float32}


def test_augmentation_is_for_training_and_new_at_each_step() -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    class Looks(Tiny):
        def forward(self, crops, features):
            seen[self.training].append(crops["mask"].clone())
            return super().forward(crops, features)

    block = cells(6, 0)
    config = dataclasses.replace(CONFIG, augment=("flips", "rotations"))
    fit(Looks(), lambda _: [block, block], lambda _: [block], config)
    assert all(torch.equal(crops, block.crops["mask"]) for crops in seen[False])
    trained = [*seen[True], block.crops["mask"]]
    assert len(trained) == 5
    for index, crops in enumerate(trained):
        assert not any(torch.equal(crops, other) for other in trained[:index])


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"learning_rate": 0.0},
        {"label_smoothing": 1.0},
        {"schedule": "stairs"},
        {"loss": "hinge"},
        {"augment": ("noise",)},
        {"monitor": "luck"},
    ):
        with pytest.raises(UserInputError):
            dataclasses.replace(CONFIG, **wrong)
    with pytest.raises(UserInputError, match="Use auto, cpu or cuda"):
        fit(tiny(), lambda _: [], lambda _: [], device="abacus")


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserInputError, match="no usable CUDA device"):
        fit(tiny(), lambda _: [], lambda _: [], device="cuda")


def test_a_precision_that_is_not_possible_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserInputError, match="Precision 16 needs a GPU"):
        check_device("auto", "16", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserInputError, match="cannot compute in bf16"):
        check_device("auto", "bf16", 1)
    with pytest.raises(UserInputError, match="2 GPUs here, not 3"):
        check_device("cuda", "32", 3)


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
