"""In the dtype that ComfyUI chooses for a Wan by itself: fp16 on a GPU.

The demo's node asks for fp32, so that other tests can be exact. Users' models are computed so.
"""

import stage
import test_few_step
import test_first_steps
import test_forms
import test_linearize
import test_stacking
import torch

CASES = {
    "the headless core": (
        test_linearize.test_the_latents_are_those_of_the_headless_core,
        test_forms.test_a_form_gives_the_latents_of_the_headless_core,
    ),
    "the model that came in": (
        test_linearize.test_the_model_that_came_in_gives_the_same_bits_ever_after,
        test_linearize.test_a_model_thrown_away_while_it_is_loaded_leaves_nothing,
        test_first_steps.test_all_steps_kept_or_none_give_the_bits_of_either_model,
    ),
    "copied, streamed or compiled": (
        test_linearize.test_a_copy_with_weights_of_its_own_samples_alike,
        test_linearize.test_weights_that_are_streamed_give_the_same_latents,
        test_linearize.test_compiled_as_one_graph_it_gives_the_same_latents_and_compiles_once,
    ),
    "the first steps": (
        test_first_steps.test_the_kept_steps_are_the_original_models,
        test_first_steps.test_a_lora_of_the_user_works_in_every_step,
    ),
    "other nodes before or after": (
        test_stacking.test_a_lora_merged_or_bypassed_by_comfyui_is_the_lora_of_merged_weights,
        test_stacking.test_the_softmax_backend_computes_every_self_attention_but_ours,
        test_stacking.test_context_windows_are_linear_each_by_itself,
        test_stacking.test_two_experts_have_a_file_each,
    ),
    "few steps": (
        test_few_step.test_the_node_gives_the_latents_of_the_headless_core,
        test_few_step.test_a_few_step_lora_from_a_file_acts_as_in_the_headless_core,
    ),
}


def test_it_is_the_same_in_fp16(case: str) -> None:
    stage.needs_cuda("on a CPU ComfyUI chooses fp32, in which all tests run")
    with stage.in_hosts_dtype():
        assert stage.demo()[0].model.get_dtype_inference() == torch.float16
        for test in CASES[case]:
            test()
            print(f"also in fp16: {test.__name__}")
