"""A copy that learns beside weights that stay ComfyUI's, in whatever form they are kept."""

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch
from linvideo_pack.linvideo_core.demo.codec import LATENT_SHAPE
from linvideo_pack.linvideo_core.transfer.config import StudentConfig
from linvideo_pack.linvideo_core.transfer.student import Student
from linvideo_pack.nodes.demo import load_demo_model
from linvideo_pack.nodes.transfer.host_model import FrozenLinear, cast_weights, freeze
from linvideo_pack.nodes.transfer.host_teacher import HostTeacher
from linvideo_pack.nodes.transfer.pipeline import make_config
from stage import complaint, demo, device, needs_cpu, relative_difference, with_lora
from test_quantised import LOADERS
from torch import Tensor, nn
from transfers import make_inputs

_TOLERANCE = 1e-5
_COPIED, _FROZEN = True, False


@contextlib.contextmanager
def _learning() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _velocity_and_gradients(model: Any, is_copied: bool) -> tuple[Tensor, list[Tensor]]:
    """Return what a student computes in fp32 and the gradients of its low-rank changes."""
    with _learning():
        inputs = make_inputs(settings=None, quality="draft")
        host = HostTeacher(model, inputs)
        # Of a small model copies are made: beside the host's weights it must come out alike.
        host.is_copied = lambda _: is_copied
        with host.teacher(make_config(inputs, host)) as teacher:
            linears = [m for m in teacher.model.blocks.modules() if isinstance(m, nn.Linear)]
            assert all(isinstance(m, FrozenLinear) for m in linears) != is_copied
            teacher.model._dtype = torch.float32
            student = Student(teacher, StudentConfig(lora_rank=4), seed=0)
            generator = torch.Generator().manual_seed(2)
            for weight in student.weights.values():
                added = 0.02 * torch.randn(weight.shape, generator=generator)
                weight.data += added.to(weight.device)
            latents = torch.randn(2, LATENT_SHAPE[0], 2, 8, 8, generator=generator).to(device())
            timesteps = torch.tensor([900.0, 200.0], device=device())
            prompts = host.conditions.prompt_embeds[:2].to(device())
            velocity = student.model(latents, timesteps, prompts)
            velocity.square().mean().backward()
            gradients = [weight.grad.cpu() for weight in student.weights.values()]
    return velocity.detach().cpu(), gradients


def _assert_alike(model: Any, name: str) -> None:
    expected, gradients = _velocity_and_gradients(model, _COPIED)
    found, others = _velocity_and_gradients(model, _FROZEN)
    worst = max(map(relative_difference, others, gradients))
    print(f"{name}: velocity {relative_difference(found, expected):.1e}, gradients {worst:.1e}")
    assert relative_difference(found, expected) <= _TOLERANCE
    assert worst <= 10 * _TOLERANCE


def test_weights_in_every_form_give_the_velocity_and_gradients_of_copies_in_fp32() -> None:
    _assert_alike(demo()[0], "as it comes")
    for name, load in LOADERS.items():
        _assert_alike(load(), name)


def test_changes_of_other_nodes_are_part_of_what_is_learned_beside() -> None:
    _assert_alike(with_lora(demo()[0]), "with a LoRA")


def test_a_layer_with_a_door_of_its_own_is_asked_through_it() -> None:
    class Packed(nn.Linear):
        """As GGUF layers: the weight is packed, a method of the layer's own unpacks it."""

        def cast_bias_weight(
            self, input: Any = None, dtype: Any = None, device: Any = None, bias_dtype: Any = None
        ) -> tuple[Tensor, Tensor]:
            return (0.5 * self.weight).to(device, dtype), self.bias.to(device, bias_dtype)

    layer = Packed(8, 4)
    x = torch.randn(3, 8)
    with _learning():
        x = x.clone().requires_grad_()
        FrozenLinear(layer)(x).sum().backward()
        torch.testing.assert_close(x.grad, 0.5 * layer.weight.sum(0).expand(3, 8).clone())
    with cast_weights(layer, torch.bfloat16, torch.device("cpu")) as (weight, _):
        assert weight.dtype == torch.bfloat16


class _Clinging(Tensor):
    """As GGUF's tensors: what is computed with them is of their class, a copy is the tensor."""

    def clone(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def detach(self) -> Tensor:
        return self


def test_no_class_of_the_hosts_weights_reaches_what_is_trained() -> None:
    needs_cpu("weights are exchanged in place, on which dynamic memory keeps notes")
    model = load_demo_model()
    comfy.model_management.load_models_gpu([model])
    layers = [m for m in model.model.diffusion_model.modules() if m._parameters]
    for layer in layers:
        for name, weight in layer.named_parameters(recurse=False):
            own = weight.data.as_subclass(_Clinging)
            layer._parameters[name] = nn.Parameter(own, requires_grad=False)
    for is_copied in (_COPIED, _FROZEN):
        made = freeze(model.model.diffusion_model, device(), is_copied=is_copied)
        assert {type(weight) for weight in made.parameters()} == {nn.Parameter}
        theirs = {weight.data_ptr() for weight in model.model.parameters()}
        kept = [weight for weight in made.parameters() if not weight.is_meta]
        assert kept and not theirs & {weight.data_ptr() for weight in kept}


def test_a_bypass_lora_is_refused_and_one_that_has_left_is_not() -> None:
    bypassed = with_lora(demo()[0], is_bypassed=True)
    comfy.model_management.load_models_gpu([bypassed])
    for is_copied in (_COPIED, _FROZEN):
        with _learning():
            words = complaint(
                ValueError, freeze, bypassed.model.diffusion_model, device(), is_copied=is_copied
            )
        assert "from before it" in words
    _assert_alike(demo()[0], "after a bypass LoRA")


def test_nothing_of_the_graphs_model_is_changed() -> None:
    model = demo()[0]
    comfy.model_management.load_models_gpu([model])
    before = {name: value for name, value in model.model.state_dict().items()}
    fields = {id(m): set(m.__dict__) for m in model.model.modules()}
    trained = [p.requires_grad for p in model.model.parameters()]
    _velocity_and_gradients(model, _FROZEN)
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [p.requires_grad for p in model.model.parameters()] == trained
    assert all("forward" not in set(m.__dict__) - fields[id(m)] for m in model.model.modules())
