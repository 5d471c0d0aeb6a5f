"""LinVideo for ComfyUI: the door through which ComfyUI finds the nodes."""

WEB_DIRECTORY = "./web"
"""What ComfyUI serves of the pack: each node's help page in `docs`, the browser's side in `js`."""


async def comfy_entrypoint() -> object:
    """Return the extension object; everything is imported only when ComfyUI asks for it."""
    from .nodes import LinVideoExtension

    return LinVideoExtension()
