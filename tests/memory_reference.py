"""The bank policies written as lists and loops in float64, one video and one position at a time."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Entry:
    row: Tensor  # [C] float64
    frames: list[int]  # the source frames it holds or stands for
    size: int = 1


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x / max(x.norm().item(), 1e-8)) @ (y / max(y.norm().item(), 1e-8)))


def mean(x: Entry, y: Entry, weighted: bool = True) -> Entry:
    s, t = (x.size, y.size) if weighted else (1, 1)
    return Entry((s * x.row + t * y.row) / (s + t), sorted(x.frames + y.frames), x.size + y.size)


def first_best(scores: dict):
    """The key of the largest score, the first one in order of insertion."""
    return max(scores, key=scores.get)


def merge(bank: list[Entry], weighted: bool = True, hard: bool = False, alike=cosine) -> list[Entry]:
    k = first_best({k: alike(bank[k].row, bank[k + 1].row) for k in range(len(bank) - 1)})
    both = mean(bank[k], bank[k + 1], weighted)
    return bank[:k] + [Entry(bank[k + 1].row, both.frames, both.size) if hard else both] + bank[k + 2 :]


def mean_of_cosines(x: Tensor, y: Tensor, N: int) -> float:
    """Of each of the N rows that x and y hold."""
    return sum(cosine(a, b) for a, b in zip(x.view(N, -1), y.view(N, -1))) / N


def fifo(bank: list[Entry]) -> list[Entry]:
    return bank[1:]


def uniform(bank: list[Entry]) -> list[Entry]:
    k = first_best({k: -bank[k].size - bank[k + 1].size for k in range(len(bank) - 1)})
    both = Entry(bank[k].row, bank[k].frames + bank[k + 1].frames, bank[k].size + bank[k + 1].size)
    return bank[:k] + [both] + bank[k + 2 :]


def tome_time(bank: list[Entry]) -> list[Entry]:
    even, odd = range(0, len(bank), 2), range(1, len(bank), 2)
    a, b = first_best({(a, b): cosine(bank[a].row, bank[b].row) for a in even for b in odd})
    rest = [entry for i, entry in enumerate(bank) if i not in (a, b)]
    return sorted([*rest, mean(bank[a], bank[b])], key=lambda entry: entry.frames[0])


def tome_space(frame: Tensor, tokens: int) -> list[Entry]:
    """[N, C] -> tokens; `frames` are the numbers of the tokens that each holds."""
    x = [Entry(row.double(), [n]) for n, row in enumerate(frame)]
    while len(x) > tokens:
        r = min(len(x) - tokens, len(x) // 2)
        A, B = x[0::2], x[1::2]
        scores = [[cosine(a.row, b.row) for b in B] for a in A]
        order = sorted(range(len(A)), key=lambda i: -max(scores[i]))
        sums = [b.row * b.size for b in B]
        for i in order[:r]:
            d = scores[i].index(max(scores[i]))
            sums[d] = sums[d] + A[i].row * A[i].size
            B[d] = Entry(B[d].row, sorted(B[d].frames + A[i].frames), B[d].size + A[i].size)
        x = [A[i] for i in order[r:]] + [Entry(s / b.size, b.frames, b.size) for s, b in zip(sums, B)]
    return x


def run(step, frames: Tensor, capacity: int | None, anchors: int = 0, whole_frame: bool = True) -> list[list[Entry]]:
    """frames [T, N, C] -> at each position the entries after the last frame, anchors first. Where decisions are taken
    for whole frames, a "position" is the frame and its rows are N * C wide."""
    if whole_frame:
        frames = frames.flatten(1)[:, None]
    result = []
    for n in range(frames.shape[1]):
        held: list[Entry] = []
        bank: list[Entry] = []
        for t, frame in enumerate(frames):
            entry = Entry(frame[n].double(), [t])
            if len(held) < anchors:
                held.append(entry)
                continue
            bank.append(entry)
            if capacity is not None and len(bank) > capacity - anchors:
                bank = step(bank)
        result.append(held + bank)
    return result
