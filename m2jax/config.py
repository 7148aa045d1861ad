# SPDX-License-Identifier: Apache-2.0
"""Every knob of an experiment, declared once: type, default, meaning, unit.

At the edge an experiment is a locked ``ml_collections.ConfigDict`` (so that files and the command
line can edit it and a misspelt key fails with a suggestion); inside the library it is the frozen
dataclass ``Experiment``. ``load_config`` takes the first to the second. No default is ``None``:
such a field could not be overridden from the command line. This module never imports jax.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from ml_collections import ConfigDict

from m2jax.architectures import ARCHITECTURES, LIMITS
from m2jax.config_values import ATTENTION, REMAT, UserError, choices, from_mapping

# Everybody takes them from here.
__all__ = ["ATTENTION", "REMAT", "UserError", "choices", "from_mapping"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """An M2-Encoder. Sizes left at 0 are those of the architecture called ``name``."""

    name: str = "m2-encoder-demo"  # a row of ARCHITECTURES
    width: int = 0  # D, of both modalities
    heads: int = 0
    backbone_layers: int = 0  # image and text tokens apart, A and B weights
    vl_layers: int = 0  # on top; the published forward takes A weights for both
    out_dim: int = 0  # of the features
    image_size: int = 0  # pixels, square
    patch_size: int = 0  # pixels
    vocab_size: int = 0  # rows of the token table as checkpoints see it
    max_text_len: int = 0  # tokens, [CLS] and end included
    text_positions: int = 1024  # rows of the text position table
    init: str = "torch"  # torch (the release's, spec section 8) | scaled (small models)
    dtype: str = "bfloat16"  # of activations; normalisation, softmax and losses are >= float32
    param_dtype: str = "float32"
    drop_path: float = 0.0  # share of residual branches dropped in training, rising with depth
    patch_drop: float = 0.0  # share of image patches dropped in training (FLIP)
    attention: str = "batch"  # a key of ATTENTION
    remat: str = "none"  # what the backward pass recomputes: a key of REMAT
    products: str = ""  # int8 | fp8: the encoder's, forward, in 8 bits (needs aqtp); "": in dtype
    fused_qkv: bool = True  # one product for queries, keys and values; three split over devices
    unroll: int = 1  # layers per iteration of the scan; >= the depth unrolls it


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes to training images, made on the device. Strengths of 0 switch a change off."""

    scale: float = 0.0  # size factor drawn from [1 - scale, 1 + scale]
    stretch: float = 0.0  # aspect factor drawn from [1 - stretch, 1 + stretch]
    shift: float = 0.0  # share of the side, each way
    rotate: float = 0.0  # degrees, each way
    flip: float = 0.0  # probability of a mirror image
    background: float = 0.0  # probability of a random colour behind a transparent drawing
    brightness: float = 0.0  # added to each channel, share of the range, each way
    contrast: float = 0.0  # factor from [1 - contrast, 1 + contrast]
    saturation: float = 0.0  # factor from [1 - saturation, 1 + saturation]
    hue: float = 0.0  # degrees, each way, about the grey axis
    grey: float = 0.0  # probability of a grey image
    tint: float = 0.0  # deviation of a random linear map of the colours from the identity
    mix: float = 0.0  # probability of a blend with another view of the same thing (views >= 2)
    erase: float = 0.0  # probability that one rectangle is painted over


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture."""

    name: str = ""  # what the log calls it
    kind: str = "tsv"  # tsv | tars | shards | tfds
    files: tuple[str, ...] = ()  # paths, or patterns with *; shards, tfds: folders
    split: str = "train"  # tfds alone
    weight: float = 1.0  # rows of it come in proportion to this
    language: str = "en"  # of captions that do not say theirs: .txt files of tars, TFDS columns


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from and how they become batches."""

    name: str = "emoji"  # emoji | tsv | tars | shards | tfds | ...: a row of data.loader.SOURCES
    files: tuple[str, ...] = ()  # paths or patterns, s3:// and gs:// too; shards, tfds: folders
    split: str = "train"  # tfds alone
    mixture: tuple[Part, ...] = ()  # the sources of name="mixture"
    language: str = "en"  # tars, tfds: of captions that do not say theirs
    unreadable: str = "error"  # a damaged image or row ends the run (error) or is counted (skip)
    draft: bool = (
        False  # decode JPEGs at 1/2, 1/4 or 1/8 of their size, never below twice the model's
    )
    tokenizer: str = ""  # files without --init: a folder with GLM's tokenizer, or a .model file
    dir: str = ""  # built data sets; "" is $M2JAX_DATA, else ~/.cache/m2jax
    batch_size: int = 256  # image-text pairs per step, over all devices
    views: int = 1  # drawings of one concept in a batch; the texts are shared between them
    languages: tuple[str, ...] = ("en", "zh")  # texts of a row; "any": one, in whichever it has
    keywords: float = 0.0  # probability that a keyword stands for, or beside, the name
    concepts: int = 0  # emoji-scenes: so many of the seen concepts alone, spread evenly; 0: all
    hold_out_styles: tuple[str, ...] = ()  # kept out of training for tuning; they become validation
    prefetch: int = 2  # batches prepared ahead of the step, each by its own thread
    workers: int = 0  # processes that prepare batches instead of threads of this one
    device_prefetch: int = 1  # batches put on the devices ahead of the step
    transform: str = "none"  # of own pictures, by PIL: none | m2 (the release's for training)
    augment: Augment = field(default_factory=Augment)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices per mesh axis; one of them may be -1: what is left over."""

    replica: int = 1  # slices joined by the data-center network
    data: int = -1
    fsdp: int = 1
    model: int = 1
    cpu_devices: int = 0  # virtual devices made of a CPU host that has no accelerator; 0: one


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimiser and schedule."""

    name: str = "adamw"  # adamw | adafactor | lion | muon
    learning_rate: float = 1e-3  # at the peak
    warmup_steps: int = 100
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    end_factor: float = 0.0  # last learning rate / peak
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices alone: never scales, biases, norms
    clip_norm: float = 1.0  # of the global gradient; 0 switches clipping off
    adam_factor: float = 1.0  # muon: learning rate of the non-matrix parameters / learning_rate
    ema: float = 0.0  # decay of the averaged parameters that evaluation uses; 0: none
    layer_decay: float = 1.0  # learning rate of a layer / that of the layer above it


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A run that starts from a trained model; ``m2jax train --init DIR`` sets ``init``.

    Sizes of ``model`` left at 0 are then those of the source. ``image_size`` may differ: the
    position table is interpolated.
    """

    init: str = ""  # whatever m2jax.load takes; "": fresh parameters
    freeze: str = ""  # image | text: this tower's features stay as they are (LiT)
    heads: str = "keep"  # keep | fresh: the maps to the features


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Image-text contrast (ITC)."""

    weight: float = 1.0  # of the loss
    form: str = "softmax"  # softmax (CLIP) | sigmoid (SigLIP), whose scale usually starts at 10
    impl: str = "dense"  # how the reduction over devices is done: see contrastive_loss
    group: int = 0  # devices that gather (grid) or share negatives (grouped); 0: chosen by impl
    wire_dtype: str = ""  # of features between devices and in products; "": as the model gives them
    tile: int = 1024  # rows of logits in memory at a time, by 4 columns each
    kernel: str = "xla"  # what computes a tile: xla | pallas (NVIDIA GPUs; never timed)
    mask_same_caption: bool = False  # rows with the same caption are no negatives of each other
    backbone_weight: float = 0.5  # of the loss on backbone features; 1 - it is on the vl features
    text_text: float = 0.0  # weight of the contrast between the first two languages
    image_image: float = (
        0.0  # weight of the contrast between two drawings of a concept (views >= 2)
    )
    label_smoothing: float = 0.0
    scale_init: float = 14.285714  # 1 / 0.07, multiplies the cosines
    scale_max: float = 100.0  # ceiling of the learned scale
    bias_init: float = -10.0  # sigmoid alone: a learned number added to the scaled cosines


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Image captioning (IC): a causal decoder over the image tokens. Weight 0: no such head."""

    weight: float = 0.0  # CoCa takes 2, beside 1 of ITC
    layers: int = 3
    languages: tuple[str, ...] = ()  # a tag each; none: those of data.languages, en and zh of "any"
    patches: str = "all"  # that the decoder sees: all | high | low | random, by fit to the text
    ratio: float = 0.5  # share of the patches it sees, unless all
    positions: int = 8  # tokens of a text whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """Text-guided masked image modelling (TG-MIM): a decoder tells patches from the text."""

    weight: float = 0.0  # 0: no such head
    target: str = "pixels"  # pixels (less their mean, over their deviation) | tokens (visual ones)
    layers: int = 2
    patches: str = "high"  # that are masked: high | low | random, by fit to the text
    ratio: float = 0.5  # share of the patches that are masked
    tokenizer: str = ""  # of target=tokens, as in MaskedTokens
    positions: int = 32  # of target=tokens, as in MaskedTokens


@dataclass(frozen=True, kw_only=True)
class MaskedText:
    """Cross-modal masked language modelling (CMLM): whole words, from the image and the others."""

    weight: float = 0.0  # 0: no such head
    ratio: float = 0.5  # share of a text's words that are masked (the release's mvlm_prob)
    positions: int = 8  # tokens of a text whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class MaskedTokens:
    """Cross-modal masked image modelling (CMIM): the visual tokens of masked patches."""

    weight: float = 0.0  # 0: no such head
    ratio: float = 0.41  # share of the patches that are masked (the release's 80 of 196)
    tokenizer: str = ""  # work directory of a run with loss.visual_tokenizer, which made the tokens
    positions: int = 32  # patches of an image whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class VisualTokenizer:
    """The tokenizer of CMIM and TG-MIM (BEiT v2's VQ-KD). With a weight a run trains it alone."""

    weight: float = 0.0  # 1: train it; it learns from the features of the model named by --init
    target: str = "features"  # that the decoder must tell: features (of that model) | pixels
    codes: int = 8192
    code_dim: int = 32
    width: int = 0  # of encoder and decoder; 0: the model's
    heads: int = 0  # 0: the model's
    encoder_layers: int = 0  # 0: as many as the model has
    decoder_layers: int = 1
    commitment: float = 1.0  # weight of the distances between patches and their codes


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The objectives of the run.

    SyCoCa is contrastive, caption and masked_image; CoCa the first two with all patches; M2 is
    contrastive, masked_text and masked_tokens.
    """

    contrastive: Contrastive = field(default_factory=Contrastive)
    caption: Caption = field(default_factory=Caption)
    masked_image: MaskedImage = field(default_factory=MaskedImage)
    masked_text: MaskedText = field(default_factory=MaskedText)
    masked_tokens: MaskedTokens = field(default_factory=MaskedTokens)
    visual_tokenizer: VisualTokenizer = field(default_factory=VisualTokenizer)
    joint_vl: str = "split"  # vl weights of image + text sequences: split (A and B) | A | B


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Loss spikes: a step whose loss or gradient norm jumps is skipped; many in a row rewind."""

    factor: float = (
        0.0  # skip when the gradient norm exceeds factor x its running mean; 0: only NaN
    )
    patience: int = 10  # skipped steps in a row before a rewind to the last checkpoint
    rewinds: int = 3  # rewinds before the run gives up
    warmup_steps: int = 50  # steps before the running mean is trusted


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    steps: int = 1000
    accumulate: int = 1  # micro-batches of a step; each fits in memory, the loss sees all rows
    accumulation: str = "exact"  # exact (encodes twice) | detach (the last part alone learns)
    log_every: int = 10  # steps between rows of metrics.jsonl
    seed: int = 0
    stall_s: float = 1800.0  # seconds without a step, or of scoring, that end the run; 0: never
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True, kw_only=True)
class Log:
    """Who else hears of metrics; ``metrics.jsonl`` always does."""

    tensorboard: bool = True  # event files under WORKDIR/tensorboard
    wandb: str = ""  # project on Weights & Biases; "": none
    profile: str = ""  # A:B traces steps A to B-1 into WORKDIR/profile; "": none


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What survives."""

    every: int = 500  # steps between saves; the last step is always saved
    keep: int = 2  # newest checkpoints kept; a damaged one falls back to the one before it
    keep_every: int = 0  # steps; checkpoints at multiples of it are never removed; 0: none
    best: str = ""  # figure whose best checkpoint stays too, of the step or eval.suite; "-loss"


@dataclass(frozen=True, kw_only=True)
class Eval:
    """What is scored, and when."""

    suite: str = "emoji"  # "" scores nothing
    every: int = 0  # steps between scores of the validation slice; 0: never
    batch_size: int = 256


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, whole."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    finetune: Finetune = field(default_factory=Finetune)
    log: Log = field(default_factory=Log)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)


def resolve(model: Model, where: str = "model") -> Model:
    """Fills the sizes left at 0 from the named architecture, and checks that they fit together.

    Raises:
        UserError: an unknown name, a size beyond its limits, or sizes that do not fit; ``where``
            names the source.
    """
    if model.name not in ARCHITECTURES:
        raise UserError(
            f"{where}.name={model.name!r}: no such architecture: "
            f"use one of {', '.join(ARCHITECTURES)}"
        )
    named = {k: v for k, v in ARCHITECTURES[model.name].items() if not getattr(model, k)}
    model = dataclasses.replace(model, **named)
    for key, most in LIMITS.items():
        size = getattr(model, key)
        if not 0 < size <= most:
            raise UserError(f"{where}.{key}={size}: must lie between 1 and {most:,}: change it")
    for whole, part in (("width", "heads"), ("image_size", "patch_size")):
        sizes = getattr(model, whole), getattr(model, part)
        if sizes[0] % sizes[1]:
            raise UserError(
                f"{where}.{whole}={sizes[0]}: not a multiple of {where}.{part}={sizes[1]}: "
                "change one"
            )
    if model.max_text_len + 2 > model.text_positions:  # two rows of the table are never read
        raise UserError(
            f"{where}.max_text_len={model.max_text_len}: text_positions={model.text_positions} "
            f"has room for {model.text_positions - 2}: change one"
        )
    return model


def as_config_dict(experiment: Experiment | None = None) -> ConfigDict:
    """The editable form of an experiment (the default one if none is given), locked."""
    return ConfigDict(dataclasses.asdict(experiment or Experiment()), type_safe=True).lock()


def build(config: ConfigDict) -> Experiment:
    """The frozen form of an edited config, with the model's sizes resolved.

    Those of a run that starts from a trained model are resolved by ``train.origin.adopt``, which
    reads that model.

    Raises:
        UserError: a value is out of its choices or sizes do not fit together.
    """
    experiment = from_mapping(Experiment, config.to_dict(), "config")
    if experiment.finetune.init:
        return experiment
    return dataclasses.replace(experiment, model=resolve(experiment.model))


def to_json(experiment: Experiment) -> str:
    """The text kept as ``config.json`` beside every checkpoint."""
    return json.dumps(dataclasses.asdict(experiment), indent=1, sort_keys=True) + "\n"


def from_json(text: str, where: str = "config.json") -> Experiment:
    """Inverse of ``to_json``; ``where`` names the source in errors."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON file ({error}): restore it from a backup") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds no JSON object: restore it from a backup")
    return from_mapping(Experiment, values, where)
