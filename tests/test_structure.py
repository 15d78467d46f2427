"""The shape of lance_core, read off its source: one-way imports, small documented files, nothing that runs
data as code.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "lance_core"
FILES = sorted(CORE.rglob("*.py"))
# Layers from the bottom up: what stands in one may import only what stands below it (or, in a package, beside
# it).
LAYERS = [
    {"errors"},
    {"files", "checks"},
    {"stored_values"},
    {"config"},
    {"hub", "model"},
    {"vae", "inputs"},
    {"checkpoint"},
    {"components", "text_generation"},
    {"dialogue"},
    {"prompting", "drawing"},
    {"pipeline"},
    {"__init__"},
    {"training", "scale"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NODES_MAY_TAKE = LEVEL["bench"]  # what lies below
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "nodes",
    "execution",
}
UNWANTED = COMFYUI | {"transformers", "decord", "flash_attn", "xformers", "diffusers", "torchvision", "tests"}
ALLOWED = {
    "torch",
    "safetensors",
    "einops",
    "tokenizers",
    "numpy",
    "PIL",
    "av",
    "tqdm",
    "huggingface_hub",
    "httpx",
}
OPTIONAL = {
    ("model.attention", "flash_attn"),
    ("model.triton_kernels", "triton"),
    ("bench.plot", "matplotlib"),
    ("scale.ray_start", "ray"),
    ("scale.serve", "ray"),
    ("scale.front", "starlette"),
    ("training.optimizer", "bitsandbytes"),
    ("training.tables", "pyarrow"),
    ("training.released_data", "yaml"),
    ("training.conversion", "pyarrow"),
    ("cli.script", "tomli"),  # Python 3.10, which has no tomllib
    ("cli.script", "tomllib"),
}


def dotted(path: Path) -> str:
    """A file as its module's name below lance_core, "__init__" for the package itself."""
    return ".".join(path.relative_to(CORE).with_suffix("").parts)


def layer(module: str) -> str:
    """The layer's member a module belongs to: its package, or itself."""
    return module.split(".")[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of lance_core, top-level packages outside) that a file imports, anywhere in it.

    What only a type checker reads (`if TYPE_CHECKING:`) is left out. A file outside of lance_core names it
    itself.
    """
    inside, outside = set(), set()
    known = {dotted(p) for p in FILES}
    at = path.relative_to(ROOT).parent.parts
    module = tree(path)
    unread = {
        id(n)
        for guard in ast.walk(module)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for n in ast.walk(guard)
    }
    for node in ast.walk(module):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*at[: len(at) - node.level + 1], *(node.module or "").split(".")]
                if node.level
                else [node.module]
            )
            found = [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            top, _, rest = name.partition(".")
            if top != "lance_core":
                outside |= {top} if not getattr(node, "level", 0) else set()
                continue
            parts = rest.split(".")
            candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            inside.add(next((c for c in candidates if c in known or f"{c}.__init__" in known), "__init__"))
    return inside, outside


@pytest.fixture(params=FILES, ids=dotted)
def file(request) -> Path:
    return request.param


def test_every_module_has_a_place():
    assert {layer(dotted(path)) for path in FILES} <= LEVEL.keys()


def test_imports_go_one_way(file):
    own = layer(dotted(file))
    above = {m for m in imports(file)[0] if layer(m) != own and LEVEL[layer(m)] >= LEVEL[own]}
    assert not above, f"{dotted(file)} imports what does not stand below it"


def test_inside_a_package_nothing_goes_in_circles():
    """Each module's imports from its own package, followed as far as they go, never lead back to it."""
    below = {
        dotted(p): {m for m in imports(p)[0] if layer(m) == layer(dotted(p)) and m != layer(m)} for p in FILES
    }
    for module, found in below.items():
        if module.endswith("__init__"):
            continue
        reached, todo = set(), list(found)
        while todo:
            one = todo.pop()
            if one not in reached:
                reached.add(one)
                todo += below.get(one, ())
        assert module not in reached, f"{module} imports itself by way of {sorted(reached)}"


def test_nodes_take_from_below_measuring():
    for path in (ROOT / "nodes").glob("*.py"):
        assert all(LEVEL[layer(m)] < NODES_MAY_TAKE for m in imports(path)[0]), path.name


def test_imports_from_outside(file):
    outside = imports(file)[1] - set(sys.stdlib_module_names)
    optional = {package for module, package in OPTIONAL if module == dotted(file)}
    assert not outside & (UNWANTED - optional), "lance_core stands alone"
    assert outside <= ALLOWED | optional, "not a run-time dependency"


def test_flash_attn_is_guarded():
    body = tree(CORE / "model" / "attention.py").body
    at_top = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("flash_attn" in ast.unparse(n) for n in at_top)
    guarded = [n for n in body if isinstance(n, ast.Try) and "flash_attn" in ast.unparse(n)]
    assert len(guarded) == 1 and "ImportError" in ast.unparse(guarded[0].handlers[0])


def test_importing_it_loads_no_host_and_no_transformers():
    code = "import sys, lance_core; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CORE.parent, check=True
    )
    assert done.stderr == "" and not UNWANTED & set(done.stdout.split())


def test_files_are_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 420


def test_everything_public_is_documented(file):
    module = tree(file)
    assert ast.get_docstring(module), f"{file.name} has no docstring"
    public = [
        n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


def test_the_api_is_documented():
    import lance_core

    for name in lance_core.__all__:
        value = getattr(lance_core, name)
        methods = (
            [m for n, m in vars(value).items() if callable(m) and not n.startswith("_")]
            if isinstance(value, type)
            else []
        )
        assert all(m.__doc__ for m in (value, *methods)), name


def calls(path: Path) -> list[ast.Call]:
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]


def test_data_is_never_code(file):
    for call in calls(file):
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), (
            f"{file.name}:{call.lineno}"
        )
        assert not name.startswith(("pickle.load", "pickle.Unpickler", "marshal.", "shelve.")), (
            f"{file.name}:{call.lineno}"
        )
        if name == "torch.load":
            assert any(
                k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords
            )


def test_nothing_is_swallowed_or_printed(file):
    handlers = [n for n in ast.walk(tree(file)) if isinstance(n, ast.ExceptHandler)]
    assert all(h.type is not None for h in handlers), "a bare except"
    assert not any(
        len(h.body) == 1 and isinstance(h.body[0], ast.Pass) and "Exception" in ast.unparse(h.type)
        for h in handlers
    )
    if layer(dotted(file)) not in ("__main__", "cli"):
        assert not [
            c.lineno
            for c in calls(file)
            if ast.unparse(c.func) in ("print", "exit", "sys.exit", "quit", "input")
        ]


def test_global_random_state_is_left_alone(file):
    seeds = (
        "torch.manual_seed",
        "torch.seed",
        "random.seed",
        "np.random.seed",
        "torch.cuda.manual_seed",
        "torch.cuda.manual_seed_all",
    )
    draws = (
        "torch.randn",
        "torch.rand",
        "torch.randint",
        "torch.randperm",
        "torch.multinomial",
        "torch.randn_like",
        "torch.rand_like",
    )
    for call in calls(file):
        name = ast.unparse(call.func)
        assert name not in seeds and not name.startswith(("random.", "np.random.")), (
            f"{file.name}:{call.lineno}"
        )
        assert name not in draws or "generator" in {k.arg for k in call.keywords}, (
            f"{file.name}:{call.lineno}"
        )


def test_no_file_knows_where_it_was_written():
    for path in [*FILES, *Path(__file__).parent.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [
            word for word in ("/work" + "/", "/tmp" + "/", "/home" + "/", "/root" + "/") if word in text
        ], path.name


def test_a_guest_requires_nothing_that_comfyui_brings():
    """Both lists of what is installed with the pack name the same, without versions; the rest is for
    lance_core on its own.
    """
    text = (CORE.parent / "pyproject.toml").read_text(encoding="utf-8")
    needed, alone = (
        re.findall(r'"([^"]*)"', re.search(rf"^{name} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1])
        for name in ("dependencies", "standalone")
    )
    assert needed == (CORE.parent / "requirements.txt").read_text(encoding="utf-8").split()
    assert all(name.replace("_", "").isalnum() for name in (*needed, *alone)) and not {
        "torch",
        "numpy",
        "pillow",
    } & set(needed)
    assert {"torch", "numpy", "pillow"} == set(alone)
