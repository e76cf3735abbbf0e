"""Products of tensor cores, D = A B + C of 16 x k by k x 8, from sm_75 on; those of sm_70 are left out.

Lane 4 g + t of a warp holds, two to a register for 16 bits: of A rows g and g + 8, of B column g, of C and D the
neighbors 2 t and 2 t + 1 of rows g and g + 8. Products and sums are float64 here, and rounded at the end.
"""

import numpy as np

from pyvidx.bench.operands import F32, F64, U32

G, T = np.arange(32) // 4, np.arange(32) % 4


def _halves(words: np.ndarray) -> list[np.ndarray]:
    return [(words >> U32(shift) & U32(0xFFFF)).astype(np.uint16).view(np.float16) for shift in (0, 16)]


def _bfloats(words: np.ndarray) -> list[np.ndarray]:
    return [(words << U32(16)).view(F32), (words & U32(0xFFFF_0000)).view(F32)]


def _tf32(words: np.ndarray) -> list[np.ndarray]:
    return [(words & U32(0xFFFF_E000)).view(F32)]


def product(more: list[str], o: list[str]):
    """A function of warp and mask, as in semantics.build; None for what is left out."""
    if more[0] not in ("16816", "1688", "1684") or "F32" not in more:
        return None
    depth = int(more[0][3:])
    parts = _tf32 if "TF32" in more else _bfloats if "BF16" in more else _halves
    each = 1 if "TF32" in more else 2  # numbers in a register
    blocks = depth // (4 * each)
    first = [None if x.startswith("RZ") else int(x[1:].split(".")[0]) for x in o[:4]]

    def register(w, start: int | None, i: int) -> np.ndarray:
        return np.zeros(32, U32) if start is None else w.file["R"][start + i]

    def run(w, m):
        a, b, c = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))
        for i in range(blocks):
            for j in range(each):
                at = 4 * each * i + each * T + j
                for half in range(2):
                    a[G + 8 * half, at] = parts(register(w, first[1], 2 * i + half))[j]
                b[at, G] = parts(register(w, first[2], i))[j]
        places = [(G + 8 * (i // 2), 2 * T + i % 2) for i in range(4)]
        for i, place in enumerate(places):
            c[place] = register(w, first[3], i).view(F32)
        d = (a.astype(F64) @ b + c).astype(F32)
        for i, place in enumerate(places):
            np.copyto(w.file["R"][first[0] + i], np.ascontiguousarray(d[place]).view(U32), where=m)

    return run
