# SPDX-License-Identifier: Apache-2.0
"""Temporal network: longest paths through a graph of each query frame's best reference frames.

As VCSL's benchmark has it (He et al., CVPR 2022; after Tan et al., ACM MM 2009). There the graph is
a networkx one and paths come from its ``dag_longest_path``; here edges lie in arrays, rows of the
query are visited in order, and a stack of maps is visited at once. Ties are broken alike: the first
predecessor as edges were added, the first end in networkx's topological order.

Two nodes of the published graph have no effect and are left out. The source links to nothing but
the sink; and the last frame's least node, which doubles as the sink, has only links of weight 0,
so no best path ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64

from m2jax.tasks.video import paths
from m2jax.tasks.video.maps import Boxes, Map, overlap

NODES = 2**21  # node-predecessor combinations that are visited at once
THIN = 64  # links per row up to which they are visited one by one
NOWHERE = -(10**9)  # reference frame of a node that is not there


@dataclass(frozen=True, kw_only=True)
class TemporalNetwork:
    """TN with VCSL's settings."""

    tn_max_step: int = 10  # frames of either video between linked nodes are fewer
    tn_top_k: int = 5  # reference frames of each query frame
    max_path: int = 10  # paths taken, and one more: the published loop has it so
    min_sim: float = 0.2  # of links; and segments are denser
    min_length: int = 5  # frames; segments are longer
    max_iou: float = 0.3  # segments that overlap an earlier one as much are dropped

    def __call__(self, maps: Sequence[Map]) -> list[Boxes]:
        """Segments of each map in the order of their paths; ends inclusive."""
        found: list[Boxes] = [paths.boxes([])] * len(maps)
        order = sorted(range(len(maps)), key=lambda i: (maps[i].dtype.itemsize, len(maps[i])))
        while order:
            members = [order.pop(0)]
            while order and self._fits(maps, [*members, order[0]]):
                members.append(order.pop(0))
            graphs = _Graphs(self, [maps[i] for i in members])
            for number, boxes in zip(members, graphs.segments(), strict=True):
                found[number] = paths.boxes(boxes)
        return found

    def _fits(self, maps: Sequence[Map], members: Sequence[int]) -> bool:
        last = maps[members[-1]]
        cells = len(members) * len(last) * self.tn_top_k**2 * self.tn_max_step
        shorter = len(maps[members[0]])  # padding costs too
        return cells <= NODES and len(last) <= 2 * shorter and last.dtype == maps[members[0]].dtype


def _best(similarity: Map, count: int) -> Int64[np.ndarray, "rows best"]:
    """The most similar columns of each row, best first.

    Equal ones keep their order, unlike in the published sort, where it depends on the machine.
    """
    left, rows = similarity.copy(), np.arange(len(similarity))
    found = np.empty((len(left), min(count, left.shape[1])), np.int64)
    for place in range(found.shape[1]):  # a few sweeps cost less than sorting long rows
        found[:, place] = left.argmax(axis=1)
        left[rows, found[:, place]] = -np.inf
    return found


class _Links:
    """The links of one map in lists, follower by follower, as predecessors lie in the arrays.

    Sums are of NumPy's scalars: they round as the arrays do.
    """

    def __init__(self, weight: np.ndarray, source: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        rows, ranks, _ = weight.shape
        places = np.argwhere(np.isfinite(weight))
        row, column = source(places[:, 0], places[:, 2])
        self.sources = (row * ranks + column).tolist()
        self.weights = list(weight[tuple(places.T)])
        followers = places[:, 0] * ranks + places[:, 1]
        first = np.flatnonzero(np.diff(followers, prepend=-1))
        ends = np.append(first, len(followers))[1:]
        named = followers[first]
        self.groups = list(zip(named.tolist(), first.tolist(), ends.tolist(), strict=True))
        self.zero = weight.dtype.type(0)
        self.parents = [-1] * (rows * ranks)  # the link, not the node

    def longest(self) -> list[int]:
        """Nodes at which the longest paths end; none where no path is longer than 0."""
        total = [self.zero] * len(self.parents)
        weights, sources = self.weights, self.sources
        most = self.zero
        for node, first, end in self.groups:
            best, parent = self.zero, -1
            for link in range(first, end):
                length = total[sources[link]] + weights[link]
                # The first of equal ones; a negative path is worse than none, one of 0 is not.
                if length > best or (parent < 0 and length == best):
                    best, parent = length, link
            self.parents[node] = parent
            total[node] = best
            most = max(most, best)
        return [node for node, length in enumerate(total) if length == most] if most > 0 else []

    def take(self, end: int) -> list[int]:
        """Nodes of the longest path to here, whose links weigh nothing from now on."""
        path = [end]
        while (link := self.parents[path[-1]]) >= 0:
            self.weights[link] = self.zero
            path.append(self.sources[link])
        return path[::-1]


@dataclass
class _Graphs:
    """Graphs of several maps of one precision, padded to one shape."""

    settings: TemporalNetwork
    maps: Sequence[Map]
    reference: np.ndarray = field(init=False)  # [maps, rows, ranks]
    weight: np.ndarray = field(init=False)  # [maps, rows, ranks, predecessors]; -inf: no link

    def __post_init__(self) -> None:
        rows = max(len(similarity) for similarity in self.maps)
        shape = len(self.maps), rows, self.settings.tn_top_k
        self.reference = np.full(shape, NOWHERE)
        similarity = np.full(shape, -np.inf, self.maps[0].dtype)
        for number, own in enumerate(self.maps):
            best = _best(own, self.settings.tn_top_k)
            self.reference[number, : len(own), : best.shape[1]] = best
            similarity[number, : len(own), : best.shape[1]] = np.take_along_axis(own, best, 1)
        self._link(similarity)

    def _link(self, similarity: np.ndarray) -> None:
        """Links each node to later ones: nearer than ``tn_max_step``, and none passes over another.

        A link from a row to a later one is not made past a reference frame that the row (by any of
        its nodes) has been linked to before. Predecessors of a node lie in the order in which the
        published code adds them: by row, then by rank.
        """
        count, rows, ranks = self.reference.shape
        steps = range(1, self.settings.tn_max_step)
        self.weight = np.full((count, rows, ranks, len(steps) * ranks), -np.inf, self.maps[0].dtype)
        nearest = np.full(self.reference.shape, -NOWHERE)  # linked frame after each node's own
        for step in steps:
            if step >= rows:
                break
            source = self.reference[:, :-step, :, None]
            target = self.reference[:, step:, None, :]
            ahead = target - source  # [maps, rows, rank of the source, rank of the target]
            linked = (ahead > 0) & (ahead < self.settings.tn_max_step)
            linked &= (similarity[:, step:] >= self.settings.min_sim)[:, :, None, :]
            linked &= target <= nearest[:, :-step, :, None]
            met = np.any(linked, axis=2, keepdims=True) & (ahead > 0)
            first = np.where(met, target, -NOWHERE).min(axis=3)
            nearest[:, :-step] = np.minimum(nearest[:, :-step], first)
            slot = (len(steps) - step) * ranks
            self.weight[:, step:, :, slot : slot + ranks] = np.where(
                linked.transpose(0, 1, 3, 2), similarity[:, step:, :, None], -np.inf
            )
        for number, own in enumerate(self.maps):  # the sink
            self.weight[number, len(own) - 1, min(ranks, own.shape[1]) - 1] = -np.inf

    def segments(self) -> list[list[list[int]]]:
        """Boxes of each map."""
        count, rows, ranks = self.reference.shape
        if np.isfinite(self.weight).sum() <= THIN * count * rows:
            return [self._thin_segments(number) for number in range(count)]
        before = self.settings.tn_max_step - 1  # empty rows in front
        total = np.zeros((count, before + rows, ranks), self.weight.dtype)
        parent = np.full((count, rows, ranks), -1)
        found: list[list[list[int]]] = [[] for _ in range(count)]
        orders: dict[int, dict[int, int]] = {}
        active, first, last = list(range(count)), 0, rows
        for _ in range(self.settings.max_path + 1):
            self._longest(total, parent, first, last)
            changed = []
            for number in list(active):
                path = self._take(number, total[number, before:], parent[number], orders)
                if not path:
                    active.remove(number)
                    continue
                changed += [path[1][0], path[-1][0]]
                box = self._judged(number, path, found[number])
                if box is not None:
                    found[number].append(box)
            if not active:
                break
            first, last = min(changed), max(changed)
        return found

    def _thin_segments(self, number: int) -> list[list[int]]:
        """Boxes of a map with few links, which are visited one by one."""
        ranks = self.reference.shape[2]
        links = _Links(self.weight[number], self._source)
        order: dict[int, int] = {}
        found: list[list[int]] = []
        for _ in range(self.settings.max_path + 1):
            ends = links.longest()
            if len(ends) > 1 and not order:
                order = self._topological(number)
            path = links.take(min(ends, key=lambda end: order.get(end, 0))) if ends else []
            if not path:
                break
            box = self._judged(number, [divmod(node, ranks) for node in path], found)
            if box is not None:
                found.append(box)
        return found

    def _longest(self, total: np.ndarray, parent: np.ndarray, first: int, last: int) -> None:
        """Longest path to each node; links have changed from row ``first`` to row ``last``."""
        count, rows, ranks = parent.shape
        before = total.shape[1] - rows
        same = 0  # rows in a row whose lengths stayed
        for row in range(max(first, 1), rows if before else 0):
            if row > last and same >= before:
                break  # nothing that later rows look at has changed
            past = total[:, row : row + before].reshape(count, 1, before * ranks)
            sums = past + self.weight[:, row]
            best = sums.argmax(axis=2)
            length = sums.max(axis=2)
            linked = length >= 0  # and not -inf; a negative path is worse than none
            length[~linked] = 0
            same = same + 1 if (length == total[:, before + row]).all() else 0
            total[:, before + row] = length
            best[~linked] = -1
            parent[:, row] = best

    def _take(
        self, number: int, total: np.ndarray, parent: np.ndarray, orders: dict[int, dict[int, int]]
    ) -> list[tuple[int, int]]:
        """Nodes (row, rank) of a map's longest path, whose links weigh nothing from now on."""
        longest = total.max()
        if not longest > 0:
            return []
        ends = np.flatnonzero(total == longest)
        if len(ends) > 1:
            if number not in orders:
                orders[number] = self._topological(number)
            end = min(ends.tolist(), key=orders[number].__getitem__)
        else:
            end = int(ends[0])
        ranks = parent.shape[1]
        node = divmod(end, ranks)
        path = [node]
        while parent[node] >= 0:
            slot = int(parent[node])
            self.weight[(number, *node, slot)] = 0
            node = self._source(node[0], slot)
            path.append(node)
        return path[::-1]

    def _source(self, row: Any, slot: Any) -> tuple[Any, Any]:
        """Row and rank of a node's predecessor, or of several."""
        back, rank = divmod(slot, self.reference.shape[2])
        return row - (self.settings.tn_max_step - 1) + back, rank

    def _topological(self, number: int) -> dict[int, int]:
        """Place of each node in networkx's order: by generation, then as their last link is cut."""
        ranks = self.reference.shape[2]
        followers: dict[int, list[int]] = {}
        waits = np.isfinite(self.weight[number]).sum(axis=2).reshape(-1)
        links = np.argwhere(np.isfinite(self.weight[number]))
        for row, rank, slot in links.tolist():  # by follower, so each list is in order
            source = self._source(row, slot)
            followers.setdefault(source[0] * ranks + source[1], []).append(row * ranks + rank)
        ready = np.flatnonzero((waits == 0) & (self.reference[number].reshape(-1) >= 0)).tolist()
        place: dict[int, int] = {}
        while ready:
            later = []
            for node in ready:
                place[node] = len(place)
                for follower in followers.get(node, ()):
                    waits[follower] -= 1
                    if not waits[follower]:
                        later.append(follower)
            ready = later
        return place

    def _judged(
        self, number: int, path: Sequence[tuple[int, int]], kept: Sequence[Sequence[int]]
    ) -> list[int] | None:
        """The box around a path where it is dense, long and new enough."""
        rows = np.array([row for row, _ in path])
        columns = np.array([self.reference[number, row, rank] for row, rank in path])
        score = float(self.maps[number][rows, columns].sum())
        if score <= 0:
            return None
        box = np.array([rows.min(), columns.min(), rows.max(), columns.max()])
        lengths = box[2:] - box[:2]
        if not score / (lengths.sum() / 2) > self.settings.min_sim:
            return None
        if not lengths.min() > self.settings.min_length:
            return None
        if kept and not overlap(box, np.array(kept)).max() < self.settings.max_iou:
            return None
        return box.tolist()
