# SPDX-License-Identifier: Apache-2.0
"""The packages the data set is made of: exact versions, npm's own integrity hashes, licences."""

from __future__ import annotations

from typing import NamedTuple

VERSION = "1.0.0"  # of the data set; raised whenever a build would give other records


class Package(NamedTuple):
    """One npm package."""

    name: str
    version: str
    integrity: str  # as `npm pack --json` prints it


class Style(NamedTuple):
    """One vendor's drawings."""

    name: str
    family: str  # styles of one family never lie on both sides of a split
    split: str  # train | fluent | openmoji
    licence: str
    credit: str
    package: Package


STYLES = (
    Style(
        "noto",
        "google",
        "train",
        "Apache-2.0",
        "Noto Emoji, (c) Google",
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYe"
            "ZVAuaw==",
        ),
    ),
    Style(
        "noto_blob",
        "google",
        "train",
        "Apache-2.0",
        "Noto Emoji (blobs), (c) Google",
        Package(
            "@iconify-json/noto-v1",
            "1.2.5",
            "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3ey"
            "PqMuVA==",
        ),
    ),
    Style(
        "twemoji",
        "twitter",
        "train",
        "CC-BY-4.0",
        "Twemoji, (c) Twitter and other contributors",
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/m"
            "vgALsw==",
        ),
    ),
    Style(
        "emojione2",
        "emojione",
        "train",
        "CC-BY-4.0",
        "EmojiOne 2.x / EmojiTwo",
        Package(
            "@iconify-json/emojione",
            "1.2.3",
            "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8z"
            "b9CMMg==",
        ),
    ),
    Style(
        "fxemoji",
        "mozilla",
        "train",
        "Apache-2.0",
        "FxEmoji, (c) Mozilla",
        Package(
            "@iconify-json/fxemoji",
            "1.2.2",
            "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn"
            "78DpiQ==",
        ),
    ),
    Style(
        "fluent",
        "microsoft",
        "fluent",
        "MIT",
        "Fluent Emoji (flat), (c) Microsoft",
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4"
            "fRXlUw==",
        ),
    ),
    Style(
        "openmoji",
        "openmoji",
        "openmoji",
        "CC-BY-SA-4.0",
        "OpenMoji",
        Package(
            "@iconify-json/openmoji",
            "1.2.29",
            "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ"
            "5nFKJQ==",
        ),
    ),
)

NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
NAMES_CREDIT = "Names and keywords: Unicode CLDR (Unicode-3.0), through emojibase-data (MIT)"


def attribution() -> str:
    """Who drew what under which licence, for the data set, the report and the README."""
    lines = [f"- {s.credit}: {s.licence} ({s.package.name} {s.package.version})" for s in STYLES]
    lines.append(f"- {NAMES_CREDIT} {NAMES.version}")
    return "\n".join(lines) + "\n"
