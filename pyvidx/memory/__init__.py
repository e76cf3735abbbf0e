"""Memory banks for videos of any length: what to keep of an endless stream of frames.

    policy = create("merge", capacity=20)           # or any of names()
    bank = policy.new(B, N, C)                      # a value; the policy holds options only
    bank = policy.push(bank, frame, seconds)        # [B, N, C], [B]
    entries = bank.entries()                        # rows [B, L, N, C], sizes, mask, first and last second of each

policy.layout says what is read: "grid", every entry has all its positions; "ragged", some, as the mask says (packed
makes lists of them).

Memory stays flat, over 100,000 frames as over 100, where a push leaves a number of entries that does not depend on how
many there were: merge, average, fifo, uniform, tome (over time; in space with a capacity), flash_vstream, streamforest.
It grows with the video in: concat, tome in space without a capacity, moviechat (both forms: `merged` frames for every
fragment), dtd and fluxmem (by whole frames: tokens that are dropped are marked, and `packed` leaves them out).

Functions of a whole clip: evs, vidcom2, keyframes, dtd_pixels, ordered_kmeans, moviechat_consolidate, and `shrink` of
merge; those whose number of tokens is known before are in PRUNERS.

A new policy is a file with a class and @register, like those in policies.py, whose one method is `_shrink_`;
tests/test_memory.py then holds it to the properties of all.
"""

from pyvidx.memory.bank import Bank, Entries, log_size_bias, packed
from pyvidx.memory.dtd import Dtd, dtd_pixels
from pyvidx.memory.evs import evs
from pyvidx.memory.files import beside, load, save
from pyvidx.memory.flash_vstream import Clusters, FlashVStream, ordered_kmeans, retrieve
from pyvidx.memory.fluxmem import FluxMem
from pyvidx.memory.keyframes import Keyframes, keyframes
from pyvidx.memory.layout import batched
from pyvidx.memory.merge import Average, Merge
from pyvidx.memory.moviechat import MovieChat, MovieChatOneVision, moviechat_consolidate
from pyvidx.memory.plot import History, plot
from pyvidx.memory.policies import Concat, Fifo, Uniform
from pyvidx.memory.policy import Policy
from pyvidx.memory.pruning import PRUNERS, compute_retained_tokens_count, compute_retention_mask
from pyvidx.memory.registry import POLICIES, create, names, register
from pyvidx.memory.streamforest import StreamForest
from pyvidx.memory.tome import ToMeSpace, ToMeTime, merge_tokens, reduce_tokens
from pyvidx.memory.vidcom2 import vidcom2

__all__ = [
    "POLICIES",
    "PRUNERS",
    "Average",
    "Bank",
    "Clusters",
    "Concat",
    "Dtd",
    "Entries",
    "Fifo",
    "FlashVStream",
    "FluxMem",
    "History",
    "Keyframes",
    "Merge",
    "MovieChat",
    "MovieChatOneVision",
    "Policy",
    "StreamForest",
    "ToMeSpace",
    "ToMeTime",
    "Uniform",
    "batched",
    "beside",
    "compute_retained_tokens_count",
    "compute_retention_mask",
    "create",
    "dtd_pixels",
    "evs",
    "keyframes",
    "load",
    "log_size_bias",
    "merge_tokens",
    "moviechat_consolidate",
    "names",
    "ordered_kmeans",
    "packed",
    "plot",
    "reduce_tokens",
    "register",
    "retrieve",
    "save",
    "vidcom2",
]
