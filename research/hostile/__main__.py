"""`python -m research.hostile`, see `cli`."""

from linvideo_core.run.config import launch

# The process that reads imports this file, too.
if __name__ == "__main__":
    launch(__package__)
