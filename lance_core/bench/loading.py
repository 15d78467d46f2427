"""Peak memory and time of loading a checkpoint, at the released sizes, without the released weights.

Writes sparse files with the released names, shapes and dtypes and no contents (they take no disk space and
read as zeros), loads each in a fresh process, and compares: the process's peak resident memory (VmHWM) with
the bound of result + largest tensor + 500 MB; the time with that of plainly reading the same bytes, each
tensor into new memory of its own that is dropped after (and, for comparison, all into one small buffer that
never leaves the cache). The kernel makes the zeros in memory, so both times are those of a warm page cache,
however large the file. Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..checkpoint import tiny
from ..checkpoint.checkpoint import VAE_FILES, VIT_FILE, VIT_FOLDER, Checkpoint, Progress, released_name
from ..checkpoint.quantize import FORMATS, stored_names
from ..checkpoint.tensor_files import DTYPES, SafetensorsFile
from ..config import IMAGE_TABLE_ROWS, LanceConfig, to_json
from ..errors import RequestError
from .case import RELEASED, vit_of
from .device import CPU, Peak, Stopwatch, child, free_memory, watched
from .memory import build, size_of
from .report import Block, Table, gigabytes

ALLOWANCE = 500 * 10**6  # bytes over the result and the largest tensor
SPARE = 2 * 10**9  # bytes that must be free beside the result
RATIO = 1.5  # of the time of reading
BUFFER = 8 << 20
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Stored:
    """One checkpoint to load into bf16. stored: dtype or format of the experts in the file."""

    name: str
    stored: str
    video: bool = False

    @property
    def label(self) -> str:
        if self.stored != "fp32":
            return f"converted, {self.stored}, one file"
        return f"released, fp32, {'video' if self.video else 'image'}"


CASES = [
    Stored("image", "fp32"),
    Stored("video", "fp32", video=True),
    *(Stored(name, name) for name in ("bf16", *FORMATS)),
]


# -- sparse files --------------------------------------------------------------------------------------------


def write_sparse(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """A safetensors file of that layout whose contents are a hole. Returns its size in bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return 8 + len(text) + at


def layout(part: str, config: LanceConfig, stored: str) -> Tensors:
    """A part's tensors under the names of a model file."""
    found: Tensors = {}
    for name, tensor in build(part, config, stored, "meta", joined=False).state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if stored in FORMATS:
            name = f"{owner}.{stored_names(FORMATS[stored], [leaf])[leaf]}" if owner else leaf
        prefix = {"vit": "vit_model.", "vae": "vae."}.get(part)
        name = prefix + name if prefix else released_name(name, part == "gen")
        found[name] = (torch.float32 if stored == "fp32" else tensor.dtype, tuple(tensor.shape))
    return found


def write_case(folder: Path, case: Stored, config: LanceConfig) -> Path:
    """The checkpoint of a case, under `folder`. Returns what to open."""
    folder.mkdir(parents=True)
    model = layout("und", config, case.stored) | layout("gen", config, case.stored)
    vit, vae = (layout(part, config, case.stored) for part in ("vit", "vae"))
    vit_json = to_json(vit_of(config))
    with tempfile.TemporaryDirectory() as small:
        donor = tiny.write(Path(small) / "tiny") / "Lance_3B"
        raw = _read_json(donor / "llm_config.json") | tiny.llm_json(config.llm, vit_of(config))
        if case.stored != "fp32":
            tokenizer = _read_json(donor / "tokenizer.json")
            told = {"llm_config": raw, "tokenizer": tokenizer, "variant": "video", "vit_config": vit_json}
            mark: Tensors = {"scaled_fp8": (torch.float8_e4m3fn, (0,))} if case.stored == "fp8" else {}
            path = folder / f"lance_{case.stored}.safetensors"
            write_sparse(path, model | vit | vae | mark, {"format": "pt", "lance": json.dumps(told)})
            return path
        home = folder / ("Lance_3B_Video" if case.video else "Lance_3B")
        shutil.copytree(donor, home)
    (home / "llm_config.json").write_text(json.dumps(raw), encoding="utf-8")
    rows = IMAGE_TABLE_ROWS * (31 if case.video else 1)
    model["latent_pos_embed.pos_embed"] = (torch.float32, (rows, config.llm.hidden_size))
    write_sparse(home / "model.safetensors", model | vit if case.video else model)
    if not case.video:
        (folder / VIT_FOLDER).mkdir()
        (folder / VIT_FOLDER / "config.json").write_text(json.dumps(vit_json), encoding="utf-8")
        write_sparse(folder / VIT_FOLDER / VIT_FILE, _without("vit_model.", vit))
    write_sparse(folder / VAE_FILES[1], _without("vae.", vae))
    return home


def _without(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): entry for name, entry in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# -- one process ---------------------------------------------------------------------------------------------


def load(path: Path, parts: list[str]) -> dict[str, Any]:
    """Load parts into bf16 and say what it took."""
    memory, watch = Peak(CPU), Stopwatch()
    before = memory.now()
    checkpoint = Checkpoint(path)
    opening = watch.lap()
    modules = [checkpoint.load(part, dtype=torch.bfloat16) for part in parts]
    seconds = opening + watch.lap()
    sizes = [size for _, _, size in _ranges(checkpoint, parts)]
    return {
        "seconds": seconds,
        "opening_seconds": opening,
        "before": before,
        "peak": memory.read(),
        "result": sum(p.nbytes for module in modules for p in module.parameters()),
        "largest": max(sizes),
        "read": sum(sizes),
    }


def _ranges(checkpoint: Checkpoint, parts: list[str]) -> list[tuple[str, int, int]]:
    """(file, first byte, bytes) of every tensor, in the order they lie."""
    tensors = [tensor for part in parts for tensor in checkpoint.parts[part].tensors.values()]
    files = [(file, file.entries[key]) for file, key in tensors if isinstance(file, SafetensorsFile)]
    return sorted((str(file.path), entry.start, entry.nbytes) for file, entry in files)


def read(path: Path, parts: list[str]) -> dict[str, Any]:
    """Read the same bytes in the same order, each tensor into new memory; then all into one buffer."""
    ranges = _ranges(Checkpoint(path), parts)
    buffer = torch.empty(BUFFER, dtype=torch.uint8)
    times = {}
    with ExitStack() as opened:
        files = {n: opened.enter_context(open(n, "rb", buffering=0)) for n in {name for name, _, _ in ranges}}
        for what in ("warm_up", "read_seconds", "buffer_seconds"):
            watch = Stopwatch()
            for name, start, size in ranges:
                files[name].seek(start)
                if what == "read_seconds":
                    # From the system, as the memory of weights that stay is; the allocator would hand out
                    # used memory again.
                    chunks = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).split(BUFFER)
                else:
                    chunks = tuple(buffer[: min(BUFFER, size - at)] for at in range(0, size, BUFFER))
                for chunk in chunks:
                    files[name].readinto(memoryview(chunk.numpy()))
            times[what] = watch.lap()
    return times


# -- every case ----------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """Every case asked for, each load and each reading in a process of its own.

    Raises:
        RequestError: an option out of range, too little memory, or a system without /proc.
    """
    total = RELEASED.llm.num_layers
    layers = total if args.layers is None else checks.whole("layers", args.layers, 1, total)
    checks.whole("repeat", args.repeat, 1, 10_000)
    names = [case.name for case in CASES]
    unknown = sorted(set(args.cases or ()) - set(names))
    if unknown:
        raise RequestError(f"there is no case {unknown[0]!r}; expected some of {', '.join(names)}")
    if args.folder and not Path(args.folder).is_dir():
        raise RequestError(f"--folder {args.folder} does not exist; make it first")
    if Peak(CPU).read() is None:
        raise RequestError("the peak of loading is read from /proc, which this system does not have")
    config = replace(RELEASED, llm=replace(RELEASED.llm, num_layers=layers))
    need, there = sum(size_of(part, config) for part in args.parts) + SPARE, free_memory(CPU)
    if there < need:
        raise RequestError(
            f"{need / 1e9:.1f} GB of memory are needed and {there / 1e9:.1f} GB are free; try fewer --layers"
        )
    chosen = {f"loading {case.name}": case for case in CASES if case.name in (args.cases or names)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = [
            measure(case, config, args.parts, args.repeat, Path(folder)) for case in watched(chosen, progress)
        ]
    told = {"bench": "loading", "torch": torch.__version__, "repeat": args.repeat}
    return told | {"layers": layers, "of_layers": total, "parts": args.parts, "results": results}


def measure(case: Stored, config: LanceConfig, parts: list[str], repeat: int, folder: Path) -> dict[str, Any]:
    """One case: the largest peak and the fastest times of `repeat` turns."""
    path = write_case(folder / case.name, case, config)
    loads, reads = [], []
    for _ in range(repeat):
        reads.append(child(__name__, "read", str(path), *parts))
        loads.append(child(__name__, "load", str(path), *parts))
    shutil.rmtree(folder / case.name)
    found = max(loads, key=lambda one: one["peak"] - one["before"])
    fastest = {key: min(one[key] for one in reads) for key in ("read_seconds", "buffer_seconds")}
    return found | fastest | {"case": case.label, "seconds": min(one["seconds"] for one in loads)}


def document(result: dict[str, Any]) -> list[Block]:
    """A row a case; what breaks a bound says so."""
    rows = []
    for one in result["results"]:
        bound, grown = one["result"] + one["largest"] + ALLOWANCE, one["peak"] - one["before"]
        ratio = one["seconds"] / one["read_seconds"]
        sizes = [gigabytes(one[key], 2) for key in ("read", "result", "largest", "peak")]
        sizes += [f"{gigabytes(grown, 2)}{' (over)' if grown > bound else ''}", gigabytes(bound, 2)]
        times = [f"{one[key]:.1f}" for key in ("seconds", "read_seconds", "buffer_seconds")]
        verdict = f"{ratio:.2f}{' (over)' if ratio > RATIO else ''}"
        rows.append([one["case"], *sizes, f"{one['opening_seconds']:.2f}", *times, verdict])
    head = (
        *("checkpoint", "read GB", "result GB", "largest tensor GB", "peak RSS GB", "of it loading GB"),
        *("bound GB", "of it opening s", "load s", "read s", "into one buffer s", "load / read"),
    )
    cut = result["layers"] < result["of_layers"]
    layers = f" of {result['layers']} layers instead of {result['of_layers']}" if cut else ""
    torch_version = result["torch"].split("+")[0]
    title = f"Loading {', '.join(result['parts'])}{layers} into bf16, best of {result['repeat']}, torch "
    return [f"{title}{torch_version}:", Table(head, rows)]


if __name__ == "__main__":
    what, path, *parts = sys.argv[1:]
    sys.stdout.write(json.dumps({"load": load, "read": read}[what](Path(path), parts)))
