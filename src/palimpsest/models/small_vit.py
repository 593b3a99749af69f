"""Vision transformers: small ones with random weights, published ones by Hub name or from a folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import (
    InvalidHyperparameter,
    MissingDependency,
    ModelMismatch,
    PickleRefused,
    UnknownName,
    UnreadableCheckpoint,
)
from palimpsest.models.registry import model
from palimpsest.parts.reinitialise import starting

if TYPE_CHECKING:
    from transformers import ViTModel

Spread = tuple[float, ...]


class VisionTransformer(nn.Module):
    """An encoder of images and a new linear head on the class token (or on what a timm network pools).

    Args:
        encoder: Maps images to an object with `last_hidden_state` [batch, tokens, width], or to [batch, width].
        width: Of the features.
        classes: Number of logits.
        size: (height, width) of the images that the encoder takes; others are resized to it.
        channels: That the encoder takes. Grey images are repeated where it takes more.
        mean: Subtracted from every channel.
        deviation: Divided by, after that.

    Attributes:
        head: The last layer, which can grow or be replaced.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        classes: int,
        size: tuple[int, int],
        channels: int,
        mean: Spread = (0.0,),
        deviation: Spread = (1.0,),
    ):
        super().__init__()
        self.encoder = encoder
        self.size, self.channels, self.mean, self.deviation = size, channels, mean, deviation
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.features(x))

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """What the head is given."""
        found = self.encoder(self.prepared(x))
        return found if isinstance(found, Tensor) else found.last_hidden_state[:, 0]

    def prepared(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Images as the encoder takes them.

        Raises:
            ModelMismatch: For images with another number of channels, unless they are grey.
        """
        if x.dim() != 4 or x.shape[1] not in (1, self.channels):
            raise ModelMismatch(
                f"The vision transformer takes images [batch, {self.channels}, height, width] or grey ones, "
                f"not {tuple(x.shape)}."
            )
        if tuple(x.shape[2:]) != tuple(self.size):
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        if x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        if self.mean == (0.0,) and self.deviation == (1.0,):
            return x
        return (x - x.new_tensor(self.mean)[:, None, None]) / x.new_tensor(self.deviation)[:, None, None]


@model("small_vit")
def small_vit(
    input_shape: tuple[int, ...],
    classes: int,
    width: int = 32,
    layers: int = 2,
    heads: int = 2,
    patch: int | None = None,
    hidden: int | None = None,
    dropout: float = 0.0,
) -> VisionTransformer:
    """The ViT of transformers in any size, with random weights from torch's global random state.

    Query, key and value are linear layers of their own in every block. An image whose sides the patch does
    not divide is resized to the next larger ones that it does.

    Args:
        input_shape: (channels, height, width).
        classes: Number of logits.
        width: Of the residual stream.
        layers: Blocks.
        heads: Of the attention; they divide the width.
        patch: Side of a patch in pixels; by default about a quarter of the shorter side, for 16 tokens.
        hidden: Units of every MLP; four times the width by default.
        dropout: In embeddings, MLPs and attention.

    Raises:
        MissingDependency: If transformers is not installed.
        InvalidHyperparameter: If a size is not positive, the heads do not divide the width, or a patch is
            larger than the image.
        ModelMismatch: If the inputs are no images.
    """
    channels, height, breadth = image_shape(input_shape)
    patch = max(1, min(height, breadth) // 4) if patch is None else patch
    hidden = 4 * width if hidden is None else hidden
    sizes = {"width": width, "layers": layers, "heads": heads, "patch": patch, "hidden": hidden}
    for name, size in sizes.items():
        if size < 1:
            raise InvalidHyperparameter(f"{name} must be at least 1, not {size}.")
    if width % heads:
        raise InvalidHyperparameter(f"A width of {width} does not divide into {heads} heads.")
    if patch > min(height, breadth):
        raise InvalidHyperparameter(f"A patch of {patch} does not fit an image of {height} x {breadth}.")
    if not 0 <= dropout < 1:
        raise InvalidHyperparameter(f"dropout must lie in [0, 1), not {dropout}.")
    try:
        from transformers import ViTConfig, ViTModel
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    size = (-(-height // patch) * patch, -(-breadth // patch) * patch)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        image_size=size,  # pyright: ignore[reportArgumentType]
        patch_size=patch,
        num_channels=channels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue] # per-sample gradients by vmap need it
    )
    encoder = ViTModel(config, add_pooling_layer=False)
    return VisionTransformer(encoder, width, classes, size, channels)


@model("published_vit")
def published_vit(
    input_shape: tuple[int, ...],
    classes: int,
    place: str = "google/vit-base-patch16-224-in21k",
    revision: str | None = None,
    **settings: Any,
) -> VisionTransformer:
    """A vision transformer with published weights and a new head.

    Images are resized to what the network was trained with, and shifted and scaled as its preprocessor (in
    timm its data configuration) says, for inputs in [0, 1].

    Args:
        input_shape: (channels, height, width) of the data.
        classes: Number of logits.
        place: Name on the Hub, or folder, of a ViT of transformers; or "timm:vit_tiny_patch16_224".
        revision: Of the Hub.
        **settings: Of `timm.create_model` (`img_size`, `pretrained=False`, ...).

    Raises:
        MissingDependency: Without transformers, or timm where it is asked for.
        UnreadableCheckpoint: If there are no such weights.
        PickleRefused: If they are a pickle.
        ModelMismatch: If the weights are no ViT, or a channel does not fit.
    """
    channels, _, _ = image_shape(input_shape)
    source, _, name = place.partition(":")
    if source == "timm" and name:
        found = _of_timm(name, classes, settings)
    elif settings:
        raise InvalidHyperparameter(
            f"A ViT of transformers takes no settings, not {', '.join(settings)}: its folder says its size."
        )
    else:
        found = _of_transformers(place, classes, revision)
    if channels not in (1, found.channels):
        raise ModelMismatch(f"'{place}' takes images of {found.channels} channels, the data have {channels}.")
    if settings.get("pretrained", True):
        starting(
            found, partial(published_vit, input_shape, classes, place=place, revision=revision, **settings)
        )
    return found


def image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width).

    Raises:
        ModelMismatch: If it is something else.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ModelMismatch(
            f"A vision transformer takes images of shape (channels, height, width), not {input_shape}."
        )
    channels, height, breadth = input_shape
    return channels, height, breadth


def _of_transformers(place: str, classes: int, revision: str | None) -> VisionTransformer:
    try:
        from transformers import AutoConfig, ViTModel
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    folder = Path(place)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickles = [item.name for item in folder.iterdir() if item.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise PickleRefused(
                f"{place} holds its weights as a pickle ({pickles[0]}), which can run any code when it is "
                "loaded: convert it to safetensors."
            )
    told: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        config = AutoConfig.from_pretrained(place, **told)
        if config.model_type != "vit":
            raise ModelMismatch(
                f"'{place}' is a {config.model_type}, not a ViT; for other vision transformers name one of "
                "timm's (timm:...)."
            )
        encoder: ViTModel = ViTModel.from_pretrained(
            place,
            config=config,
            **told,
            add_pooling_layer=False,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise UnreadableCheckpoint(f"Cannot load a vision transformer from '{place}': {problem}") from problem
    size = config.image_size
    height, breadth = (size, size) if isinstance(size, int) else size
    mean, deviation = _preprocessing(place, revision)
    return VisionTransformer(
        encoder, config.hidden_size, classes, (height, breadth), config.num_channels, mean, deviation
    )


def _preprocessing(place: str, revision: str | None) -> tuple[Spread, Spread]:
    """Mean and deviation of the inputs; without a preprocessor they are taken as they are."""
    from transformers.utils.hub import cached_file

    file = cached_file(
        place,
        "preprocessor_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return (0.0,), (1.0,)
    told = json.loads(Path(file).read_text())
    if not told.get("do_normalize", True) or "image_mean" not in told:
        return (0.0,), (1.0,)
    return tuple(told["image_mean"]), tuple(told["image_std"])


def _of_timm(name: str, classes: int, settings: dict[str, Any]) -> VisionTransformer:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as missing:
        raise MissingDependency("timm", "vision") from missing
    if name.partition(".")[0] not in timm.list_models():
        raise UnknownName("timm model", name, timm.list_models())
    try:
        encoder = timm.create_model(name, **{"pretrained": True, **settings, "num_classes": 0})
    except (OSError, RuntimeError) as problem:
        raise UnreadableCheckpoint(f"Cannot load timm's '{name}': {problem}") from problem
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.Module) or not all(
        hasattr(getattr(block, "attn", None), "qkv") for block in blocks.children()
    ):
        raise ModelMismatch(
            f"timm's '{name}' is no plain vision transformer: its blocks have no attention `attn.qkv`."
        )
    told = resolve_model_data_config(encoder)
    channels, height, breadth = told["input_size"]
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None) or (height, breadth)
    return VisionTransformer(
        encoder,
        int(encoder.num_features),  # pyright: ignore[reportArgumentType]
        classes,
        (int(size[0]), int(size[1])),  # pyright: ignore[reportArgumentType, reportIndexIssue]
        channels,
        tuple(told["mean"]),
        tuple(told["std"]),
    )
