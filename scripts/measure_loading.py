"""Peak memory and time of loading a checkpoint, at the released sizes, without the released weights.

    python scripts/measure_loading.py [--layers N] [--cases image fp8] [--json FILE]

Writes sparse files with the released names, shapes and dtypes and no contents (they take no disk space and
read as zeros), loads each in a fresh process through lance_core, and compares: the process's peak resident
memory (VmHWM) with the bound of result + largest tensor + 500 MB; the time with that of plainly reading the
same bytes, each tensor into new memory of its own that is dropped after (and, for comparison, all into one
small buffer that never leaves the cache). The kernel makes the zeros in memory, so both times are those of a
warm page cache, however large the file. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measure_memory import RELEASED, build, table  # noqa: E402

from lance_core.bench.device import free_memory
from lance_core.checkpoint import tiny
from lance_core.checkpoint.checkpoint import VAE_FILES, VIT_FILE, VIT_FOLDER, Checkpoint, released_name
from lance_core.checkpoint.quantize import FORMATS, stored_names
from lance_core.checkpoint.tensor_files import DTYPES
from lance_core.config import IMAGE_TABLE_ROWS, LanceConfig, to_json

ALLOWANCE = 500 * 10**6  # bytes over the result and the largest tensor
RATIO = 1.5  # of the time of reading
BUFFER = 8 << 20
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Case:
    """One checkpoint to load into bf16. stored: dtype or format of the experts in the file."""

    name: str
    stored: str
    video: bool = False

    @property
    def label(self) -> str:
        if self.stored != "fp32":
            return f"converted, {self.stored}, one file"
        return f"released, fp32, {'video' if self.video else 'image'}"


CASES = [Case("image", "fp32"), Case("video", "fp32", True), *(Case(f, f) for f in ("bf16", *FORMATS))]


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


def write_case(folder: Path, case: Case, config: LanceConfig) -> Path:
    """The checkpoint of a case, under `folder`. Returns what to open."""
    folder.mkdir(parents=True)
    model = {
        name: entry for part in ("und", "gen") for name, entry in layout(part, config, case.stored).items()
    }
    vit, vae = (layout(part, config, case.stored) for part in ("vit", "vae"))
    with tempfile.TemporaryDirectory() as small:
        donor = tiny.write(Path(small) / "tiny") / "Lance_3B"
        raw = json.loads((donor / "llm_config.json").read_text(encoding="utf-8")) | tiny.llm_json(
            config.llm, config.vit
        )
        if case.stored != "fp32":
            tokenizer = json.loads((donor / "tokenizer.json").read_text(encoding="utf-8"))
            told = {
                "llm_config": raw,
                "tokenizer": tokenizer,
                "variant": "video",
                "vit_config": to_json(config.vit),
            }
            mark = {"scaled_fp8": (torch.float8_e4m3fn, (0,))} if case.stored == "fp8" else {}
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
        (folder / VIT_FOLDER / "config.json").write_text(json.dumps(to_json(config.vit)), encoding="utf-8")
        write_sparse(
            folder / VIT_FOLDER / VIT_FILE,
            {name.removeprefix("vit_model."): entry for name, entry in vit.items()},
        )
    write_sparse(folder / VAE_FILES[1], {name.removeprefix("vae."): entry for name, entry in vae.items()})
    return home


# -- one process ---------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """Bytes in a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def load(path: Path, parts: list[str]) -> dict[str, Any]:
    """Load parts into bf16 and say what it took."""
    before = status("VmRSS")
    began = time.perf_counter()
    checkpoint = Checkpoint(path)
    opened = time.perf_counter() - began
    modules = [checkpoint.load(part, dtype=torch.bfloat16) for part in parts]
    seconds = time.perf_counter() - began
    ranges = [(file, key) for part in parts for file, key in checkpoint.parts[part].tensors.values()]
    return {
        "seconds": seconds,
        "opening_seconds": opened,
        "before": before,
        "peak": status("VmHWM"),
        "result": sum(p.nbytes for module in modules for p in module.parameters()),
        "largest": max(file.entries[key].nbytes for file, key in ranges),
        "read": sum(file.entries[key].nbytes for file, key in ranges),
    }


def read(path: Path, parts: list[str]) -> dict[str, Any]:
    """Read the same bytes in the same order, each tensor into new memory; then all into one buffer."""
    checkpoint = Checkpoint(path)
    ranges = sorted(
        (str(file.path), file.entries[key].start, file.entries[key].nbytes)
        for part in parts
        for file, key in checkpoint.parts[part].tensors.values()
    )
    buffer = torch.empty(BUFFER, dtype=torch.uint8)
    times = {"warm_up": 0.0, "read_seconds": 0.0, "buffer_seconds": 0.0}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(name, "rb", buffering=0))
            for name in {name for name, _, _ in ranges}
        }
        for what in times:
            began = time.perf_counter()
            for name, start, size in ranges:
                files[name].seek(start)
                # From the system, as the memory of weights that stay is; the allocator would hand out used
                # memory again.
                into = (
                    torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
                    if what == "read_seconds"
                    else buffer
                )
                for part in (
                    into.split(BUFFER)
                    if what == "read_seconds"
                    else [buffer[: min(BUFFER, size - at)] for at in range(0, size, BUFFER)]
                ):
                    files[name].readinto(memoryview(part.numpy()))
            times[what] = time.perf_counter() - began
    return times


def fresh(what: str, path: Path, parts: list[str]) -> dict[str, Any]:
    """`load` or `read` in a process of its own."""
    command = [sys.executable, __file__, "--child", what, str(path), *parts]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} of {path.name} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


# -- report --------------------------------------------------------------------------------------------------


def measure(case: Case, config: LanceConfig, parts: list[str], repeat: int, folder: Path) -> dict[str, Any]:
    """One case: the largest peak and the fastest times of `repeat` turns."""
    path = write_case(folder / case.name, case, config)
    loads, reads = [], []
    for _ in range(repeat):
        reads.append(fresh("read", path, parts))
        loads.append(fresh("load", path, parts))
    shutil.rmtree(folder / case.name)
    found = max(loads, key=lambda one: one["peak"] - one["before"])
    fastest = {key: min(one[key] for one in reads) for key in ("read_seconds", "buffer_seconds")}
    return found | fastest | {"case": case.label, "seconds": min(one["seconds"] for one in loads)}


def report(results: list[dict[str, Any]]) -> str:
    """Markdown; what breaks a bound says so."""
    rows = []
    for one in results:
        bound, grown = one["result"] + one["largest"] + ALLOWANCE, one["peak"] - one["before"]
        ratio = one["seconds"] / one["read_seconds"]
        numbers = [f"{one[key] / 1e9:.2f}" for key in ("read", "result", "largest", "peak")]
        verdict = (f"{grown / 1e9:.2f}{' (over)' if grown > bound else ''}", f"{bound / 1e9:.2f}")
        times = [
            f"{one['opening_seconds']:.2f}",
            *(f"{one[key]:.1f}" for key in ("seconds", "read_seconds", "buffer_seconds")),
        ]
        times.append(f"{ratio:.2f}{' (over)' if ratio > RATIO else ''}")
        rows.append([one["case"], *numbers, *verdict, *times])
    head = [
        "checkpoint",
        "read GB",
        "result GB",
        "largest tensor GB",
        "peak RSS GB",
        "of it loading GB",
        "bound GB",
        "of it opening s",
        "load s",
        "read s",
        "into one buffer s",
        "load / read",
    ]
    return table(head, rows)


def main() -> None:
    """Measure and print; as a child process, one load or read."""
    if sys.argv[1:2] == ["--child"]:
        what, path, *parts = sys.argv[2:]
        gc.collect()
        print(json.dumps({"load": load, "read": read}[what](Path(path), parts)))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--layers",
        type=int,
        default=RELEASED.llm.num_layers,
        help="cut the experts to so many layers, for little memory",
    )
    parser.add_argument(
        "--cases", nargs="+", default=[c.name for c in CASES], choices=[c.name for c in CASES]
    )
    parser.add_argument(
        "--parts", nargs="+", default=["und", "gen", "vit", "vae"], choices=("und", "gen", "vit", "vae")
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write the sparse files (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = replace(RELEASED, llm=replace(RELEASED.llm, num_layers=args.layers))
    wanted = (
        sum(p.nbytes for part in args.parts for p in build(part, config, "bf16", "meta").parameters())
        + 2 * 10**9
    )
    free = free_memory(torch.device("cpu"))
    if free < wanted:
        parser.error(
            f"{wanted / 1e9:.1f} GB of memory are needed and {free / 1e9:.1f} GB are free; try fewer --layers"
        )
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for case in CASES:
            if case.name in args.cases:
                results.append(measure(case, config, args.parts, args.repeat, Path(folder)))
                print(report(results[-1:]), file=sys.stderr, flush=True)
    cut = (
        ""
        if args.layers == RELEASED.llm.num_layers
        else f" of {args.layers} layers instead of {RELEASED.llm.num_layers}"
    )
    print(
        f"Loading {', '.join(args.parts)}{cut} into bf16, best of {args.repeat}, torch "
        f"{torch.__version__.split('+')[0]}:\n"
    )
    print(report(results))
    if args.json:
        args.json.write_text(
            json.dumps({"layers": args.layers, "parts": args.parts, "results": results}, indent=1),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
