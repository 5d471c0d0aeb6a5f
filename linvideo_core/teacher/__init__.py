"""The frozen model with its prompts, and the trajectories that are sampled from it."""
