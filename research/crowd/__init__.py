"""`crowd`, the larger embedded model of research: textured sprites that pass behind a bar.

    clips     the training data: scenes drawn by chance, rendered on any device, and their latents
    captions  what a scene is called in words, and its prompt embeddings
    fitting   one training loop with a time limit, for judge and teacher
    judge     a network that answers a caption's questions about a clip
    train     the teacher, a small Wan, and its files of prompts
    tracks    exact measures: where sprites go, and whether their textures come back
    evaluate  compares the teacher with LINVIDEO files that were made from it
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

`weights` holds a judge of one minute and a teacher of 14 minutes on one H200 (685,632 clips, batch
32). Before its matrices were rounded to fp8, which adds 0.3 to 0.9 % to its error, the judge found
in 160 of its videos, of captions that no training has seen, of 1: objects .85, motion .71, speed
.93, size .93, bar 1, background 1; in rendered clips .996 or more. It has to become better yet:
    python -m research.crowd.train --start research/crowd/weights/model.safetensors --minutes 10 \
        --batch-size 32 --short-share 0.2 --learning-rate 5e-4 --compile --out runs/crowd_on
"""
