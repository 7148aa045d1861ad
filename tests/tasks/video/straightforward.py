# SPDX-License-Identifier: Apache-2.0
"""The classical methods in loops over cells and dictionaries, one map at a time.

What the arrays' forms are compared with, in tests and for speed in benchmarks/video.py.
"""

import itertools

import numpy as np

from m2jax.tasks.video.paths import segments_of


def hough(s, min_sim, iou_thresh, max_peaks=100):
    """HV."""
    s = np.where(s < min_sim, s.dtype.type(0), s)
    n, m = s.shape
    votes = []
    for offset in range(1 - n, m):
        diagonal = np.diagonal(s, offset)
        if (diagonal >= min_sim).any():
            q = max(0, -offset)
            end = q + len(diagonal) - 1
            votes.append(
                (float(diagonal.sum(dtype=np.float64)), (q, q + offset, end, end + offset))
            )
    votes.sort(key=lambda vote: -vote[0])
    kept = []
    for score, box in votes[:max_peaks]:
        if score > 0 and all(iou(box, other) <= iou_thresh for other in kept):
            kept.append(box)
    return [list(box) for box in kept]


def iou(a, b):
    """Of boxes with inclusive ends."""
    w = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return w * h / (sum(areas) - w * h)


def warping(s, discontinue, min_sim, min_length):
    """DTW."""
    n, m = s.shape
    cost = (1 - s).tolist()
    total = np.full((n + 1, m + 1), np.inf).tolist()
    total[0][0] = 0.0
    for i in range(n):
        for j in range(m):
            least = min(total[i][j + 1], total[i + 1][j], total[i][j])
            total[i + 1][j + 1] = cost[i][j] + least
    i, j, path = n - 1, m - 1, [(n - 1, m - 1)]
    while i or j:
        around = (total[i][j], total[i][j + 1], total[i + 1][j])
        k = 2 if i == 0 else 1 if j == 0 else around.index(min(around))
        i, j = i - (k < 2), j - (k != 1)
        path.append((i, j))
    path = np.array(path[::-1])
    limits = {"longest": discontinue, "at_least": min_sim, "min_length": min_length}
    return segments_of(path, s, **limits)


def dynamic(s, discontinue, min_sim, ave_sim, min_length, diagonal_thres):
    """DP."""
    s = s + 1
    n, m = s.shape
    best, unmatched, came = s.copy(), np.zeros((n, m), int), np.full((n, m), -1)
    for i in range(1, n):
        for j in range(1, m):
            cells = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
            half = 0.5 * float(s[i, j])
            sums = (
                float(best[cells[0]] + s[i, j]),
                float(best[cells[1]]) + half,
                float(best[cells[2]]) + half,
            )
            k = sums.index(max(sums))
            if float(s[i, j]) < min_sim:
                unmatched[i, j] = unmatched[cells[k]] + 1
            if unmatched[i, j] <= discontinue:
                best[i, j], came[i, j] = sums[k], k
    found = []
    for _ in range(100):
        i, j = np.unravel_index(np.argmax(best), best.shape)
        if best[i, j] == -np.inf:
            break
        path = [(i, j)]
        while came[i, j] >= 0:
            i, j = i - (came[i, j] < 2), j - (came[i, j] != 1)
            if best[i, j] == -np.inf:
                break
            path.append((i, j))
        path = np.array(path[::-1])
        best[path[0, 0] : path[-1, 0] + 1, path[0, 1] : path[-1, 1] + 1] = -np.inf
        limits = {"longest": diagonal_thres, "at_least": ave_sim, "min_length": min_length}
        found += segments_of(path, s, **limits)
    return found


def network(s, tn_max_step, tn_top_k, max_path, min_sim, min_length, max_iou):
    """TN with source and sink, as the published graph has them."""
    nodes, before, after = graph(s, tn_max_step, tn_top_k, min_sim)
    order = generations(before, after)
    found = []
    for _ in range(max_path + 1):
        path = longest_path(order, before)
        for u, v in itertools.pairwise(path):
            before[v][u] = 0
        inner = [nodes[v] for v in path if v not in (0, len(nodes) - 1)]
        if not inner:
            break
        box = [f(axis) for f in (min, max) for axis in zip(*inner, strict=True)]
        score, (dq, dr) = sum(s[node] for node in inner), (box[2] - box[0], box[3] - box[1])
        if min(dq, dr) <= min_length or score / ((dq + dr) / 2) <= min_sim:
            continue
        if max((iou(box, other) for other in found), default=0) < max_iou:
            found.append(box)
    return found


def graph(s, max_step, top_k, min_sim):
    """Nodes, and the links to and from each in the order they are added."""
    rows, top_k = len(s), min(top_k, s.shape[1])
    ranked = np.argsort(-s, axis=1, kind="stable")[:, :top_k].tolist()
    nodes = [(-1, -1)] + [(q, r) for q in range(rows) for r in ranked[q]]
    before, after = ([{} for _ in nodes] for _ in range(2))
    for q in range(rows):
        seen = set()
        for later in range(q + 1, min(rows - 1, q + max_step - 1) + 1):
            new = set()
            for rank, r in enumerate(ranked[later]):
                for of, start in enumerate(ranked[q]):
                    near = 0 < r - start < max_step and s[later, r] >= min_sim
                    if near and not any(start < x < r for x in seen):
                        u, v = 1 + q * top_k + of, 1 + later * top_k + rank
                        before[v][u] = after[u][v] = s[later, r]
                        new.add(r)
            seen |= new
    sink = len(nodes) - 1
    for u, (q, r) in enumerate(nodes[:-1]):
        if 0 < nodes[sink][0] - q <= max_step and 0 < nodes[sink][1] - r <= max_step:
            before[sink][u] = after[u][sink] = 0
    return nodes, before, after


def generations(before, after):
    """networkx's topological order."""
    waits = [len(links) for links in before]
    ready = [v for v, count in enumerate(waits) if not count]
    order = []
    while ready:
        order += ready
        later = []
        for u in ready:
            for v in after[u]:
                waits[v] -= 1
                if not waits[v]:
                    later.append(v)
        ready = later
    return order


def longest_path(order, before):
    """networkx's ``dag_longest_path``."""
    length = {}
    for v in order:
        ways = [(length[u][0] + weight, u) for u, weight in before[v].items()]
        best = max(ways, key=lambda way: way[0]) if ways else (0, v)
        length[v] = best if best[0] >= 0 else (0, v)
    v, u, path = max(length, key=lambda node: length[node][0]), None, []
    while u != v:
        path.append(v)
        u, v = v, length[v][1]
    return path[::-1]


METHODS = {"HV": hough, "DTW": warping, "DP": dynamic, "TN": network}
