"""LinVideo for ComfyUI: the door through which ComfyUI finds the nodes."""

WEB_DIRECTORY = "./web"
"""What ComfyUI serves of the pack: the help page of each node, in `docs`."""


async def comfy_entrypoint() -> object:
    """Return the extension object; everything is imported only when ComfyUI asks for it."""
    from .nodes import LinVideoExtension

    return LinVideoExtension()
