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

`weights` holds a judge of one minute and a teacher of 30 minutes on one H200 (986,976 clips, batch
32), of which the last 15.5 shared the card. Its matrices are rounded to fp8. In 160 of its videos,
of captions that no training has seen, the judge finds, of 1: objects .91, motion .79, speed .94,
size .96, bar 1, background 1; in rendered clips .996 or more. .86 of the sprites are found, and .63
come back with their texture (rendered: .91 and .70). After 14 minutes motion was .71 and recall
.45, after 22.6 .74 and .59: it gains by more time yet. Guidance of 2, 4 or 6 instead of 3 does not
help its motion (.70, .74, .74 after 22.6).
    python -m research.crowd.train --start research/crowd/weights/model.safetensors --minutes 10 \
        --batch-size 32 --short-share 0.2 --learning-rate 5e-4 --compile --out runs/crowd_on
"""
