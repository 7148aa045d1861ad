# SPDX-License-Identifier: Apache-2.0
"""Prompts for zero-shot classification, in our own wording; ``{c}`` is the name of the class.

A class's features are the mean over prompts (and over its names), made a unit row again: the prompt
ensemble of CLIP (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Mapping

Templates = Mapping[str, tuple[str, ...]]

TEMPLATES: Templates = {
    "en": (
        "{c}",
        "a picture of {c}.",
        "a photo that shows {c}.",
        "this is {c}.",
        "{c}, seen from nearby.",
        "{c}, seen from far away.",
        "a dark photo of {c}.",
        "a bright photo of {c}.",
        "a blurred photo of {c}.",
        "a drawing of {c}.",
        "part of {c} in a photo.",
        "a good view of {c}.",
    ),
    "zh": (
        "{c}",
        "{c}的图片。",
        "一张{c}的照片。",
        "这是{c}。",
        "近处看到的{c}。",
        "远处看到的{c}。",
        "一张昏暗的{c}照片。",
        "一张明亮的{c}照片。",
        "一张模糊的{c}照片。",
        "一幅{c}的画。",
        "照片里有{c}的一部分。",
        "清楚地看到{c}。",
    ),
}

PLAIN: Templates = {"en": ("{c}",), "zh": ("{c}",)}

BIRDS: Templates = {
    "en": ("{c}, a bird.", "a photo of the bird {c}.", "the bird in this picture is {c}."),
    "zh": ("{c}，一种鸟。", "一张{c}的照片，这是一种鸟。", "图中的鸟是{c}。"),
}

DOGS: Templates = {
    "en": ("{c}, a dog.", "a photo of a dog of the breed {c}.", "the dog in this picture is {c}."),
    "zh": ("{c}，一种狗。", "一张{c}的照片，这是一个犬种。", "图中的狗是{c}。"),
}

CARS: Templates = {
    "en": ("{c}, a car.", "a photo of the car {c}.", "the car in this picture is {c}."),
    "zh": ("{c}，一款汽车。", "一张{c}汽车的照片。", "图中的汽车是{c}。"),
}
