"""What BT-Adapter's frozen towers give for every row, on disk: the branch never feeds the backbone, so it is the same
in every epoch that sees the same frames.

    FOLDER/index.json           what it was made from, and the shards
    FOLDER/00000.safetensors    of each row in a shard: layers [d, T, 1+P, C], text [E], at (variant, row read)

A row of ViT-L/14 with 8 frames takes 16.8 MB in float16. Frames and boxes are drawn once per variant: epoch e sees
those of variant e % variants.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyvidx.train.checkpoint import differences
from pyvidx.train.curve import progress
from pyvidx.train.distributed import Ranks
from pyvidx.train.fields import MANY, check_choices, check_ranges, fields
from pyvidx.train.outputs import sweep, written
from pyvidx.train.pairs import Pair, Pairs, collate

DTYPES = ("float16", "bfloat16", "float32")
# Names that safetensors has for them.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I64": "int64"}
INDEX = "index.json"
STALE = 3600  # seconds; another run may store in the same folder

Frozen = Callable[[Pairs], tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Features:
    """Where and how they are stored.

    Attributes:
        folder: of this data set and these towers alone; the same for all processes.
        variants: draws of frames and boxes to store of every row.
        dtype: of the file; "float32" keeps them to the bit, which batches of another size can change.
        shard: rows of a file.
    """

    folder: str
    variants: int = 1
    dtype: str = "float16"
    shard: int = 64

    def __post_init__(self):
        check_choices(self, {"dtype": DTYPES})
        check_ranges(self, {"variants": (1, MANY), "shard": (1, MANY)})

    @classmethod
    def from_dict(cls, values: dict) -> "Features":
        """Raises ValueError for fields that are unknown, missing or not of their types."""
        return cls(**fields(cls, values, ("folder",)))


def digest(*modules: nn.Module) -> str:
    """A hash of their parameters' names, dtypes and values."""
    result = hashlib.sha256()
    for module in modules:
        for name, p in sorted(module.state_dict().items()):
            result.update(f"{name} {p.dtype} {tuple(p.shape)} ".encode())
            result.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()


def store(
    features: Features,
    data: Dataset,
    frozen: Frozen,
    about: dict,
    ranks: Ranks,
    batch: int,
    workers: int = 0,
    *,
    shape: tuple[int, ...],
):
    """Write what is not there yet or is damaged; all processes call it, and each writes its share of the shards.

    Args:
        data: of Pair, indexed by (epoch, row).
        frozen: a batch to outputs of d backbone layers, [B, T, 1+P, C] each, and text embeddings [B, E].
        about: what the numbers depend on; JSON.
        batch: rows to run at once.
        workers: as in Recipe.
        shape: (d, T, 1+P, C, E) of what is stored.

    Raises:
        ValueError: the folder holds features of something else, or a value does not fit the dtype.
        OSError: a file cannot be written.
    """
    folder, about = Path(features.folder), _about(features, about)
    order = [(variant, row) for variant in range(features.variants) for row in range(len(data))]
    shards = [order[i : i + features.shard] for i in range(0, len(order), features.shard)]
    paths = [folder / f"{number:05d}.safetensors" for number in range(len(shards))]
    # One process looks at what is there, before any writes: all need the same list.
    found = None
    if ranks.first:
        _refuse_others(folder, _index(folder), about)
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder, STALE)
        found = {n: _found(p, about, (len(shards[n]), *shape), features.dtype) for n, p in enumerate(paths)}
    found = ranks.gathered(found)[0]
    mine = [number for number, broken in found.items() if broken is None][ranks.rank :: ranks.world]
    batches = {n: [shards[n][i : i + batch] for i in range(0, len(shards[n]), batch)] for n in mine}
    loader = iter(
        DataLoader(
            data,
            batch_sampler=[rows for n in mine for rows in batches[n]],  # one loader: workers take seconds to start
            collate_fn=list,
            num_workers=workers,
            generator=torch.Generator(),
            multiprocessing_context="spawn" if workers else None,
        )
    )
    bar = progress(len(mine), unit="shard of features") if ranks.first else None
    for number in mine:
        found[number] = _write(paths[number], islice(loader, len(batches[number])), frozen, features.dtype, about)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    for part in ranks.gathered({number: found[number] for number in mine}):
        found |= part
    if ranks.first:
        broken = {number * features.shard + int(i): why for number in found for i, why in found[number].items()}
        content = {"about": about, "rows": len(data), "broken": {str(place): why for place, why in broken.items()}}
        if content != _index(folder):
            with written(folder / INDEX) as part:
                part.write_text(json.dumps(content))
    ranks.total(0)  # nobody reads before it is there


class StoredPairs(Dataset):
    """The rows of a folder that `store` filled, indexed by (epoch, row).

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, or they were made from something else.
    """

    def __init__(self, features: Features, about: dict):
        self.folder, self.variants, self.shard = Path(features.folder), features.variants, features.shard
        content = _index(self.folder)
        if content is None:
            if not (self.folder / INDEX).exists():
                raise FileNotFoundError(f"train: there is no {self.folder / INDEX}")
            raise ValueError(f"train: {self.folder / INDEX} is damaged; start the run again and it is made anew")
        _refuse_others(self.folder, content, _about(features, about))
        self.rows, self.broken, self.content = content["rows"], content["broken"], about.get("rows")

    def __len__(self) -> int:
        return self.rows

    def digest(self) -> str | None:
        """What the rows are of, as of those that were stored."""
        return self.content

    def __getitem__(self, at: tuple[int, int]) -> Pair:
        """Raises RuntimeError where a shard cannot be read."""
        epoch, row = at
        place = epoch % self.variants * self.rows + row
        number, i = divmod(place, self.shard)
        path = self.folder / f"{number:05d}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                layers, text, read = (file.get_slice(name)[i].clone() for name in ("layers", "text", "at"))
        except (OSError, SafetensorError, IndexError) as error:
            raise RuntimeError(f"train: {path} cannot be read: {error}; start again and it is mended") from error
        if not 0 <= int(read[1]) < self.rows:
            raise RuntimeError(f"train: {path} is damaged: it names row {int(read[1])} of {self.rows}; remove it")
        # In this epoch: masks are drawn anew.
        return Pair((epoch, int(read[1])), text, layers.float(), self.broken.get(str(place), {}))

    collate = staticmethod(collate)


def _about(features: Features, about: dict) -> dict:
    own = {"variants": features.variants, "dtype": features.dtype, "shard": features.shard}
    return json.loads(json.dumps(about | own))


@torch.no_grad()
def _write(
    path: Path, batches: Iterable[list[Pair]], frozen: Frozen, dtype: str, about: dict
) -> dict[int, dict[str, str]]:
    """A shard; what of its rows could not be read, by their place in it."""
    parts, broken = {"layers": [], "text": [], "at": []}, []
    for pairs in batches:
        xs, text = frozen(collate(pairs))
        parts["layers"].append(torch.stack(xs, dim=1).to("cpu", getattr(torch, dtype)))
        parts["text"].append(text.float().cpu())  # few
        parts["at"].append(torch.tensor([pair.at for pair in pairs]))
        if not bool(parts["layers"][-1].isfinite().all()):
            raise ValueError(f"train: backbone outputs do not fit {dtype}; store them as bfloat16 or float32")
        broken += [pair.broken for pair in pairs]
    tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    found = {i: why for i, why in enumerate(broken) if why}
    header = {"format": "pt", "pyvidx": json.dumps({"about": about, "broken": found})}
    with written(path) as part:
        save_file(tensors, part, header)
    return found


def _index(folder: Path) -> dict | None:
    """The index of a folder; None where there is none that makes sense, which is made anew from the shards."""
    try:
        content = json.loads((folder / INDEX).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    shaped = isinstance(content, dict) and content.keys() == {"about", "rows", "broken"}
    if not shaped or type(content["rows"]) is not int or not isinstance(content["about"], dict):
        return None
    return content if _are_broken(content["broken"]) else None


def _refuse_others(folder: Path, content: dict | None, about: dict) -> None:
    other = differences(content["about"], about) if content is not None else ""
    if other:
        raise ValueError(
            f"train: the features in {folder} are of something else: {other}; "
            "remove them or give another folder of features"
        )


def _found(path: Path, about: dict, shape: tuple[int, ...], dtype: str) -> dict[str, dict[str, str]] | None:
    """What of a shard's rows could not be read; None: there is none, or it is damaged.

    Args:
        shape: (n, d, T, 1+P, C, E).
        dtype: of the layers.

    Raises:
        ValueError: it is whole, and of something else.
    """
    *layers, E = shape
    want = {"layers": (layers, dtype), "text": ([shape[0], E], "float32"), "at": ([shape[0], 2], "int64")}
    try:
        with safe_open(path, "pt") as file:  # refuses a file that is longer or shorter than its header says
            header = json.loads((file.metadata() or {}).get("pyvidx", "null"))
            slices = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (part.get_shape(), _DTYPES.get(part.get_dtype())) for name, part in slices.items()}
    except (FileNotFoundError, SafetensorError, ValueError, RecursionError):
        return None
    whole = isinstance(header, dict) and isinstance(header.get("about"), dict) and _are_broken(header.get("broken"))
    if not whole:
        return None
    _refuse_others(path.parent, header, about)
    return header["broken"] if found == want else None


def _are_broken(value: object) -> bool:
    """It is {place: {name: why}}."""

    def named(why: object) -> bool:
        return isinstance(why, dict) and all(isinstance(text, str) for text in why.values())

    return isinstance(value, dict) and all(k.isdecimal() and len(k) < 16 and named(why) for k, why in value.items())
