"""A labelled graph -> bytes that spell it out, its vertices in an order that hardly depends on how they were numbered.

Equal codes are equal graphs, always: a code holds every label and every edge. The reverse holds for nearly all graphs
of chemistry but is no promise, so a code may stand in front of a computation (a memo of it never errs, and misses a
little too often), not for the class itself. The order: vertices are coloured by repeated refinement (Weisfeiler,
Lehman), then visited depth first from the smallest colour, neighbours by colour.

Bytes of a code, vertex after vertex: its label (4 bytes, little-endian as all numbers), how many edges lead to vertices
before it (2), and for each of these, ascending, the vertex (2) and the edge's label (1).
"""

import numpy as np
from numba import njit

LABEL_BYTES, VERTEX_BYTES, EDGE_BYTES = 4, 6, 3
_ROUNDS = 8


@njit(cache=True)
def mix(state: int, value: int) -> int:
    """A 64-bit hash of two 64-bit numbers (the finaliser of splitmix64)."""
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(value) + np.uint64(0x632BE59BD9B4E019)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@njit(cache=True)
def write_code(
    labels: np.ndarray, degree: np.ndarray, neighbors: np.ndarray, edge_labels: np.ndarray, code: np.ndarray, start: int
) -> int:
    """Write the code of a graph of n vertices to `code[start:]` (uint8), and return where it ends.

    labels: uint32 [n]; degree: int32 [n]; neighbors, edge_labels: int32 and uint8 [n, largest degree], of which the
    first `degree` entries of a row count.
    """
    n = len(labels)
    colors = _refine(labels, degree, neighbors, edge_labels)
    number = np.full(n, -1, dtype=np.int32)  # of each vertex, as visited
    pending = np.empty(neighbors.shape[1] * n + 1, dtype=np.int32)
    count = visited = 0
    while visited < n:
        if count == 0:
            pending[0], count = _smallest_unvisited(colors, number), 1
        count -= 1
        vertex = pending[count]
        if number[vertex] >= 0:
            continue
        number[vertex] = visited
        visited += 1
        start = _write_vertex(vertex, labels[vertex], degree[vertex], neighbors, edge_labels, number, code, start)
        first = count
        for slot in range(degree[vertex]):
            neighbor = neighbors[vertex, slot]
            if number[neighbor] < 0:
                place = count
                while place > first and colors[pending[place - 1]] < colors[neighbor]:
                    pending[place] = pending[place - 1]
                    place -= 1
                pending[place] = neighbor
                count += 1
    return start


@njit(cache=True)
def _smallest_unvisited(colors: np.ndarray, number: np.ndarray) -> int:
    smallest = -1
    for vertex in range(len(colors)):
        if number[vertex] < 0 and (smallest < 0 or colors[vertex] < colors[smallest]):
            smallest = vertex
    return smallest


@njit(cache=True)
def _refine(labels: np.ndarray, degree: np.ndarray, neighbors: np.ndarray, edge_labels: np.ndarray) -> np.ndarray:
    """A colour for each vertex that follows from its surroundings: uint64 [n]."""
    n = len(labels)
    colors, refined = np.empty(n, dtype=np.uint64), np.empty(n, dtype=np.uint64)
    for vertex in range(n):
        colors[vertex] = mix(labels[vertex], degree[vertex])
    for _ in range(_ROUNDS):
        for vertex in range(n):
            around = np.uint64(0)
            for slot in range(degree[vertex]):
                around += mix(colors[neighbors[vertex, slot]], edge_labels[vertex, slot])
            refined[vertex] = mix(colors[vertex], around)
        colors, refined = refined, colors
    return colors


@njit(cache=True)
def _write_vertex(
    vertex: int,
    label: int,
    degree: int,
    neighbors: np.ndarray,
    edge_labels: np.ndarray,
    number: np.ndarray,
    code: np.ndarray,
    at: int,
) -> int:
    slots = np.empty(degree, dtype=np.int32)
    earlier = np.empty(degree, dtype=np.int32)
    count = 0
    for slot in range(degree):
        other = number[neighbors[vertex, slot]]
        if 0 <= other < number[vertex]:
            slots[count], earlier[count] = slot, other
            count += 1
    for byte in range(LABEL_BYTES):
        code[at + byte] = (label >> (8 * byte)) & 255
    code[at + 4], code[at + 5] = count & 255, count >> 8
    at += VERTEX_BYTES
    for _ in range(count):
        first = 0
        for index in range(1, count):
            if earlier[index] < earlier[first]:
                first = index
        code[at], code[at + 1] = earlier[first] & 255, earlier[first] >> 8
        code[at + 2] = edge_labels[vertex, slots[first]]
        earlier[first] = 1 << 30
        at += EDGE_BYTES
    return at
