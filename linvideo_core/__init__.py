"""LinVideo's headless core: linear attention for video diffusion transformers, without data.

The flow, and the one noun that each stage hands on:

    models, demo        a model                          -> teacher
    adapters            find_sites(model)                -> attention sites
    trajectories        collect(teacher)                 -> trajectory shards
    attention, kernels  install(mixed attention)         -> student
    warm_start          fit each layer to its softmax    -> feature maps
    selection           layer scores, budget, rounding;
    sensitivity         or a rule, a list, a ranking     -> which layers are linear
    layer_order         learned scores beside a ranking  -> rank correlation
    objectives          velocity, adm, dmd               -> the loss at any noise level
    training            fit(): step, log, checkpoint     -> trained student
    team, parallel,     many processes, one run:
    units, checkpoints  shares, shards, state on disk    -> the same student, sooner
    linearization       these stages, one after another
    artifact            save, load, check, apply         -> LINVIDEO file
    distillation, dmd2  generator, real and fake score   -> LINVIDEO file with sigmas
    health              spikes and collapses of it       -> a sentence that ends it
    few_step            predict, renoise, predict again  -> latents in a few steps
    motion, spectrum    what is seen of the videos alone;
    teacher_features    what the teacher sees in them    -> fidelity
    evaluation, bench   measures, on equal terms         -> comparison
    comparison, evidence  teacher, swapped, student      -> evaluation.json
    ablations, workers  declared runs, several at a time;
    ablation_worker     one of them on equal terms       -> a row
    ablation_results    means and spread over seeds      -> ablation.json
    report, pictures    plots, videos side by side;
    datasheet, tables   a file's picture; rows of text   -> what a reader sees
    preview             a training while it runs         -> what who waits sees

Commands, each run with `python -m linvideo_core.NAME`: `transfer`, `distill`, `evaluate`, `ablate`,
`records`, `kernels.benchmark`, `scale.training`, `demo.train`.
"""

__version__ = "0.1.0"
