# SPDX-License-Identifier: Apache-2.0
"""What is drawn: concepts with names and keywords, and which icon of a style draws which concept.

Most styles list the code point of each icon. Three older ones list names alone; an icon of theirs
is given the concept that most naming sources agree on, and none where they tie.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LANGUAGES = ("en", "zh")
COMPONENT_GROUP = 2  # skin tones and hair: no concepts of their own
GROUPS = (  # emojibase's numbers 0 to 9
    "smileys and emotion",
    "people and body",
    "components",
    "animals and nature",
    "food and drink",
    "travel and places",
    "activities",
    "objects",
    "symbols",
    "flags",
)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji, whoever draws it."""

    id: int
    hexcode: str  # code points as emojibase writes them
    names: Mapping[str, str]  # by language
    keywords: Mapping[str, tuple[str, ...]]
    group: int
    subgroup: int
    base: str  # shared by what differs in gender or number of the people alone
    seen: bool = True  # False: held out of every training style


_GENDERED = {  # single code points that differ in gender alone -> the neutral one
    "1F468": "1F9D1",
    "1F469": "1F9D1",
    "1F466": "1F9D2",
    "1F467": "1F9D2",
    "1F474": "1F9D3",
    "1F475": "1F9D3",
    "1F478": "1F934",
    "1F936": "1F385",
    "1F46C": "1F46B",
    "1F46D": "1F46B",
    "1F483": "1F57A",
}
_DROPPED = {"FE0F", "200D", "2640", "2642"}


def key(hexcode: str) -> str:
    """A hexcode without variation selectors: what two lists can be joined on."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def base(hexcode: str) -> str:
    """The concept apart from gender: a woman and a man doing the same thing share it.

    Families of any make-up share one base, since only the people's number and gender differ.
    """
    parts = [_GENDERED.get(p, p) for p in hexcode.upper().split("-") if p not in _DROPPED]
    people = [p for p in parts if p in {"1F9D1", "1F9D2"}]
    if (len(people) == len(parts) and len(people) > 1) or parts == ["1F46A"]:
        return "family"
    if len(people) == 2 and "2764" in parts:
        return "couple-kiss" if "1F48B" in parts else "couple"
    return "-".join(parts)


def is_country_flag(hexcode: str) -> bool:
    """Two regional indicators: drawings of these barely differ between vendors."""
    parts = hexcode.upper().split("-")
    return len(parts) == 2 and all(part.startswith("1F1") for part in parts)


def read_concepts(data: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Concept]:
    """All concepts but components and country flags, in emojibase's order.

    Args:
        data: emojibase's ``data.json`` by language.
    """
    translated = {lang: {row["hexcode"]: row for row in data[lang]} for lang in LANGUAGES}
    concepts = []
    for row in data["en"]:
        code = row["hexcode"]
        group = row.get("group")
        if group in (None, COMPONENT_GROUP) or is_country_flag(code):
            continue
        rows = {lang: translated[lang][code] for lang in LANGUAGES}
        concepts.append(
            Concept(
                id=len(concepts),
                hexcode=code,
                names={lang: r["label"] for lang, r in rows.items()},
                keywords={lang: tuple(r.get("tags", ())) for lang, r in rows.items()},
                group=group,
                subgroup=row["subgroup"],
                base=base(code),
            )
        )
    return concepts


def slug(name: str) -> str:
    """Lower-case words joined by hyphens, accents folded: how icon sets write names."""
    folded = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", folded.replace("'", "")).strip("-")


def by_code_point(chars: Mapping[str, str], concepts: Sequence[Concept]) -> dict[int, str]:
    """Concept id -> icon, for a style that lists code points.

    An icon that a private code point claims too is left out: of the two drawings of that name one
    has overwritten the other (OpenMoji's ``scroll`` is a mouse wheel).
    """
    ids = {key(concept.hexcode): concept.id for concept in concepts}
    private = {
        icon for code, icon in chars.items() if 0xE000 <= int(code.split("-")[0], 16) < 0xF900
    }
    return {
        ids[key(code)]: icon
        for code, icon in chars.items()
        if key(code) in ids and icon not in private
    }


def name_votes(
    concepts: Sequence[Concept], listed: Sequence[Mapping[int, str]]
) -> dict[str, collections.Counter[int]]:
    """How many sources call a concept by a name: CLDR, Unicode, and each style with code points."""
    votes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for concept in concepts:
        names = {slug(concept.names["en"])}
        parts = key(concept.hexcode).split("-")
        if len(parts) == 1:
            names.add(slug(unicodedata.name(chr(int(parts[0], 16)), "")))
        for name in names - {""}:
            votes[name][concept.id] += 1
            squeezed = name.replace("-", "")  # FxEmoji runs the words together
            if squeezed != name:
                votes[squeezed][concept.id] += 1
    for icons in listed:
        for concept_id, icon in icons.items():
            votes[icon][concept_id] += 1
    return votes


def by_name(
    icons: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
    votes: Mapping[str, collections.Counter[int]],
) -> dict[int, str]:
    """Concept id -> icon, for a style that lists names alone.

    An icon's own name decides; its aliases only where its own name is unknown. (EmojiOne 2 and the
    blobs list ``cricket``, an insect, as an alias of their ``cricket-game``.)
    """
    found: dict[int, str] = {}
    for icon in sorted(icons):
        for name in (icon, *aliases.get(icon, ())):
            ranked = votes[name].most_common(2) if name in votes else []
            if not ranked:
                continue
            if len(ranked) == 1 or ranked[0][1] > ranked[1][1]:
                found.setdefault(ranked[0][0], icon)
            break
    return found
