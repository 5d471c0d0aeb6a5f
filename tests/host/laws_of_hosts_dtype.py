"""Laws in the dtype that ComfyUI chooses for a Wan by itself: fp16 on a GPU.

The demo's node asks for fp32, so that laws elsewhere can be exact. Users' models are computed so.
"""

from collections.abc import Callable

import laws_of_few_step
import laws_of_first_steps
import laws_of_forms
import laws_of_linearize
import laws_of_stacking
import stage
import torch

stage.IS_IN_HOSTS_DTYPE = True


def _hold(*laws: Callable[[], None]) -> None:
    stage.needs_cuda("on a CPU ComfyUI chooses fp32, in which all laws are examined")
    assert stage.demo()[0].model.get_dtype_inference() == torch.float16
    for law in laws:
        law()
        print(f"also in fp16: {law.__name__}")


def a_linearized_model_is_that_of_the_headless_core() -> None:
    _hold(
        laws_of_linearize.the_teacher_gives_the_latents_of_the_headless_core,
        laws_of_linearize.the_linearized_model_gives_the_latents_of_the_headless_core,
        laws_of_linearize.full_weight_changes_give_the_latents_of_the_headless_core,
        laws_of_linearize.strength_zero_leaves_the_weights_alone,
    )


def every_form_is_that_of_the_headless_core() -> None:
    _hold(laws_of_forms.a_form_gives_the_latents_of_the_headless_core)


def the_model_that_came_in_stays_as_it_was() -> None:
    _hold(
        laws_of_linearize.the_model_that_came_in_gives_the_same_bits_ever_after,
        laws_of_linearize.a_model_thrown_away_while_it_is_loaded_leaves_nothing,
        laws_of_first_steps.all_steps_kept_give_the_original_models_bits,
    )


def copied_streamed_or_compiled_it_is_the_same() -> None:
    _hold(
        laws_of_linearize.a_copy_with_weights_of_its_own_samples_alike,
        laws_of_linearize.weights_that_are_streamed_give_the_same_latents,
        laws_of_linearize.compiled_as_one_graph_it_gives_the_same_latents_and_compiles_once,
    )


def the_first_steps_are_kept() -> None:
    _hold(
        laws_of_first_steps.the_kept_steps_are_the_original_models,
        laws_of_first_steps.a_lora_of_the_user_works_in_every_step,
    )


def other_nodes_before_or_after_work_as_without() -> None:
    _hold(
        laws_of_stacking.a_lora_merged_or_bypassed_by_comfyui_is_the_lora_of_merged_weights,
        laws_of_stacking.the_softmax_backend_computes_every_self_attention_but_ours,
        laws_of_stacking.context_windows_are_linear_each_by_itself,
        laws_of_stacking.two_experts_have_a_file_each,
        laws_of_stacking.two_files_on_one_model_do_not_disturb_each_other,
    )


def few_steps_are_those_of_the_headless_core() -> None:
    _hold(
        laws_of_few_step.the_node_gives_the_latents_of_the_headless_core,
        laws_of_few_step.a_few_step_lora_from_a_file_acts_as_in_the_headless_core,
    )
