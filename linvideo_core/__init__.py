"""LinVideo's headless core: linear attention for video diffusion transformers, without data.

The flow, and the one noun that each stage hands on:

    models, demo        a model                          -> teacher
    prompts             words, encoded once              -> prompt embeddings
    held, offload       bf16, fp8, blocks in CPU memory  -> a teacher that fits
    preflight, memory   headers and arithmetic           -> a sentence, or a run that fits
    adapters            find_sites(model)                -> attention sites
    teacher_sampling,   videos, and which states are kept;
    trajectories        collect(teacher)                 -> sampled states, which all
    shards              which videos a folder holds         runs of that teacher share
    attention, kernels  install(mixed attention)         -> student
    warm_start          fit each layer to its softmax    -> feature maps
    selection, layer_scores  scores, budget, rounding;
    sensitivity         or a rule, a list, a ranking     -> which layers are linear
    layer_order         learned scores beside a ranking  -> rank correlation
    objectives          velocity, adm, dmd               -> the loss at any noise level
    level_density, flow_gain  how far errors are carried -> how often a level is seen
    task, training      fit(): step, log, checkpoint     -> trained student
    checkpoint_files    the last one from before a fault -> what is kept
    team, parallel,     many processes, one run:
    units, checkpoints  shares, shards, state on disk    -> the same student, sooner
    linearization       these stages, one after another
    two_experts         the same for each of Wan 2.2's   -> two students
    artifact            save, load, check, apply         -> LINVIDEO file
    distillation, dmd2  generator, real and fake score;
    distillation_stages these stages, one after another  -> LINVIDEO file with sigmas
    health              spikes and collapses of it       -> a sentence that ends it
    few_step            predict, renoise, predict again  -> latents in a few steps
    motion, spectrum    what is seen of the videos alone;
    teacher_features    what the teacher sees in them    -> fidelity
    evaluation, bench   measures, on equal terms         -> comparison
    stages              a linearized file, its distilled -> by what name they are compared
    lora_file           a LoRA of others                 -> added to a model's weights
    lineup              all steps, few, distilled        -> who is compared
    comparison, evidence  teacher, swapped, student      -> evaluation.json
    ablations, workers  declared runs, several at a time;
    shared_warm_start   fitted once for many of them     -> their first feature maps
    ablation_worker,    one of them on equal terms,      -> a row
    kept_frames         a few of its videos;
    ablation_results    means and spread over seeds      -> ablation.json
    findings, claims    its rows asked; bars held to it  -> verdicts
    ablation_plots,     every seed a dot, plots beside
    ablation_report     verdicts and samples             -> the evidence
    scale               whole models at real sizes       -> scale.json
    report, pictures    plots, videos side by side;
    datasheet, tables   a file's picture; rows of text   -> what a reader sees
    preview             a training while it runs         -> what who waits sees

Commands, each run with `python -m linvideo_core.NAME`: `transfer`, `distill`, `evaluate`, `ablate`,
`evidence_report`, `flow_gain`, `benchmark`, `scale.training`, `records`, `kernels.benchmark`,
`demo.train`.
"""

__version__ = "0.1.0"
