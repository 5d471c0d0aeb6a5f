"""LinVideo for ComfyUI: the door through which ComfyUI finds the nodes."""


async def comfy_entrypoint() -> object:
    """Return the extension object; everything is imported only when ComfyUI asks for it."""
    from .nodes import LinVideoExtension

    return LinVideoExtension()
