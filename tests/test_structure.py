"""The shape of lance_core, read off its source: one-way imports, small documented files, nothing that runs data as code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parent.parent / "lance_core"
FILES = sorted(CORE.glob("*.py"))
# A module imports only modules above it.
# fmt: off
ORDER = [
    "errors", "config", "ops", "sequence", "rope", "cache", "side", "decoder", "vit", "vae_blocks", "vae_memory", "vae", "model", "sampler",
    "preprocess", "prompts", "media", "request", "weights", "token_loop", "answer", "quantize", "checkpoint", "tiny", "convert", "transfer",
    "download", "parts", "pipeline", "__init__", "info",
    "bench_growth", "bench_cost", "bench_case", "bench_tools", "bench_profile", "bench_report", "bench_plot", "bench_baseline", "bench_vae", "bench_measure",
    "bench_suite", "bench", "cli", "__main__",
]
# fmt: on
HOSTS = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "nodes", "execution"}
UNWANTED = HOSTS | {"transformers", "decord", "flash_attn", "xformers", "diffusers", "torchvision", "tests"}
ALLOWED = {"torch", "safetensors", "einops", "tokenizers", "numpy", "PIL", "imageio", "av", "tqdm"}
OPTIONAL = {
    ("ops", "flash_attn"),
    ("ops", "huggingface_hub"),
    ("checkpoint", "huggingface_hub"),
    ("__main__", "huggingface_hub"),
    ("bench_plot", "matplotlib"),
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of lance_core, top-level packages outside) that a file imports, anywhere in it."""
    inside, outside = set(), set()
    known = {p.stem for p in FILES}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *rest = alias.name.split(".")
                inside |= {(rest or ["__init__"])[0]} if top == "lance_core" else set()
                outside |= {top} - {"lance_core"}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 0 and parts[0] != "lance_core":
                outside.add(parts[0])
                continue
            name = parts[0] if node.level else ".".join(parts[1:2])
            inside |= {name} if name else {a.name if a.name in known else "__init__" for a in node.names}
    return inside, outside


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def file(request) -> Path:
    return request.param


def test_the_folder_is_flat():
    assert [p.name for p in CORE.iterdir() if p.is_dir() and p.name != "__pycache__"] == []


def test_imports_go_one_way(file):
    assert file.stem in ORDER, f"{file.name} has no place in ORDER yet"
    above = ORDER[: ORDER.index(file.stem)]
    assert imports(file)[0] <= set(above), f"{file.name} imports what stands below it"


def test_imports_from_outside(file):
    outside = imports(file)[1] - set(sys.stdlib_module_names)
    optional = {package for module, package in OPTIONAL if module == file.stem}
    assert not outside & (UNWANTED - optional), "lance_core stands alone"
    assert outside <= ALLOWED | optional | {"huggingface_hub"}, "not a run-time dependency"


def test_flash_attn_is_guarded():
    body = tree(CORE / "ops.py").body
    at_top = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("flash_attn" in ast.unparse(n) for n in at_top)
    guarded = [n for n in body if isinstance(n, ast.Try) and "flash_attn" in ast.unparse(n)]
    assert len(guarded) == 1 and "ImportError" in ast.unparse(guarded[0].handlers[0])


def test_importing_it_loads_no_host_and_no_transformers():
    code = "import sys, lance_core; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CORE.parent, check=True)
    assert done.stderr == "" and not UNWANTED & set(done.stdout.split())


def test_files_are_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 420


def test_everything_public_is_documented(file):
    module = tree(file)
    assert ast.get_docstring(module), f"{file.name} has no docstring"
    public = [n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


def test_the_api_is_documented():
    import lance_core

    for name in lance_core.__all__:
        value = getattr(lance_core, name)
        methods = [m for n, m in vars(value).items() if callable(m) and not n.startswith("_")] if isinstance(value, type) else []
        assert all(m.__doc__ for m in (value, *methods)), name


def calls(path: Path) -> list[ast.Call]:
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]


def test_data_is_never_code(file):
    for call in calls(file):
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), f"{file.name}:{call.lineno}"
        assert not name.startswith(("pickle.load", "pickle.Unpickler", "marshal.", "shelve.")), f"{file.name}:{call.lineno}"
        if name == "torch.load":
            assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)


def test_nothing_is_swallowed_or_printed(file):
    handlers = [n for n in ast.walk(tree(file)) if isinstance(n, ast.ExceptHandler)]
    assert all(h.type is not None for h in handlers), "a bare except"
    assert not any(len(h.body) == 1 and isinstance(h.body[0], ast.Pass) and "Exception" in ast.unparse(h.type) for h in handlers)
    if file.stem not in ("__main__", "cli"):
        assert not [c.lineno for c in calls(file) if ast.unparse(c.func) in ("print", "exit", "sys.exit", "quit", "input")]


def test_global_random_state_is_left_alone(file):
    seeds = ("torch.manual_seed", "torch.seed", "random.seed", "np.random.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all")
    draws = ("torch.randn", "torch.rand", "torch.randint", "torch.randperm", "torch.multinomial", "torch.randn_like", "torch.rand_like")
    for call in calls(file):
        name = ast.unparse(call.func)
        assert name not in seeds and not name.startswith(("random.", "np.random.")), f"{file.name}:{call.lineno}"
        assert name not in draws or "generator" in {k.arg for k in call.keywords}, f"{file.name}:{call.lineno}"


def test_no_file_knows_where_it_was_written():
    for path in [*FILES, *Path(__file__).parent.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("/work" + "/", "/tmp" + "/", "/home" + "/", "/root" + "/") if word in text], path.name


def test_a_guest_requires_nothing_that_comfyui_brings():
    """Both lists of what is installed with the pack name the same, without versions; the rest is for lance_core on its own."""
    text = (CORE.parent / "pyproject.toml").read_text(encoding="utf-8")
    needed, alone = (
        re.findall(r'"([^"]*)"', re.search(rf"^{name} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1])
        for name in ("dependencies", "standalone")
    )
    assert needed == (CORE.parent / "requirements.txt").read_text(encoding="utf-8").split()
    assert all(name.replace("_", "").isalnum() for name in (*needed, *alone)) and not {"torch", "numpy", "pillow"} & set(needed)
    assert {"torch", "numpy", "pillow"} == set(alone)
