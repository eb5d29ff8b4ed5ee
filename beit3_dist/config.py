"""The one description of a run: nested, typed, validated.

`RunConfig` is what a recipe in `launchers/recipes/` fills in and what the command line overrides with dotted
names (`--optim.lr 5e-4`). Every default is the BEiT-3 paper's value unless its docstring says otherwise; where the
paper is silent the docstring says so and names the practice that was followed. A combination that cannot run raises
`ValueError` with one line that names the field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from os.path import expanduser
from typing import Any, Literal, cast

from jsonargparse.typing import register_type

MOST_LAYERS = 10_000
"""Each is a module; the deepest Transformers have 1,000."""
SPECIAL_ROWS = 10
"""Rows of the word embedding beyond the SentencePiece pieces: 64,000 pieces give the released 64,010 rows
(pieces are shifted by one, <mask> follows them, eight rows are spare)."""

Recompute = Literal["none", "attention", "selective", "full"]
"""What activation checkpointing recomputes in a block."""
Sharing = Literal["shared", "per_modality"]
"""Whether vision and language tokens pass the same weights, or each their own."""


class Auto(int):
    """What a field is until the planner has found its number (plan/auto.py)."""

    def __new__(cls) -> Auto:
        return super().__new__(cls, -1)

    def __repr__(self) -> str:
        return "auto"


AUTO = Auto()


def is_auto(value: int) -> bool:
    """Whether the planner is to find this number."""
    return isinstance(value, Auto)


class _Planned(int):
    """Names the kind of a field that holds a whole number, or AUTO."""


def _planned(value: Any) -> int:
    if value == "auto":
        return AUTO
    if isinstance(value, str) and value.removeprefix("-").isdecimal():  # as a command line gives it
        return int(value)
    raise ValueError(f"{value!r} is neither a whole number nor auto")


register_type(
    _Planned,
    serializer=lambda value: "auto" if is_auto(value) else int(value),
    deserializer=_planned,
    type_check=lambda value, _: isinstance(value, int) and not isinstance(value, bool),
)
Planned = int
"""A whole number, or the word auto."""
globals()["Planned"] = _Planned  # for parsers, which read annotations; for type checkers it is an int


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def expand_home(config: object, *names: str) -> None:
    """Writes out a leading ~ of these fields, each a path or a list of paths: in a recipe no shell does it."""
    for name in names:
        value = getattr(config, name)
        setattr(config, name, list(map(expanduser, value)) if isinstance(value, list) else expanduser(value))


def require_positive(section: str, config: object, *names: str) -> None:
    """Raises ValueError for the first of these fields of a section (`model.`) that is not above 0."""
    for name in names:
        require(getattr(config, name) > 0, f"{section}{name} must be positive, not {getattr(config, name)}")


def require_not_negative(section: str, config: object, *names: str) -> None:
    """The same for fields that are below 0."""
    for name in names:
        require(getattr(config, name) >= 0, f"{section}{name}={getattr(config, name)} is negative")


def require_within(interval: str, section: str, config: object, *names: str) -> None:
    """The same for fields outside of an interval, such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(config, name)
        inside = low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"
        require(inside, f"{section}{name}={value} is not in {interval}")


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raises ValueError unless `divisor` divides `value`, naming both fields."""
    require(divisor > 0 and value % divisor == 0, f"{name}={value} is not divisible by {divisor_name}={divisor}")


_ABOVE_VISION = (
    "fusion_layers", "connected_every", "language_layers", "decoder_layers", "vision_layers", "vision_width",
    "vision_heads",
)  # fmt: skip
"""Fields of ModelConfig that are 0 where pairs attend jointly in all layers."""


@dataclass(kw_only=True)
class ModelConfig:
    """The Multiway Transformer. The defaults are the paper's giant."""

    layers: int = 40
    """Transformer blocks."""
    width: int = 1408
    """Hidden size D."""
    heads: int = 16
    """Attention heads; must divide the width."""
    ffn_width: int = 6144
    """Hidden size F of every expert's feed-forward network."""
    patch_size: int = 14
    """Side of a patch in pixels; must divide image_size."""
    image_size: int = 224
    """Side of the square input image in pixels."""
    attention: Sharing = "shared"
    """shared: one set of attention projections and norms for all tokens (the paper). per_modality: one set for vision
    tokens and one for language tokens, including the final norm (the released base and large models)."""
    ffn: Sharing = "per_modality"
    """per_modality: a feed-forward network for vision tokens and one for language tokens, the experts (BEiT-3, VLMo).
    shared: one for all tokens, which makes a single tower with shared attention (ViLT, ViT-BERT); there are no experts
    then, and vl_expert_layers is 0."""
    sub_layernorm: bool = False
    """An extra LayerNorm before attention's output projection and before the second FFN matrix (the released ones)."""
    vl_expert_layers: int = 3
    """Top layers with a vision-language expert that takes both sides of a pair (paper: 3; released models: 0)."""
    fusion_layers: int = 0
    """Top layers in which a pair's words look at its image, which rests, by cross-attention (ALBEF, mPLUG); below them
    images and words are encoded alone. Needs attention and ffn per_modality. 0: there are none, and pairs attend
    jointly in all layers (BEiT-3)."""
    connected_every: int = 0
    """After so many fusion layers one is connected: image and words of a pair attend jointly by weights in common, and
    what the image was is added to what it becomes (mPLUG's skip connection). It counts as one of them. 0: none is."""
    language_layers: int = 0
    """Of the layers below fusion, the upper ones that words pass, too; in the others images alone are encoded (ALBEF: 6
    of 12). 0: all of them."""
    decoder_layers: int = 0
    """Layers of a decoder above fusion, which writes the words after a prefix while it looks at the fused image and
    prefix by cross-attention (mPLUG: 12). It has no stochastic depth. 0: there is none."""
    vision_layers: int = 0
    """Layers of an image encoder of its own width below a model with fusion_layers, whose layers below fusion are those
    of words alone then (mPLUG large: 24). It has no stochastic depth. 0: images pass the layers below fusion."""
    vision_width: int = 0
    """Hidden size of that image encoder; its feed-forward networks are as much wider than the others."""
    vision_heads: int = 0
    """Attention heads of that image encoder; must divide its width."""
    word_norm: bool = False
    """A LayerNorm of words behind their vectors and positions (BERT, VLMo)."""
    post_norm: bool = False
    """In a model with fusion_layers, whether layers of words, fusion layers and decoder have their norms behind each
    residual connection, so that words have no final norm (BERT; ALBEF, mPLUG). Needs word_norm. Images have theirs
    before what is added."""
    vocab_size: int = 64010
    """Rows of the word embedding and of the text head: SentencePiece pieces + 10."""
    visual_vocab_size: int = 8192
    """Codes of the image tokenizer: rows of the image head."""
    max_text_length: int = 1022
    """Longest text in tokens, <s> and </s> included. The position table has two more rows: positions start at 2."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0 at the first. Per sample, for both branches."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""

    @property
    def lower_layers(self) -> int:
        """Layers below fusion."""
        return self.layers - self.fusion_layers

    @property
    def of_vision(self) -> ModelConfig:
        """The image encoder of its own width."""
        return replace(
            self,
            layers=self.vision_layers,
            width=self.vision_width,
            heads=self.vision_heads,
            ffn_width=self.ffn_width * self.vision_width // self.width,
            post_norm=False,
            **cast(Any, dict.fromkeys(_ABOVE_VISION, 0)),
        )

    @property
    def patches(self) -> int:
        """Patches of one image, CLS not counted."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        sizes = ("layers", "width", "heads", "ffn_width", "patch_size", "image_size", "vocab_size", "visual_vocab_size")
        require_positive("model.", self, *sizes, "layer_norm_eps")
        require(self.layers <= MOST_LAYERS, f"model.layers={self.layers} modules to build: give {MOST_LAYERS} or fewer")
        require_divides("model.heads", self.heads, "model.width", self.width)
        require_divides("model.patch_size", self.patch_size, "model.image_size", self.image_size)
        require(
            0 <= self.vl_expert_layers <= self.layers,
            f"model.vl_expert_layers={self.vl_expert_layers} is not between 0 and model.layers={self.layers}",
        )
        require(
            self.ffn == "per_modality" or self.vl_expert_layers == 0,
            f"model.vl_expert_layers={self.vl_expert_layers}: with model.ffn=shared there are no experts: use 0",
        )
        require_not_negative("model.", self, *_ABOVE_VISION)
        require(
            self.fusion_layers == 0
            or (self.attention == self.ffn == "per_modality" and self.vl_expert_layers == 0 < self.lower_layers),
            f"model.fusion_layers={self.fusion_layers} stand above two encoders: use model.attention=per_modality, "
            "model.ffn=per_modality, model.vl_expert_layers=0 and more model.layers",
        )
        require(
            max(self.connected_every, self.language_layers) == 0 or self.fusion_layers > 0,
            "model.connected_every and model.language_layers are of a model with model.fusion_layers",
        )
        require(
            max(self.decoder_layers, self.vision_layers) == 0 or self.fusion_layers > 0,
            "model.decoder_layers and model.vision_layers are of a model with model.fusion_layers",
        )
        self._check_vision()
        require(
            not self.post_norm or (self.fusion_layers > 0 and self.word_norm and not self.sub_layernorm),
            "model.post_norm is of a model with model.fusion_layers and model.word_norm, without model.sub_layernorm",
        )
        require(
            self.language_layers <= self.lower_layers,
            f"model.language_layers={self.language_layers} exceeds the {self.lower_layers} layers below fusion",
        )
        require_within("[0, 1)", "model.", self, "drop_path")
        require(
            self.max_text_length >= 3,
            f"model.max_text_length={self.max_text_length}: a text needs at least <s>, a word and </s>",
        )
        require(
            self.vocab_size > SPECIAL_ROWS,
            f"model.vocab_size={self.vocab_size} leaves no room for words beside {SPECIAL_ROWS} special rows",
        )

    def _check_vision(self) -> None:
        name = f"model.vision_layers={self.vision_layers}"
        if self.vision_layers == 0:
            both = max(self.vision_width, self.vision_heads)
            require(both == 0, f"model.vision_width and model.vision_heads are of an image encoder, but {name}")
            return
        require_positive("model.", self, "vision_width", "vision_heads")
        require_divides("model.vision_heads", self.vision_heads, "model.vision_width", self.vision_width)
        require(
            self.language_layers == 0,
            f"model.language_layers={self.language_layers}: with {name} words pass all layers below fusion: use 0",
        )


@dataclass(kw_only=True)
class Source:
    """One of several sources of a stream."""

    shards: str
    """Brace or glob pattern of tars."""
    weight: float | Literal["samples"] = 1.0
    """Share of the stream's samples, relative to the other sources' weights; samples: as many as it holds."""
    name: str = ""
    """Of a data set: its losses and samples are told apart in records, as loss_image.NAME and images.NAME."""

    def __post_init__(self) -> None:
        fine = self.weight == "samples" or 0 < self.weight < float("inf")
        require(fine, f"the weight of source {self.shards!r} must be positive, not {self.weight}")
        require(
            re.fullmatch(r"[A-Za-z0-9_-]*", self.name) is not None,
            f"the name {self.name!r} of source {self.shards!r} has other characters than letters, digits, _ and -",
        )


MOST_STEPS = 10**11
"""Of a run; times and counts of more have no place in their types."""
MOST_SAMPLES = 1 << 24
"""Of a stream in a step; a rank lists those of its share."""
STREAMS = ("images", "texts", "pairs")
"""The streams of pretraining."""
Patterns = str | list[str | Source]
"""One pattern of tars, several that are one source together, or weighted sources."""


@dataclass(kw_only=True)
class CaptionField:
    """One of several fields with captions."""

    field: str
    """Its name in the .json member."""
    weight: float = 1.0
    """Share of the draws, relative to the weights of the other fields that the sample has."""

    def __post_init__(self) -> None:
        fine = 0 < self.weight < float("inf")
        require(fine, f"the weight of caption field {self.field!r} must be positive, not {self.weight}")


CaptionKey = str | list[str | CaptionField]
"""One field with captions, or several, with or without weights."""


def caption_fields(key: CaptionKey, name: str) -> list[CaptionField]:
    """The fields that the field `name` names. Raises ValueError where its list is empty or has one twice."""
    listed = [key] if isinstance(key, str) else key
    fields = [CaptionField(field=field) if isinstance(field, str) else field for field in listed]
    names = [field.field for field in fields]
    require(bool(names), f"{name}: the list of fields is empty")
    require(len(set(names)) == len(names), f"{name} names a field twice: {', '.join(names)}")
    return fields


def sources_of(shards: Patterns, field: str) -> list[Source]:
    """The sources that `field` names. Raises ValueError where its list is empty or of two kinds."""
    if isinstance(shards, str):
        return [Source(shards=shards)]
    sources = [source for source in shards if isinstance(source, Source)]
    patterns = [pattern for pattern in shards if isinstance(pattern, str)]
    require(bool(shards), f"{field}: the list of sources is empty")
    require(
        not sources or not patterns,
        f"{field} lists patterns ({', '.join(patterns)}) beside sources with weights: write all of them as "
        "{shards: PATTERN, weight: NUMBER}",
    )
    if not patterns:
        names = [source.name for source in sources if source.name]
        require(len({*names}) == len(names), f"{field} has one name twice: {', '.join(names)}")
        require(
            not names or len(names) == len(sources),
            f"{field} names some of its sources ({', '.join(names)}), but not all: give each a name, or none",
        )
        return sources
    for pattern in patterns:
        require(
            ":" not in pattern.partition("/")[0],
            f"{field} lists {pattern!r}: commands and addresses are sources of their own, {{shards: {pattern!r}}}",
        )
    # A comma parts the alternatives of braces.
    joined = ",".join(expanduser(p) if "{" in p else expanduser(p).replace(",", r"\,") for p in patterns)
    return [Source(shards=f"{{{joined}}}" if len(patterns) > 1 else patterns[0])]


@dataclass(kw_only=True)
class TemperatureConfig:
    """What makes the shares of a stream's sources more alike: each is proportional to weight^(1 / temperature). With
    `weight: samples` 1 draws all samples alike, 2 or 3 brings small data sets forward (as mT5 does languages, where it
    is 3.3), and a large one draws all sets alike."""

    images: float = 1.0
    """Of data.images, and of eval.images."""
    texts: float = 1.0
    """Of the texts."""
    pairs: float = 1.0
    """Of the pairs."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            fine = 0.1 <= value < float("inf")
            require(fine, f"data.temperature.{name}={value} is less than 0.1, or no number")


@dataclass(kw_only=True)
class LoadingConfig:
    """How samples are loaded, whatever they are."""

    workers: int = 8
    """Loader processes per rank; 0 reads in the training process."""
    prefetch: int = 4
    """Micro-batches that each worker prepares ahead."""
    cache: str = "~/.cache/beit3_dist"
    """Folder of the shard indexes; the data folders themselves are never written to."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused as image bombs and replaced."""

    def __post_init__(self) -> None:
        require_not_negative("data.", self, "workers")
        require_positive("data.", self, "prefetch", "max_pixels")


@dataclass(kw_only=True)
class DataConfig(LoadingConfig):
    """The three streams. A stream is one pattern of tars, a list of patterns that are one source together, or a list of
    weighted sources, which may be data sets with names: `[{name: coco, shards: 'coco/*.tar', weight: 3}, ...]`.

    Tars are files, or what a command writes (`pipe:cat {000..099}.tar`, started without a shell), or addresses
    (https://, http://, s3://, gs://, through curl, aws and gsutil), but not both in one stream. The latter two are read
    from front to back; see data.virtual_readers.
    """

    images: Patterns = ""
    """Images: members with extension jpg, jpeg, jfif, png, webp, gif, bmp, tif, avif or, where pillow-heif is
    installed, heic. A .tar.gz is unpacked into the cache."""
    texts: Patterns = ""
    """Documents: .txt members with one document a line, or .jsonl members with a `text` field."""
    pairs: Patterns = ""
    """Images with captions: an image member and a .txt (or .json, see caption_key) member of the same key."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Of the weights of each stream's sources."""
    caption_key: CaptionKey = "caption"
    """Field of a pair's .json member that holds the caption, or a list of them; used only where a sample has no .txt. A
    list of fields, `[caption, alt]` or `[{field: caption, weight: 3}, {field: alt}]`: one of those that a sample has is
    drawn by weight, then one of its captions; the .json member then goes before the .txt."""
    text_length: int = 512
    """Tokens of a text sample, <s> and </s> included (the paper does not say; FLAVA and RoBERTa use 512)."""
    caption_length: int = 64
    """Longest caption in tokens, <s> and </s> included; longer ones are cut (the released fine-tuning default)."""
    min_crop_scale: float = 0.2
    """Smallest area of the random crop as a share of the image (BEiT v2's pretraining recipe)."""
    scaled_decoding: bool = True
    """Whether a JPEG is decoded at a half, a quarter or an eighth of its size where its crop then still has 1.5, 1.75
    or 2 pixels along each side for every pixel of its view, the larger of the model's and the image tokenizer's: a view
    of 224 pixels needs a crop of 672. Crops and all else that is drawn are the same as of the whole image, in its
    coordinates; a view's levels differ by less than 1.25 of 255 in the mean (data/reduced.py). Smaller images and
    other formats are decoded whole."""
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter."""
    horizontal_flip: float = 0.5
    """Probability of mirroring an image. The paper flips images and pairs alike."""
    shuffle: Literal["full", "blocks"] = "full"
    """full: any order of a stream's samples. blocks: blocks of neighbours in any order, and any order inside windows
    of some blocks, which are read ahead: for disks and network storage that are slow at single samples."""
    shuffle_block: int = 1024
    """Neighbouring samples that make a block; of use with shuffle=blocks only."""
    shuffle_window: int = 16_384
    """Samples that are shuffled among one another: a window should fit the page cache twice."""
    virtual_readers: int = 64
    """Shards that are read at a time, over all ranks, in a stream of commands or addresses. Each step takes as many
    samples from each, so it divides the stream's batch and is a multiple of the data-parallel ranks. It cannot change
    in a run."""
    max_bad_fraction: float = 0.01
    """The run stops with a report when more than this share of all samples, or of those of 1,000 steps, had to be
    replaced. The share is taken of at least 10,000 samples: 0.01 stops no run before its 101st bad sample."""

    def __post_init__(self) -> None:
        for name in STREAMS:
            if getattr(self, name) != "":
                sources_of(getattr(self, name), f"data.{name}")
        caption_fields(self.caption_key, "data.caption_key")
        for name in ("text_length", "caption_length"):
            require(
                getattr(self, name) >= 3,
                f"data.{name}={getattr(self, name)}: a text needs at least <s>, a word and </s>",
            )
        require_within("[0, 1]", "data.", self, "horizontal_flip", "color_jitter", "max_bad_fraction")
        require_within("(0, 1]", "data.", self, "min_crop_scale")
        require_positive("data.", self, "shuffle_block", "virtual_readers")
        require(
            self.shuffle_window >= self.shuffle_block,
            f"data.shuffle_window={self.shuffle_window} is smaller than data.shuffle_block={self.shuffle_block}",
        )
        super().__post_init__()

    @property
    def shuffled_by(self) -> str:
        """How the training streams are shuffled, in words."""
        blocks = f"blocks of {self.shuffle_block} in windows of {self.shuffle_window}"
        return blocks if self.shuffle == "blocks" else self.shuffle


@dataclass(kw_only=True)
class BatchConfig:
    """Global numbers of samples per step, over all ranks and micro-batches. 0: the run does not have this stream."""

    images: int = 2048
    """Image-only samples per step."""
    texts: int = 2048
    """Text-only samples per step."""
    pairs: int = 2048
    """Image-text pairs per step."""
    accumulation: Planned = 1
    """Micro-batches per step; a rank's micro-batch of a stream is its count / data-parallel ranks / accumulation. auto:
    as few as fit, see parallel."""

    def __post_init__(self) -> None:
        require_not_negative("batch.", self, *STREAMS)
        for name in STREAMS:
            size = getattr(self, name)
            require(size <= MOST_SAMPLES, f"batch.{name}={size} samples a step: give {MOST_SAMPLES} or fewer")
        require(any(getattr(self, name) for name in STREAMS), "batch: images, texts and pairs are all 0")
        if not is_auto(self.accumulation):
            require_positive("batch.", self, "accumulation")


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is spread over the ranks. The data-parallel size is what the launcher's world leaves.

    auto, in pretrain.py: the planner (plan/auto.py) takes the fastest of the layouts that fit the devices' memory,
    among those with the fewest ranks to a replica; a resumed run goes on in whatever it finds then."""

    tensor: Planned = 1
    """Tensor-parallel ranks: every layer's matrices are cut over so many neighbouring processes. Divides model.heads
    and model.ffn_width."""
    pipeline: Planned = 1
    """Pipeline ranks: the blocks are cut into so many stages. Needs batch.accumulation >= parallel.pipeline."""
    chunks: int = 1
    """Stages of each pipeline rank; above 1 they are interleaved, which shortens the bubble and costs communication."""
    sequence: bool = False
    """Shard the tokens over the tensor ranks where layers are not: norms, residuals, drop path. Saves memory."""
    zero_stage: Planned = 3
    """ZeRO stage: 0 nothing is sharded, 1 optimizer state, 2 and gradients, 3 and parameters."""

    def __post_init__(self) -> None:
        require_positive("parallel.", self, *(n for n in ("tensor", "pipeline") if not is_auto(getattr(self, n))))
        require(
            is_auto(self.zero_stage) or 0 <= self.zero_stage <= 3,
            f"parallel.zero_stage={self.zero_stage} is none of 0, 1, 2, 3 and auto",
        )
        require(
            self.chunks == 1 or (self.chunks > 1 and self.pipeline > 1),
            f"parallel.chunks={self.chunks} interleaves the stages of a pipeline: set parallel.pipeline above 1",
        )
        require(
            self.tensor > 1 or is_auto(self.tensor) or not self.sequence,
            "parallel.sequence shards tokens over the tensor ranks: set parallel.tensor above 1, or leave it off",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer, with a linear warm-up and a decay."""

    name: str = "adamw"
    """adamw; lion, the sign of a running mean (lr 3 to 10 times lower, weight_decay as many times higher, beta2 0.99);
    lamb, for very large batches; muon, which makes updates of the blocks' matrices orthogonal and leaves the rest to
    AdamW, at AdamW's lr and weight_decay; or a plugin's."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate that the decay comes down to in the end (the paper is silent; BEiT v1 and v2 use 1e-5), and below
    which inverse_sqrt does not come."""
    decay: Literal["cosine", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    """How it comes down after the warm-up: by half a cosine; by a line (BERT, ViLT, VLMo); not at all; by the root of
    warmup_steps / step (Vaswani et al. 2017); or not until the last steps, in which it comes down by one less the root
    of their share that is done (Hägele et al. 2024). constant and inverse_sqrt do not depend on `steps`, and so go on
    as they were where a resumed run has more of them; warmup_stable_decay does until it decays."""
    decay_share: float = 0.2
    """Of warmup_stable_decay: share of `steps` in which it decays, at the end."""
    warmup_steps: int = 10_000
    """Steps of the linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-6
    """What is added to the root of the second moment: AdamW's epsilon, and LAMB's."""
    momentum: float = 0.95
    """muon: decay of the first moment of the matrices that it steps on."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices; biases, norms, CLS and mask tokens and position tables are not decayed."""
    clip_norm: float = 3.0
    """Largest gradient norm of the whole model; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr={self.min_lr} is not between 0 and optim.lr={self.lr}")
        require_not_negative("optim.", self, "warmup_steps", "weight_decay", "clip_norm")
        require_positive("optim.", self, "eps")
        require_within("[0, 1)", "optim.", self, "beta1", "beta2", "momentum")
        require_within("(0, 1]", "optim.", self, "decay_share")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Sharded checkpoints in OUT/checkpoints."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest good checkpoints that are kept, beside those that are newer; 0 keeps all. One is good once a step after it
    was finite: before, nobody knows whether its weights can be trained on."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for ever; 0: none. A multiple of `every`."""
    resume: str = "none"
    """none: start anew. auto: go on from the newest whole checkpoint of OUT, or start anew if there is none.
    PATH: go on from that checkpoint folder."""
    other_data: bool = False
    """Go on although shards, weights, seed or a tokenizer are not those of the checkpoint, as where data have been
    added: the order begins anew at the same position, so that in this epoch samples come twice or not at all. With
    another image tokenizer, codes mean something else from there on."""
    other_resolution: bool = False
    """Go on although model.image_size is not the checkpoint's: the positions of patches and their running means are
    resampled for the new grid, the moments of all else are kept."""
    other_recipe: bool = False
    """Go on although the batch or the objective is not the checkpoint's: from there on a step has other samples, or the
    optimizer's moments are those of another loss. What else differs needs no leave; all of it is said in one line."""

    def __post_init__(self) -> None:
        expand_home(self, "resume")
        require_positive("checkpoint.", self, "every")
        require_not_negative("checkpoint.", self, "keep", "keep_every")
        require_divides("checkpoint.every", self.every, "checkpoint.keep_every", self.keep_every)


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out validation with the same losses and accuracies, on fixed crops and masks of the training's kind."""

    every: int = 0
    """Steps between validations; 0 turns validation off."""
    batches: int = 4
    """Batches of the training size per validation, always the same samples."""
    images: Patterns = ""
    """Held-out tars of images: files, named as in data.images."""
    texts: Patterns = ""
    """Held-out tars of documents."""
    pairs: Patterns = ""
    """Held-out tars of pairs."""
    image_codes: str = ""
    """Folder of the held-out views' visual codes; empty: the image tokenizer computes them at every validation."""
    retrieval: str = ""
    """Pattern of tars of pairs: each validation also scores retrieval both ways among them, by the model's contrast
    as it is (image_retrieval_recall@1, ..., as tools/evaluate.py). A .txt member may have several lines, a caption
    each. Empty: none."""
    captions: str = ""
    """Pattern of tars of pairs: each validation also writes a caption of each image, as prefix language modelling has
    taught it, by a beam search of width 3; exact_match is the share of those that are a caption of the pair. Empty:
    none."""
    classes: str = ""
    """Pattern of tars of images with .cls members: each validation also tells their classes by their names, where the
    model learns contrast (acc1, acc5, mean_per_class_recall), and from eval.classes_train. Empty: none."""
    classes_train: str = ""
    """Pattern of such tars from which each validation learns the classes of eval.classes by the frozen encoder's
    features: votes of the nearest images (knn10_acc1, ...) and a linear probe (lp_acc1, ...). Empty: none."""
    class_names: str = ""
    """File with the names of eval.classes, one a line in the order of their numbers."""
    templates: str = "shipped"
    """File of lines with {} in the place of a class's name, over which its vectors are averaged; shipped: eight that
    come with the program (tasks/data/zero_shot.py)."""
    pictures: int = 0
    """Held-out images and pairs that each validation shows to the `trackers`: with what the model guesses of hidden
    patches and words, and which codes it takes for which. 0: none."""
    at_most: int = 5000
    """Images of each of these tars that are scored, or learnt from: of more, so many at equal distances, which bounds a
    validation's time; 0: all."""

    @property
    def scored(self) -> tuple[str, ...]:
        """The fields that name what validations score beside the losses."""
        return tuple(name for name in ("retrieval", "captions", "classes") if getattr(self, name))

    def __post_init__(self) -> None:
        expand_home(self, "image_codes", "class_names", "templates")
        require_not_negative("eval.", self, "every", "at_most", "pictures")
        require_positive("eval.", self, "batches")
        require(bool(self.classes) or not self.classes_train, "eval.classes_train teaches the classes of eval.classes")
        for name in STREAMS:
            sources_of(getattr(self, name), f"eval.{name}")


@dataclass(kw_only=True)
class GradientMaskingConfig:
    """Which stream's gradient each weight of a shared encoder takes, images' or texts' (ViT-BERT, Li et al. 2021). A
    run of images and texts without pairs; each micro-batch goes forward and backward stream by stream."""

    every: int = 0
    """Steps between updates of the masks, which begin with the texts' gradient for all weights (ViT-BERT does not say);
    0: there are no masks, and each weight takes the sum of both."""
    share: float = 0.5
    """Share of the weights that takes the images' gradient in the end (ViT-BERT: 50 %)."""
    share_per_update: float = 0.1
    """Share of the weights that an update adds to them, those with the smallest gradients of texts (ViT-BERT: 10 %)."""

    def __post_init__(self) -> None:
        require_not_negative("gradient_masking.", self, "every")
        require_within("[0, 1]", "gradient_masking.", self, "share")
        require_within("(0, 1]", "gradient_masking.", self, "share_per_update")

    def share_after(self, steps: int) -> float:
        """Share of the weights that takes the images' gradient after so many steps."""
        return min(self.share, steps // self.every * self.share_per_update)


@dataclass(kw_only=True)
class GuardConfig:
    """What a run watches itself for. None of it changes what an undisturbed run computes."""

    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped: it changes nothing, and OUT/skipped.jsonl names its
    samples. The run stops with a report after so many of them in a row."""
    spike_window: int = 200
    """Steps whose median loss a step's loss is compared with; no warning before so many."""
    spike_factor: float = 8.0
    """Warns of a loss that lies so many robust standard deviations (1.4826 x the median distance from the median, at
    least a thousandth of the median) above that median; 0 turns the warning off."""
    step_timeout_s: float = 1800.0
    """Seconds that a step may take, its validation and its checkpoint included; the first step of a process may take
    three times as long. After that all threads' stacks go to OUT/logs/ and the run ends. 0: there is no limit."""
    times_every: int = 100
    """Every so many steps the ranks' times for data, forward, backward, reduction and optimizer go to the trackers, and
    a warning names the ranks, with their hosts, that are slower than the others. 0: never."""
    compare_every: int = 0
    """Every so many steps the weights of which several processes hold a copy are compared by a sum over their bits:
    those of the replicas below ZeRO-3, and what tensor ranks do not cut. Where they differ the run stops and names the
    parameter and the rank. It costs a pass over the weights and a small reduction. 0: never."""

    def __post_init__(self) -> None:
        require_positive("guards.", self, "max_skipped_steps", "spike_window")
        require_not_negative("guards.", self, "spike_factor", "step_timeout_s", "times_every", "compare_every")


@dataclass(kw_only=True)
class CallbackConfig:
    """Functions that the first process calls as the run goes on, each by its import path, `module:function` or
    `FILE.py:function`; the file is a program of yours. Empty: none."""

    on_step: str = ""
    """After every step, with its line of metrics.jsonl as a dictionary."""
    on_validation: str = ""
    """After every validation, with its line of eval.jsonl."""
    on_save: str = ""
    """Once a checkpoint is whole on the disk, with its folder, a pathlib.Path."""


@dataclass(kw_only=True)
class JobConfig:
    """What all training runs share, whatever they train."""

    out: str
    """Run folder: config.yaml, metrics.jsonl, tensorboard/, logs/, checkpoints/, quarantine.jsonl."""
    model: Any
    """The network, a dataclass: a checkpoint goes on with the same one only."""
    seed: int = 0
    """Seed of everything that is drawn: initial values, order, crops, masks, drop path."""
    steps: int = 1_000_000
    """Optimizer steps of the whole run."""
    precision: str = "bf16"
    """bf16: matrix products in bf16. fp32: everything in fp32."""
    deterministic: bool = False
    """Whether a GPU computes the same bits at every run, so that a resumed run is the undisturbed one bit for bit there
    too. Attention's and other gradients are then added in a fixed order, which costs some time. On a CPU it is so
    anyway."""
    profile: int = 0
    """Steps that the first process profiles, after two others: OUT/profile/trace.json opens in Perfetto, kernels.txt
    lists what took longest. 0: none."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """Bad steps, loss spikes, hanging steps."""
    callbacks: CallbackConfig = field(default_factory=CallbackConfig)
    """What the run calls as it goes on."""
    trackers: list[str | dict[str, Any]] = field(default_factory=lambda: ["tensorboard"])
    """Who is told of the records beside OUT's own files: tensorboard, wandb, mlflow, trackio; with settings as
    {wandb: {project: NAME, mode: offline}}, whose fields stand in trackers/NAME.py. One that is missing at the start is
    an error; one that breaks later is said once, and the run goes on without it."""

    def __post_init__(self) -> None:
        expand_home(self, "out")
        require(  # the current folder would become one
            bool(self.out),
            'out is empty: name the run folder (was it a shell variable that is not set, --out "$OUT"?)',
        )
        require_not_negative("", self, "profile")
        require_positive("", self, "steps")
        require(self.steps <= MOST_STEPS, f"steps={self.steps} are more than any run takes: give {MOST_STEPS} or fewer")
        require(
            self.optim.warmup_steps <= self.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} exceeds steps={self.steps}",
        )


@dataclass(kw_only=True)
class TrainingConfig(JobConfig):
    """What pretraining and fine-tuning share."""

    text_tokenizer: str
    """SentencePiece model file, which tools/train_text_tokenizer.py makes, or Hugging Face's tokenizer.json, whose
    tokens for beginning, end, padding, masked and unknown words are found by their names. A wrong model.vocab_size is
    told with the one that the file needs."""
    precision: Literal["bf16", "fp8", "fp8_emulated", "fp32"] = "bf16"
    """bf16: bf16 parameters and activations, fp32 masters and gradient accumulation; DeepSpeed sums gradients over the
    replicas in bf16 (a `deepspeed_config` with "communication_data_type": "fp32" sends twice as much and rounds less).
    fp8: as bf16, but the products of the blocks' projections and experts in fp8, by the package torchao, on H100, L40
    and newer; not with tensor parallelism. fp8_emulated: the same roundings on any device, slower than bf16, to see
    what fp8 would learn. fp32: everything in fp32."""
    activation_checkpointing: Recompute | list[Recompute] = "none"
    """What is recomputed in the backward pass. attention: softmax(q k') v; selective: that and the experts' FFNs; full:
    whole blocks. A list has one entry per pipeline rank: rank r of p holds the activations of p - r micro-batches."""
    activation_checkpointing_every: int = 1
    """Recompute in every so many-th block only, counted over the whole model from block 0."""
    kernels: Literal["auto", "torch", "triton", "compiled"] = "auto"
    """Who computes what is no matrix product. torch: torch's own operations, and Apex's LayerNorm where installed.
    triton: our kernels, which join residual connections, drop path, norms, GELU and the gradients of biases; they need
    CUDA (what tensor parallelism cuts, they compute norm by norm). compiled: torch.compile joins the operations of each
    block, but of fusion layers and of those with post_norm; the first step then takes minutes. It needs torch 2.10 and
    a C++ compiler, and is no faster on a CPU. auto: triton on CUDA, torch on the CPU."""
    attention_kernel: Literal["auto", "padded", "varlen", "flash"] = "auto"
    """Who computes softmax(q k') v. padded: torch's attention, group by group, texts padded to one length. varlen:
    torch's for samples of different lengths, without padding or copies. flash: the same by the package flash-attn-4,
    on H100 and newer. The last two need kernels=triton and bf16; masks that do more than hide padding always take
    padded. auto: flash where it is installed, else varlen, else padded."""
    deepspeed_config: str = ""
    """DeepSpeed JSON file. ds_configs/zero3_bf16.json and its fellows come with the program and are found from any
    folder that has none of that name. "auto" values come from this config; a value that contradicts it is an error.
    Empty: everything is auto."""
    plugins: list[str] | str = field(default_factory=list)
    """Python files or modules that are imported before this recipe is read, and register objectives, tasks or kernels
    of their own."""
    init_from: list[str] | str = ""
    """Weights to start from: a file in the released form (or torchscale's), one of timm's for images or of BERT's for
    words, a model folder, a checkpoint of a run, or a run's folder, which means its newest whole checkpoint; or several
    of these, each of which gives what those before it lack. A head that is in none starts from random values, which is
    logged. Empty: random values by (seed, name)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block to the one below; embeddings come last (BEiT)."""
    ema_decay: float = 0.0
    """Decay per step of a moving average of the weights, which checkpoints hold, and which validation, the saved model
    and whatever is made of a checkpoint then use; 0: none (unilm's 0.9999 suits long runs)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The Multiway Transformer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over the ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "deepspeed_config", "init_from")
        require(
            not self.model.fusion_layers or not self.parallel.sequence,
            f"model.fusion_layers={self.model.fusion_layers}: tokens rest in some layers, which parallel.sequence does "
            "not know: leave it off",
        )
        require(
            not self.model.fusion_layers or self.attention_kernel in ("auto", "padded"),
            f"model.fusion_layers={self.model.fusion_layers}: attention_kernel={self.attention_kernel} does not know "
            "attention of words to images: use auto or padded",
        )
        self.plugins = [self.plugins] if isinstance(self.plugins, str) else self.plugins
        require(
            self.precision == "fp32" or self.parallel.zero_stage != 0,
            "parallel.zero_stage=0 cannot accumulate bf16 gradients in fp32 (DeepSpeed refuses it): "
            "use parallel.zero_stage=1 or precision=fp32",
        )
        require(
            self.layer_decay == 1 or not self.model.vision_layers,
            f"layer_decay={self.layer_decay} counts the layers of one stack, and model.vision_layers="
            f"{self.model.vision_layers} are another: leave it at 1",
        )
        require_positive("", self, "layer_decay")
        require_within("[0, 1)", "", self, "ema_decay")
        modes, ranks = self.activation_checkpointing, self.parallel.pipeline
        require(
            isinstance(modes, str) or len(modes) == ranks,
            f"activation_checkpointing has {len(modes)} entries but parallel.pipeline={ranks}: "
            "give one per pipeline rank, or one value for all",
        )
        every = self.activation_checkpointing_every
        require_positive("", self, "activation_checkpointing_every")
        require(
            every == 1 or any(self.recompute(rank) != "none" for rank in range(max(1, ranks))),
            f"activation_checkpointing_every={every}, but activation_checkpointing=none recomputes nothing: use 1",
        )

    def recompute(self, pipeline_rank: int) -> Recompute:
        """What the blocks of a pipeline rank recompute."""
        modes = self.activation_checkpointing
        return modes if isinstance(modes, str) else modes[pipeline_rank]

    @property
    def in_bf16(self) -> bool:
        """Whether parameters and activations are in bf16; else they are in fp32."""
        return self.precision != "fp32"

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        raise NotImplementedError

    def micro_batch(self, data_parallel: int) -> tuple[int, ...]:
        """Samples of one rank's micro-batch, by kind. Raises ValueError where the batch does not divide."""
        raise NotImplementedError


def require_laid_out(config: TrainingConfig) -> None:
    """Raises ValueError where a number is still to be found, which only pretraining on its own does."""
    fields = {f"parallel.{name}": getattr(config.parallel, name) for name in ("tensor", "pipeline", "zero_stage")}
    for name, value in (fields | {"batch.accumulation": config.accumulation}).items():
        require(not is_auto(value), f"{name}=auto is for pretrain.py: give a number here; tools/plan.py finds it")


@dataclass(kw_only=True)
class RunConfig(TrainingConfig):
    """A pretraining run."""

    data: DataConfig
    """The three streams of tars."""
    image_tokenizer: str = ""
    """VQ-KD image tokenizer file, for objectives with visual codes; launchers/train_image_tokenizer.py makes one."""
    image_codes: str = ""
    """Folder of the training views' visual codes, which tools/precompute_codes.py makes; empty: the image tokenizer
    computes them at every step."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Samples per step."""
    objectives: dict[str, Any] = field(default_factory=dict)
    """What is learnt: the section of each objective by its name (objectives/registry.py). Empty: masked data modelling
    with its defaults."""
    train_only: list[str] | str = field(default_factory=list)
    """Patterns, with * for any characters, of the names of the parameters that are trained, such as
    blocks.*.ffn.language.*; those behind a ! are left out, and patterns that all have one leave out of everything. The
    others are frozen: they have no gradient, no moments and no decay, and keep their values. Empty: all are trained."""
    gradient_masking: GradientMaskingConfig = field(default_factory=GradientMaskingConfig)
    """Masks of the shared encoder's gradients."""
    cuda_graphs: bool = False
    """Whether the blocks are recorded as CUDA graphs, which a GPU starts faster than their kernels one by one. Captions
    are then filled up to the longest micro-batch so far, with words that no loss reads, so that all micro-batches have
    one shape. For kernels=triton with attention_kernel=varlen or flash, parallel.zero_stage=1, one tensor rank and one
    stage."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "image_tokenizer", "image_codes")
        if self.gradient_masking.every:
            self._check_gradient_masking()
        self.train_only = [self.train_only] if isinstance(self.train_only, str) else self.train_only
        for name in STREAMS:
            count = getattr(self.batch, name)
            require(
                not count or bool(getattr(self.data, name)),
                f"data.{name} is not given, but batch.{name}={count}: name its shards, or set batch.{name}=0",
            )
            require(
                not count or not self.eval.every or bool(getattr(self.eval, name)),
                f"eval.{name} is empty but eval.every={self.eval.every}: name held-out shards or set eval.every to 0",
            )
        for name, samples in {"text_length": self.batch.texts, "caption_length": self.batch.pairs}.items():
            require(
                not samples or getattr(self.data, name) <= self.model.max_text_length,
                f"data.{name}={getattr(self.data, name)} exceeds model.max_text_length={self.model.max_text_length}",
            )

    def _check_gradient_masking(self) -> None:
        name = f"gradient_masking.every={self.gradient_masking.every}"
        require(
            bool(self.batch.images and self.batch.texts and not self.batch.pairs),
            f"{name} tells the gradients of images and texts apart: give both batch.images and batch.texts, and "
            "batch.pairs=0",
        )
        require(
            self.model.attention == "shared",
            f"{name} masks what both streams share: use model.attention=shared (and model.ffn=shared for all of it)",
        )
        require(
            self.parallel.pipeline == 1,
            f"{name}: a pipeline takes the streams of a micro-batch together: use parallel.pipeline=1",
        )

    @property
    def accumulation(self) -> int:
        return self.batch.accumulation

    def sets(self, stream: str) -> list[str]:
        """Names of a stream's data sets: of those that train, and of others that only validate."""
        both = [getattr(self.data, stream), getattr(self.eval, stream)]
        found = [source.name for shards in both if shards for source in sources_of(shards, stream)]
        return list(dict.fromkeys(filter(None, found)))

    def micro_batch(self, data_parallel: int) -> tuple[int, int, int]:
        """Images, texts and pairs of one rank's micro-batch. Raises ValueError where the batch does not divide."""
        parts = data_parallel * self.batch.accumulation
        for name in STREAMS:
            count = getattr(self.batch, name)
            require(
                count % parts == 0,
                f"batch.{name}={count} is not divisible by {data_parallel} data-parallel ranks "
                f"x batch.accumulation={self.batch.accumulation} = {parts}",
            )
        return self.batch.images // parts, self.batch.texts // parts, self.batch.pairs // parts
