r"""`crowd`, the larger embedded model of research: textured sprites that pass behind a bar.

    clips     the training data: scenes drawn by chance, rendered on any device, and their latents
    captions  what a scene is called in words, and its prompt embeddings
    fitting   one training loop with a time limit, for judge and teacher
    judge     a network that answers a caption's questions about a clip
    train     the teacher, a small Wan, and its files of prompts
    tracks    exact measures: where sprites go, and whether their textures come back
    evaluate  compares the teacher with LINVIDEO files that were made from it
    config    the settings of evaluate
    rows      what evaluate says of a model, and its part of results/crowd.json
    picture   draws videos of teacher and student beside their seconds
    errors    where a student's velocity is wrong, level by level
    arms      what is compared of objectives, students, few steps, selections, sizes: declared
    tasks     trainings that the product has not: other losses, another start
    trainings the trainings of arms by name, and what runs of a seed share
    pace      how long a training step takes, so that trainings of equal time are steps
    summary   tables of means over seeds and of paired tests
    study     trains and measures the declared arms, with several seeds
    forecast  what is missing of that, and how long it takes
    workers   the processes that do it, several on each GPU
    experiments  the command for that, and its record

From nothing to a comparison; with `torchrun --nproc-per-node N -m` the crowd's own take N GPUs:
    python -m research.crowd.judge --minutes 1
    python -m research.crowd.train --minutes 9 --compile
    python -m linvideo_core.transfer --model runs/crowd/model.safetensors \
        --prompts runs/crowd/prompts.safetensors --num-frames 61 --height 256 --width 256 --shift 5
    python -m research.crowd.evaluate --artifacts runs/transfer/linearized.safetensors
and of the stored teacher, with all that is declared:
    python -m research.crowd.experiments --tables objectives

Students of the stored teacher, half hybrid and half linear, and what is recorded of them:
    python -m research.crowd.captions
    python -m linvideo_core.transfer --model research/crowd/weights/model.safetensors \
        --prompts runs/crowd/prompts.safetensors --num-frames 61 --height 256 --width 256 \
        --shift 5 --sampler-steps 20 --guidance-scale 3 --states stored --objective velocity \
        --num-trajectories 1536 --shard-size 64 --batch-size 32 --accumulation 1 \
        --warm-start-steps 80 --map-learning-rate 2e-3 --frozen fp32 \
        --activation-checkpointing false --checkpoint-every 500 --evaluate-samples 0 --compile \
        --choice alternate --target 6 --learning-rate 1e-3 --tile 1x16x16 \
        --attention-mass moments --steps 1400 --out runs/crowd/half_hybrid
    the same with --tile none instead of both, and with
        --learning-rate 3e-4 --parameters full --steps 1800 --out runs/crowd/half_full
    the first with --num-trajectories 2048 and --steps 4000 --out runs/crowd/half_long, or
        --target 12 --steps 1600 --out runs/crowd/all_hybrid; with --num-trajectories 1024,
        --tile 0x4x4 and the same steps --out runs/crowd/half_tube and runs/crowd/all_tube;
        half_long without --tile and --attention-mass --out runs/crowd/half_cube
    torchrun --nproc-per-node 2 -m research.crowd.evaluate --record --sampler-steps 20 --compile \
        --model research/crowd/weights/model.safetensors \
        --judge research/crowd/weights/judge.safetensors --artifacts \
        runs/crowd/half_hybrid/linearized.safetensors,runs/crowd/half_full/linearized.safetensors
    torchrun --nproc-per-node 2 -m research.crowd.evaluate --record --sampler-steps 20 \
        --model research/crowd/weights/model.safetensors \
        --judge research/crowd/weights/judge.safetensors \
        --artifacts runs/crowd/half_long/linearized.safetensors --densities 0.1,0.2 \
        --num-samples 128 --batch-size 32 --out runs/crowd/evaluation_sparse
On one H200 half_hybrid's steps took 3.4 minutes and half_full's 3.7, at .147 and .124 seconds a
step of 32 videos, and the teacher's videos one or two minutes besides; the evaluation took 3.2
minutes on two H200s. The recorded `half_linear` is of 2,500 steps of 8 videos, at .137 seconds
each; its command stands in results/crowd.json. The last command compiles nothing: Sol-Attn's kernel
takes video by video, and all these calls would be compiled. Recorded with five students, it was
stopped before its last two rows.

Where the students' velocities are wrong, 40 minutes of two CPU cores:
    OMP_NUM_THREADS=2 python -m research.crowd.errors --device cpu --record \
        --keep-first-steps 4,8 --artifacts research/crowd/weights/half_long.safetensors

The README's picture of teacher and student with their seconds:
    OMP_NUM_THREADS=2 python -m research.crowd.picture --device cpu --record

`weights` holds the student half_long, a judge of one minute and a teacher of 47 minutes on one
H200 (1,440,160 clips, batch 32), of which 15.5 shared the card. Its matrices are rounded to fp8. In
2,000 of its videos, of 20 guided steps and captions that no training has seen, the judge finds, of
1: objects .950, motion .855, speed .970, size .979, bar 1, background 1; in rendered clips .996 or
more. Sprites are seen in .858 of the frames in which they should be, and the texture that comes
back from behind a bar correlates by .639 with the one that went in (rendered: .900 and .766). After
14 minutes motion was .71 and recall .45, after 22.6 .74 and .59, after 30 .79 and .63: it gains by
more time yet. Guidance of 2, 4 or 6 instead of 3 did not help its motion (.70, .74, .74 after
22.6), nor did a shift of 3 or 8 instead of 5 (.796, .765 after 30). All trainings so far drew the
same clips, of `--seed` 0; to train it on, give another:
    python -m research.crowd.train --start research/crowd/weights/model.safetensors --seed 1 \
        --minutes 10 --batch-size 32 --short-share 0.2 --learning-rate 5e-4 --compile \
        --out runs/crowd_on
"""
