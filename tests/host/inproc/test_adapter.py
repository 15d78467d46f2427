"""nodes/comfy_compat.py under another ComfyUI's shape: what newer versions do differently, faked on this one.

Each fake does what ComfyUI 0.38 does in its source (names and signatures are its own).
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from graphs import GOLDEN
from small import CHECKPOINT, away, edit, lance, module, question, samples, t2i


@pytest.fixture(scope="module")
def wanted(comfy):
    return samples(comfy, lance(edit())), comfy.value(question(), "answer")


@pytest.fixture
def good(comfy, wanted):
    comfy.forget()
    yield wanted
    comfy.forget()


def same_as(comfy, good):
    comfy._executor.reset()
    assert away(samples(comfy, lance(edit())), good[0]) < 1e-6
    assert comfy.value(question(), "answer") == good[1]


@pytest.fixture
def newer_patcher(comfy, monkeypatch):
    """A CoreModelPatcher as of 0.38: dynamic, a fixed constructor, clone() that hands on what older ones do
    not know.
    """
    import comfy.model_patcher as mp

    class ModelPatcherDynamic(mp.ModelPatcher):
        made: list = []
        cpu_is_plain = False

        def __new__(
            cls,
            model=None,
            load_device=None,
            offload_device=None,
            size=0,
            weight_inplace_update=False,
            fast_disk=False,
        ):
            if cls.cpu_is_plain:
                return mp.ModelPatcher(model, load_device, offload_device, size, weight_inplace_update)
            return super().__new__(cls)

        def __init__(
            self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=False
        ):
            super().__init__(model, load_device, offload_device, size, weight_inplace_update)
            self.fast_disk, self.cached_patcher_init = fast_disk, None
            self.made.append(self)

        def is_dynamic(self):
            return True

        # What hosts that have the real one ask of it.

        def set_in_use_by_current_prompt(self, in_use):
            pass

        def loaded_ram_size(self):
            return 0

        def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
            type(self)(
                self.model,
                self.load_device,
                self.offload_device,
                self.model_size(),
                weight_inplace_update=False,
                fast_disk=True,
            )
            n = super().clone()
            n.cached_patcher_init = self.cached_patcher_init
            return n

    monkeypatch.setattr(mp, "CoreModelPatcher", ModelPatcherDynamic, raising=False)
    return ModelPatcherDynamic


def test_patchers_are_the_hosts_own(comfy, monkeypatch, good, newer_patcher):
    same_as(comfy, good)
    main, reader, vae = (comfy.value(t2i(), "loader", i) for i in range(3))
    patchers = (
        main,
        reader.und,
        reader.vit,
        vae.patcher,
        main.get_additional_models_with_key("lance_und")[0],
        main.clone(),
    )
    assert all(isinstance(p, newer_patcher) for p in patchers)
    assert not {id(m) for m in main.model.modules()} & {id(m) for m in reader.und.model.modules()}, (
        "no shared modules"
    )
    assert type(main.clone()) is type(main)


def test_weights_of_their_own_again(comfy, good, newer_patcher, monkeypatch):
    """Several GPUs and conditioning hooks ask for the patcher anew, by cached_patcher_init = (function,
    arguments, index).
    """
    import comfy.model_patcher as mp

    monkeypatch.setattr(
        comfy.server, "last_prompt_id", "", raising=False
    )  # as in a server, for the progress bar
    main, reader = (comfy.value(t2i(), "loader", i) for i in range(2))
    for patcher in (main, main.get_additional_models_with_key("lance_und")[0], reader.vit):
        origin = patcher if getattr(patcher, "cached_patcher_init", None) else patcher.parent
        make, arguments, index = origin.cached_patcher_init
        anew = make(*arguments, disable_dynamic=True)[index]
        assert not isinstance(anew, newer_patcher) and isinstance(anew, mp.ModelPatcher)
        before, after = patcher.model.state_dict(), anew.model.state_dict()
        assert anew.model is not patcher.model and before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_dynamic_class_that_is_plain_on_a_cpu(comfy, good, newer_patcher, monkeypatch):
    monkeypatch.setattr(newer_patcher, "cpu_is_plain", True)
    main = comfy.value(t2i(), "loader")
    assert not isinstance(main, newer_patcher)
    theirs = {"diffusion_model.understanding.layers.0.self_attn.q_proj.weight": ("diff", (torch.zeros(1),))}
    patched = main.clone()
    assert patched.add_patches(theirs) and not patched.patches
    assert patched.get_additional_models_with_key("lance_und")[0].patches, (
        "LoRAs on the understanding expert still find it"
    )
    same_as(comfy, good)


def test_order_of_construction(comfy, good, newer_patcher, monkeypatch):
    """Construct, archive dtypes, patcher, then weights: layers have none before, and nothing may look at
    them.
    """
    import comfy.model_management as mm

    order, host = [], module(comfy, "nodes.comfy_compat")
    monkeypatch.setattr(
        mm, "archive_model_dtypes", lambda model: order.append(("archive", id(model))), raising=False
    )
    init, load, size = newer_patcher.__init__, torch.nn.Module.load_state_dict, mm.module_size

    def patcher(self, model, *args, **kwargs):
        order.append(("patcher", id(model)))
        init(self, model, *args, **kwargs)

    def filled(self, state, strict=True, assign=False):
        order.append(("weights", id(self)))
        assert strict and assign, "a dynamic patcher's weights are assigned, not copied"
        return load(self, state, strict, assign)

    monkeypatch.setattr(newer_patcher, "__init__", patcher)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", filled)
    monkeypatch.setattr(mm, "module_size", lambda m: order.append(("measured", id(m))) or size(m))
    main, reader, vae = comfy.run(t2i(), [("loader", i) for i in range(3)]).values
    for patched, weights in (
        (main.model, main.model.diffusion_model),
        (reader.und.model, reader.und.model),
        (reader.vit.model, reader.vit.model),
        (vae.first_stage_model, vae.first_stage_model),
    ):
        at = [
            order.index((what, id(m)))
            for what, m in (("archive", patched), ("patcher", patched), ("weights", weights))
        ]
        assert at == sorted(at)
    assert not [what for what, _ in order if what == "measured"], (
        "sizes are kept by patchers, so nothing is measured before it is filled"
    )
    assert main.model_size() == sum(p.nbytes for p in main.model.diffusion_model.parameters())
    assert host.patcher_class() is newer_patcher


def test_layers_without_weights(comfy, good, monkeypatch):
    """0.38's Linear has no weight until it is loaded."""
    from comfy.ops import disable_weight_init

    linear = disable_weight_init.Linear
    init, fill = linear.__init__, linear._load_from_state_dict

    def bare(self, in_features, out_features, bias=True, device=None, dtype=None):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

    def lazily(self, state, prefix, metadata, strict, missing, unexpected, errors):
        assert metadata.get("assign_to_params_buffers")
        for key, value in state.items():
            setattr(self, key.removeprefix(prefix), torch.nn.Parameter(value, requires_grad=False))

    monkeypatch.setattr(linear, "__init__", bare)
    monkeypatch.setattr(linear, "_load_from_state_dict", lazily)
    same_as(comfy, good)
    assert init is not linear.__init__ and fill is not linear._load_from_state_dict


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_layers_the_host_itself_makes_without_weights(comfy, monkeypatch, tmp_path, dtype):
    """As newer hosts do with dynamic VRAM."""
    import comfy.model_management as mm

    memory = pytest.importorskip("comfy.memory_management", reason="this host never does")
    checkpoint = CHECKPOINT
    if dtype:
        import folder_paths

        checkpoint = f"{dtype}.safetensors"
        module(comfy, "lance_core.checkpoint.convert").convert(
            GOLDEN / "checkpoint" / CHECKPOINT, tmp_path / checkpoint, dtype
        )
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "lance", ([str(tmp_path)], set()))
    graph = t2i()
    graph["loader"]["inputs"]["checkpoint"] = checkpoint
    comfy.forget()
    wanted = samples(comfy, lance(graph))
    comfy.forget()
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    monkeypatch.setattr(mm, "WINDOWS", True)
    host = module(comfy, "nodes.comfy_compat")
    linear = host.operations(torch.float32, torch.float32).Linear(4, 4, bias=True, dtype=torch.float16)
    assert linear.weight is None and host.planned(linear) == (torch.float16, True)
    comfy.value(graph, "loader")
    monkeypatch.setattr(memory, "aimdo_enabled", False)  # there is none to ask for memory
    assert torch.equal(samples(comfy, lance(graph)), wanted)
    comfy.forget()


def test_base_model_calls(comfy, good):
    """New arguments of the methods ComfyUI calls on a model."""
    main = comfy.value(edit(), "loader")
    shape = [1, 48, 1, 4, 4]
    wanted = main.model.memory_required(shape, {"lance": [[1, 1, 10]]})
    assert (
        main.model.memory_required(
            shape, cond_shapes={"lance": [[1, 1, 10]]}, memory_efficient_attention=True
        )
        == wanted
    )
    assert main.model.memory_required(input_shape=shape) > 0 and main.memory_required(shape) > 0


def test_latent_shapes_everywhere(comfy, good, monkeypatch):
    """extra_conds and OUTER_SAMPLE gain latent_shapes; wrappers hand it on."""
    import comfy.samplers as stock
    from comfy.patcher_extension import WrapperExecutor

    encode, outer, seen = stock.encode_model_conds, stock.CFGGuider.outer_sample, []
    has_them = "latent_shapes" in inspect.signature(outer).parameters

    def newer_encode(*args, **kwargs):
        return encode(*args, **{"latent_shapes": [(1, 48, 1, 4, 4)], **kwargs})

    def newer_outer(self, *args, latent_shapes=None, **kwargs):
        seen.append(latent_shapes)
        return outer(self, *args, **kwargs, **({"latent_shapes": latent_shapes} if has_them else {}))

    execute = WrapperExecutor.execute

    def handing_on(self, *args, **kwargs):
        named = getattr(self.original, "__name__", "") == "newer_outer"
        return execute(
            self, *args, **({"latent_shapes": [(1, 48, 1, 14, 19)], **kwargs} if named else kwargs)
        )

    monkeypatch.setattr(stock, "encode_model_conds", newer_encode)
    monkeypatch.setattr(stock.CFGGuider, "outer_sample", newer_outer)
    monkeypatch.setattr(WrapperExecutor, "execute", handing_on)
    same_as(comfy, good)
    assert [list(map(tuple, shapes)) for shapes in seen] == [[(1, 48, 1, 14, 19)]]


def test_vae_output_in_place(comfy, good):
    """0.38's decode ignores what process_output returns."""
    vae = comfy.value(edit(), "loader", 2)
    pixels = torch.linspace(-2, 2, 9)
    wanted = vae.process_output(pixels.clone())
    vae.process_output(pixels)
    assert torch.equal(pixels, wanted) and pixels.min() == 0 and pixels.max() == 1
    for name in (
        "pad_channel_value",
        "size",
        "handles_tiling",
        "format_encoded",
        "audio_sample_rate",
        "upscale_ratio",
        "crop_input",
    ):
        assert hasattr(vae, name), name


def test_outputs_name_their_patchers(comfy, good):
    """For the cache that frees outputs under RAM pressure."""
    _, reader, vae = (comfy.value(edit(), "loader", i) for i in range(3))
    assert vae.patcher.model is vae.first_stage_model
    assert reader.get_models() == [reader.und, reader.vit]


def test_differences_live_in_one_file(comfy):
    """Nobody else asks which attributes the host has, or for its version."""
    folder = Path(module(comfy, "nodes.comfy_compat").__file__).parent
    for file in folder.glob("*.py"):
        if file.name == "comfy_compat.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        asked = []
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) in ("hasattr", "getattr"):
                whose = ast.unparse(call.args[0]).split(".")[0]
                asked += [call] if whose in ("comfy", "mm", "folder_paths", "io") else []
        assert not asked, f"{file.name}: {[ast.unparse(n) for n in asked]}"
        assert "comfyui_version" not in file.read_text(encoding="utf-8")


def test_old_names_still_do(comfy, good, monkeypatch):
    """0.3.60 has no way to send text to a node, and no is_compiling in every torch."""
    server = importlib.import_module("server").PromptServer
    if hasattr(server, "send_progress_text"):
        monkeypatch.delattr(server, "send_progress_text")
    assert comfy.value(question(), "answer") == good[1]
    assert (GOLDEN / "checkpoint" / CHECKPOINT).is_dir()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="few rows take the plain way without MKL")
def test_few_rows_go_the_cores_way_unless_weights_change_on_the_way(comfy, monkeypatch):
    host, calls = module(comfy, "nodes.comfy_compat"), []
    monkeypatch.setattr(host, "few_rows", lambda *args, few=host.few_rows: (calls.append(1), few(*args))[1])
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 5, generator=g).bfloat16(), torch.randn(7, generator=g).bfloat16()

    def layer(stored):
        linear = host.operations(stored, torch.float32).Linear(5, 7, dtype=stored)
        linear.weight.data, linear.bias.data = weight.to(stored), bias.to(stored)
        return linear

    plain, casting = layer(torch.float32), layer(torch.bfloat16)
    with torch.no_grad():
        for rows in (2, 4, 9):
            x = torch.randn(rows, 5, generator=g)
            expected = torch.nn.functional.linear(x, weight.float(), bias.float())
            calls.clear()
            torch.testing.assert_close(plain(x), expected)
            assert len(calls) == (rows < 9)
            torch.testing.assert_close(casting(x), expected)
            assert len(calls) == (rows < 9)
        plain.weight_function = [lambda weight: 2 * weight]
        torch.testing.assert_close(plain(x[:2]), 2 * expected[:2] - bias.float())
        assert not calls


def test_norms_lend_their_weights_to_kernels_unless_they_cast_or_patch_them(comfy, monkeypatch):
    model = comfy.value(t2i(), "loader").model.diffusion_model
    norms = [m for m in model.modules() if hasattr(m, "ready_weight")]
    assert len(norms) > 4
    norm = norms[0]
    monkeypatch.setattr(norm, "comfy_cast_weights", False, raising=False)
    assert norm.ready_weight() is norm.weight
    monkeypatch.setattr(norm, "weight_function", [lambda weight: weight])
    assert norm.ready_weight() is None
    monkeypatch.setattr(norm, "weight_function", [])
    monkeypatch.setattr(norm, "comfy_cast_weights", True)
    assert norm.ready_weight() is None
