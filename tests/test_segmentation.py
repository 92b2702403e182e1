"""Finding cells: the shipped network, the files it comes from, and files that are refused."""

import hashlib
import io
import pickle
import urllib.error

import imagecodecs
import numpy as np
import pytest

from cellstore.analysis import segmentation
from cellstore.analysis.segmentation import ModelFiles, find_model, load_segmenter
from cellstore.config import SegmentParams
from cellstore.enums import DEFAULT_MODEL
from cellstore.errors import ImageError, UnknownNameError, UserInputError
from cellstore.report.drawing import OUTLINE_COLOUR, outline_overlay, outlines
from cellstore.report.segment_preview import CAPTION_HEIGHT, captioned, png

pytest.importorskip("cellpose.resnet_torch", reason="needs Cellpose 3")
torch = pytest.importorskip("torch")

from tiny_network import DIAM_MEAN, new_network, save_network  # noqa: E402
from train_shipped_network import fit_size_model, save_size_model  # noqa: E402

from cellstore.analysis.rendering import PlateDesign, render_field  # noqa: E402
from cellstore.learn import finetuning  # noqa: E402


class Trap:
    """Unpickles into a call that leaves a trace."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (open, (self.trace, "w"))


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "mine.pt"
    save_network(new_network(0), path)
    return path


def size_model(diam_mean=17.0):
    return segmentation.SizeModel(np.linspace(-1, 1, 256), np.zeros(256), 0.2, diam_mean)


@pytest.fixture(scope="session")
def demo_field():
    design = PlateDesign()
    field = render_field(design, next(design.fields()))
    return np.median(field.channels, axis=0).astype(np.float32), field.masks


@pytest.fixture(scope="session")
def shipped_result(demo_field):
    return load_segmenter(find_model(), device="cpu").segment(demo_field[0])


# --- the shipped network ---------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("thresholds", [(0.4, 0.0), (0.7, -5.0)])
def test_nine_of_ten_rendered_cells_are_found(demo_field, thresholds):
    from cellpose.metrics import average_precision

    image, truth = demo_field
    flow, prob = thresholds
    segmenter = load_segmenter(
        find_model(), flow_threshold=flow, cellprob_threshold=prob, device="cpu"
    )
    result = segmenter.segment(image)
    _, hits, false, _ = average_precision(
        truth.astype(np.int32), result.masks.astype(np.int32), threshold=[0.5]
    )
    assert hits[0] >= 0.9 * truth.max()
    assert false[0] <= 0.1 * truth.max()


@pytest.mark.heavy
def test_the_result_has_the_promised_form(demo_field, shipped_result):
    image, truth = demo_field
    masks, flows = shipped_result.masks, shipped_result.flows
    assert masks.shape == image.shape
    assert masks.dtype == np.uint16
    assert np.array_equal(np.unique(masks), np.arange(masks.max() + 1))
    assert flows.shape == (*image.shape, 4)
    assert flows.dtype == np.uint8
    true = 2 * np.sqrt(np.median(np.bincount(truth.ravel())[1:]) / np.pi)
    assert shipped_result.diameter == pytest.approx(true, rel=0.2)


@pytest.mark.heavy
def test_the_cell_probability_tells_cells_from_background(demo_field, shipped_result):
    truth, probability = demo_field[1], shipped_result.flows[..., 3]
    assert np.median(probability[truth > 0]) > 200
    assert np.median(probability[truth == 0]) < 50


@pytest.mark.heavy
def test_segmenting_twice_gives_the_same_pixels(demo_field, shipped_result):
    again = load_segmenter(find_model(), device="cpu").segment(demo_field[0])
    np.testing.assert_array_equal(again.masks, shipped_result.masks)
    np.testing.assert_array_equal(again.flows, shipped_result.flows)
    assert again.diameter == shipped_result.diameter


@pytest.mark.heavy
def test_an_empty_image_has_no_cells(capfd):
    result = load_segmenter(find_model(), device="cpu").segment(np.zeros((64, 64), np.float32))
    assert result.masks.max() == 0
    assert result.diameter > 0
    assert capfd.readouterr() == ("", "")


def test_the_shipped_network_is_a_plain_half_precision_state(tmp_path):
    files = find_model()
    assert files.name == DEFAULT_MODEL
    state = torch.load(files.network, weights_only=True)
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
    assert files.network.stat().st_size < 16e6
    assert files.size_model.suffix == ".npz"
    assert (files.network.parent / "MODEL_CARD.md").is_file()


# --- names and paths -------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="cyto3"):
        find_model("cyt03")


def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserInputError, match="no network file"):
        find_model(str(tmp_path / "none.pt"))


def test_the_digest_covers_network_and_size_model(untrained, tmp_path):
    network = tmp_path / "net.pt"
    network.write_bytes(untrained.read_bytes())
    alone = find_model(str(network))
    plain = hashlib.sha256(network.read_bytes()).hexdigest()
    assert alone.size_model is None
    assert alone.sha256 == plain
    save_size_model(tmp_path / "net_size.npz", size_model())
    both = find_model(str(network))
    assert both.size_model == tmp_path / "net_size.npz"
    sized = hashlib.sha256(both.size_model.read_bytes()).hexdigest()
    assert both.sha256 == hashlib.sha256((plain + sized).encode()).hexdigest()


def test_a_published_network_that_cannot_be_fetched_is_explained(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(segmentation.urllib.request, "urlopen", offline)
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path / "cache"))
    with pytest.raises(UserInputError, match=r"put it at .*nucleitorch_0") as raised:
        find_model("nuclei")
    assert "no route to host" in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_published_network_is_found_where_cellpose_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    for name in segmentation.PUBLISHED_MODELS["cyto3"].files:
        (tmp_path / name).write_bytes(name.encode())
    files = find_model("cyto3")
    assert files.network == tmp_path / "cyto3"
    assert files.size_model == tmp_path / "size_cyto3.npy"


def test_a_published_network_is_fetched_once_and_known_by_its_bytes(tmp_path, monkeypatch):
    asked = []

    def online(url, **_):
        asked.append(url)
        return io.BytesIO(url.encode())

    monkeypatch.setattr(segmentation.urllib.request, "urlopen", online)
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    files = find_model("nuclei")
    again = find_model("nuclei")
    assert files == again
    assert [url.rpartition("/")[2] for url in asked] == ["nucleitorch_0", "size_nucleitorch_0.npy"]
    parts = [hashlib.sha256(url.encode()).hexdigest() for url in asked]
    assert files.sha256 == hashlib.sha256("".join(parts).encode()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nucleitorch_0",
        "size_nucleitorch_0.npy",
    ]


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, _size=-1):
            raise ConnectionResetError("connection reset")

    monkeypatch.setattr(segmentation.urllib.request, "urlopen", lambda *_, **__: Broken())
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    with pytest.raises(UserInputError, match="connection reset"):
        find_model("cyto")
    assert list(tmp_path.iterdir()) == []


# --- files and values that are refused ---------------------------------------------------------


def files_of(network, size=None):
    return ModelFiles("mine", network, size, "0" * 64)


@pytest.mark.parametrize("content", [b"", b"not a network", b"PK\x03\x04 half a zip file"])
def test_a_damaged_network_is_refused(tmp_path, content):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match="cannot be read as a network"):
        load_segmenter(files_of(path), diameter=20)


def test_a_truncated_network_is_refused(tmp_path, untrained):
    path = tmp_path / "short.pt"
    path.write_bytes(untrained.read_bytes()[:-2000])
    with pytest.raises(UserInputError, match="cannot be read as a network"):
        load_segmenter(files_of(path), diameter=20)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": torch.zeros(1)}, "not a standard Cellpose 3 network"),
        ({"W2": torch.zeros(1)}, "Cellpose 4"),
        ([1, 2], "cannot be read as a network"),
    ],
)
def test_a_foreign_network_is_refused(tmp_path, state, words):
    path = tmp_path / "foreign.pt"
    torch.save(state, path)
    with pytest.raises(UserInputError, match=words):
        load_segmenter(files_of(path), diameter=20)


def test_a_network_that_would_run_code_is_refused(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"a": Trap(trace)}, path)
    with pytest.raises(UserInputError, match="cannot be read as a network"):
        load_segmenter(files_of(path), diameter=20)
    assert not trace.exists()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_size_model_that_would_run_code_is_refused(tmp_path, untrained, wrapped):
    path, trace = tmp_path / "evil_size.npy", tmp_path / "trace"
    if wrapped:
        np.save(path, {"A": Trap(trace)}, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(UserInputError, match="not a Cellpose size model"):
        load_segmenter(files_of(untrained, path))
    assert not trace.exists()


def test_pickled_arrays_in_our_own_format_are_refused(tmp_path):
    path, trace = tmp_path / "evil_size.npz", tmp_path / "trace"
    np.savez(path, A=np.array(Trap(trace), object), smean=0, ymean=0, diam_mean=17)
    with pytest.raises(UserInputError, match="not a Cellpose size model"):
        segmentation.load_size_model(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_damaged_size_model_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match="not a Cellpose size model"):
        segmentation.load_size_model(path)


def test_without_size_model_a_diameter_is_asked_for(untrained):
    with pytest.raises(UserInputError, match="--diameter"):
        load_segmenter(files_of(untrained))


def test_an_impossible_diameter_is_refused():
    for diameter in (0, -3.0, float("nan"), float("inf")):
        with pytest.raises(UserInputError, match="--diameter must be"):
            SegmentParams(diameter=diameter)


def test_an_unknown_device_is_refused(untrained):
    with pytest.raises(UserInputError, match="auto, cpu or cuda"):
        load_segmenter(files_of(untrained), diameter=20, device="abacus")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((3, 8, 8)),
        np.zeros((1, 8, 8)),
        np.zeros((1, 8)),
        np.full((8, 8), np.nan),
        np.full((2, 8, 8), np.inf),
        np.zeros(5),
    ],
)
def test_unusable_pixels_are_refused(untrained, image):
    segmenter = load_segmenter(files_of(untrained), diameter=20, device="cpu")
    with pytest.raises(ImageError):
        segmenter.segment(image.astype(np.float32))


# --- the size model ----------------------------------------------------------------------------


def test_a_size_model_survives_storage(tmp_path):
    path = tmp_path / "size.npz"
    save_size_model(path, size_model())
    loaded = segmentation.load_size_model(path)
    np.testing.assert_array_equal(loaded.weights, size_model().weights)
    assert (loaded.offset, loaded.diam_mean) == (0.2, 17.0)


@pytest.mark.parametrize("number", [float, np.float32, np.float64])
def test_a_size_model_as_cellpose_writes_it_is_read(tmp_path, number):
    path = tmp_path / "size.npy"
    written = {
        "A": np.arange(256, dtype=np.float32),
        "smean": np.ones(256, np.float32),
        "ymean": number(0.5),
        "diam_mean": number(30.0),
    }
    np.save(path, written, allow_pickle=True)
    loaded = segmentation.load_size_model(path)
    np.testing.assert_array_equal(loaded.weights, written["A"])
    assert (loaded.offset, loaded.diam_mean) == (0.5, 30.0)
    # Cellpose: exp(A @ (style - smean) + log(diam_mean) + ymean)
    assert loaded.estimate(np.ones(256)) == pytest.approx(30 * np.exp(0.5))


def test_the_regression_recovers_a_law_it_can_express():
    rng = np.random.default_rng(0)
    styles, law = rng.normal(size=(600, 256)), rng.normal(size=256) / 30
    truth = 20 * np.exp(styles @ law)
    fitted = fit_size_model(styles, truth, diam_mean=17.0, ridge=1e-6)
    estimates = [fitted.estimate(style) for style in styles[:50]]
    np.testing.assert_allclose(estimates, truth[:50], rtol=1e-3)


def test_an_estimate_is_never_below_the_smallest_diameter():
    model = segmentation.SizeModel(np.full(256, -1.0), np.zeros(256), 0.0, 17.0)
    assert model.estimate(np.ones(256)) == segmentation.SMALLEST_DIAMETER


# --- training ----------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_few_steps_lower_the_loss_on_their_own_crops(demo_field):
    from cellpose.dynamics import masks_to_flows

    image, masks = (part[:64, :64] for part in demo_field)
    flows = masks_to_flows(masks.astype(np.int64), device=torch.device("cpu"))
    planes = np.stack([image / image.max(), np.zeros_like(image)]).astype(np.float32)
    target = np.concatenate([masks[None] > 0, flows]).astype(np.float32)
    batch = np.stack([planes] * 2), np.stack([target] * 2)
    net = new_network(0)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
    device = torch.device("cpu")
    losses = [finetuning.train_step(net, optimiser, batch, device) for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


# --- pictures ----------------------------------------------------------------------------------


def test_outlines_of_a_square_and_its_neighbour():
    masks = np.zeros((6, 8), np.uint16)
    masks[1:5, 1:4], masks[1:5, 4:7] = 1, 2
    expected = masks > 0
    expected[2:4, 2] = expected[2:4, 5] = False
    np.testing.assert_array_equal(outlines(masks), expected)


def test_a_cell_that_fills_the_image_has_no_outline():
    assert not outlines(np.ones((4, 4), np.uint16)).any()


def test_the_overlay_is_grey_but_for_the_outlines():
    image, masks = np.arange(64.0).reshape(8, 8), np.zeros((8, 8), np.uint16)
    masks[2:6, 2:6] = 1
    picture = outline_overlay(image, masks)
    assert picture.shape == (8, 8, 3)
    assert picture.dtype == np.uint8
    edge = outlines(masks)
    assert (picture[edge] == OUTLINE_COLOUR).all()
    assert (np.ptp(picture[~edge], axis=-1) == 0).all()


def test_a_caption_stands_above_its_picture():
    picture = np.full((5, 200, 3), 7, np.uint8)
    whole = captioned(picture, "P1/a: 3 cells")
    np.testing.assert_array_equal(whole[CAPTION_HEIGHT:], picture)
    assert whole.shape == (CAPTION_HEIGHT + 5, 200, 3)
    assert whole[:CAPTION_HEIGHT].max() > 200
    assert (whole[:CAPTION_HEIGHT] != captioned(picture, "P1/b: 4 cells")[:CAPTION_HEIGHT]).any()


def test_a_picture_survives_as_a_file():
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(imagecodecs.png_decode(png(picture)), picture)


def test_the_network_loader_is_the_one_cellpose_offers(untrained):
    from cellpose.models import CellposeModel

    ours = segmentation.load_network(untrained, "cpu")
    theirs = CellposeModel(pretrained_model=str(untrained), device=torch.device("cpu"))
    assert ours.diam_mean == theirs.diam_mean == DIAM_MEAN
    for one, other in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        assert torch.equal(one, other)
