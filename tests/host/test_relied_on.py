"""What the pack relies on in ComfyUI: every name, how it is called, and in which order it calls us.

Names and calls are read from the pack's source, the others stand here. A finding is one sentence
for whoever mends the pack; `check_host.py` prints them for any checkout.
"""

import ast
import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import linvideo_pack
import torch

_ROOTS = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server")

# Called on objects, which the source does not tell from others.
_METHODS = """
comfy.model_patcher.ModelPatcher.add_callback_with_key(self, moment, key, action)
comfy.model_patcher.ModelPatcher.add_object_patch(self, name, value)
comfy.model_patcher.ModelPatcher.add_patches(self, patches, strength)
comfy.model_patcher.ModelPatcher.add_wrapper_with_key(self, moment, key, wrapper)
comfy.model_patcher.ModelPatcher.clone(self, disable_dynamic=True)
comfy.model_patcher.ModelPatcher.eject_model(self)
comfy.model_patcher.ModelPatcher.get_additional_models_with_key(self, key)
comfy.model_patcher.ModelPatcher.get_attachment(self, key)
comfy.model_patcher.ModelPatcher.get_model_object(self, name)
comfy.model_patcher.ModelPatcher.is_dynamic(self)
comfy.model_patcher.ModelPatcher.model_size(self)
comfy.model_patcher.ModelPatcher.set_additional_models(self, key, models)
comfy.model_patcher.ModelPatcher.set_attachments(self, key, value)
comfy.model_patcher.ModelPatcher.set_injections(self, key, injections)
comfy.model_patcher.CoreModelPatcher(module, load_device=device, offload_device=device)
comfy.ldm.wan.model.WanSelfAttention.forward(self, x, freqs, transformer_options=options)
comfy.model_base.BaseModel.extra_conds(self, cross_attn=prompt, noise=noise, device=device)
comfy.ops.manual_cast.Linear(1, 1, bias=False, dtype=dtype, device=device)
comfy.samplers.CFGGuider.predict_noise
comfy.samplers.CFGGuider.set_cfg
comfy.sd.CLIP.encode_from_tokens_scheduled(self, tokens)
comfy.sd.CLIP.tokenize(self, text)
comfy_extras.nodes_custom_sampler.SamplerCustom.execute
server.PromptServer.send_progress_text(self, text, node_id, sid)
"""

_METHODS_OF_H3 = """
comfy.ldm.minimax.model.Attention.forward(self, x, rope_freqs=freqs, transformer_options=options)
comfy.ldm.minimax.model.DiTBlock.forward(self, x, t_emb, segments, freqs, options)
"""
"""Where ComfyUI has MiniMax-H3, since 0.30.0."""

_FIELDS = """
backup cached_patcher_init hook_backup injections is_injected load_device model_options
offload_device patches patches_uuid model.current_patcher model.diffusion_model model.latent_format
model.manual_cast_dtype model.model_sampling.multiplier model.model_sampling.shift
model.diffusion_model.patch_size
"""
"""Of a ModelPatcher of a Wan."""

_LAYER_FIELDS = "head_dim num_heads norm_q.eps norm_k.weight q.weight_function k v o"
"""Of its `model.diffusion_model.blocks.0.self_attn`."""

_CONFIG = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 1, "cross_attn_norm": True}

_ORDER = [
    "outer_sample",
    "inject",
    "apply_model with sample_sigmas",
    "self_attn.forward(x, freqs, transformer_options=)",
    "optimized_attention_override(function, query, key, value, heads=)",
    "cleanup",
    "eject",
]
"""In a sampling of one step; what repeats is told once, an ejection that of its end."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A host's name in a file of ours, and the call of it if it is one.

    where: file and line; name: dotted, from ComfyUI's root.
    """

    where: str
    name: str
    call: ast.Call | None = None


def find_uses() -> Iterator[Use]:
    """Yield every name of the host's that the pack's nodes hold, and those that stand here."""
    pack = Path(linvideo_pack.__file__).parent
    for path in sorted((pack / "nodes").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from _uses_in(tree, path.relative_to(pack).as_posix())
    imports = "".join(f"import {root}\n" for root in _ROOTS)
    has_h3 = importlib.util.find_spec("comfy.ldm.minimax") is not None
    methods = _METHODS + _METHODS_OF_H3 * has_h3
    yield from _uses_in(ast.parse(imports + methods), Path(__file__).name)


def _uses_in(tree: ast.Module, file: str) -> Iterator[Use]:
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        for alias, name in _imported(node):
            if name.partition(".")[0] in _ROOTS:
                bound[alias] = name if alias != name.partition(".")[0] else alias
                yield Use(f"{file}:{node.lineno}", name)
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call)
        if name := _dotted(node.func if is_call else node, bound):
            yield Use(f"{file}:{node.lineno}", name, node if is_call else None)


def _imported(node: ast.AST) -> list[tuple[str, str]]:
    """Return the names that a statement binds, and what to."""
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
    return []


def _dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, bound)):
        return f"{owner}.{node.attr}"
    return None


def find_problems(uses: Iterator[Use]) -> list[str]:
    """Return a sentence for each name that the host lacks and each call that it does not take."""
    found = []
    for use in uses:
        try:
            value = _resolve(use.name)
        except (ImportError, AttributeError) as error:
            found.append(f"{use.where} needs {use.name}, which this ComfyUI lacks ({error})")
            continue
        if use.call and (problem := _refuse(value, use.call)):
            found.append(f"{use.where} calls {use.name}, which does not take it: {problem}")
    return list(dict.fromkeys(found))


def _resolve(name: str) -> Any:
    root, *parts = name.split(".")
    value = importlib.import_module(root)
    for depth, part in enumerate(parts, 1):
        if inspect.ismodule(value) and not hasattr(value, part):
            value = importlib.import_module(".".join((root, *parts[:depth])))
        else:
            value = getattr(value, part)
    return value


def _refuse(function: Any, call: ast.Call) -> str:
    """Return what is wrong with a call by the function's signature, "" if nothing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    plain = [x for x in call.args if not isinstance(x, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    is_whole = len(plain) == len(call.args) and len(named) == len(call.keywords)
    try:
        (signature.bind if is_whole else signature.bind_partial)(*plain, **named)
    except TypeError as error:
        return str(error)
    return ""


def find_missing_fields(patcher: Any) -> list[str]:
    """Return a sentence for each field that a loaded Wan lacks."""
    layer = "model.diffusion_model.blocks.0.self_attn"
    found = []
    for field in (*_FIELDS.split(), *(f"{layer}.{name}" for name in _LAYER_FIELDS.split())):
        try:
            functools.reduce(_get, field.split("."), patcher)
        except AttributeError:
            found.append(f"a loaded Wan has no {field} in this ComfyUI")
    return found


def _get(value: Any, part: str) -> Any:
    return value[int(part)] if part.isdecimal() else getattr(value, part)


def watch_sampling(patcher: Any, noise: torch.Tensor, conditioning: list[Any]) -> list[str]:
    """Return what ComfyUI calls of ours in a sampling, in the order of the first calls."""
    import comfy.sample
    from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

    events: list[str] = []

    def say(event: str) -> None:
        if event not in events:
            events.append(event)

    def override(function: Any, q: Any, k: Any, v: Any, heads: int, **options: Any) -> Any:
        say("optimized_attention_override(function, query, key, value, heads=)")
        return function(q, k, v, heads, **options)

    def attend(x: Any, freqs: Any, *, transformer_options: dict) -> Any:
        say("self_attn.forward(x, freqs, transformer_options=)")
        options = {**transformer_options, "optimized_attention_override": override}
        return type(attention).forward(attention, x, freqs, transformer_options=options)

    def inject(current: Any) -> None:
        say("inject")
        current.model.diffusion_model.blocks[0].self_attn.__dict__["forward"] = attend

    def eject(current: Any) -> None:
        if attention.__dict__.pop("forward", None) and "cleanup" in events:
            say("eject")

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        assert executor.class_obj.current_patcher.get_attachment("check") == "kept"
        options = next(x for x in (*args, *kwargs.values()) if isinstance(x, dict))
        say("apply_model with sample_sigmas" if "sample_sigmas" in options else "apply_model")
        return executor(*args, **kwargs)

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        assert executor.class_obj.model_patcher.get_attachment("check") == "kept"
        say("outer_sample")
        return executor(*args, **kwargs)

    def clean_up(current: Any) -> None:
        say("cleanup")
        current.eject_model()

    attention = patcher.model.diffusion_model.blocks[0].self_attn
    model = patcher.clone()
    model.set_injections("check", [PatcherInjection(inject, eject)])
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "check", outer_sample)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "check", apply_model)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "check", clean_up)
    model.set_attachments("check", "kept")
    settings = (1, 1.0, "euler", "simple", conditioning, conditioning, noise * 0.5)
    comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=1)
    return events


def test_every_name_is_there_and_takes_what_it_is_given() -> None:
    problems = find_problems(find_uses())
    assert not problems, "\n".join(problems)


def test_a_sampling_calls_the_pack_in_the_order_that_it_relies_on() -> None:
    from variants import build, random_tensor

    patcher = build("comfy.ldm.wan.model", "WanModel", _CONFIG)
    missing = find_missing_fields(patcher)
    assert not missing, "\n".join(missing)
    conditioning = [[random_tensor(1, 5, 4096, seed=4), {}]]
    found = watch_sampling(patcher, random_tensor(1, 16, 2, 8, 8), conditioning)
    assert found == _ORDER, f"a sampling calls {', '.join(found)}; known is {', '.join(_ORDER)}"


def test_what_a_host_lacks_is_said_with_the_line_that_needs_it() -> None:
    tree = ast.parse(
        "from comfy.samplers import gone\n"
        "import comfy.model_management\n"
        "comfy.model_management.load_models_gpu([model], nothing=1)\n"
        "comfy.model_management.load_models_gpu(**settings)\n"
    )
    first, second = find_problems(_uses_in(tree, "a.py"))
    assert first.startswith("a.py:1 needs comfy.samplers.gone, which this ComfyUI lacks (")
    assert second.startswith("a.py:3 calls comfy.model_management.load_models_gpu, which does not")
    assert "'nothing'" in second, second
    missing = find_missing_fields(object())
    assert missing[0] == "a loaded Wan has no backup in this ComfyUI" and len(missing) > 20, missing
