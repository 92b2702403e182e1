"""Published networks that embed crops: opened from files, shown what they were trained on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vit import save_dinov2
from torch import nn

from cellstore.errors import ImageError, UnknownNameError, UserInputError
from cellstore.learn import embedders
from cellstore.learn.embedders import KNOWN, SubCell, open_embedder

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def crops(channels: int = 2, size: int = 28) -> torch.Tensor:
    return 2 * torch.rand((3, channels, size, size), generator=torch.manual_seed(0)) - 1


def test_each_channel_is_shown_as_a_grey_picture(tmp_path: Path) -> None:
    net = save_dinov2(tmp_path / "tiny-vit")
    images = crops()
    embedder = open_embedder(str(tmp_path / "tiny-vit"))
    with torch.inference_mode():
        found = embedder(images)
        parts = []
        for channel in range(2):
            grey = (images[:, channel] / 2 + 0.5)[:, None].expand(-1, 3, -1, -1)
            mean, std = (
                torch.tensor(v)[:, None, None] for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
            )
            parts.append(net(pixel_values=(grey - mean) / std).last_hidden_state[:, 0])
    torch.testing.assert_close(found, torch.cat(parts, dim=1))
    digest = embedder.identity.pop("sha256")
    assert digest == embedders.sha256_of(tmp_path / "tiny-vit" / "model.safetensors")
    assert embedder.identity == {
        "model": "folder tiny-vit",
        "revision": None,
        "config": embedders.sha256_of(tmp_path / "tiny-vit" / "config.json"),
        "mode": "channels",
        "input_size": 28,
        "licence": "not known",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
    }
    # Crops of another size are resized; what is brighter than white is white.
    with torch.inference_mode():
        assert embedder(crops(size=50)).shape == (3, 32)
        torch.testing.assert_close(embedder(images + 4), embedder(torch.ones_like(images)))


def test_three_channels_may_be_the_colours(tmp_path: Path) -> None:
    net = save_dinov2(tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images = crops(3)
    embedder = open_embedder(str(tmp_path / "model.safetensors"), "rgb")
    with torch.inference_mode():
        expected = net(pixel_values=images).last_hidden_state[:, 0]
        torch.testing.assert_close(embedder(images), expected)
        larger = open_embedder(str(tmp_path), "rgb", size=56)
        assert larger(images).shape == (3, 16)
    with pytest.raises(ImageError, match=r"reads 3 channels with --mode rgb, and these are 2"):
        embedder(crops(2))
    with pytest.raises(UnknownNameError, match="Unknown mode 'colour'"):
        open_embedder(str(tmp_path), "colour")
    with pytest.raises(UserInputError, match=r"cannot read crops of 9 pixels.*--crop"):
        open_embedder(str(tmp_path), size=9)


def test_a_network_of_timm_is_opened_by_its_name_or_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = timm.create_model("test_vit", num_classes=10).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    named = open_embedder("timm:test_vit", weights=tmp_path / "model.safetensors")
    assert named.identity["licence"] == "apache-2.0"
    described = {"architecture": "test_vit", "pretrained_cfg": named.net[0].pretrained_cfg}
    described["model_args"] = {"checkpoint_path": "evil.pth", "in_chans": 9}
    (tmp_path / "config.json").write_text(json.dumps(described))
    folder = open_embedder(str(tmp_path))
    images = crops(1, 160)
    with torch.inference_mode():
        grey = images.expand(-1, 3, -1, -1)  # it was trained on -1 to 1
        expected = net.forward_head(net.forward_features(grey), pre_logits=True)
        for one in (named, folder):
            torch.testing.assert_close(one(images), expected)
    assert folder.identity["sha256"] == named.identity["sha256"]
    with pytest.raises(UserInputError, match="not the weights of timm's test_efficientnet"):
        open_embedder("timm:test_efficientnet", weights=tmp_path / "model.safetensors")
    with pytest.raises(UnknownNameError, match=r"'test_vitt'.*Did you mean test_vit"):
        open_embedder("timm:test_vitt")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserInputError, match=r"not those of the network that config\.json"):
        open_embedder(str(tmp_path))


def test_a_repository_of_the_hub_is_pinned_to_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models--lab--vit"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    save_dinov2(folder / "snapshots" / COMMIT)
    latest = open_embedder("hf:lab/vit")
    pinned = open_embedder(f"hf:lab/vit@{COMMIT}")
    assert latest.identity["revision"] == pinned.identity["revision"] == COMMIT
    with torch.inference_mode():
        assert torch.equal(latest(crops(1)), pinned(crops(1)))
    with pytest.raises(UserInputError, match=r"lab/other could not be fetched.*hf download lab/o"):
        open_embedder("hf:lab/other")
    told = r"facebook/dinov2-small could not be fetched.*--revision ed25f3a.*--model DIR"
    with pytest.raises(UserInputError, match=told):
        open_embedder("dinov2-small")
    with pytest.raises(UserInputError, match=r"timm/test_vit.r160_in1k could not be fetched"):
        open_embedder("timm:test_vit")
    with pytest.raises(UserInputError, match="Write hf:OWNER/NAME"):
        open_embedder("hf:../etc")
    with pytest.raises(UnknownNameError, match=r"'dinov2-smal'.*Did you mean dinov2-small"):
        open_embedder("dinov2-smal")


def test_files_that_may_hold_code_are_not_opened(tmp_path: Path) -> None:
    save_dinov2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "kept.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UserInputError, match="may hold code and are not opened"):
            open_embedder(str(path))
    (tmp_path / "kept.safetensors").rename(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    # A class that the folder brings along is never looked up.
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    open_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "MAE"}))
    with pytest.raises(UserInputError, match=r"type 'MAE', and cellstore does not know.*dinov2"):
        open_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UserInputError, match="not those of the network"):
        open_embedder(str(tmp_path))
    for hostile in ("[" * 100_000, json.dumps({"architecture": "test_vit", "model_args": [1]})):
        (tmp_path / "config.json").write_text(hostile)
        with pytest.raises(
            UserInputError, match=r"is no JSON|not as timm or transformers write it"
        ):
            open_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserInputError, match="is no JSON"):
        open_embedder(str(tmp_path))


SUBCELL_NAMES = {
    "layers.": "layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""What transformers 5 calls the layers of a vision transformer, and the files of SubCell."""


def small(net: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in net.state_dict().items()
    }


def shorten(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """The vision transformers of timm; that of this name has two layers, to be quick."""
    vit = timm.models.vision_transformer
    monkeypatch.setattr(vit, name, partial(getattr(vit, name), depth=2))
    return vit


def test_openphenom_reads_any_number_of_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its authors compute it: all channels in one row, and the mean of all patches."""
    vit = shorten(monkeypatch, "vit_small_patch16_224")
    plain = vit.vit_small_patch16_224(
        img_size=256, in_chans=1, num_classes=0, global_pool="avg", init_values=1e-4,
        block_fn=vit.ParallelScalingBlock, qkv_bias=False, qk_norm=True,
    ).eval()  # fmt: skip
    plain.load_state_dict(small(plain))
    state = {f"encoder.vit_backbone.{k}": v for k, v in plain.state_dict().items()}
    positions = plain.pos_embed[:, 1:].repeat(1, 11, 1)
    state["encoder.vit_backbone.pos_embed"] = torch.cat([plain.pos_embed[:, :1], positions], 1)
    state["decoder.mask_token"] = torch.zeros(1)
    # Its file has the name of a safetensors file, and is one of torch.
    path = tmp_path / "model.safetensors"
    torch.save({"state_dict": {k: v.detach() for k, v in state.items()}}, path)
    embedder = open_embedder("openphenom", weights=path)
    assert embedder.identity["mode"] == "native"
    assert "no commercial use" in embedder.identity["licence"]
    one = crops(1, 256)
    with torch.inference_mode():
        # Of one channel, and of twice the same, it is the plain vision transformer.
        normal = torch.nn.InstanceNorm2d(1)(one / 2 + 0.5)
        expected = plain.forward_features(normal)[:, 1:].mean(dim=1)
        torch.testing.assert_close(embedder(one), expected)
        both = embedder(one.expand(-1, 2, -1, -1))
        assert both.shape == (3, 384)
        apart = open_embedder("openphenom", "channels", weights=path)
        torch.testing.assert_close(apart(one.expand(-1, 2, -1, -1)), expected.repeat(1, 2))
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(UserInputError, match="does not hold the weights of openphenom"):
        open_embedder("openphenom", weights=path)


def test_cell_dino_and_subcell_are_built_from_the_files_of_their_authors(tmp_path: Path) -> None:
    net = timm.create_model(
        "vit_small_patch14_dinov2", patch_size=8, img_size=128, in_chans=5, num_classes=0
    )
    state = small(net)
    # In their files, blocks lie in four parts.
    named = {
        k.replace(f"blocks.{k.split('.')[1]}.", f"blocks.{int(k.split('.')[1]) // 3}."
                  f"{k.split('.')[1]}.", 1) if k.startswith("blocks.") else k: v
        for k, v in state.items()
    }  # fmt: skip
    torch.save(named | {"mask_token": torch.zeros(1, 384)}, tmp_path / "cell.pth")
    embedder = open_embedder("cell-dino-painting", weights=tmp_path / "cell.pth")
    net.load_state_dict(state)
    images = crops(5, 128)
    spread = images.std((2, 3), unbiased=False, keepdim=True)
    with torch.inference_mode():
        expected = net.eval()((images - images.mean((2, 3), keepdim=True)) / spread)
        torch.testing.assert_close(embedder(images), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ImageError, match=r"reads 5 channels with --mode native, and these are 4"):
        embedder(images[:, :4])
    with pytest.raises(UserInputError, match=r"reads 5 channels at once\. Use --mode native"):
        open_embedder("cell-dino-painting", "channels", tmp_path / "cell.pth")
    with pytest.raises(UserInputError, match=r"cannot be fetched by a program.*ai\.meta\.com"):
        open_embedder("cell-dino")
    with pytest.raises(UserInputError, match=r"czi-subcell-public.*--weights FILE"):
        open_embedder("subcell")
    with pytest.raises(UserInputError, match=r"does not hold the weights of subcell"):
        open_embedder("subcell", weights=tmp_path / "cell.pth")


def test_subcell_pools_the_tokens_of_a_vision_transformer_by_gated_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, "vit_base_patch16_224")
    torch.manual_seed(4)
    config = transformers.ViTConfig(
        layer_norm_eps=1e-12, image_size=448, patch_size=16, num_channels=2, num_hidden_layers=2
    )
    net = transformers.ViTModel(config, add_pooling_layer=False).eval()
    state = {}
    for name, value in small(net).items():
        for new, old in SUBCELL_NAMES.items():
            name = name.replace(new, old)
        state[f"encoder.{'encoder.' if name.startswith('layer.') else ''}{name}"] = value
    net.load_state_dict(small(net))
    parts = {name: nn.Linear(768, 512) for name in ("attention_v.1", "attention_u.1")}
    parts["attention"] = nn.Linear(512, 2)
    for name, layer in parts.items():
        state |= {f"pool_model.{name}.{k}": v for k, v in layer.state_dict().items()}
    images = torch.rand((1, 2, 448, 448))
    with torch.inference_mode():
        tokens = net(pixel_values=images).last_hidden_state
        v, u, attention = (
            layer(tokens) if k != "attention" else layer for k, layer in parts.items()
        )
        weights = attention(torch.tanh(v) * nn.functional.gelu(u))[0].softmax(dim=0)
        expected = torch.cat([weights[:, head] @ tokens[0] for head in range(2)])
        torch.testing.assert_close(SubCell(2, state).eval()(images)[0], expected)


def test_the_table_of_networks_is_whole() -> None:
    for name, known in KNOWN.items():
        assert known.licence, name
        assert known.mode in embedders.MODES, name
        if known.source.startswith("hf:"):
            assert known.revision is not None, name
            assert len(known.revision) == 40, name
        else:
            assert known.make is not None, name
        assert embedders.licence_of(name) == known.licence
    assert embedders.licence_of("timm:test_vit") == "apache-2.0"
    for model, name in (
        ("dinov2-small", "dinov2_small"),
        ("timm:vit_small_patch16_224.dino", "vit_small_patch16_224_dino"),
        (f"hf:Lab/Big-ViT@{COMMIT}", "big_vit"),
        ("models/my vit/", "my_vit"),
    ):
        assert embedders.name_of(model) == name
