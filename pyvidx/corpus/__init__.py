"""Many files in, many embeddings out.

for one in encode_videos(paths, model): ...          # pyvidx.corpus.encode: a stream of results
read("embeddings/").pooled                           # what `pyvidx encode FOLDER --out embeddings/` wrote, as arrays
for row in iterate("embeddings/"): ...               # the same row by row, for what is larger than memory
"""

from pyvidx.corpus.embeddings import Embeddings, iterate, load, read, save
from pyvidx.corpus.encode import Encoded, Timing, encode_videos
from pyvidx.corpus.folder import Corpus, Manifest

__all__ = ["Corpus", "Embeddings", "Encoded", "Manifest", "Timing", "encode_videos", "iterate", "load", "read", "save"]
